"""The plot of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vst.results.folders import atomic_path
from vst.tree.splits import split_label


def accuracy_latency_plot(results: dict[str, Any], path: str | Path) -> None:
    """Accuracy against measured latency over the split depth, drawn from a run's results.

    Args:
        results: with ``towers``: rows of ``name``, ``kind``, ``accuracy``, ``accuracy_spread`` and ``ratio``; ``score``
            names the vertical axis.
        path: of the PNG or SVG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=140)
    rows = results["towers"]
    splits = sorted((r for r in rows if r["kind"] == "split"), key=_order)
    xs, ys = [100 * r["ratio"] for r in splits], [100 * r["accuracy"] for r in splits]
    spread = [100 * (r.get("accuracy_spread") or 0) for r in splits]
    bars = spread if any(spread) else None
    axes.errorbar(xs, ys, yerr=bars, fmt="o-", color="#2457a6", lw=2, ms=7, capsize=3, label="stitch tree, by split")
    for x, y, row in zip(xs, ys, splits, strict=True):
        axes.annotate(split_label(row["split"]), (x, y), textcoords="offset points", xytext=(6, 7), color="#2457a6")
    marks = {"single": ("s", "#b3541e"), "full": ("D", "#2f7d4f"), "control": ("^", "#5a6675")}
    for row in rows:
        if row["kind"] in marks:
            shape, colour = marks[row["kind"]]
            error = 100 * (row.get("accuracy_spread") or 0) or None
            axes.errorbar(
                [100 * row["ratio"]], [100 * row["accuracy"]], yerr=error, fmt=shape, color=colour, ms=8, capsize=3
            )
            right = row["ratio"] > 0.8  # all models in full are at 100 %, the right edge
            axes.annotate(
                row["name"],
                (100 * row["ratio"], 100 * row["accuracy"]),
                textcoords="offset points",
                xytext=(-7 if right else 7, -13),
                ha="right" if right else "left",
                color=colour,
            )
    axes.set_xlabel("measured latency, % of all models in full")
    axes.set_ylabel(results.get("score", "probe accuracy on held-out pictures, %"))
    axes.margins(x=0.14, y=0.16)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", frameon=False)
    if results.get("caption"):
        figure.text(0.01, 0.005, results["caption"], fontsize=6.5, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:])
    plt.close(figure)


def _order(row: dict[str, Any]) -> tuple[bool, float]:
    """By depth, splits that differ by branch last and by their cost."""
    return (False, row["split"]) if isinstance(row["split"], int) else (True, row["ratio"])
