"""Which split depth to use, from rows that were measured: the best score within a latency budget, and why.

Rows of ``vst latency`` have no scores: of their splits the shallowest within the budget is chosen, which keeps most of
the branches. Times that cannot carry the answer are named: an interval across the budget, a time far from its FLOPs.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vst.models.fields import checked, line, number, shown
from vst.results.finished import as_written, read_results

_ADVICE = "restore it, or give the folder of another finished run"
_TIMES = {
    *("median_ms", "low_ms", "high_ms", "flops_ratio"),
    *(f"{of}{end}" for of in ("ratio", "trunk_ratio") for end in ("", "_sure_low", "_sure_high")),
}
FAR = 1.25
"""Times above or below the ratio of FLOPs from which a row is suspected of a busy machine."""


@dataclass(frozen=True)
class Recommendation:
    """The split that is recommended, and why.

    Attributes:
        row: of the results.
        reasons: sentences: what was asked for, why this one, what speaks against it.
    """

    row: Mapping[str, Any]
    reasons: list[str]


@dataclass(frozen=True)
class _Cost:
    """Of a call, in ms or as a factor: the median, and (where it was measured) an interval and what FLOPs say."""

    value: float
    low: float
    high: float
    by_flops: float | None = None


def measured_rows(
    folder: str | Path, task: str | None = None, *, batch_size: int | None = None, dtype: str | None = None
) -> list[dict[str, Any]]:
    """Towers of a run that were timed, and scored unless the run was of ``vst latency``.

    Args:
        folder: of a run whose ``results.json`` has ``towers``: rows of ``name``, ``kind`` (full, single, split, or
            tuned: a tuned trunk without branches), ``split``, ``accuracy`` (0..1), ``accuracy_spread`` (standard
            deviation over seeds or None), ``median_ms`` and ``ratio`` (time over that of all models in full). Trees of
            another ``objective`` than the one that the run kept, and controls, are left out. Or of a run of ``vst
            latency``, whose results are such rows without scores.
        task: one of the run's tasks, whose scores then count; default: the mean over tasks.
        batch_size, dtype: which rows of a run of ``vst latency`` that measured several.

    Raises:
        FileNotFoundError: no finished run.
        ValueError: results without scored and timed splits, or without that task, batch size or dtype.
    """
    if not isinstance(folder, (str, Path)):
        raise ValueError(f"folder is {shown(folder)}; expected the path of a finished run.")
    checked(task, str | None, "task")
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no results.json; give the folder of a finished run (vst demo).")
    results = read_results(path, "a sweep such as vst demo, or vst latency,", _ADVICE)
    timed = isinstance(results, list)
    with as_written(path, "a sweep such as vst demo, or vst latency,", _ADVICE):
        towers = results if timed else checked(results, dict[str, Any], "results")["towers"]
        wanted = ("name", "kind", "median_ms", "ratio", *(() if timed else ("accuracy",)))
        rows, lacking = [], []
        kept = None if timed else results.get("objective")
        for row in checked(towers, list[dict[str, Any]], "results" if timed else "towers"):
            if row.get("objective") not in (None, kept) or row.get("kind") == "control":
                continue
            missing = [key for key in wanted if row.get(key) is None]
            rows += [] if missing else [row]
            lacking += [f"{shown(row.get('name'))} has no {', '.join(missing)}"] if missing else []
        rows = timed_rows(rows, "rows of towers")
        if not any(row["kind"] == "split" for row in rows):
            raise ValueError("it has no splits that were both scored and timed")
        if lacking:
            warnings.warn(f"{path}: {'; '.join(lacking)}: left out of the choice.", stacklevel=2)
    rows = _one_setting(_one_setting(rows, "batch_size", batch_size), "dtype", dtype)
    return rows if task is None else [_scored_by(row, task) for row in rows]


def timed_rows(towers: Any, what: str) -> list[dict[str, Any]]:
    """Rows of towers that were timed, checked for what a choice or a plot counts with.

    Args:
        towers: as a run's file holds them.
        what: they are called in messages.

    Raises:
        ValueError: the first part that is something else.
    """
    rows = []
    for i, row in enumerate(checked(towers, list[dict[str, Any]], what)):
        place = f"{what}[{i}]"
        for key in ("name", "kind"):
            line(row.get(key), f"{key} of {place}")
        place = row["name"]
        for key in ("median_ms", "ratio", *sorted(key for key in _TIMES if row.get(key) is not None)):
            if number(row.get(key), f"{key} of {place}", (0, None)) == 0:
                raise ValueError(f"{key} of {place} is 0; expected a number above 0.")
        for key, most in (("accuracy", 1), ("accuracy_spread", None)):
            if row.get(key) is not None:
                number(row[key], f"{key} of {place}", (0, most))
        if "tasks" in row:
            checked(row["tasks"], dict[str, dict[str, float]], f"tasks of {place}")
        if row["kind"] == "split":
            checked(row.get("split"), int | dict[str, int], f"split of {place}")
        rows.append(row)
    places = [tuple(str(row.get(key)) for key in ("name", "batch_size", "dtype")) for row in rows]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise ValueError(f"{what} holds {twice[0]!r} more than once.")
    return rows


def _one_setting(rows: list[dict[str, Any]], name: str, wanted: Any) -> list[dict[str, Any]]:
    """Rows of one batch size or dtype, since the same tower stands there once for each."""
    known = list(dict.fromkeys(row.get(name) for row in rows))
    if wanted is None and len(known) > 1:
        raise ValueError(f"The run measured {name} {', '.join(map(str, known))}: choose one of them by --{name}.")
    if wanted is not None and wanted not in known:
        raise ValueError(f"{name} is {wanted!r}; the run measured {', '.join(map(str, known))}.")
    return rows if wanted is None else [row for row in rows if row.get(name) == wanted]


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
    seeds, sqrt((a^2 + b^2) / 2); with one seed there is no spread, and the higher score wins. Without scores the split
    that costs most within the budget is chosen. The reasons warn where the time of the one chosen, or of the row that
    the budget refers to, is too noisy for the answer.

    Args:
        rows: see :func:`measured_rows`.
        budget: a factor such as ``1.2x`` over the latency of ``of``.
        latency_ms: milliseconds a call, as they were measured (device and batch are the run's).
        of: name of the row that a factor refers to; default: the first model alone, that is the trunk.

    Raises:
        ValueError: no or two budgets, an unreadable one, an unknown name, or a budget that nothing fits.
    """
    rows = timed_rows(rows, "rows")
    if (budget is None) == (latency_ms is None):
        raise ValueError("Give one budget: a factor (budget, such as 1.2x) or milliseconds (latency_ms).")
    if latency_ms is not None:
        if of is not None:
            raise ValueError(f"of is {of!r}, but latency_ms refers to no other row; leave it out or give budget.")
        if not number(latency_ms, "latency_ms") > 0:
            raise ValueError(f"latency_ms is {latency_ms}, but must be above 0.")
        limit, one, asked, unit = float(latency_ms), None, f"{latency_ms:g} ms", "{:.0f} ms"
    else:
        limit, one = _budget_factor(str(budget)), _reference_row(rows, of)
        asked, unit = f"{limit:g}x of {one['name']}", "{:.2f}x"
    costs = _costs(rows, one)
    cost = {name: own.value for name, own in costs.items()}
    splits = sorted((r for r in rows if r["kind"] == "split"), key=lambda r: cost[r["name"]])
    if not splits:
        raise ValueError("No split was measured; expected rows of kind split: measure a tree that holds stitches.")
    within = [r for r in splits if cost[r["name"]] <= limit]
    if not within:
        least = splits[0]
        raise ValueError(
            f"No split fits {asked}: the cheapest measured one is {least['name']} at "
            f"{unit.format(cost[least['name']])}; raise the budget, or use one model."
        )
    if (unscored := [r["name"] for r in splits if r.get("accuracy") is None]) and len(unscored) < len(splits):
        raise ValueError(f"{', '.join(unscored)} of the splits have no score, others do: score them all, or none.")
    if unscored:
        chosen = within[-1]
        return Recommendation(
            chosen,
            [
                f"{len(within)} of {len(splits)} measured splits fit {asked}.",
                f"{chosen['name']} takes {_cost_text(chosen, cost, unit)}: of those that fit it is the shallowest, and "
                "keeps most of the branches. No scores were measured; vst demo and the sweep measure both.",
                *_warnings(chosen, splits, costs, limit, one, unit),
            ],
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
        fits = single["kind"] in ("single", "tuned") and cost[single["name"]] <= max(limit, cost[chosen["name"]])
        if fits and chosen["accuracy"] - single["accuracy"] <= _tolerated_difference(chosen, single):
            reasons.append(
                f"But {single['name']} scores {_score_text(single)} at {_cost_text(single, cost, unit)}: on this task, "
                "one model is enough."
            )
    return Recommendation(chosen, [*reasons, *_warnings(chosen, splits, costs, limit, one, unit)])


def _costs(rows: Sequence[Mapping[str, Any]], one: Mapping[str, Any] | None) -> dict[str, _Cost]:
    """By name: milliseconds, between the quartiles of all calls; or factors over a row, in 95 % intervals."""
    out: dict[str, _Cost] = {}
    for r in rows:
        if one is None:
            ms = r["median_ms"]
            by_flops = ms * r["flops_ratio"] / r["ratio"] if r.get("flops_ratio") else None
            out[r["name"]] = _Cost(ms, _or(r, "low_ms", ms), _or(r, "high_ms", ms), by_flops)
            continue
        paired = one.get("trunk_ratio") == 1 and all("trunk_ratio" in row for row in rows)  # beats a quotient
        if paired or r is one:
            value = 1.0 if r is one else r["trunk_ratio"]
            low, high = (value if r is one else _or(r, f"trunk_ratio_sure_{end}", value) for end in ("low", "high"))
        else:
            value = r["ratio"] / one["ratio"]
            low = _or(r, "ratio_sure_low", r["ratio"]) / _or(one, "ratio_sure_high", one["ratio"])
            high = _or(r, "ratio_sure_high", r["ratio"]) / _or(one, "ratio_sure_low", one["ratio"])
        flops = [row.get("flops_ratio") for row in (r, one)]
        out[r["name"]] = _Cost(value, low, high, flops[0] / flops[1] if all(flops) else None)  # type: ignore[operator]
    return out


def _or(row: Mapping[str, Any], key: str, value: float) -> float:
    """A number of a row, or another where it is not told."""
    return value if row.get(key) is None else row[key]


def _warnings(
    chosen: Mapping[str, Any],
    splits: Sequence[Mapping[str, Any]],
    costs: Mapping[str, _Cost],
    limit: float,
    one: Mapping[str, Any] | None,
    unit: str,
) -> list[str]:
    """What speaks against the times that the answer rests on."""
    own, out = costs[chosen["name"]], []
    again = "measure again on a machine that does nothing else, with more repeats"
    if own.high > limit:
        sure = [r for r in splits if costs[r["name"]].high <= limit]
        instead = f"; {sure[-1]['name']} surely fits" if sure else "; no measured split surely fits"
        out.append(
            f"Warning: the time of {chosen['name']} is not known well enough: {unit.format(own.low)} .. "
            f"{unit.format(own.high)} crosses the budget{instead}; {again}."
        )
    if own.by_flops and not 1 / FAR <= own.value / own.by_flops <= FAR:
        against = "" if one is None else f" over {one['name']}"
        out.append(
            f"Warning: {chosen['name']} takes {unit.format(own.value)}{against} where its FLOPs say "
            f"{unit.format(own.by_flops)}: a busy machine, or one that small work does not fill; {again}."
        )
    for r in splits:
        if costs[r["name"]].low <= limit < costs[r["name"]].value:
            span = f"{unit.format(costs[r['name']].low)} .. {unit.format(costs[r['name']].high)}"
            out.append(f"Warning: {r['name']} may fit as well ({span}); {again}.")
    return out


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
