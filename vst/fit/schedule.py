"""The learning rate over the steps of a training: the same for fits and for the protocol."""

from __future__ import annotations

import math


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak rate at ``step`` of ``steps``: linear warm-up over a share of them, then a cosine to zero."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))
