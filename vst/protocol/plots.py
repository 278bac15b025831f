"""The protocol's pictures: score by depth for each objective, and where two models agree."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vst.fit.objectives import OBJECTIVES
from vst.protocol.tables import kinds, stitched_rows
from vst.results.folders import atomic_path

Row = Mapping[str, Any]
COLOURS = ("#8a94a0", "#b9a37a", "#2f7d4f", "#b3541e", "#7a4fa3", "#2457a6", "#c2185b", "#00838f", "#6d4c41", "#9e9d24")
STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


def curves(rows: Sequence[Row], task: str, family: str, path: Path) -> None:
    """Score over depth, a panel for each direction and a line for each objective; bars are deviations over seeds."""
    plt = _pyplot()
    part = [r for r in stitched_rows(rows) if (r["task"], r["family"]) == (task, family)]
    models = [r for r in rows if r["kind"] == "model" and r["task"] == task]
    directions = list(dict.fromkeys((r["source"], r["target"]) for r in part))
    figure, panels = plt.subplots(1, len(directions), figsize=(4.6 * len(directions) + 1, 4.4), dpi=130, sharey=True)
    for axes, (a, b) in zip([panels] if len(directions) == 1 else panels, directions, strict=True):
        for i, objective in enumerate(kinds(part, "objective")):
            mine = [r for r in part if (r["source"], r["target"], r["objective"]) == (a, b, objective)]
            depths = sorted(set(kinds(mine, "depth")))
            at = [[100 * r["score"] for r in mine if r["depth"] == d] for d in depths]
            axes.errorbar(
                depths,
                [statistics.mean(v) for v in at],
                yerr=[statistics.stdev(v) if len(v) > 1 else 0 for v in at],
                marker="o",
                color=COLOURS[i % len(COLOURS)],
                ls="--" if objective.startswith("ridge+") else "-",
                capsize=3,
                label=objective,
            )
        for name, style in dict.fromkeys([(b, "-"), (a, ":")] if a != b else [(b, "-")]):
            alone = [100 * m["score"] for m in models if m["model"] == name]
            if alone:
                axes.axhline(statistics.mean(alone), color="#333333", lw=1, ls=style, label=f"{name} alone")
        if models:
            axes.axhline(100 * models[0]["majority"], color="#bbbbbb", lw=1, ls="-.", label="majority")
        axes.set_title(f"{a} into {b}")
        axes.set_xlabel("depth of the stitch")
        axes.grid(alpha=0.25)
    first = panels if len(directions) == 1 else panels[0]
    first.set_ylabel(f"{task}: {part[0]['metric']} %")
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="center right", frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1 - 1.7 / (4.6 * len(directions) + 1), 1))
    _save(figure, path)


def training_curves(rows: Sequence[Row], task: str, family: str, path: Path) -> None:
    """Validation loss over epochs, the first seed's: a column for each stage, a line of panels for each direction."""
    plt = _pyplot()
    from matplotlib.lines import Line2D

    mine = [r for r in stitched_rows(rows) if (r["task"], r["family"]) == (task, family)]
    part = [r for r in mine if r["seed"] == min(r["seed"] for r in mine)]
    stages = [s for s, o in OBJECTIVES.items() if not o.closed_form and any(_last(r) == s for r in part)]
    if not stages:
        return
    directions = list(dict.fromkeys((r["source"], r["target"]) for r in part))
    depths = sorted(set(kinds(part, "depth")))
    colours = {d: plt.get_cmap("viridis")(0.9 * i / max(1, len(depths) - 1)) for i, d in enumerate(depths)}
    size = (4.2 * len(stages), 3.1 * len(directions) + 0.5)
    figure, panels = plt.subplots(
        len(directions), len(stages), figsize=size, dpi=130, squeeze=False, sharex="col", sharey="col"
    )
    for j, stage in enumerate(stages):
        chains = kinds([r for r in part if _last(r) == stage], "objective")
        styles = {chain: STYLES[i % len(STYLES)] for i, chain in enumerate(chains)}
        for i, direction in enumerate(directions):
            axes = panels[i][j]
            for r in part:
                if (r["source"], r["target"]) == direction and r["objective"] in styles:
                    history = r["stages"][stage]["history"]
                    epochs, losses = ([h[name] for h in history] for name in ("epoch", "validation"))
                    axes.plot(epochs, losses, styles[r["objective"]], color=colours[r["depth"]], marker="o", ms=2.5)
            axes.grid(alpha=0.25)
            if i == 0:
                axes.set_title(stage)
                lines = [Line2D([], [], color="k", linestyle=style, label=chain) for chain, style in styles.items()]
                axes.legend(handles=lines, fontsize=7, frameon=False)
            if i == len(directions) - 1:
                axes.set_xlabel("epoch")
        for i, (source, target) in enumerate(directions):
            panels[i][0].set_ylabel(f"{source} into {target}\nvalidation loss")
    marks = [Line2D([], [], color=colour, label=f"depth {depth}") for depth, colour in colours.items()]
    figure.legend(handles=marks, loc="lower center", ncol=len(marks), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    _save(figure, path)


def _last(row: Row) -> str:
    return row["objective"].split("+")[-1]


def cka_picture(rows: Sequence[Row], task: str, path: Path) -> None:
    """Maps of linear CKA by depth, one for each pair of models and list of depths, means over seeds."""
    plt = _pyplot()
    maps: dict[tuple[str, str, tuple[int, ...]], list[Row]] = {}
    for row in rows:
        if row["kind"] == "cka" and row["task"] == task:
            maps.setdefault((row["source"], row["target"], tuple(row["depths"])), []).append(row)
    figure, panels = plt.subplots(1, len(maps), figsize=(4.3 * len(maps), 4.0), dpi=130, squeeze=False)
    for axes, ((a, b, depths), found) in zip(panels[0], maps.items(), strict=True):
        size = len(depths)
        mean = [[statistics.mean(r["cka"][i][j] for r in found) for j in range(size)] for i in range(size)]
        axes.imshow(mean, vmin=0, vmax=1, cmap="viridis", origin="lower")
        for i in range(size):
            for j in range(size):
                dark = mean[i][j] < 0.6
                axes.text(j, i, f"{mean[i][j]:.2f}", ha="center", va="center", color="w" if dark else "k", fontsize=7)
        axes.set_xticks(range(size), [str(d) for d in depths])
        axes.set_yticks(range(size), [str(d) for d in depths])
        axes.set_xlabel(f"depth of {b}")
        axes.set_ylabel(f"depth of {a}")
    figure.suptitle(f"Linear CKA of patch tokens, {task}")
    figure.tight_layout()
    _save(figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('The report needs matplotlib: pip install "vfm-stitch-tree[eval]".') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])
    _pyplot().close(figure)
