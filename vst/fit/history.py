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
        self._bad = torch.zeros((), dtype=torch.int64)  # first step of which a loss was not finite; 0: none

    def add(self, losses: torch.Tensor, step: int) -> None:
        """Add a step's ``[stitches]``; nothing waits for the device."""
        self.sum, self.count = self.sum.to(losses.device) + losses, self.count + 1
        bad = self._bad.to(losses.device)
        self._bad = torch.where((bad == 0) & ~torch.isfinite(losses).all(), step, bad)

    def mean(self, accelerator: Any) -> dict[str, float]:
        """Over all processes, of all stitches (``mean``) and by ``branch@split``; then begin anew.

        Raises:
            RuntimeError: one is not finite.
        """
        *total, count = self.pending(accelerator)
        means = {f"{n}@{s}": value / max(count, 1) for (n, s), value in zip(self.keys, total, strict=True)}
        self.sum, self.count = torch.zeros(len(self.keys)), 0
        return {"mean": sum(means.values()) / len(means), **means}

    def pending(self, accelerator: Any) -> list[float]:
        """Sums over all processes and the count, as they stand: what a state holds of steps that have no row yet.

        Raises:
            RuntimeError: one is not finite.
        """
        both = torch.cat(
            [self.sum.to(accelerator.device), torch.tensor([float(self.count)], device=accelerator.device)]
        )
        found = accelerator.reduce(both, reduction="sum").tolist()
        bad = [f"{n}@{s}" for (n, s), value in zip(self.keys, found, strict=False) if not math.isfinite(value)]
        if bad:
            steps = accelerator.gather(self._bad.to(accelerator.device).reshape(1))
            raise RuntimeError(
                f"The loss of {', '.join(bad)} is not finite at step {int(steps[steps > 0].min())}: lower lr, or use "
                "precision fp32; the last saved state is kept."
            )
        return found

    def restore(self, pending: list[float]) -> None:
        """Go on from what :meth:`pending` gave; one process does so, for all."""
        self.sum, self.count = torch.tensor(pending[:-1]), int(pending[-1])
