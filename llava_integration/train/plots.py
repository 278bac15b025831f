"""Plots of a training and of what came out of it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from vst.results.folders import atomic_path

BLUE, ORANGE, GREY = "#2457a6", "#b3541e", "#5a6675"
_CAPTION = 130  # characters that fit beneath a figure


def loss_curve(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Loss over the steps of all stages, one stage after another, with the learning rate behind it.

    Args:
        history: rows of ``stage``, ``step``, ``loss`` and ``learning_rate`` in order; the steps of each stage count
            from its own beginning.
        path: of the PNG or SVG.

    Raises:
        ValueError: the history is empty.
    """
    if not history:
        raise ValueError("The history is empty, so there is no loss to draw; give at least one row.")
    stages = [(stage, list(rows)) for stage, rows in groupby(history, key=lambda row: row["stage"])]
    total = sum(rows[-1]["step"] for _, rows in stages)
    with _figure(path) as (figure, axes):
        rates = axes.twinx()
        begin, name_end, lifted = 0, 0.0, False
        for stage, rows in stages:
            steps = begin + np.array([row["step"] for row in rows])
            losses = np.array([row["loss"] for row in rows], dtype=float)
            (raw,) = axes.plot(steps, losses, color=BLUE, lw=0.8, alpha=0.3)
            (mean,) = axes.plot(steps, running_mean(losses), color=BLUE, lw=2)
            (rate,) = rates.plot(steps, [row["learning_rate"] for row in rows], color=GREY, lw=1, ls=":")
            if begin:
                axes.axvline(begin, color=GREY, lw=0.8)
            lifted = begin / total < name_end and not lifted  # a short stage before this one, with a long name
            axes.annotate(
                stage, (begin, 1), xycoords=("data", "axes fraction"), xytext=(3, 15 if lifted else 4),
                textcoords="offset points", color=GREY, fontsize=9,
            )  # fmt: skip
            name_end = begin / total + 0.013 * len(stage)  # share of the axes' width that 9 pt text takes
            begin += rows[-1]["step"]
        axes.set_xlim(0, total)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("loss of the answers' tokens")
        axes.grid(alpha=0.25)
        # Stages' rates lie orders of magnitude apart, and each ends near zero: logarithmic, and cut off below.
        peaks = [max(row["learning_rate"] for row in rows) for _, rows in stages]
        if min(peaks) > 0:
            rates.set_yscale("log")
            rates.set_ylim(min(peaks) / 10, 3 * max(peaks))
        rates.set_ylabel("learning rate", color=GREY, fontsize=8)
        rates.tick_params(which="both", colors=GREY, labelsize=7)
        rates.spines[:].set_visible(False)
        axes.legend(
            [raw, mean, rate], ["loss", "running mean", "learning rate"],
            loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False,
        )  # fmt: skip
        figure.tight_layout()


def running_mean(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Centred mean over a window of ``share`` of the values ``[n]``; at the ends over as much of it as there is."""
    half = max(1, round(share * len(values) / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def depth_curve(results: Mapping[str, Any], path: str | Path, caption: str = "") -> None:
    """Share of right answers by the split depth.

    Args:
        results: ``random`` (a model trained at splits drawn at random, run at every depth) and ``fixed`` (models that
            were each trained at the depth they are run at): scores 0..1 over seeds, by split; ``majority``: score of
            the most frequent answers; ``blank``: score with the picture blanked, or None.
        path: of the PNG or SVG.
        caption: beneath, wrapped.
    """
    with _figure(path) as (figure, axes):
        drawn: list[Any] = []
        for key, shape, colour, label in (
            ("random", "o-", BLUE, "trained with a random split"),
            ("fixed", "s", ORANGE, "trained at this split alone"),
        ):
            scores = {int(split): 100 * np.asarray(values) for split, values in results[key].items()}
            if not scores:
                continue
            splits = sorted(scores)
            spreads = [scores[s].std(ddof=1) if len(scores[s]) > 1 else 0.0 for s in splits]
            bars = axes.errorbar(
                splits, [scores[s].mean() for s in splits], yerr=spreads if any(spreads) else None, fmt=shape,
                color=colour, lw=2, ms=7, capsize=3, label=label,
            )  # fmt: skip
            drawn.append(bars)
        drawn.append(
            axes.axhline(100 * results["majority"], color=GREY, ls="--", lw=1.2, label="most frequent answers")
        )
        if results.get("blank") is not None:
            drawn.append(axes.axhline(100 * results["blank"], color=GREY, ls=":", lw=1.2, label="picture blanked"))
        axes.set_xticks(sorted({int(split) for key in ("random", "fixed") for split in results[key]}))
        axes.set_xlabel("split depth: trunk blocks before the stitch")
        axes.set_ylabel("right answers, %")
        axes.margins(x=0.08, y=0.16)
        axes.grid(alpha=0.25)
        # Above the axes: no corner is sure to be free of points and lines.
        axes.legend(handles=drawn, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        lines = textwrap.wrap(caption, _CAPTION)
        figure.text(0.01, 0.01, "\n".join(lines), fontsize=6.5, color="#555555")
        figure.tight_layout(rect=(0, 0.01 + 0.025 * len(lines), 1, 1))


@contextmanager
def _figure(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, written to ``path`` once they are drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=140)
    try:
        yield figure, axes
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=Path(path).suffix[1:])
    finally:
        plt.close(figure)
