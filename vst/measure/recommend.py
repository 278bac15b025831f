"""Which split depth to use, from rows that were measured: the best score within a latency budget, and why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vst.results.folders import read_json


@dataclass(frozen=True)
class Recommendation:
    """The split that is recommended, and why.

    Attributes:
        row: of the results.
        reasons: sentences: what was asked for, why this one, what speaks against it.
    """

    row: Mapping[str, Any]
    reasons: list[str]


def measured_rows(folder: str | Path, task: str | None = None) -> list[dict[str, Any]]:
    """Towers of a run that were both scored and timed.

    Args:
        folder: of a run whose ``results.json`` has ``towers``: rows of ``name``, ``kind`` (full, single, split),
            ``split``, ``accuracy`` (0..1), ``accuracy_spread`` (standard deviation over seeds or None), ``median_ms``
            and ``ratio`` (time over that of all models in full). Trees of another ``objective`` than the one that the
            run kept are left out.
        task: one of the run's tasks, whose scores then count; default: the mean over tasks.

    Raises:
        FileNotFoundError: no finished run.
        ValueError: results without scored and timed splits, or without that task.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no results.json; give the folder of a finished run (vst demo).")
    results = read_json(path).get("results")
    towers = results.get("towers") if isinstance(results, dict) else None
    wanted = ("name", "kind", "accuracy", "median_ms", "ratio")
    rows = [row for row in towers or () if all(row.get(key) is not None for key in wanted)]
    kept = results.get("objective") if isinstance(results, dict) else None
    rows = [row for row in rows if row.get("objective") in (None, kept)]
    if not any(row["kind"] == "split" for row in rows):
        raise ValueError(
            f"{path} has no splits that were both scored and timed; expected the results of a sweep such as vst demo."
        )
    return rows if task is None else [_scored_by(row, task) for row in rows]


def _scored_by(row: dict[str, Any], task: str) -> dict[str, Any]:
    if task not in row.get("tasks", {}):
        known = ", ".join(row.get("tasks", {})) or "none by name"
        raise ValueError(f"task is {task!r}; the run has {known}: choose among these, or leave it out.")
    scores = list(row["tasks"][task].values())
    spread = statistics.stdev(scores) if len(scores) > 1 else None
    return {**row, "accuracy": statistics.mean(scores), "accuracy_spread": spread}


def recommend(
    rows: Sequence[Mapping[str, Any]],
    *,
    budget: str | None = None,
    latency_ms: float | None = None,
    of: str | None = None,
) -> Recommendation:
    """Choose the best split within a budget.

    A deeper, cheaper split wins where its score differs from the best one's by less than twice the pooled spread over
    seeds, sqrt((a^2 + b^2) / 2); with one seed there is no spread, and the higher score wins.

    Args:
        rows: see :func:`measured_rows`.
        budget: a factor such as ``1.2x`` over the latency of ``of``.
        latency_ms: milliseconds a call, as they were measured (device and batch are the run's).
        of: name of the row that a factor refers to; default: the first model alone, that is the trunk.

    Raises:
        ValueError: no or two budgets, an unreadable one, an unknown name, or a budget that nothing fits.
    """
    if (budget is None) == (latency_ms is None):
        raise ValueError("Give one budget: a factor (budget, such as 1.2x) or milliseconds (latency_ms).")
    if latency_ms is not None:
        if of is not None:
            raise ValueError(f"of is {of!r}, but latency_ms refers to no other row; leave it out or give budget.")
        if not latency_ms > 0:
            raise ValueError(f"latency_ms is {latency_ms}, but must be above 0.")
        cost, limit, asked = {r["name"]: r["median_ms"] for r in rows}, float(latency_ms), f"{latency_ms:g} ms"
        unit = "{:.0f} ms"
    else:
        limit, one = _budget_factor(str(budget)), _reference_row(rows, of)
        paired = one.get("trunk_ratio") == 1 and all("trunk_ratio" in r for r in rows)  # pair by pair beats a quotient
        cost = {r["name"]: r["trunk_ratio"] if paired else r["ratio"] / one["ratio"] for r in rows}
        asked, unit = f"{limit:g}x of {one['name']}", "{:.2f}x"
    splits = sorted((r for r in rows if r["kind"] == "split"), key=lambda r: cost[r["name"]])
    within = [r for r in splits if cost[r["name"]] <= limit]
    if not within:
        least = splits[0]
        raise ValueError(
            f"No split fits {asked}: the cheapest measured one is {least['name']} at "
            f"{unit.format(cost[least['name']])}; raise the budget, or use one model."
        )
    best = max(within, key=lambda r: r["accuracy"])
    chosen = next(r for r in within if best["accuracy"] - r["accuracy"] <= _tolerated_difference(best, r))
    reasons = [
        f"{len(within)} of {len(splits)} measured splits fit {asked}.",
        f"{chosen['name']} takes {unit.format(cost[chosen['name']])} and scores {_score_text(chosen)}.",
    ]
    if chosen is not best:
        reasons.append(
            f"{best['name']} scores {_score_text(best)}, which is not distinguishable from it, and costs more."
        )
    elif best.get("accuracy_spread") is None and len(within) > 1:
        reasons.append("It has the best score among those; with one seed, no spread tells how sure that is.")
    elif len(within) > 1:
        reasons.append("No cheaper split comes as close as the spread over seeds.")
    if missed := [r for r in splits if r not in within and r["accuracy"] > chosen["accuracy"]]:
        better = max(missed, key=lambda r: r["accuracy"])
        reasons.append(
            f"Beyond the budget, {better['name']} scores {_score_text(better)}: {_cost_text(better, cost, unit)}."
        )
    for single in rows:
        fits = single["kind"] == "single" and cost[single["name"]] <= max(limit, cost[chosen["name"]])
        if fits and chosen["accuracy"] - single["accuracy"] <= _tolerated_difference(chosen, single):
            reasons.append(
                f"But {single['name']} scores {_score_text(single)} at {_cost_text(single, cost, unit)}: on this task, "
                "one model is enough."
            )
    return Recommendation(chosen, reasons)


def _cost_text(row: Mapping[str, Any], cost: Mapping[str, float], unit: str) -> str:
    return unit.format(cost[row["name"]])


def _budget_factor(text: str) -> float:
    try:
        factor = float(text.strip().lower().removesuffix("x"))
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ValueError(f"budget is {text!r}; expected a factor above 0 such as 1.2x.")
    return factor


def _reference_row(rows: Sequence[Mapping[str, Any]], of: str | None) -> Mapping[str, Any]:
    known = [r["name"] for r in rows]
    if of is None:
        found = next((r for r in rows if r["kind"] == "single"), None)
        if found is None:
            raise ValueError(f"No model alone was measured; name the row that the budget refers to (of): {known}.")
        return found
    if of not in known:
        raise ValueError(f"of is {of!r}; expected one of {', '.join(known)}.")
    return rows[known.index(of)]


def _tolerated_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    spreads = [row.get("accuracy_spread") for row in (a, b)]
    if None in spreads:
        return 0.0
    return 2 * math.sqrt(sum(s * s for s in spreads if s is not None) / 2)


def _score_text(row: Mapping[str, Any]) -> str:
    spread = row.get("accuracy_spread")
    return f"{100 * row['accuracy']:.1f} %" + (f" +- {100 * spread:.1f}" if spread is not None else "")
