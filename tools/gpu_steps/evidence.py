"""Real weights at the full grid: the demo's pair at every split, recipes of fits side by side, and the protocol."""

from __future__ import annotations

from functools import partial

from gpu_steps.options import made, options
from gpu_steps.work import Skipped, Work, needs
from vst.demo import assets
from vst.demo.config import DemoConfig
from vst.demo.job import run_demo
from vst.protocol.config import ProtocolConfig
from vst.protocol.grid import run_protocol

GRID = 14  # patches a side of CLIP-B/16 at 224 pixels, the grid it was trained at


def demo_config(dry: bool) -> DemoConfig:
    """The demo's, at the full grid; in a dry run so short that its numbers mean nothing."""
    if not dry:
        return made(DemoConfig, options("demo/evidence.yaml", "demo"), grid=GRID)
    return _small(["ridge"])


def recipes_config(dry: bool) -> DemoConfig:
    """Four times the pictures, and so the steps, that these take on a CPU; in a dry run the demo's own recipe alone."""
    if dry:
        return _small(["ffm"])
    values = options("demo/recipes.yaml", "demo")
    fit = {**values["fit"], "cache": None, "save_every": 200}  # pictures pass four times: a cache would not pay
    return made(DemoConfig, values, grid=GRID, pictures=2400, fit=fit)


def _small(objectives: list[str]) -> DemoConfig:
    small = {"splits": [10], "grid": 4, "pictures": 16, "probe_train": 40, "probe_test": 8}
    values, fit = options("demo/short.yaml", "demo"), {"epochs": 1, "calibration": 16}
    return made(DemoConfig, values, **small, objectives=objectives, heldout=4, repeats=1, batch_size=1, fit=fit)


def protocol_config(dry: bool) -> ProtocolConfig:
    """The protocol's, at the full grid; in a dry run one row of it."""
    if not dry:
        return made(ProtocolConfig, options("stitch/protocol-gpu.yaml", "protocol"))
    values = options("stitch/protocol-short.yaml", "protocol")
    tasks = {name: {**task, "train": 24, "validation": 4, "test": 8} for name, task in values["tasks"].items()}
    train = {**values["train"], "calibration": 16, "head_epochs": 2}
    return made(ProtocolConfig, values, objectives=["ridge"], cka_depths=[], tasks=tasks, train=train)


def run(work: Work) -> str:
    """Run what is missing of all three; the rows of each are kept as they come."""
    needs("sklearn", "matplotlib", "accelerate")
    if lacking := assets.missing():
        raise Skipped(f"the demo's assets are not there ({', '.join(lacking)}): see docs/gpu.md")
    demo, recipes, protocol = (work.folder(name) for name in ("demo", "recipes", "protocol"))
    work.attempt(
        {
            "demo": partial(run_demo, demo, demo_config(work.dry)),
            "recipes": partial(run_demo, recipes, recipes_config(work.dry)),
            "protocol": partial(run_protocol, protocol, protocol_config(work.dry)),
        }
    )
    return f"the demo, recipes and the protocol at a grid of {demo_config(work.dry).grid}"
