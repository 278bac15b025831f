"""The demo's curve: the share of the two-model gain over the extra cost, by split depth, beside the paper's points."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vst.demo.config import MODELS
from vst.demo.results import TITLES
from vst.demo.tables import gain_text
from vst.measure.latency import ALL_IN_FULL
from vst.results.folders import atomic_path

Row = Mapping[str, Any]
PAPER = {"VST-22": (4.3, 45), "VST-14": (39, 84)}
"""Extra cost and share of the gain, in %, of CLIP-L and DINOv2-L under LLaVA-1.5 (Mai et al., CVPR 2026): ViT-L models
of 24 blocks, cost counted in blocks."""
_COLOURS = ("#2457a6", "#8a94a0", "#2f7d4f", "#7a4fa3", "#c22f5f", "#00838f", "#c98a00", "#4a4a4a", "#8d5a3b",
            "#6fa8dc", "#9ccc65", "#e573b7")  # fmt: skip
_MANY = 4  # recipes: with more of them the legend goes below the plot, and the one shown alone has its bars


def share_plot(results: Row, path: str | Path) -> None:
    """A panel a task: the share of the gain, or the score where the gain cannot be told from zero.

    Bars are 95 % intervals of the bootstrap over pictures; of scores, deviations over seeds. Among many recipes the one
    shown alone has them.

    Args:
        results: of the demo.
        path: of the PNG or SVG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    many = _many(results)
    figure, panels = plt.subplots(1, len(TITLES), figsize=(5.6 * len(TITLES), 6.3 if many else 4.9), dpi=140)
    for axes, (task, title) in zip(panels, TITLES.items(), strict=True):
        full = next(r for r in results["towers"] if r["name"] == ALL_IN_FULL)["share"][task]
        if full["share"] is None:
            _scores(axes, results, task)
        else:
            _shares(axes, results, task)
        axes.set_title(f"{title}\n{gain_text(full)} over {results['better'][task]}", fontsize=9.5)
        axes.set_xlabel(
            f"extra FLOPs over {results['trunk']} alone, % of what {results['branch']} in full adds",
            fontsize=8.5,
        )
        axes.margins(x=0.05, y=0.14)
        axes.grid(alpha=0.25)
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncol": 3}
        axes.legend(frameon=False, fontsize=8, **(below if many else {"loc": "lower right"}))
    figure.suptitle(
        f"{MODELS[results['trunk']]} as trunk, {MODELS[results['branch']]} as branch, by split depth", fontsize=11
    )
    figure.text(0.01, 0.008, results["caption"], fontsize=6.5, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 0.98))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:])
    plt.close(figure)


def _splits(results: Row) -> dict[str, list[Row]]:
    """Rows of the tree by objective, the one shown first, in order of depth."""
    objectives = dict.fromkeys(r["objective"] for r in results["towers"] if r["kind"] == "split")
    ordered = sorted(objectives, key=lambda o: o != results["objective"])
    return {
        o: sorted((r for r in results["towers"] if r["objective"] == o and r["kind"] == "split"), key=_depth)
        for o in ordered
    }


def _many(results: Row) -> bool:
    return len(_splits(results)) > _MANY


def _barred(results: Row, i: int) -> bool:
    """Whether the i-th line has bars."""
    return i == 0 or not _many(results)


def _depth(row: Row) -> int:
    return row["split"]


def _shares(axes: Any, results: Row, task: str) -> None:
    for i, (objective, rows) in enumerate(_splits(results).items()):
        shares = [r["share"][task] for r in rows]
        y = [100 * s["share"] for s in shares]
        down, up = ([100 * abs(s["share"] - s[end]) for s in shares] for end in ("low", "high"))
        _line(axes, rows, y, (down, up) if _barred(results, i) else None, i, objective)
    trunk, better = f"{results['trunk']} alone", results["better"][task]
    for r in results["towers"]:
        if r["name"] in (trunk, better, ALL_IN_FULL):
            place, right = (100 * r["extra_flops"], 100 * r["share"][task]["share"]), r["extra_flops"] > 0.5
            axes.plot(*place, "D", color="#333333", ms=6)
            axes.annotate(
                "both in full" if r["name"] == ALL_IN_FULL else r["name"], place, textcoords="offset points",
                xytext=(12, 9) if right else (8, -11), fontsize=8, ha="right" if right else "left",
            )  # fmt: skip
    if better == trunk:  # the paper's one model is the trunk, too
        label: str | None = "the paper's points (two ViT-L, LLaVA-1.5; blocks)"
        for name, (paid, kept) in PAPER.items():
            axes.plot([paid], [kept], "*", ms=13, color="#b3541e", label=label, zorder=1)
            axes.annotate(name, (paid, kept), textcoords="offset points", xytext=(-6, 9), color="#b3541e", fontsize=8)
            label = None
        axes.plot([0, 100], [0, 100], ":", color="#999999", lw=1, label="share in proportion to cost")
    axes.set_ylabel("share of the two-model gain, %")


def _scores(axes: Any, results: Row, task: str) -> None:
    for i, (objective, rows) in enumerate(_splits(results).items()):
        values = [list(r["tasks"][task].values()) for r in rows]
        y = [100 * statistics.mean(v) for v in values]
        deviation = [100 * statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        _line(axes, rows, y, (deviation, deviation) if _barred(results, i) else None, i, objective)
    styles = {ALL_IN_FULL: "-", f"{results['trunk']} alone": "--", f"{results['branch']} alone": ":"}
    for r in results["towers"]:
        if r["name"] in styles:
            own = statistics.mean(r["tasks"][task].values())
            axes.axhline(100 * own, color="#333333", lw=1, ls=styles[r["name"]], label=r["name"])
    axes.set_xlim(-4, 104)
    axes.set_ylabel(f"{TITLES[task]} %")


def _line(
    axes: Any, rows: Sequence[Row], y: list[float], bars: tuple[list[float], list[float]] | None, i: int, objective: str
) -> None:
    """One objective's towers; the first one's, which is the one shown, filled and with its depths written."""
    x, colour = [100 * r["extra_flops"] for r in rows], _COLOURS[i % len(_COLOURS)]
    axes.errorbar(
        x, y, yerr=bars, fmt="--" if i else "-", marker="o", ms=5 if i else 7, lw=1.2 if i else 2,
        mfc="white" if i else colour, color=colour, capsize=3, label=f"stitch tree, {objective}", zorder=2 if i else 3,
    )  # fmt: skip
    for px, py, row in zip(x, y, rows, strict=True) if not i else ():
        axes.annotate(f"{row['split']}", (px, py), textcoords="offset points", xytext=(5, 7), color=colour, fontsize=9)
