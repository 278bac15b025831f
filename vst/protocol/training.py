"""One training loop for every stage and head, so that none is favoured: same optimiser, same choice of rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vst.fit.config import rate_factor
from vst.protocol.config import TrainConfig
from vst.results.progress import progress


@dataclass(frozen=True)
class Trained:
    """What a stage did.

    Attributes:
        rate: learning rate that was chosen. trials: validation loss by rate after the trial (empty for a single rate).
        epochs: passes that were made. best: epoch whose weights were kept (0: the start).
        history: rows of ``epoch``, ``train`` and ``validation`` loss.
        seconds: with trials and validation.
    """

    rate: float
    epochs: int
    best: int
    seconds: float
    trials: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


class LossNotFinite(RuntimeError):
    """Training met a loss that is not finite."""


@dataclass(frozen=True)
class Trainer:
    """Trains a module's free parameters.

    Attributes:
        module: in place.
        loss: mean loss of pictures, given by row.
        train, validation: rows.
        config: how. epochs: at most.
        seed: of the order.
        title: for progress and errors.
        show: progress.
    """

    module: nn.Module
    loss: Callable[[Sequence[int]], Tensor]
    train: Sequence[int]
    validation: Sequence[int]
    config: TrainConfig
    epochs: int
    seed: int
    title: str
    show: bool = True

    def run(self) -> Trained:
        """Choose a rate, train, keep the best epoch.

        Raises:
            LossNotFinite: at the start, with every rate in the trials, or in training.
        """
        began = time.monotonic()
        rates = self.config.rates
        per_epoch = -(-len(self.train) // self.config.batch_size)
        trials = {f"{rate:g}": self._trial(rate) for rate in rates} if len(rates) > 1 else {}
        finite = {rate: value for rate, value in trials.items() if math.isfinite(value)}
        if trials and not finite:
            raise LossNotFinite(
                f"{self.title}: the loss is not finite with any of the rates {rates}; give lower rates, or precision "
                "fp32; finished rows are kept."
            )
        rate = float(min(finite, key=lambda r: finite[r])) if trials else rates[0]
        best, kept = self._validate(), self._weights()
        if not math.isfinite(best):  # no epoch would be better than it, and the start would be kept without a word
            raise LossNotFinite(
                f"{self.title}: the loss is not finite before any step; give precision fp32, or look for broken "
                "weights; finished rows are kept."
            )
        history = [{"epoch": 0.0, "validation": best}]
        best_epoch, epoch, step = 0, 0, 0
        optimizer = self._optimizer(rate)
        with progress(self.title, self.epochs * per_epoch, self.show) as bar:
            for epoch in range(1, self.epochs + 1):
                total = 0.0
                for step, rows in enumerate(self._batches(epoch), start=(epoch - 1) * per_epoch):
                    total += self._step(optimizer, rate, step, self.epochs * per_epoch, rows) * len(rows)
                    if not math.isfinite(total):
                        break
                    bar.step(f"loss {total / len(self.train):.4f}" if (step + 1) % per_epoch == 0 else "")
                value = self._validate()
                history.append({"epoch": float(epoch), "train": total / len(self.train), "validation": value})
                if not math.isfinite(total) or not math.isfinite(value):
                    raise LossNotFinite(
                        f"{self.title}: the loss is not finite in epoch {epoch}, by step {step + 1}, at rate {rate:g}; "
                        "give lower rates, or precision fp32; finished rows are kept."
                    )
                if value < best:
                    best, best_epoch, kept = value, epoch, self._weights()
                elif epoch - best_epoch >= self.config.patience:
                    break
        self._restore(kept)
        return Trained(rate, epoch, best_epoch, time.monotonic() - began, trials, history)

    def _trial(self, rate: float) -> float:
        start = self._weights()
        optimizer, steps, done = self._optimizer(rate), self.config.trial_steps, 0
        while done < steps:
            for rows in self._batches(0)[: steps - done]:
                self._step(optimizer, rate, done, steps, rows)
                done += 1
        value = self._validate(self.config.trial_pictures)
        self._restore(start)
        return value

    def _step(self, optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int, rows: Sequence[int]) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(step, steps, self.config.warmup)
        loss = self.loss(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def _validate(self, limit: int | None = None) -> float:
        rows, size = list(self.validation[:limit]), self.config.batch_size
        parts = [rows[at : at + size] for at in range(0, len(rows), size)]
        return sum(float(self.loss(part)) * len(part) for part in parts) / len(rows)

    def _batches(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator).tolist()
        size = self.config.batch_size
        return [[self.train[i] for i in order[at : at + size]] for at in range(0, len(order), size)]

    def _optimizer(self, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._free(), lr=rate, weight_decay=self.config.weight_decay)

    def _free(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def _weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._free()]

    @torch.no_grad()
    def _restore(self, weights: Sequence[Tensor]) -> None:
        for p, value in zip(self._free(), weights, strict=True):
            p.copy_(value)
