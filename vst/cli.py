"""The command line: ``vst fit``, ``inspect``, ``export``, ``latency``, ``trunk``, ``protocol``, ``demo`` and others."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from vst.bundle.command import bundle, unbundle
from vst.demo.config import DemoConfig
from vst.demo.job import run_demo
from vst.export.command import export
from vst.fit.config import FitConfig
from vst.fit.loop import fit_stitches
from vst.fit.precision import usable_device
from vst.measure.tables import LLAVA_PICTURES
from vst.models.fields import whole
from vst.parsing import command as command
from vst.parsing import run
from vst.protocol.command import protocol
from vst.results.locks import held
from vst.results.stopping import goes_on
from vst.tree.encoder import VSTEncoder
from vst.tree.options import TreeArgs
from vst.trunk.command import trunk


def fit(
    tree: TreeArgs,
    images: str,
    out: str,
    fit: FitConfig = FitConfig(),  # noqa: B008 (frozen)
    heldout_images: str | None = None,
    save_tree: bool = True,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Fit the stitches of a tree on a folder of pictures, for all splits in one pass.

    Examples:
        vst fit --config configs/stitch/dinov2-clip-l.yaml --images pictures/
        torchrun --nproc_per_node 8 train/stitch.py --config configs/stitch/dinov2-clip-l.yaml --images pictures/

    Args:
        tree: which tree.
        images: folder of pictures, searched recursively; unreadable ones are skipped and counted.
        out: run folder: config, environment, results.json, stitches/ and (with save_tree) tree/.
        fit: how.
        heldout_images: folder of pictures for the report; default: some of images.
        save_tree: write the whole self-contained tree as well as the stitches alone.
        resume: go on where a killed run stopped; the result is that of an uninterrupted one. With DeepSpeed this
            unpickles the run's state, which can run code: resume only folders that you trust.
        overwrite: start the run in out again.
    """
    model, main = VSTEncoder.from_args(tree), os.environ.get("RANK", "0") == "0"
    with held(out) if main else nullcontext():
        result = fit_stitches(
            model, images, fit, heldout_images=heldout_images, folder=out, resume=resume, overwrite=overwrite
        )
        if not main:
            return
        if save_tree:
            model.save_pretrained(Path(out) / "tree", overwrite=True)
    from vst.fit.heldout import stitch_table

    stitch_table(result.reports)
    if result.skipped:
        print(f"skipped {len(result.skipped)} pictures that could not be read; names and reasons: {out}/results.json")
    print(f"{result.steps} steps in {result.seconds['total']:.0f} s; results in {out}")


def inspect(path: str, dtype: str = "float16") -> None:
    """Print what a saved tree is: models, grid, tokens, and cost and memory at each split; loads no weights.

    Args:
        path: folder or hub id of a saved tree, or of a language model on one.
        dtype: that memory is told for: float32, float16 or bfloat16.
    """
    from vst.measure.inspect import inspect_tree
    from vst.tree.saving import read_config

    kind = _dtype(dtype)
    inspect_tree(read_config(path, inside=True)[1], kind)


