"""What more processes bring a fit: the same global batch by one of them alone and by all together, in turn."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from vst.fit.config import FitConfig
from vst.fit.matching import Matcher
from vst.fit.precision import uses_bf16
from vst.fit.processes import accelerator_for
from vst.measure.latency import latency_of, median_interval, timed_rounds
from vst.measure.throughput import Batch, FitStep, random_teacher
from vst.tree.encoder import VSTEncoder


def measure_scaling(
    tree: VSTEncoder,
    *,
    batch_size: int = 4,
    repeats: int = 7,
    precision: str = "auto",
    checkpointing: bool = False,
    objective: str = "ffm",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Time steps of a fit under ``torchrun``; every process calls this alike.

    Args:
        tree: whose stitches would be fitted; they are changed, and differ between processes afterwards. Any weights do:
            targets are random ones.
        batch_size: pictures a step, of all processes together.
        repeats: counted rounds; in each the first process takes one step alone, then all take one together.
        precision: auto, fp32 or bf16, as of a fit.
        checkpointing: recompute the tails' activations in the backward pass.
        objective: ffm or lfm.
        show_progress: a bar with the time left, of the first process.

    Returns:
        ``rows``, for one process and for all: ``processes``, ``pictures_per_s`` and the fields of
        :class:`vst.measure.latency.Latency` against one; ``speed_up`` with a 95 % interval ``speed_up_low``,
        ``speed_up_high``; ``efficiency``, speed-up over processes; ``threads`` of a process. Times are the first
        process', which waits for the others, without loading pictures.

    Raises:
        ValueError: one process only, or a batch that does not divide among them.
    """
    accelerator = accelerator_for(FitConfig())
    world, device = accelerator.num_processes, accelerator.device
    check_division(batch_size, world)
    bf16 = uses_bf16(precision, device)
    teacher, main = random_teacher(tree).to(device), accelerator.is_main_process
    alone = FitStep(teacher, Batch.random(teacher, batch_size, device), Matcher(teacher, objective), bf16)
    matcher = Matcher(teacher, objective).to(device)
    part = Batch.random(teacher, batch_size // world, device)
    together = FitStep(teacher, part, matcher, bf16, model=accelerator.prepare(matcher))

    def one() -> None:
        if main:
            alone.step()
        accelerator.wait_for_everyone()

    def every() -> None:
        together.step()
        accelerator.wait_for_everyone()

    for branch in tree.branches.values():
        branch.tail.checkpointing = checkpointing
    try:
        show = show_progress and main
        times = timed_rounds(
            {"one": one, "every": every}, repeats=repeats, device=device, show_progress=show, title="steps"
        )
    finally:
        for branch in tree.branches.values():
            branch.tail.checkpointing = False
    rows = []
    for name, processes in (("one", 1), ("every", world)):
        found = latency_of(times[name], times["one"])
        speed = batch_size / found.median_ms * 1e3
        rows.append({"processes": processes, "pictures_per_s": speed, **found.to_dict()})
    ups = [a / b for a, b in zip(times["one"], times["every"], strict=True)]
    low, high = median_interval(ups)
    speed_up = statistics.median(ups)
    return {
        "rows": rows, "batch_size": batch_size, "threads": torch.get_num_threads(), "speed_up": speed_up,
        "speed_up_low": low, "speed_up_high": high, "efficiency": speed_up / world,
    }  # fmt: skip


def check_division(batch_size: int, processes: int) -> None:
    """Make sure that a batch can be shared out.

    Raises:
        ValueError: it cannot.
    """
    if processes < 2:
        raise ValueError("One process has nothing to be compared with: start several, torchrun --nproc_per_node 2 ...")
    if batch_size % processes:
        raise ValueError(f"batch_size is {batch_size}; expected a multiple of {processes}, the number of processes.")
