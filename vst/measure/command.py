"""The commands that measure time: ``vst latency``, ``vst runtimes`` and ``vst throughput``."""

from __future__ import annotations

import os

import torch

from vst.fit.precision import usable_device
from vst.measure.tables import LLAVA_PICTURES
from vst.models.fields import whole
from vst.tree.encoder import VSTEncoder
from vst.tree.folder import read_config
from vst.tree.options import TreeArgs


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


def runtimes(
    path: str | None = None,
    tree: TreeArgs | None = None,
    split: str | int | dict[str, int] | None = None,
    batch_size: int | list[int] = 1,
    repeats: int = 15,
    device: str = "auto",
    dtype: str | list[str] = "float32",
    out: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Time a tree at one split in every way this machine can run it, interleaved: eager, folded, compiled, and others.

    Examples:
        vst runtimes --path runs/demo/tree --split 6
        vst runtimes --path runs/demo/tree --split 6 --batch_size '[1,8]' --dtype '[float32,bfloat16]' --out runs/ways

    Args:
        path: folder or hub id of a saved tree; or give tree.
        tree: a tree to plan, with random weights: time does not depend on them.
        split: one for all branches or one by branch name; default: the tree's own.
        batch_size: pictures a call, one number or several.
        repeats: counted rounds; in each of them every way is called once.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16, one or several; times and tokens are compared with those of eager in the
            first.
        out: run folder for results.json; default: only print.
        resume: go on with a stopped run in out.
        overwrite: replace the run in out.
    """
    from vst.measure.benchmark import RoundsConfig
    from vst.measure.runtimes import compare_runtimes
    from vst.measure.tables import runtimes_table

    batches, dtypes = batch_size if isinstance(batch_size, list) else [batch_size], dtype
    config = RoundsConfig(batches, [dtypes] if isinstance(dtypes, str) else dtypes, repeats, device)
    usable_device(device)
    if path is not None and tree is None:
        chosen = read_config(path)[1].resolve(split)
        model = VSTEncoder.from_pretrained(path, splits={name: [at] for name, at in chosen.items()})
    else:
        model = _untrained(path, tree)
        chosen = model.config.resolve(split)
    for found in compare_runtimes(model, config, chosen, out, resume=resume, overwrite=overwrite):
        runtimes_table(found)


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
    if (path is None) == (tree is None):
        raise ValueError("Give either --path of a saved tree or --tree.trunk, --tree.branches and --tree.splits.")
    config = read_config(path, inside=True)[1] if path is not None else tree.plan()  # type: ignore[union-attr]
    return VSTEncoder.from_config(config, pretrained=False)