def latency(
    path: str | None = None,
    tree: TreeArgs | None = None,
    batch_size: int | list[int] = 1,
    repeats: int = 15,
    device: str = "auto",
    dtype: str | list[str] = "float32",
    execution: str = "eager",
    out: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Measure a tree at every split beside each model alone and all models in full, interleaved.

    Examples:
        vst latency --path runs/demo/tree
        vst latency --path runs/demo/tree --batch_size '[1,8]' --dtype '[float32,bfloat16]' --out runs/latency
        vst latency --tree.trunk dinov2-l --tree.branches '[clip-l-336]' --tree.splits '[6,14,22]' \\
            --tree.image_size 336

    Args:
        path: folder or hub id of a saved tree, or of a language model on one, of which the tree's config alone is read;
            or give tree.
        tree: a tree to plan; weights are random either way, since time does not depend on them.
        batch_size: pictures a call, one number or several.
        repeats: counted rounds.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16, one or several.
        execution: eager, streams or graphs (the branches of a call run at the same time on a GPU), compile, or
            compiled-graphs (both on a GPU); all in full are then measured both ways.
        out: run folder for results.json, latency.csv and latency.png; default: only print.
        resume: go on with a stopped run in out.
        overwrite: replace the run in out.
    """
    from vst.measure.benchmark import BenchmarkConfig, benchmark
    from vst.measure.tables import latency_table

    batches, dtypes = batch_size if isinstance(batch_size, list) else [batch_size], dtype
    config = BenchmarkConfig(batches, [dtypes] if isinstance(dtypes, str) else dtypes, repeats, device, execution)
    usable_device(device)  # before anything is read or fetched
    rows = benchmark(_untrained(path, tree), config, out, resume=resume, overwrite=overwrite)
    for kind, batch in dict.fromkeys((r["dtype"], r["batch_size"]) for r in rows):
        latency_table([r for r in rows if (r["dtype"], r["batch_size"]) == (kind, batch)])


def throughput(
    path: str | None = None,
    tree: TreeArgs | None = None,
    batch_size: int = 4,
    repeats: int = 7,
    device: str = "auto",
    precision: str = "auto",
    checkpointing: bool = False,
    pictures: int = LLAVA_PICTURES,
    cache: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Measure what fitting stitches takes: all depths in one pass, each alone, targets on disk; time, FLOPs, memory.

    Under torchrun: what the processes bring together, against one of them alone with the same batch.

    Examples:
        vst throughput --path runs/demo/tree
        vst throughput --config configs/trees/dinov2-clip-l.yaml --batch_size 32
        torchrun --nproc_per_node 2 -m vst throughput --path runs/demo/tree

    Args:
        path: folder or hub id of a saved tree, or of a language model on one, of which the tree's config alone is read;
            or give tree.
        tree: a tree to plan; weights are random either way, since time does not depend on them.
        batch_size: pictures a step, of all processes together.
        repeats: counted rounds; in each every way takes one step.
        device: auto, cpu or cuda (under torchrun: cuda where there is one).
        precision: auto (bf16 autocast on a GPU that has it, else fp32), fp32 or bf16.
        checkpointing: recompute the tails' activations in the backward pass.
        pictures: size of a data set whose time is to be told; default: LLaVA's stage 1.
        cache: folder whose disk holds cached targets meanwhile; default: the system's temporary one.
        out: run folder for results.json; default: only print.
        overwrite: replace the run in out.
    """
    from vst.fit.precision import uses_bf16
    from vst.measure.scaling import check_division, measure_scaling
    from vst.measure.tables import scaling_table, throughput_table
    from vst.measure.throughput import measure_fit
    from vst.results.folders import Run

    where, processes = usable_device(device), int(os.environ.get("WORLD_SIZE", "1"))
    main = os.environ.get("RANK", "0") == "0"
    if overwrite and out is None:
        raise ValueError("overwrite needs a run folder (out): name the run's.")
    whole(pictures, "pictures", (1, None))
    if processes > 1:
        check_division(batch_size, processes)
        if cache is not None or (where == "cpu" and torch.cuda.is_available()):
            raise ValueError("Under torchrun there is no cache to measure, and a GPU is used where there is one.")
    model = _untrained(path, tree)
    options = {"batch_size": batch_size, "repeats": repeats, "checkpointing": checkpointing}
    run = None
    if out is not None and main:
        facts = {"tree": model.config.to_dict(), **options, "precision": precision, "processes": processes}
        run = Run(out, facts, overwrite=overwrite, device=where)
    if processes > 1:
        results = measure_scaling(model, precision=precision, **options)  # type: ignore[arg-type]
        show = scaling_table
    else:
        bf16 = uses_bf16(precision, torch.device(where))
        results = measure_fit(model, device=where, bf16=bf16, cache=cache, **options)  # type: ignore[arg-type]
        show = throughput_table
    if main:
        show(results, pictures)
    if run is not None:
        run.finish(results)


def _untrained(path: str | None, tree: TreeArgs | None) -> VSTEncoder:
    """A tree to time: random weights of the specs in its config, so that no source has to be reached."""
    from vst.tree.saving import read_config

    if (path is None) == (tree is None):
        raise ValueError("Give either --path of a saved tree or --tree.trunk, --tree.branches and --tree.splits.")
    config = read_config(path, inside=True)[1] if path is not None else tree.plan()  # type: ignore[union-attr]
    return VSTEncoder.from_config(config, pretrained=False)


@goes_on
def demo(
    out: str | None = None,
    trunk: str | None = None,
    demo: DemoConfig = DemoConfig(),  # noqa: B008 (frozen)
    overwrite: bool = False,
) -> None:
    """The whole job on real weights, offline: CLIP-B/16 + DINOv2-S as a tree, fitted, scored and timed at every split.

    Examples:
        vst demo
        vst demo --trunk dinov2
        vst demo --config configs/demo/evidence.yaml

    Args:
        out: run folder; a second call finds what is there; default: runs/demo, or runs/demo-dinov2 with that trunk.
        trunk: clip or dinov2: which of the two models sees the pixels; short for demo.trunk.
        demo: what to run.
        overwrite: start again; a run that is there is gone on with otherwise.
    """
    config = demo if trunk is None else replace(demo, trunk=trunk)
    default = "runs/demo" if config.trunk == DemoConfig.trunk else f"runs/demo-{config.trunk}"
    run_demo(out or default, config, resume=not overwrite, overwrite=overwrite)


def recommend(
    results: str,
    budget: str | None = None,
    latency_ms: float | None = None,
    of: str | None = None,
    task: str | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
) -> None:
    """Choose a split depth within a latency budget, from the measured rows of a run, and say why.

    Examples:
        vst recommend --results runs/demo --budget 1.1x --task scenes
        vst recommend --results runs/demo --budget 0.6x --of "all in full"
        vst recommend --results runs/demo --latency-ms 300
        vst recommend --results runs/latency --budget 1.5x --batch_size 8 --dtype float32

    Args:
        results: folder of a finished run that scored and timed towers (vst demo, a sweep), or only timed them (vst
            latency: the shallowest split that fits is then chosen).
        budget: a factor over the latency of one model, such as 1.2x.
        latency_ms: or milliseconds a call, on the run's device and at its batch size.
        of: what the factor refers to, a row's name; default: the first model alone, the trunk.
        task: whose scores count, one of the run's; default: the mean over its tasks.
        batch_size: which rows, where the run measured several batch sizes.
        dtype: which rows, where the run measured several dtypes.
    """
    from vst.measure.recommend import measured_rows
    from vst.measure.recommend import recommend as choose

    rows = measured_rows(results, task, batch_size=batch_size, dtype=dtype)
    choice = choose(rows, budget=budget, latency_ms=latency_ms, of=of)
    print(f"split {choice.row['split']}")
    for reason in choice.reasons:
        print(f"  {reason}")


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype is {name!r}; expected float32, float16 or bfloat16.")
    return getattr(torch, name)


COMMANDS = (fit, inspect, export, latency, throughput, trunk, recommend, protocol, demo, bundle, unbundle)


def main(args: list[str] | None = None) -> None:
    """Entry point of ``vst``."""
    run(COMMANDS, args, prog="vst", description=__doc__ or "")
