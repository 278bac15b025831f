"""The losses of a fit, as they stand in its history."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vst.fit.similarity import Agreement

RISE = 1.1  # of a loss, beyond what one batch differs from the next
DRIFT = 0.5  # of a trunk's own features, by channel; 1 is what their mean would be off by


class Window:
    """Mean losses since the last row of the history.

    Args:
        labels: names of the losses, in their order.
        stitches: the first so many are the stitches'.
    """

    def __init__(self, labels: list[str], stitches: int) -> None:
        self.labels, self.stitches, self.sum, self.count = labels, stitches, torch.zeros(len(labels)), 0
        self._bad = torch.zeros((), dtype=torch.int64)  # first step of which a loss was not finite; 0: none

    def add(self, losses: torch.Tensor, step: int) -> None:
        """Add a step's ``[labels]``; nothing waits for the device."""
        self.sum, self.count = self.sum.to(losses.device) + losses, self.count + 1
        bad = self._bad.to(losses.device)
        self._bad = torch.where((bad == 0) & ~torch.isfinite(losses).all(), step, bad)

    def mean(self, accelerator: Any) -> dict[str, float]:
        """Over all processes, of all stitches (``mean``) and by label; then begin anew.

        Raises:
            RuntimeError: one is not finite.
        """
        *total, count = self.pending(accelerator)
        means = {label: value / max(count, 1) for label, value in zip(self.labels, total, strict=True)}
        self.sum, self.count = torch.zeros(len(self.labels)), 0
        return {"mean": sum(list(means.values())[: self.stitches]) / self.stitches, **means}

    def pending(self, accelerator: Any) -> list[float]:
        """Sums over all processes and the count, as they stand: what a state holds of steps that have no row yet.

        Raises:
            RuntimeError: one is not finite.
        """
        both = torch.cat(
            [self.sum.to(accelerator.device), torch.tensor([float(self.count)], device=accelerator.device)]
        )
        found = accelerator.reduce(both, reduction="sum").tolist()
        bad = [label for label, value in zip(self.labels, found, strict=False) if not math.isfinite(value)]
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


def warn_of_rise(history: Sequence[Mapping[str, float]]) -> None:
    """Say so when a fit ends above where its closed form began; the first row is that of the first step alone."""
    first, last = history[0], history[-1]
    if first["step"] == 1 and last["mean"] > RISE * first["mean"]:
        warnings.warn(
            f"The loss ended at {last['mean']:.3f} after {last['step']:.0f} steps, above the {first['mean']:.3f} of "
            "its first step, where the closed form began: train for more steps, or with a lower lr (and tune.lr).",
            stacklevel=2,
        )


def warn_of_drift(own: Agreement | None) -> None:
    """Say so when a tuned trunk's own features have moved far from the published model's."""
    if own is not None and own.channel_error > DRIFT:
        warnings.warn(
            f"The tuned trunk's own features are off the published model's by {own.channel_error:.2f} by channel (1: "
            "no better than their mean), so what reads them loses much: more pictures, a lower tune.lr or a higher "
            "tune.own keep them.",
            stacklevel=2,
        )
