"""What fitting takes: all depths in one pass against separate runs, targets on disk, the closed-form start."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from vst.fit.cache import TargetCache, cache_bytes
from vst.fit.heldout import check_tree
from vst.fit.matching import Matcher
from vst.fit.precision import usable_device
from vst.fit.teacher import Teacher, tails_tuned
from vst.measure.cost import flops_of
from vst.measure.latency import MOST_BATCH, latency_of, median_interval, timed_rounds
from vst.measure.memory import saved_mb, working_mb
from vst.models.checkpoints import load_vfm
from vst.models.fields import checked, whole
from vst.tree.encoder import VSTEncoder
from vst.tree.ridge import RidgeSums

ONE_PASS = "all depths in one pass"
WRITING, READING = "all depths, writing targets", "all depths, reading targets"
_RIDGE_ROWS = 4096  # tokens an update: sixteen pictures of 256


def measure_fit(
    tree: VSTEncoder,
    *,
    batch_size: int = 4,
    repeats: int = 7,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    checkpointing: bool = False,
    objective: str = "ffm",
    cache: str | Path | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Time steps of a fit (forward, backward, AdamW) on pictures that are in memory, every way once a round.

    Args:
        tree: whose stitches would be fitted; they are changed. Any weights do: targets are random ones.
        batch_size: pictures a step.
        repeats: counted rounds.
        device: of the models.
        bf16: autocast, as a fit does on a GPU.
        checkpointing: recompute the tails' activations in the backward pass.
        objective: ffm or lfm.
        cache: folder that holds the cached targets meanwhile; default: the system's temporary one. The same pictures
            come each step, so they are read from the system's page cache, as of a data set that fits the memory.
        show_progress: a bar with the time left.

    Returns:
        ``rows``, one a way: ``name``, ``splits``, ``gflops`` a step, ``pictures_per_s``, ``saved_mb``
        (activations kept for the backward pass), ``working_mb`` (what a step holds at the most beside weights, pictures
        and AdamW's state) and the fields of :class:`vst.measure.latency.Latency` against all depths in one pass;
        ``time_ratio`` and ``flops_ratio`` of one pass over the sum of separate runs (with ``time_ratio_low`` and
        ``time_ratio_high``, a 95 % interval of the median); ``over``, the first over the second: what one pass loses
        against arithmetic; ``cache_pays_from``, the first epoch whose end is reached sooner with targets on disk (None:
        never), and ``cache_mb`` a picture; ``ridge``, rows of :func:`measure_ridge`; ``batch_size`` and ``threads``.

    Raises:
        ValueError: a tree with fewer than two splits that all branches hold, bad options, a
            device that is not there, or no such folder for the cache.
    """
    check_tree(tree, "measure_fit")
    config, batch_size, device = tree.config, whole(batch_size, "batch_size", MOST_BATCH), usable_device(device)
    checked(bf16, bool, "bf16")
    checked(checkpointing, bool, "checkpointing")
    checked(cache, str | Path | None, "cache")
    if cache is not None and (not str(cache) or not Path(cache).is_dir()):
        raise ValueError(f"cache is {str(cache)!r}, which is no folder: make it first.")
    if len(config.splits) < 2:
        raise ValueError(f"The tree holds the splits {config.splits}; expected at least two, to compare one pass with.")
    teacher = random_teacher(tree).to(torch.device(device))
    batch = Batch.random(teacher, batch_size, device)
    alone = {f"split {s} alone": [s] for s in config.splits}
    held = {ONE_PASS: config.splits, WRITING: config.splits, READING: config.splits} | alone
    with TemporaryDirectory(prefix="vst-targets-", dir=cache) as folder:
        ways = {name: FitStep(teacher, batch, Matcher(teacher, objective, splits=s), bf16) for name, s in held.items()}
        shapes = ways[ONE_PASS].shapes()
        caches = {n: TargetCache(folder, f"branch{i}", batch_size, s) for i, (n, s) in enumerate(shapes.items())}
        ways[WRITING].writes = ways[READING].reads = caches
        calls = {name: way.step for name, way in ways.items()}
        for branch in tree.branches.values():
            branch.tail.checkpointing = checkpointing
        try:
            flops = {name: flops_of(call) for name, call in calls.items()}
            times = timed_rounds(
                calls, repeats=repeats, warmup=1, device=device, show_progress=show_progress, title="steps"
            )
            working = {name: working_mb(call, device) for name, call in calls.items()}
            weights = {p.untyped_storage().data_ptr() for m in (tree, *teacher.heads.values()) for p in m.parameters()}
            saved = {name: saved_mb(way.forward, weights) for name, way in ways.items()}
        finally:
            for branch in tree.branches.values():
                branch.tail.checkpointing = False
    together = [t / sum(parts) for t, *parts in zip(times[ONE_PASS], *(times[n] for n in alone), strict=True)]
    low, high = median_interval(together)
    time_ratio, flops_ratio = statistics.median(together), flops[ONE_PASS] / sum(flops[n] for n in alone)
    found = {name: latency_of(own, times[ONE_PASS]) for name, own in times.items()}
    rows = [
        {
            "name": name, "splits": held[name], "gflops": flops[name] / 1e9,
            "pictures_per_s": batch_size / found[name].median_ms * 1e3, "saved_mb": saved[name],
            "working_mb": working[name], **found[name].to_dict(),
        }
        for name in calls
    ]  # fmt: skip
    return {
        "rows": rows, "batch_size": batch_size, "threads": torch.get_num_threads(), "time_ratio": time_ratio,
        "time_ratio_low": low, "time_ratio_high": high, "flops_ratio": flops_ratio, "over": time_ratio / flops_ratio,
        "cache_pays_from": first_paying_epoch(found[WRITING].ratio, found[READING].ratio),
        "cache_mb": sum(cache_bytes(1, s) for s in shapes.values()) / 2**20,
        "ridge": measure_ridge(tree, device=device),
    }  # fmt: skip


