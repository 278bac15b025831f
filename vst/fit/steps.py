"""The optimisation steps of a fit, on one process' share of the pictures or on all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vst.data.images import ImageTransform
from vst.fit.config import FitConfig, rate_factor
from vst.fit.matching import Matcher
from vst.fit.processes import check_engine
from vst.fit.targets import Targets
from vst.fit.teacher import TRUNK_PIXELS, Teacher
from vst.fit.tuning import Tuning
from vst.models.finite import not_finite, some
from vst.tree.encoder import VSTEncoder


class Steps:
    """What is trained, its optimizer, and a step of it.

    Args:
        accelerator: of the processes.
        config: of the fit.
        teacher: the frozen models.
        matcher: what is trained, and its loss; moved to the accelerator's device.
        pictures: how a picture becomes each model's pixels, by name.
        bf16: whether models run under bf16 autocast.
    """

    def __init__(
        self,
        accelerator: Any,
        config: FitConfig,
        teacher: Teacher,
        matcher: Matcher,
        pictures: Mapping[str, ImageTransform],
        *,
        bf16: bool,
    ) -> None:
        self.accelerator, self.config, self.teacher, self.matcher = accelerator, config, teacher, matcher
        self.targets, self._pictures, self._bf16 = Targets(teacher, matcher), pictures, bf16
        groups: list[dict[str, Any]] = [
            {"params": [p for p in matcher.stitches.parameters() if p.requires_grad], "lr": config.lr}
        ]
        if matcher.tuning is not None:
            groups.append({"params": list(matcher.tuning.parameters()), "lr": config.tune.lr})
        self._peaks = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        self.model, self.optimizer = accelerator.prepare(matcher.to(accelerator.device), optimizer)
        check_engine(config, self.model)

    def set_rate(self, step: int, steps: int) -> float:
        """Set the learning rates of one step of so many; returns the stitches'."""
        factor = rate_factor(step, steps, self.config.warmup)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return self._peaks[0] * factor

    def step(self, pixels: Mapping[str, Tensor], rows: list[int]) -> Tensor | None:
        """One step on this process' share.

        Args:
            pixels: of the pictures that could be read, by name. rows: their numbers.

        Returns:
            Losses ``[labels]``; None where this process had no readable picture (another may have had one).
        """
        accelerator = self.accelerator
        world, share = accelerator.num_processes, 1.0
        if world > 1:  # shares may differ (skipped pictures, a short last batch): weigh them by their pictures
            counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
            if not sum(counts):
                return None
            share = len(rows) * world / sum(counts)
        elif not rows:
            return None
        if rows:
            with self._autocast():
                seen, wanted = self._seen(pixels), self.targets.of(pixels, rows, accelerator.device)
        else:
            seen, wanted = self._blank()
        with self._autocast():
            losses = self.model(seen, wanted)
        accelerator.backward(self.matcher.total(losses) * share)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.detach() if rows else None

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """While open, models that a gradient goes through recompute their activations, where the config says so."""
        tree = self.teacher.tree
        models = [tree.trunk, *(branch.tail for branch in tree.branches.values())]
        for model in models:
            model.checkpointing = self.config.checkpointing
        try:
            yield
        finally:
            for model in models:
                model.checkpointing = False

    def _autocast(self) -> Any:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self._bf16)

    def _seen(self, pixels: Mapping[str, Tensor]) -> Any:
        """What the loss is computed from: the frozen trunk's tokens, or pixels where the trunk is tuned."""
        trunk = pixels[TRUNK_PIXELS]
        return trunk if self.matcher.tunes_trunk else self.teacher.taps(trunk)

    @torch.no_grad()
    def _blank(self) -> tuple[Any, Any]:
        """Stand-ins for a process without a readable picture: it takes part in the exchange of gradients, times 0."""
        device = self.accelerator.device
        pixels = {n: torch.zeros(1, 3, t.size, t.size, device=device) for n, t in self._pictures.items()}
        with self._autocast():
            return self._seen(pixels), self.targets.computed(pixels)


def check_finite(tree: VSTEncoder, tuning: Tuning | None, step: int) -> None:
    """Before what is trained is saved: an update can overflow after the last look at a loss. Alike in all processes.

    Raises:
        RuntimeError: a stitch, or what is tuned, holds weights that are not finite.
    """
    stitches = tree.stitches().items()
    bad = [f"{name}@{split}" for (name, split), stitch in stitches if not_finite(stitch.state_dict())]
    if tuning is not None and (off := not_finite(tuning.state_dict())):
        bad.append(f"what is tuned ({some(off)})")
    if bad:
        raise RuntimeError(
            f"The weights of {', '.join(bad)} are not finite after step {step}: lower lr, or use precision fp32; "
            "the last saved state is kept."
        )
