"""What results look like: tables on the terminal, plots, and feature maps as pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vst.config import VSTConfig
from vst.cost import activation_bytes, block_figure, fit_flops, full_cost, tree_cost, weights_bytes
from vst.heldout import StitchReport
from vst.runs import atomic_path


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str | None = None) -> None:
    """Print a table: the first column to the left, the others to the right, floats with three digits."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row])
    console = Console()
    console.width = max(console.width, 120)
    console.print(shown)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *rows])


def spread(values: Sequence[float | None], digits: int = 3, factor: float = 1) -> str:
    """Mean, and standard deviation where there are two or more; a dash for none (None: not a number in a row)."""
    scaled = [factor * v for v in values if v is not None]
    if not scaled:
        return "-"
    deviation = f" +- {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):.{digits}f}{deviation}"


def stitch_table(reports: Sequence[StitchReport]) -> None:
    """Print how well stitches match on held-out pictures."""
    table(
        "Stitches on held-out pictures",
        ["branch", "split", "enters", "stitch", "seam error", "final error", "by channel", "cosine", "distance"],
        [
            (
                r.branch,
                r.split,
                r.enter,
                r.family,
                r.seam.error,
                r.final.error,
                r.final.channel_error,
                r.final.cosine,
                r.distance,
            )
            for r in reports
        ],
        "errors are relative to the target's own variance (1 = as bad as its mean); distance: of the tail's inputs "
        "from what the target feeds it (0 equal, 1 as far as a constant)",
    )


def inspect_tree(config: VSTConfig, dtype: torch.dtype) -> None:
    """Print models, grid, tokens, cost and memory of a tree."""
    fuse = config.fuser()
    print(
        f"Stitch tree: pictures {config.image_size} x {config.image_size}, grid {config.grid} x {config.grid}, "
        f"{fuse.tokens(config.grid**2)} tokens of width {fuse.width} (fusion {config.fusion}, normalise "
        f"{config.normalise}), hidden state {config.feature_layer}, cut {config.cut}"
    )
    parts = [("trunk", config.trunk_name, config.trunk, f"1..{config.trunk_depth()}", "-", "-")]
    parts += [
        (
            "branch",
            b.name,
            b.spec,
            f"{min(b.enters) + 1}..{b.stop}",
            b.stitch.family,
            ", ".join(f"{s}>{e}" for s, e in zip(b.splits, b.enters, strict=True)),
        )
        for b in config.branches
    ]
    table(
        "Models",
        ["part", "name", "source", "width", "heads", "patch", "prefix", "blocks", "stitch", "split>enters", "licence"],
        [
            (part, name, s.source, s.width, s.heads, s.patch, s.prefix, f"{held} of {s.depth}", stitch, at, s.license)
            for part, name, s, held, stitch, at in parts
        ],
    )
    whole = full_cost(config)
    rows: list[tuple[object, ...]] = []
    default = config.default_split() if config.branches else None
    for label, split in config.choices().items():
        cost = tree_cost(config, split)
        rows.append(
            (
                label + (" (default)" if split == default else ""),
                f"{cost.flops / 1e9:.2f}",
                cost.flops / whole.flops,
                f"{100 * block_figure(config, split):.1f} %",
                f"{100 * block_figure(config, split, stitch=True):.1f} %",
                f"{cost.parameters / 1e6:.1f}",
                f"{weights_bytes(config, split, dtype) / 1e6:.0f}",
            )
        )
    rows.append(
        (
            "all in full",
            f"{whole.flops / 1e9:.2f}",
            1.0,
            "",
            "",
            f"{whole.parameters / 1e6:.1f}",
            f"{whole.parameters * dtype.itemsize / 1e6:.0f}",
        )
    )
    name = str(dtype).removeprefix("torch.")
    fit = ""
    if config.branches:
        apart = sum(fit_flops(config, [s]) for s in {s for b in config.branches for s in b.splits})
        fit = (
            f"; fitting all stitches by FFM: {fit_flops(config) / 1e9:.1f} GFLOPs a picture in one pass, "
            f"{fit_flops(config, cached=True) / 1e9:.1f} with cached targets, {apart / 1e9:.1f} in separate runs"
        )
    table(
        "Cost of one picture",
        ["split", "GFLOPs", "/ all in full", "extra blocks", "with stitch", "M parameters", f"MB in {name}"],
        rows,
        f"extra blocks: over the trunk model alone; activations of one picture: about "
        f"{activation_bytes(config, dtype=dtype) / 1e6:.1f} MB in {name}{fit}",
    )


def pca_maps(features: Sequence[np.ndarray], basis: int = 0) -> list[np.ndarray]:
    """Feature maps ``[pictures, N, D]`` as RGB ``[pictures, grid, grid, 3]`` in 0..1.

    The three leading principal directions are those of ``features[basis]`` over all its pictures; every other set of
    the same width is shown in the same directions and scale (so equal colours mean equal features); a set of another
    width gets directions of its own.
    """

    def directions(x: np.ndarray) -> tuple[np.ndarray, ...]:
        flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
        mean, scale = flat.mean(0), flat.std(0) + 1e-9
        # clipped: a few outlier tokens (CLIP keeps some in empty background) would otherwise be all that is seen
        _, _, v = np.linalg.svd(((flat - mean) / scale).clip(-2, 2), full_matrices=False)
        shown = (flat - mean) / scale @ v[:3].T
        low, high = np.percentile(shown, [2, 98], axis=0)
        return mean, scale, v[:3].T, low, high

    common, out = directions(features[basis]), []
    for x in features:
        mean, scale, v, low, high = common if x.shape[-1] == features[basis].shape[-1] else directions(x)
        side = round(x.shape[1] ** 0.5)
        shown = ((x - mean) / scale @ v - low) / (high - low)
        out.append(shown.clip(0, 1).reshape(len(x), side, side, 3).astype(np.float32))
    return out


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
    splits = sorted((r for r in rows if r["kind"] == "split"), key=lambda r: r["split"])
    xs, ys = [100 * r["ratio"] for r in splits], [100 * r["accuracy"] for r in splits]
    spread = [100 * (r.get("accuracy_spread") or 0) for r in splits]
    bars = spread if any(spread) else None
    axes.errorbar(xs, ys, yerr=bars, fmt="o-", color="#2457a6", lw=2, ms=7, capsize=3, label="stitch tree, by split")
    for x, y, row in zip(xs, ys, splits, strict=True):
        axes.annotate(str(row["split"]), (x, y), textcoords="offset points", xytext=(6, 7), color="#2457a6")
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
