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
from vst.measure.command import latency as latency
from vst.measure.command import runtimes, throughput
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

    With fit.tune, low-rank changes of trunk and tails are trained beside them and merged: they cost nothing later.

    Examples:
        vst fit --config configs/stitch/clip-dinov2-l.yaml --images pictures/ --out runs/fit
        vst fit --config configs/stitch/clip-dinov2-l.yaml --images pictures/ --out runs/tuned --fit.tune.tails lora
        torchrun --nproc_per_node 8 train/stitch.py --config configs/stitch/clip-dinov2-l.yaml --images pictures/ \
            --out runs/fit

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
    if result.own is not None:
        print(
            f"the trunk's own features, tuned, to the published model's: error {result.own.error:.3f}, by channel "
            f"{result.own.channel_error:.3f}, cosine {result.own.cosine:.3f}"
        )
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
    from vst.tree.folder import read_config

    kind = _dtype(dtype)
    inspect_tree(read_config(path, inside=True)[1], kind)


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


COMMANDS = (fit, inspect, export, latency, runtimes, throughput, trunk, recommend, protocol, demo, bundle, unbundle)


def main(args: list[str] | None = None) -> None:
    """Entry point of ``vst``."""
    run(COMMANDS, args, prog="vst", description=__doc__ or "")
