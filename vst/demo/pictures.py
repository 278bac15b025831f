"""How much pictures are worth: recipes that differ in how many they see, drawn over that number, with a fitted line."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from vst.demo.config import MODELS
from vst.demo.division import SCENES
from vst.demo.results import TITLES
from vst.measure.latency import ALL_IN_FULL
from vst.results.folders import atomic_path

Row = Mapping[str, Any]
_COLOURS = ("#2457a6", "#b3541e", "#2f7d4f", "#7a4fa3")


@dataclass(frozen=True)
class Series:
    """Recipes that differ only in how many pictures they see, and in passes over these.

    Attributes:
        name: what their names share. kind: ``scenes``, ``singles`` or ``both``.
        recipes: by pictures seen, in that order.
    """

    name: str
    kind: str
    recipes: dict[int, str]


@dataclass(frozen=True)
class Slope:
    """A least-squares line over the base-2 logarithm of pictures.

    Attributes:
        each_doubling: what a doubling adds.
        error: its standard error from what the line leaves; None with two points, which leave nothing.
    """

    each_doubling: float
    error: float | None

    @classmethod
    def of(cls, pictures: Sequence[int], values: Sequence[float]) -> Slope:
        """Through values at two or more numbers of pictures."""
        x, y = _doublings(pictures), np.asarray(values, float)
        slope = float(x @ y / (x @ x))
        if len(y) < 3:
            return cls(slope, None)
        left = y - y.mean() - slope * x
        return cls(slope, math.sqrt(float(left @ left) / (len(y) - 2) / float(x @ x)))

    def text(self, digits: int) -> str:
        """Both numbers, as tables and plots show them."""
        error = "" if self.error is None else f" +- {self.error:.{digits}f}"
        return f"{self.each_doubling:+.{digits}f}{error}"


def _doublings(pictures: Sequence[int]) -> np.ndarray:
    """Base-2 logarithms, around their mean."""
    x = np.log2(pictures)
    return x - x.mean()


def series_of(results: Row) -> list[Series]:
    """The series among a demo's recipes; none if no two differ in pictures alone."""
    groups: dict[tuple[str, str, int], dict[int, str]] = {}
    for recipe, told in results.get("recipes", {}).items():
        seen = [kind for kind, count in told["pictures"].items() if count]
        others = {k: v for k, v in told["fit"].items() if k != "epochs"}
        alike = (seen[0] if len(seen) == 1 else "both", json.dumps([told.get("stitch"), others], sort_keys=True))
        count = sum(told["pictures"].values())
        # Of as many pictures as another, in other passes: it begins a series of its own, or goes on with that.
        place = next(i for i in range(len(groups) + 1) if count not in groups.get((*alike, i), {}))
        groups.setdefault((*alike, place), {})[count] = recipe
    out = []
    for (kind, *_), recipes in groups.items():
        if len(recipes) > 1:
            out.append(Series(_shared_start(list(recipes.values())) or kind, kind, dict(sorted(recipes.items()))))
    return out


def _shared_start(names: Sequence[str]) -> str:
    """``scenes`` of ``scenes-75`` and ``scenes-150``."""
    letters = takewhile(lambda at: len(set(at)) == 1, zip(*names, strict=False))
    return "".join(at[0] for at in letters).rstrip("-_ 0123456789")


def picture_rows(results: Row) -> tuple[list[str], list[list[str]]]:
    """Headings and cells at the deepest split: what each series reaches by pictures, and what a doubling brings.

    Shares are in percent of the two-model gain on the scenes, or scores where that gain cannot be told from zero.
    """
    what = _what(results)
    heads = ["series", "pictures", "steps", what, "the tuned trunk alone", "final error by channel"]
    rows = []
    for series in series_of(results):
        trees, trunks, errors = (_values(results, series, part) for part in ("tree", "trunk", "error"))
        for recipe, pictures in ((r, p) for p, r in series.recipes.items()):
            steps = max(f.get("steps", 0) for f in results["fits"] if f["objective"] == recipe)
            values = [f"{trees[recipe]:.1f}", f"{trunks[recipe]:.1f}" if trunks else "", f"{errors[recipe]:.3f}"]
            rows.append([series.name, str(pictures), str(steps), *values])
        cells = [
            Slope.of(list(series.recipes), [values[r] for r in series.recipes.values()]).text(digits) if values else ""
            for values, digits in ((trees, 1), (trunks, 1), (errors, 3))
        ]
        rows.append([series.name, "each doubling", "", *cells])
    return heads, rows


def pictures_plot(results: Row, path: str | Path) -> None:
    """Two panels over pictures seen, at the deepest split: the share of the gain, and the final error by channel.

    Args:
        results: of the demo, with at least one series.
        path: of the PNG or SVG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11.2, 5.6), dpi=140)
    for i, series in enumerate(series_of(results)):
        colour, x = _COLOURS[i % len(_COLOURS)], list(series.recipes)
        for part, axes, style in (("tree", left, "-"), ("trunk", left, ":"), ("error", right, "-")):
            values = _values(results, series, part)
            if not values:
                continue
            y = [values[recipe] for recipe in series.recipes.values()]
            axes.plot(x, y, "o", color=colour, mfc="white" if part == "trunk" else colour)
            line, digits = Slope.of(x, y), 3 if part == "error" else 1
            fitted = [statistics.mean(y) + line.each_doubling * d for d in _doublings(x)]
            name = f"{series.name}, the tuned trunk alone" if part == "trunk" else series.name
            axes.plot(x, fitted, ls=style, lw=1.4, color=colour, label=f"{name}: {line.text(digits)} a doubling")
    if _shares(results):
        left.axhline(100, color="#333333", lw=1, label="both in full")
    left.set_ylabel(_what(results))
    right.set_ylabel("final error by channel (1 = as bad as the mean)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        ticks = sorted({p for s in series_of(results) for p in s.recipes})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("pictures seen, without labels")
        axes.grid(alpha=0.25)
        axes.margins(y=0.2)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, fontsize=8)
    trunk, branch = MODELS[results["trunk"]], MODELS[results["branch"]]
    title = f"{trunk} as trunk, {branch} as branch, split {_deepest(results)}: what pictures are worth"
    figure.suptitle(title, fontsize=11)
    figure.text(0.01, 0.008, results["caption"], fontsize=6.5, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 0.98))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:])
    plt.close(figure)


def _deepest(results: Row) -> int:
    return max(r["split"] for r in results["towers"] if r["kind"] == "split")


def _shares(results: Row) -> bool:
    full = next(r for r in results["towers"] if r["name"] == ALL_IN_FULL)
    return full["share"][SCENES]["share"] is not None


def _what(results: Row) -> str:
    return "share of the gain on scenes, %" if _shares(results) else f"{TITLES[SCENES]} %"


def _values(results: Row, series: Series, part: str) -> dict[str, float]:
    """By recipe: of its tree or trunk alone, in percent, or its tree's final error; nothing without such a tower."""
    kind = "tuned" if part == "trunk" else "split"
    out = {}
    for recipe in series.recipes.values():
        if part == "error":
            reports = [s for f in results["fits"] if f["objective"] == recipe for s in f["reports"]]
            at = [s["final"]["channel_error"] for s in reports if s["split"] == _deepest(results)]
            out[recipe] = statistics.mean(at)
            continue
        for r in results["towers"]:
            if (r["objective"], r["kind"]) == (recipe, kind) and r.get("split") in (None, _deepest(results)):
                shared, scores = r["share"][SCENES]["share"], r["tasks"][SCENES].values()
                out[recipe] = 100 * (shared if _shares(results) else statistics.mean(scores))
    return out
