"""What a comparison of trunks says: the verdict in a sentence, the table, the plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vst.measure.latency import ALL_IN_FULL
from vst.results.folders import atomic_path

Row = Mapping[str, Any]


def verdict(
    rows: Sequence[Row],
    alone: Mapping[str, Row],
    right: Mapping[tuple[str, int], np.ndarray],
) -> tuple[str | None, str]:
    """The trunk to take and why, in a sentence; None where the rows do not tell.

    With labels: the trunk whose trees score highest on average over its splits, where it lies above every other by more
    than two standard errors of the paired difference over held-out pictures. Without: the trunk whose branches come
    out with the lowest error, in both scales, at every split (splits pair up in order of depth).

    Args:
        rows: of :func:`compare_trunks`. alone: likewise.
        right: by trunk and split, which held-out pictures a probe gets right (empty without labels).
    """
    trunks = list(dict.fromkeys(r["trunk"] for r in rows))
    of = {t: [r for r in rows if r["trunk"] == t] for t in trunks}
    if right:
        hits = {t: np.mean([right[t, r["split"]] for r in of[t]], axis=0) for t in trunks}
        best = max(trunks, key=lambda t: hits[t].mean())
        told = "; ".join(
            f"with {t} as the trunk trees score {_range(100 * r['score'] for r in rows)} %" for t, rows in of.items()
        )
        models = ", ".join(f"{n} {100 * m['score']:.1f} %" for n, m in alone.items())
        why = f"{told} (alone: {models})"
        if all(_surely_above(hits[best], hits[t]) for t in trunks if t != best):
            return best, f"Take {best} as the trunk: {why}; a tree on it costs {_cost(of[best])}."
        return None, f"The scores do not tell which trunk to take, the difference is within noise: {why}."
    told = "; ".join(_errors(t, own, len(trunks) > 2) for t, own in of.items())
    best = min(trunks, key=lambda t: statistics.mean(_mean(r["channel_errors"]) for r in of[t]))
    if all(_lower(of[best], of[t]) for t in trunks if t != best):
        return best, (
            f"Take {best} as the trunk: {told}; a tree on it costs {_cost(of[best])}. Errors are relative to each "
            "target's own variance; with labels a probe would tell more."
        )
    return None, f"The errors do not tell which trunk to take: {told}. Give labels, so that a probe can tell."


def _errors(trunk: str, rows: Sequence[Row], several: bool) -> str:
    raw, channel = (_list(_mean(r[key]) for r in rows) for key in ("errors", "channel_errors"))
    others = "the others come" if several else "the other comes"
    return f"with {trunk} as the trunk {others} out with errors {raw} ({channel} by channel)"


def _surely_above(a: np.ndarray, b: np.ndarray) -> bool:
    difference = a.astype(float) - b.astype(float)
    return float(difference.mean()) > 2 * float(difference.std(ddof=1)) / math.sqrt(len(difference))


def _lower(a: Sequence[Row], b: Sequence[Row]) -> bool:
    pairs = list(zip(a, b, strict=False))
    return all(_mean(x[k]) < _mean(y[k]) for x, y in pairs for k in ("errors", "channel_errors"))


def _mean(errors: Mapping[str, float]) -> float:
    return statistics.mean(errors.values())


def _list(values: Iterable[float]) -> str:
    return " / ".join(f"{v:.2f}" for v in values)


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]:.1f} to {found[-1]:.1f}"


def _cost(rows: Sequence[Row]) -> str:
    trunk = sorted(r["trunk_flops_ratio"] for r in rows)
    whole = sorted(r["flops_ratio"] for r in rows)
    return (
        f"{trunk[0]:.2f} to {trunk[-1]:.2f} times {rows[0]['trunk']} alone, {whole[0]:.2f} to {whole[-1]:.2f} times "
        "all in full (FLOPs)"
    )


def trunk_rows(results: Row) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of a comparison; with labels, models alone follow the trees."""
    lines = []
    for r in results["rows"]:
        line = {"trunk": r["trunk"], "split": str(r["split"])}
        for head, key in (("final error", "errors"), ("by channel", "channel_errors")):
            line[head] = ", ".join(f"{v:.3f}" for v in r[key].values())
        if r["score"] is not None:
            line["score %"] = f"{100 * r['score']:.1f}"
        line["extra blocks"] = f"{100 * r['extra_blocks']:.0f} %"
        for over, key in (("trunk alone", "trunk_ratio"), ("all in full", "ratio")):
            line[f"FLOPs / {over}"] = f"{r[key.replace('ratio', 'flops_ratio')]:.2f}"
            if key in r:
                line[f"time / {over}"] = f"{r[key]:.2f} ({r[f'{key}_sure_low']:.2f} .. {r[f'{key}_sure_high']:.2f})"
        lines.append(line)
    for name, m in results["alone"].items():
        if m["score"] is not None:
            alone = name if name == ALL_IN_FULL else f"{name} alone"
            cost = f"{m['flops_ratio']:.2f}"
            lines.append({"trunk": alone, "score %": f"{100 * m['score']:.1f}", "FLOPs / all in full": cost})
    heads = list(lines[0])
    return heads, [[line.get(head, "") for head in heads] for line in lines]


def trunk_plot(results: Row, path: str | Path) -> None:
    """Error of what comes out over the relative depth of the split, a line a trunk; scores beside it with labels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scored = results["rows"][0]["score"] is not None
    figure, panels = plt.subplots(1, 1 + scored, figsize=(5.4 * (1 + scored), 4.2), dpi=140, squeeze=False)
    trunks = list(dict.fromkeys(r["trunk"] for r in results["rows"]))
    colours = plt.get_cmap("tab10")
    for i, trunk in enumerate(trunks):
        own = [r for r in results["rows"] if r["trunk"] == trunk]
        x = [r["relative_depth"] for r in own]
        label = f"{trunk} as trunk"
        panels[0][0].plot(x, [_mean(r["errors"]) for r in own], "o-", color=colours(i), label=label)
        panels[0][0].plot(x, [_mean(r["channel_errors"]) for r in own], "o:", color=colours(i), mfc="white")
        if scored:
            panels[0][1].plot(x, [100 * r["score"] for r in own], "o-", color=colours(i), label=label)
    panels[0][0].axhline(1, color="#bbbbbb", lw=1)
    panels[0][0].set_ylabel("final error (dotted: by channel; 1 = the mean)")
    if scored:
        for i, (name, m) in enumerate(results["alone"].items()):
            alone = name if name == ALL_IN_FULL else f"{name} alone"
            colour = "#333333" if name == ALL_IN_FULL else colours(trunks.index(name))
            panels[0][1].axhline(100 * m["score"], color=colour, lw=1, ls=("--", "-.", ":", "-")[i % 4], label=alone)
        panels[0][1].set_ylabel("probe on the tree's tokens, % right")
    for axes in panels[0]:
        axes.set_xlabel("split, share of the trunk's depth")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:])
    plt.close(figure)
