"""The share of the two-model gain that a cheaper tower keeps, and when there is no such thing to speak of.

Two uncertainties are told apart. :func:`share_of_gain` has one score a seed and tells how the share varies with the
training; :func:`bootstrap_share_of_gain` has what each test picture adds to a score and tells how it varies with those.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShareOverSeeds:
    """What both models in full gain over one, and how much of it a tower keeps, with errors over seeds.

    Attributes:
        gain: mean over seeds of score(full) - score(one).
        gain_error: standard error of that mean; None with one seed.
        share: mean of score(tower) - score(one), over ``gain``; None where the gain cannot be told from zero.
        share_error: standard error of the share, the gain taken as it is; None with one seed.
        noise: that the gain had to exceed beside twice its own error.
        seeds: over which.
    """

    gain: float
    gain_error: float | None
    share: float | None
    share_error: float | None
    noise: float
    seeds: int

    def __str__(self) -> str:
        if self.share is None:
            sure = "" if self.gain_error is None else f" +- {100 * self.gain_error:.1f}"
            noise = f" (noise {100 * self.noise:.1f})" if self.noise else ""
            return f"gain {100 * self.gain:+.1f}{sure}{noise}: not distinguishable from zero"
        sure = "" if self.share_error is None else f" +- {100 * self.share_error:.0f}"
        return f"{100 * self.share:.0f} %{sure}"


def share_of_gain(
    tower: Mapping[int, float], one: Mapping[int, float], full: Mapping[int, float], *, noise: float = 0.0
) -> ShareOverSeeds:
    """(score(tower) - score(one)) / (score(full) - score(one)), paired by seed.

    The gain counts as one where it exceeds twice its standard error over seeds, and ``noise`` in any case; a ratio over
    a gain within noise would be any number.

    Args:
        tower, one, full: scores (0..1, higher is better) by seed; seeds that not all three have are left out.
        noise: what a score is uncertain by for other reasons, such as a finite number of questions (two standard
            errors of a difference).

    Raises:
        ValueError: no seed in common.
    """
    seeds = sorted(set(tower) & set(one) & set(full))
    if not seeds:
        raise ValueError(
            f"The tower was scored with seeds {sorted(tower)}, one model with {sorted(one)} and both in full with "
            f"{sorted(full)}; expected at least one seed in common."
        )
    gains, kept = [full[s] - one[s] for s in seeds], [tower[s] - one[s] for s in seeds]
    gain, error = statistics.mean(gains), _standard_error(gains)
    if gain <= noise or (error is not None and gain <= 2 * error):
        return ShareOverSeeds(gain, error, None, None, noise, len(seeds))
    spread = _standard_error(kept)
    return ShareOverSeeds(
        gain, error, statistics.mean(kept) / gain, None if spread is None else spread / gain, noise, len(seeds)
    )


def _standard_error(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class ShareOverPictures:
    """A gain and the share of it that a tower keeps, with 95 % intervals of a bootstrap over test pictures.

    Attributes:
        gain, gain_low, gain_high: mean over seeds of score(full) - score(one).
        share, low, high: of that gain; None where the gain's interval reaches zero.
    """

    gain: float
    gain_low: float
    gain_high: float
    share: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.share is None or self.low is None or self.high is None:
            interval = f"{100 * self.gain_low:+.1f} .. {100 * self.gain_high:+.1f}"
            return f"gain {100 * self.gain:+.1f} ({interval}): not distinguishable from zero"
        return f"{100 * self.share:.0f} % ({100 * self.low:.0f} .. {100 * self.high:.0f})"


def bootstrap_share_of_gain(
    tower: Sequence[np.ndarray],
    one: Sequence[np.ndarray],
    full: Sequence[np.ndarray],
    score: Callable[[np.ndarray], np.ndarray],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> ShareOverPictures:
    """(score(tower) - score(one)) / (score(full) - score(one)) with its uncertainty from the finite test set.

    Test pictures are drawn with replacement, the same ones for all three towers, within each seed; scores are averaged
    over seeds. The interval holds the middle 95 % of the draws (percentile bootstrap, Efron 1979). What varies with
    the training pictures is not in it: that is the spread over seeds.

    Args:
        tower, one, full: one array a seed, ``[pictures, ...]``: counts by picture, whose sum tells a score.
        score: of summed counts ``[draws, ...]``, one a draw.
        draws: of the bootstrap. seed: of the draws.

    Raises:
        ValueError: towers with other seeds or other pictures.
    """
    shapes = [[counts.shape for counts in part] for part in (tower, one, full)]
    if not (shapes[0] == shapes[1] == shapes[2]) or not shapes[0]:
        raise ValueError(
            f"Counts of the towers have the shapes {shapes}; expected the same pictures and seeds for all."
        )
    rng, sampled, exact = np.random.default_rng(seed), np.zeros((3, draws)), np.zeros(3)
    for parts in zip(tower, one, full, strict=True):
        pictures = len(parts[0])
        weights = rng.multinomial(pictures, np.full(pictures, 1 / pictures), size=draws).astype(float)
        for i, counts in enumerate(parts):
            whole = counts.reshape(pictures, -1).astype(float)
            sampled[i] += score((weights @ whole).reshape(draws, *counts.shape[1:])) / len(tower)
            exact[i] += score(whole.sum(0).reshape(1, *counts.shape[1:]))[0] / len(tower)
    gains, kept = sampled[2] - sampled[1], sampled[0] - sampled[1]
    gain, (gain_low, gain_high) = float(exact[2] - exact[1]), _middle_95(gains)
    if gain_low <= 0:
        return ShareOverPictures(gain, gain_low, gain_high, None, None, None)
    # In the few draws without a gain the ratio has no meaning: the floor moves them beyond either end.
    low, high = _middle_95(kept / np.maximum(gains, gain / 1000))
    return ShareOverPictures(gain, gain_low, gain_high, float((exact[0] - exact[1]) / gain), low, high)


def _middle_95(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
