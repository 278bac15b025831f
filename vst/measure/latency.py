"""Measured latency: interleaved repeats, so that a drifting machine hits all candidates alike.

Absolute times belong to the machine they were taken on; ratios, pair by pair against a reference, carry further.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from vst.fit.heldout import check_tree
from vst.fit.precision import usable_device
from vst.measure.cost import full_cost, model_cost, tree_cost
from vst.measure.execution import runner
from vst.measure.memory import working_mb
from vst.measure.overlap import Overlapped
from vst.models.fields import Limits, checked, dtype_of, whole
from vst.results.progress import progress
from vst.tree.baseline import FullEncoders
from vst.tree.encoder import VSTEncoder

MOST_BATCH: Limits = (1, 2**20)
ALL_IN_FULL = "all in full"
"""Name of the tower of every model in full, one after another: the reference of all ratios."""


@dataclass(frozen=True)
class Latency:
    """Of one candidate.

    Attributes:
        median_ms, low_ms, high_ms: median and quartiles of a call, in milliseconds.
        ratio, ratio_low, ratio_high: median and quartiles of time over the reference's time in the same round.
        ratio_sure_low, ratio_sure_high: interval that holds the true median of that ratio with at least 95 %
            (between order statistics, from the binomial distribution: free of assumptions on how times scatter); the
            extremes where fewer than six rounds cannot give one.
        repeats: rounds.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_sure_low: float
    ratio_sure_high: float
    repeats: int

    def to_dict(self) -> dict[str, float]:
        """Plain dict."""
        return asdict(self)


@torch.no_grad()
def measure(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    reference: str,
    repeats: int = 15,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    show_progress: bool = False,
) -> dict[str, Latency]:
    """Time every candidate once a round, in an order that rotates from round to round, without gradients.

    Args:
        candidates: calls by name.
        reference: the candidate that ratios are taken against.
        repeats, warmup: counted and uncounted rounds.
        device: synchronised before the clock is read.
        show_progress: a bar with the time left.

    Raises:
        ValueError: the reference is not a candidate, or there is nothing to repeat.
    """
    if reference not in candidates:
        raise ValueError(f"reference is {reference!r}; expected one of {list(candidates)}.")
    times = timed_rounds(candidates, repeats=repeats, warmup=warmup, device=device, show_progress=show_progress)
    return {name: latency_of(own, times[reference]) for name, own in times.items()}


def timed_rounds(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 15,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    show_progress: bool = False,
    title: str = "latency",
) -> dict[str, list[float]]:
    """Call every candidate once a round: the times behind :func:`measure`, in milliseconds, round by round.

    Raises:
        ValueError: there is nothing to repeat.
    """
    repeats, warmup = whole(repeats, "repeats", (1, None)), whole(warmup, "warmup", (0, None))
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    with progress(title, (repeats + warmup) * len(names), show_progress) as bar:
        for round_ in range(-warmup, repeats):
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                _synchronise(device)
                began = time.perf_counter()
                candidates[name]()
                _synchronise(device)
                if round_ >= 0:
                    times[name].append((time.perf_counter() - began) * 1e3)
                bar.step(name)
    return times


def latency_of(times: list[float], reference: list[float]) -> Latency:
    """Medians and spreads of times (ms) and of their ratios to the reference's times of the same rounds."""
    ratios = [t / r for t, r in zip(times, reference, strict=True)]
    (low, mid, high), (rlow, rmid, rhigh) = _quartiles(times), _quartiles(ratios)
    return Latency(mid, low, high, rmid, rlow, rhigh, *median_interval(ratios), len(times))


