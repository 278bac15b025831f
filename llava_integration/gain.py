"""The share of the two-model gain that a cheaper tower keeps, and when there is no such thing to speak of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gain:
    """What both models in full gain over one, and how much of it a tower keeps.

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
) -> Gain:
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
    gain, error = statistics.mean(gains), _error(gains)
    if gain <= noise or (error is not None and gain <= 2 * error):
        return Gain(gain, error, None, None, noise, len(seeds))
    spread = _error(kept)
    return Gain(gain, error, statistics.mean(kept) / gain, None if spread is None else spread / gain, noise, len(seeds))


def _error(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