def first_paying_epoch(writing: float, reading: float) -> int | None:
    """The first epoch whose end comes sooner with a cache: ``writing + (n - 1) reading < n``; None: there is none.

    Args:
        writing, reading: time of an epoch that fills the cache and of one that reads it, over that of one without. The
            first does more work than one without, so below 1 it is taken as 1.
    """
    return None if reading >= 1 else int((max(writing, 1.0) - reading) / (1 - reading)) + 1


@torch.no_grad()
def measure_ridge(tree: VSTEncoder, *, device: torch.device | str = "cpu", repeats: int = 16) -> list[dict[str, Any]]:
    """Time the closed-form map of patch tokens of one stitch of every branch, on random tokens of its widths.

    Returns:
        By branch: ``branch``, ``widths``, ``seconds_per_million`` tokens, ``solve_s``, ``sums_mb`` (all that is
        kept, however many tokens), ``gflops_per_s`` (achieved in the sums).
    """
    found = []
    for b in tree.config.branches:
        reads = max(len(b.reads(split)) for split in b.splits)
        widths = (reads * tree.config.trunk.width, b.spec.width)
        x, y = (torch.randn(_RIDGE_ROWS, width, device=device) for width in widths)
        sums = RidgeSums()
        times = timed_rounds({"update": partial(sums.update, x, y)}, repeats=repeats, device=device)
        solving = timed_rounds({"solve": partial(sums.solve, 1e-3)}, repeats=3, warmup=1, device=device)
        update_s = statistics.median(times["update"]) / 1e3
        found.append(
            {
                "branch": b.name, "widths": list(widths), "seconds_per_million": update_s / _RIDGE_ROWS * 1e6,
                "solve_s": statistics.median(solving["solve"]) / 1e3, "sums_mb": sums.nbytes() / 2**20,
                "gflops_per_s": 2 * _RIDGE_ROWS * widths[0] * sum(widths) / update_s / 1e9,
            }
        )  # fmt: skip
    return found


def random_teacher(tree: VSTEncoder) -> Teacher:
    """The frozen models of a fit whose steps are to be timed; no source is asked for weights.

    Each target's stem and the blocks before the tree's own tail are random, whatever the tail is (of a tuned tail, all
    blocks): a step takes as long, while its targets mean nothing.
    """
    grid = tree.config.grid
    return Teacher(
        tree,
        {
            b.name: load_vfm(
                b.spec, grid=grid, pretrained=False, stop=b.stop if tails_tuned(tree) else min(b.enters), norm=False
            )
            for b in tree.config.branches
        },
    )


@dataclass(frozen=True)
class Batch:
    """Random pictures of a step.

    Attributes:
        pixels: the trunk's, ``[B, 3, S, S]``.
        own: every target's, by branch name.
    """

    pixels: Tensor
    own: Mapping[str, Tensor]

    @classmethod
    def random(cls, teacher: Teacher, size: int, device: torch.device | str) -> Batch:
        """``size`` of them."""
        side = teacher.tree.config.image_size
        sides = {n: head.image_size for n, head in teacher.heads.items()}
        own = {n: torch.randn(size, 3, s, s, device=device) for n, s in sides.items()}
        return cls(torch.randn(size, 3, side, side, device=device), own)


class FitStep:
    """One step of a fit, as :func:`vst.fit_stitches` takes it, without loading pictures.

    Args:
        teacher: the frozen models.
        batch: what every step sees.
        matcher: the stitches and their loss.
        bf16: autocast.
        model: what is called in the matcher's place, such as its wrapper for many processes.

    Attributes:
        writes, reads: caches by branch: targets are computed, kept and read back, or only read.
    """

    def __init__(self, teacher: Teacher, batch: Batch, matcher: Matcher, bf16: bool, model: Any = None) -> None:
        self.teacher, self.batch, self.bf16 = teacher, batch, bf16
        self.matcher = matcher.to(batch.pixels.device)
        self.model = self.matcher if model is None else model
        self.optimizer = torch.optim.AdamW([p for p in matcher.parameters() if p.requires_grad], lr=1e-6)
        self.writes: Mapping[str, TargetCache] = {}
        self.reads: Mapping[str, TargetCache] = {}

    def shapes(self) -> dict[str, dict[int, tuple[int, int]]]:
        """(tokens, width) of the targets by depth, by branch."""
        return {n: {d: (y.shape[1], y.shape[2]) for d, y in t.items()} for n, t in self._computed().items()}

    def forward(self) -> Tensor:
        """The loss."""
        with torch.autocast(self.batch.pixels.device.type, torch.bfloat16, enabled=self.bf16):
            taps = self.teacher.taps(self.batch.pixels, self.matcher.keys)
            return self.model(taps, self._targets()).sum()

    def step(self) -> None:
        """Forward, backward and update."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _computed(self) -> dict[str, dict[int, Tensor]]:
        names = dict.fromkeys(name for name, _ in self.matcher.keys)
        return {n: self.matcher.wanted(n, self.teacher.target(n, self.batch.own[n])) for n in names}

    def _targets(self) -> dict[str, dict[int, Tensor]]:
        if not self.writes and not self.reads:
            return self._computed()
        rows: Sequence[int] = range(len(self.batch.pixels))
        if self.writes:
            for n, found in self._computed().items():
                self.writes[n].write(rows, found)
        return {n: c.read(rows, self.batch.pixels.device) for n, c in (self.reads or self.writes).items()}
