"""The benchmark: a tree at every split, its models alone and in full, over batch sizes and dtypes, kept as it goes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vst.fit.heldout import check_tree
from vst.fit.precision import usable_device
from vst.measure.execution import EXECUTIONS
from vst.measure.latency import MOST_BATCH, measure_tree
from vst.measure.recommend import timed_rows
from vst.models.fields import check_fields, checked
from vst.results.drawing import drawing
from vst.results.finished import ROWS, as_written
from vst.results.folders import Run, atomic_path, read_json
from vst.tree.encoder import VSTEncoder

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RoundsConfig:
    """What is called in interleaved rounds.

    Attributes:
        batch_sizes: pictures a call.
        dtypes: float32, bfloat16 or float16, of weights and pixels.
        repeats: counted rounds; in each of them everything that is compared is called once.
        device: auto, cpu, cuda or cuda:N.
    """

    batch_sizes: list[int] = field(default_factory=lambda: [1])
    dtypes: list[str] = field(default_factory=lambda: ["float32"])
    repeats: int = 15
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self, {"batch_sizes": MOST_BATCH})
        if unknown := set(self.dtypes) - set(DTYPES):
            raise ValueError(f"dtype is {min(unknown)!r}; expected float32, float16 or bfloat16.")
        if not self.batch_sizes or not self.dtypes or min([self.repeats, *self.batch_sizes]) < 1:
            raise ValueError(
                f"batch sizes {self.batch_sizes}, dtypes {self.dtypes} and repeats {self.repeats}: expected at least "
                "one of each, and numbers of at least 1."
            )


@dataclass(frozen=True)
class BenchmarkConfig(RoundsConfig):
    """Rounds for each pair of batch size and dtype; see :class:`RoundsConfig`.

    Attributes:
        execution: eager, streams, graphs, compile or compiled-graphs: how towers are run, see
            vst/measure/execution.py.
    """

    execution: str = "eager"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.execution not in EXECUTIONS:
            raise ValueError(f"execution is {self.execution!r}; expected {', '.join(EXECUTIONS)}.")


def run_in(
    folder: str | Path | None, described: Mapping[str, Any], device: str, *, resume: bool, overwrite: bool
) -> Run | None:
    """A run in a folder, begun or gone on with; None where there is no folder.

    Raises:
        ValueError: ``resume`` or ``overwrite`` without a folder, or a run that was begun with other options.
    """
    checked(resume, bool, "resume")
    checked(overwrite, bool, "overwrite")
    if folder is None:
        if resume or overwrite:
            raise ValueError("resume and overwrite need a run folder (out): name the run's.")
        return None
    return Run(folder, described, resume=resume and Path(folder).exists(), overwrite=overwrite, device=device)


def benchmark(
    tree: VSTEncoder,
    config: BenchmarkConfig,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure every pair of batch size and dtype; with a folder, leave results.json, latency.csv and latency.png in it.

    Args:
        tree: whose towers are measured.
        config: what is measured.
        folder: run folder; None keeps nothing.
        resume: go on with a stopped run: pairs that were measured are not measured again.
        overwrite: replace the run in the folder.
        show_progress: a bar for each pair.

    Returns:
        Rows of :func:`vst.measure.latency.measure_tree`, pair after pair.
    """
    check_tree(tree, "benchmark")
    checked(config, BenchmarkConfig, "config")
    device = usable_device(config.device)
    described = {"tree": tree.config.to_dict(), **asdict(config), "device": device}
    run = run_in(folder, described, device, resume=resume, overwrite=overwrite)
    rows: list[dict[str, Any]] = []
    for dtype in config.dtypes:
        for batch in config.batch_sizes:
            key = f"{dtype}-batch{batch}"
            if run is not None and run.has(key):
                with as_written(run.path("rows"), "vst latency", ROWS):
                    kept = next(r["towers"] for r in run.rows() if r["key"] == key)
                    rows += timed_rows(kept, f"towers of {key}")
                continue
            found = measure_tree(
                tree,
                batch_size=batch,
                repeats=config.repeats,
                device=device,
                dtype=getattr(torch, dtype),
                execution=config.execution,
                show_progress=show_progress,
            )
            if run is not None:
                run.add({"key": key, "towers": found}, key)
            rows += found
    if run is not None:
        run.finish(rows)
        write_csv(rows, run.path("latency.csv"))
        path = run.path("environment.json")
        with as_written(path, "vst latency"):
            where = read_json(path)
            on = f"{where['device_name']}, {where['torch_threads']} threads, torch {where['versions']['torch']}"
        told = f"medians of {config.repeats} interleaved rounds, bars: 95 % intervals of the median"
        caption = f"{on}, {config.execution}; {told}"
        with drawing(path := run.path("latency.png")):
            benchmark_plot(rows, path, caption)
    return rows


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """One line a row."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def benchmark_plot(rows: Sequence[Mapping[str, Any]], path: str | Path, caption: str) -> None:
    """Time over that of all models in full against the same ratio in FLOPs, and pictures a second over the batch.

    Args:
        rows: of :func:`benchmark`.
        path: of the PNG or SVG.
        caption: below the plots.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, (ratio, speed) = plt.subplots(1, 2, figsize=(11, 4.6), dpi=140)
    settings = list(dict.fromkeys((r["dtype"], r["batch_size"]) for r in rows))
    names = list(dict.fromkeys(r["name"] for r in rows))
    colours = plt.get_cmap("viridis")
    top = 1.08 * max(max(r["ratio_sure_high"], r["flops_ratio"]) for r in rows)
    ratio.plot([0, top], [0, top], color="#888888", lw=1, label="as FLOPs")
    ratio.fill_between([0, top], [0, top], [0, 1.03 * top], color="#888888", alpha=0.2, label="3 % above")
    for i, (dtype, batch) in enumerate(settings):
        part = [r for r in rows if (r["dtype"], r["batch_size"]) == (dtype, batch) and r["kind"] != "full"]
        y = [r["ratio"] for r in part]
        low = [r["ratio"] - r["ratio_sure_low"] for r in part]
        high = [r["ratio_sure_high"] - r["ratio"] for r in part]
        ratio.errorbar(
            [r["flops_ratio"] for r in part], y, yerr=[low, high], fmt="o", ms=4, capsize=2,
            color=colours(i / max(1, len(settings))), label=f"{dtype}, batch {batch}",
        )  # fmt: skip
    ratio.set(xlabel="FLOPs / all in full", ylabel="time / all in full", xlim=(0, top), ylim=(0, top))
    styles = {"float32": "-", "bfloat16": "--", "float16": ":"}
    for i, name in enumerate(names):
        for dtype in dict.fromkeys(d for d, _ in settings):
            part = [r for r in rows if r["name"] == name and r["dtype"] == dtype]
            speed.plot(
                [r["batch_size"] for r in part], [r["images_per_s"] for r in part], styles[dtype], marker="o", ms=4,
                color=colours(i / len(names)), label=name if dtype == settings[0][0] else None,
            )  # fmt: skip
    speed.set(xlabel="pictures a call", ylabel="pictures a second", xscale="log")
    speed.set_yscale("log", base=2)
    speed.yaxis.set_major_formatter(ticker.ScalarFormatter())
    speed.set_xticks(sorted({b for _, b in settings}), [str(b) for b in sorted({b for _, b in settings})], minor=False)
    speed.minorticks_off()
    for axes in (ratio, speed):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7)
    figure.text(0.01, 0.005, caption, fontsize=6.5, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:])
    plt.close(figure)