def median_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a median: the tightest symmetric pair of order statistics with at least ``level``.

    The number of values below the median is binomial(n, 1/2), so the pair (k + 1, n - k) in order covers it with
    1 - 2 P(X <= k) (Conover, Practical Nonparametric Statistics, on quantiles).
    """
    ordered, n = sorted(values), len(values)
    k, below = 0, 0.5**n
    while k + 1 < n / 2 and 1 - 2 * (below + math.comb(n, k + 1) * 0.5**n) >= level:
        k += 1
        below += math.comb(n, k) * 0.5**n
    return ordered[k], ordered[n - 1 - k]


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high


def _synchronise(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def measure_tree(
    tree: VSTEncoder,
    *,
    batch_size: int = 1,
    repeats: int = 15,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    execution: str = "eager",
    full: FullEncoders | None = None,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Time a tree at every split, each of its models alone, and all of them in full, one after another.

    The full models carry random weights where none are given: time does not depend on them.

    Args:
        tree: which.
        batch_size: pictures a call.
        repeats: counted rounds.
        device: of all towers.
        dtype: of weights and pixels.
        execution: one of ``EXECUTIONS`` (see :mod:`vst.measure.execution`), for splits and models alone; all models in
            full are then measured both ways: eager (the reference, as towers of several encoders run today) and so.
        full: all of the tree's models in full; they are moved and cast. Default: made for this call.
        show_progress: a bar with the time left.

    Returns:
        Rows of ``name``, ``kind`` (split, single, full), ``split``, ``batch_size``, ``dtype``, ``execution``,
        ``gflops`` a picture, ``flops_ratio``, ``images_per_s``, ``gflops_per_s`` (achieved), ``peak_mb`` (the weights
        that the tower needs, and what a call holds at the most beside them: :func:`vst.measure.memory.working_mb`; None
        for compiled towers on a CPU) and the fields of :class:`Latency`; both ratios are against all models in full.
        Where the trunk's own tail is kept, ``trunk_ratio``, ``trunk_ratio_sure_low`` and ``trunk_ratio_sure_high`` are
        the same ratio of times against the trunk alone. Latencies are of one call.

    Raises:
        ValueError: bad options, a device that is not there, or models that are not all of the tree's.
    """
    check_tree(tree, "measure_tree")
    checked(full, FullEncoders | None, "full")
    batch_size = whole(batch_size, "batch_size", MOST_BATCH)
    device, dtype = usable_device(device), dtype_of(dtype)
    config = tree.config
    if full is None:
        full = FullEncoders.load(config, pretrained=False)
    elif {n: m.spec for n, m in full.models.items()} != config.specs or full.config.grid != config.grid:
        raise ValueError(
            f"full holds {list(full.models)} at a grid of {full.config.grid}; expected the tree's models, "
            f"{list(config.specs)}, at {config.grid}: FullEncoders.load(tree.config) makes them."
        )
    full = full.to(device, dtype)
    weight = next(tree.parameters())
    same = weight.dtype == dtype and weight.device.type == torch.device(device).type
    model = tree if same else copy.deepcopy(tree).to(device, dtype)  # the caller's tree keeps its device and dtype
    pixels = torch.randn(batch_size, 3, config.image_size, config.image_size, device=device, dtype=dtype)
    own_pixels = {
        n: torch.randn(batch_size, 3, m.image_size, m.image_size, device=device, dtype=dtype)
        for n, m in full.models.items()
    }
    towers: dict[str, Any] = {ALL_IN_FULL: runner(full)}
    if execution != "eager":
        towers[f"{ALL_IN_FULL}, {execution}"] = runner(full, execution)
    calls = {name: partial(tower, own_pixels) for name, tower in towers.items()}
    for n, m in full.models.items():
        name = f"{n} alone"
        towers[name] = runner(FullEncoders(config, {n: m}), execution)
        calls[name] = partial(towers[name], {n: own_pixels[n]})
    for label, s in config.choices().items():
        towers[label] = runner(model, execution)  # each its own, whose graphs need not make room for others'
        calls[label] = partial(towers[label], pixels, split=s)
    calls = {name: torch.no_grad()(call) for name, call in calls.items()}
    spent = timed_rounds(calls, repeats=repeats, device=device, show_progress=show_progress)
    times = {name: latency_of(own, spent[ALL_IN_FULL]) for name, own in spent.items()}
    trunk = spent.get(f"{config.trunk_name} alone") if config.keep_trunk else None
    costs = dict.fromkeys([name for name in towers if name.startswith(ALL_IN_FULL)], full_cost(config))
    costs |= {label: tree_cost(config, s) for label, s in config.choices().items()}
    costs |= {f"{n} alone": model_cost(m.spec, config.grid, m.stop) for n, m in full.models.items()}
    hidden = execution == "compile" and torch.device(device).type == "cpu"  # compiled code calls no operators of torch
    rows = []
    for name, tower in towers.items():
        cost, per_s = costs[name], batch_size / times[name].median_ms * 1e3
        peak = None
        if name == ALL_IN_FULL or not hidden:
            if isinstance(tower, Overlapped):  # what a graph takes at its capture stays taken: a replay would show none
                tower.forget()
            working = working_mb(calls[name], device)
            peak = cost.parameters * dtype.itemsize / 2**20 + working
        rows.append(
            {
                "name": name,
                "kind": "full" if name.startswith(ALL_IN_FULL) else "split" if name in config.choices() else "single",
                "split": config.choices().get(name),
                "batch_size": batch_size,
                "dtype": str(dtype).removeprefix("torch."),
                "execution": "eager" if name == ALL_IN_FULL else execution,
                "gflops": cost.flops / 1e9,
                "flops_ratio": cost.flops / costs[ALL_IN_FULL].flops,
                "images_per_s": per_s,
                "gflops_per_s": cost.flops / 1e9 * per_s,
                "peak_mb": peak,
                **times[name].to_dict(),
                **({} if trunk is None else _over_trunk(latency_of(spent[name], trunk))),
            }
        )
    return rows


def _over_trunk(times: Latency) -> dict[str, float]:
    return {f"trunk_{name}": getattr(times, name) for name in ("ratio", "ratio_sure_low", "ratio_sure_high")}
