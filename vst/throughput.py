"""What fitting takes: all depths in one pass against separate runs, with and without cached targets; time and FLOPs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vst.cost import flops_of
from vst.latency import median_interval, peak_mb, rounds, summary
from vst.matching import Matcher, Teacher
from vst.tree import VSTEncoder

ONE_PASS, CACHED = "all depths in one pass", "all depths, targets cached"


def measure_fit(
    tree: VSTEncoder,
    *,
    batch_size: int = 4,
    repeats: int = 7,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    checkpointing: bool = False,
    objective: str = "ffm",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Time steps of a fit (forward, backward, AdamW) on pictures that are in memory, every way once a round.

    Args:
        tree: whose stitches would be fitted; they are changed.
        batch_size: pictures a step.
        repeats: counted rounds.
        device: of the models.
        bf16: autocast, as a fit does on a GPU.
        checkpointing: recompute the tails' activations in the backward pass.
        objective: ffm or lfm.
        show_progress: a bar with the time left.

    Returns:
        ``rows``, one a way: ``name``, ``splits``, ``gflops`` a step, ``pictures_per_s``, ``saved_mb``
        (activations kept for the backward pass), ``peak_mb`` (allocated on a GPU in a step; None on a CPU) and the
        fields of :class:`vst.latency.Latency` against all depths in one pass;
        ``time_ratio`` and ``flops_ratio`` of one pass over the sum of separate runs (with ``time_ratio_low`` and
        ``time_ratio_high``, a 95 % interval of the median); ``over``, the first over the second: what one pass loses
        against arithmetic; ``cached_ratio``, time with cached targets over time without (reading them not counted).

    Raises:
        ValueError: a tree with fewer than two splits that all branches hold.
    """
    config = tree.config
    if len(config.splits) < 2:
        raise ValueError(f"The tree holds the splits {config.splits}; expected at least two, to compare one pass with.")
    teacher = Teacher(tree).to(torch.device(device))
    names = list(tree.branches)
    pixels = torch.randn(batch_size, 3, config.image_size, config.image_size, device=device)
    sizes = {n: teacher.heads[n].image_size for n in names}
    own = {n: torch.randn(batch_size, 3, sizes[n], sizes[n], device=device) for n in names}

    def way(splits: Sequence[int], cached: bool = False) -> _Way:
        matcher = Matcher(teacher, objective, splits=splits).to(device)
        optimizer = torch.optim.AdamW([p for p in matcher.parameters() if p.requires_grad], lr=1e-6)

        def targets() -> dict[str, dict[int, torch.Tensor]]:
            return {n: matcher.wanted(n, teacher.target(n, own[n])) for n in names}

        kept = targets() if cached else None

        def forward() -> torch.Tensor:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                return matcher(teacher.taps(pixels, matcher.keys), targets() if kept is None else kept).sum()

        def step() -> None:
            forward().backward()
            optimizer.step()
            optimizer.zero_grad()

        return _Way(forward, step)

    alone = {f"split {s} alone": way([s]) for s in config.splits}
    ways = {ONE_PASS: way(config.splits), CACHED: way(config.splits, cached=True), **alone}
    calls = {name: one.step for name, one in ways.items()}
    held = {ONE_PASS: config.splits, CACHED: config.splits} | {f"split {s} alone": [s] for s in config.splits}
    for branch in tree.branches.values():
        branch.tail.checkpointing = checkpointing
    try:
        flops = {name: flops_of(call) for name, call in calls.items()}
        times = rounds(calls, repeats=repeats, warmup=1, device=device, show_progress=show_progress, title="fit steps")
        peaks = {name: peak_mb(call, device) for name, call in calls.items()}
        weights = {p.untyped_storage().data_ptr() for m in (tree, *teacher.heads.values()) for p in m.parameters()}
        saved = {name: _saved_mb(one.forward, weights) for name, one in ways.items()}
    finally:
        for branch in tree.branches.values():
            branch.tail.checkpointing = False
    together = [t / sum(parts) for t, *parts in zip(times[ONE_PASS], *(times[n] for n in alone), strict=True)]
    low, high = median_interval(together)
    time_ratio, flops_ratio = statistics.median(together), flops[ONE_PASS] / sum(flops[n] for n in alone)
    rows = []
    for name in calls:
        found = summary(times[name], times[ONE_PASS])
        rows.append(
            {
                "name": name, "splits": held[name], "gflops": flops[name] / 1e9,
                "pictures_per_s": batch_size / found.median_ms * 1e3, "saved_mb": saved[name],
                "peak_mb": peaks[name], **found.to_dict(),
            }
        )  # fmt: skip
    return {
        "rows": rows, "batch_size": batch_size, "time_ratio": time_ratio, "time_ratio_low": low,
        "time_ratio_high": high, "flops_ratio": flops_ratio, "over": time_ratio / flops_ratio,
        "cached_ratio": next(r["ratio"] for r in rows if r["name"] == CACHED),
    }  # fmt: skip


class _Way(NamedTuple):
    forward: Callable[[], torch.Tensor]
    step: Callable[[], None]


def _saved_mb(forward: Callable[[], torch.Tensor], weights: set[int]) -> float:
    """Memory that autograd holds between a forward and its backward pass, weights not counted."""
    held: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward()
    del loss
    return sum(held.values()) / 2**20
