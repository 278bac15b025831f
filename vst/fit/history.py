"""The losses of a fit, as they stand in its history."""

from __future__ import annotations

import math
from typing import Any

import torch


class Window:
    """Mean losses since the last row of the history.

    Args:
        keys: branch and split of every stitch, in the order of the losses.
    """

    def __init__(self, keys: list[tuple[str, int]]) -> None:
        self.keys, self.sum, self.count = keys, torch.zeros(len(keys)), 0

    def add(self, losses: torch.Tensor) -> None:
        """Add a step's ``[stitches]``."""
        self.sum, self.count = self.sum.to(losses.device) + losses, self.count + 1

    def mean(self, accelerator: Any, step: int) -> dict[str, float]:
        """Over all processes, of all stitches (``mean``) and by ``branch@split``; then begin anew.

        Raises:
            RuntimeError: one is not finite.
        """
        both = torch.cat(
            [self.sum.to(accelerator.device), torch.tensor([float(self.count)], device=accelerator.device)]
        )
        *total, count = accelerator.reduce(both, reduction="sum").tolist()
        means = {f"{n}@{s}": value / max(count, 1) for (n, s), value in zip(self.keys, total, strict=True)}
        bad = [key for key, value in means.items() if not math.isfinite(value)]
        if bad:
            raise RuntimeError(
                f"The loss of {', '.join(bad)} is not finite near step {step}: lower lr, or use precision fp32; the "
                "last saved state is kept."
            )
        self.sum, self.count = torch.zeros(len(self.keys)), 0
        return {"mean": sum(means.values()) / len(means), **means}
