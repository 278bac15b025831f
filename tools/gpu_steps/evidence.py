"""Real weights at the full grid: the demo's pair fitted and scored at every split, then the stitching protocol."""

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
    small = {"splits": [10], "grid": 4, "objectives": ["ridge"], "pictures": 16, "probe_train": 40, "probe_test": 8}
    fit = {"epochs": 1, "calibration": 16}
    return made(DemoConfig, options("demo/short.yaml", "demo"), **small, heldout=4, repeats=1, batch_size=1, fit=fit)


def protocol_config(dry: bool) -> ProtocolConfig:
    """The protocol's, at the full grid; in a dry run one row of it."""
    if not dry:
        return made(ProtocolConfig, options("stitch/protocol-gpu.yaml", "protocol"))
    values = options("stitch/protocol-short.yaml", "protocol")
    tasks = {name: {**task, "train": 24, "validation": 4, "test": 8} for name, task in values["tasks"].items()}
    train = {**values["train"], "calibration": 16, "head_epochs": 2}
    return made(ProtocolConfig, values, objectives=["ridge"], cka_depths=[], tasks=tasks, train=train)


def run(work: Work) -> str:
    """Run what is missing of both; the rows of each are kept as they come."""
    needs("sklearn", "matplotlib", "accelerate")
    if lacking := assets.missing():
        raise Skipped(f"the demo's assets are not there ({', '.join(lacking)}): see docs/gpu.md")
    demo, protocol = work.folder("demo"), work.folder("protocol")
    work.attempt(
        {
            "demo": partial(run_demo, demo, demo_config(work.dry)),
            "protocol": partial(run_protocol, protocol, protocol_config(work.dry)),
        }
    )
    return f"the demo and the protocol at a grid of {demo_config(work.dry).grid}"
