"""A training stops at the first loss, gradient or weight that is not finite: what comes after it is of no use.

With a loss scale (fp16) a gradient that overflows belongs to the search for the scale: the step is skipped, and no
weight changes. That goes on until the scale has fallen below 1; a loss that is not finite is never the scale's doing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_integration.train.checkpoints import COMPLETE
from vst.models.finite import not_finite

if TYPE_CHECKING:
    from llava_integration.train.trainer import MLLMTrainer


class NotFinite(RuntimeError):
    """A training met a loss, a gradient or a weight that is not finite."""


class StopAtNonFinite(TrainerCallback):
    """Looks at losses, gradients and trained weights of all processes, and stops all of them.

    Args:
        trainer: whose training is watched.
    """

    def __init__(self, trainer: MLLMTrainer) -> None:
        self.trainer = trainer
        self._bad_loss: Tensor | None = None

    def see(self, loss: Tensor) -> None:
        """Note a loss; it is looked at before the optimizer's step."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if bad := self._not_finite_weights():
            raise NotFinite(
                f"The model to be trained holds values that are not finite in {bad}: its weights are damaged, load "
                "them from elsewhere."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, bad_loss = state.global_step + 1, self._bad_loss
        self._bad_loss = None
        gradients = self._gradients()
        seen = _any_not_finite(gradients.values())
        device = self.trainer.args.device
        flags = torch.stack([torch.zeros((), device=device), torch.zeros((), device=device)])
        flags[0] = 0 if bad_loss is None else bad_loss
        flags[1] = 0 if seen is None else seen
        if _several():
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        loss, gradient = flags.bool().tolist()
        if loss:
            raise NotFinite(self._sentence("The loss", step))
        if (gradient or self._engine_overflow()) and not self._scale_searched():
            names = not_finite(gradients)
            raise NotFinite(self._sentence(f"The gradient{_of(names)}", step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(float(logs["loss"])):
            raise NotFinite(self._sentence("The loss", state.global_step))
        # A norm can overflow where no gradient does; such a step was clipped to nothing.
        if not math.isfinite(float(logs.get("grad_norm") or 0.0)) and not self._scale_searched():
            raise NotFinite(self._sentence("The norm of the gradient", state.global_step))

    def check_weights(self) -> None:
        """See that every trained weight is finite, before anything is saved; every process calls this.

        Raises:
            NotFinite: one is not.
        """
        if bad := self._not_finite_weights():
            raise NotFinite(self._sentence(f"A weight ({bad})", self.trainer.state.global_step))

    def _gradients(self) -> dict[str, Tensor]:
        """By name; none under DeepSpeed, which keeps its own."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    def _engine_overflow(self) -> bool:
        """Whether DeepSpeed, which has made its step already, met a gradient that is not finite; alike in all."""
        engine: Any = self.trainer.deepspeed
        if engine is None:
            return False
        norm = engine.get_global_grad_norm()
        overflow = bool(getattr(engine.optimizer, "overflow", False))
        return overflow or (norm is not None and not math.isfinite(float(norm)))

    def _scale_searched(self) -> bool:
        """Whether a loss scale is there that can still be lowered; DeepSpeed itself stops at the lowest."""
        engine: Any = self.trainer.deepspeed
        if engine is not None:
            return bool(engine.fp16_enabled())
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() >= 1

    def _not_finite_weights(self) -> str:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        # Under ZeRO-3 a parameter is in pieces, of which each process has one.
        held = {n: getattr(p, "ds_tensor", p).detach() for n, p in model.named_parameters() if p.requires_grad}
        names = not_finite(held)
        if _several():
            parts: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, names)
            names = sorted({name for part in parts for name in part})
        return _listed(names)

    def _sentence(self, what: str, step: int) -> str:
        args = self.trainer.args
        whole = [p for p in Path(str(args.output_dir)).glob("checkpoint-*") if (p / COMPLETE).is_file()]
        newest = max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
        kept = "no checkpoint had been saved" if newest is None else f"the checkpoint {newest} is kept"
        clip = "" if args.max_grad_norm > 0 else ", and give trainer.max_grad_norm, which is 0, such as 1.0"
        return (
            f"{what} is not finite at step {step} of {self.trainer.state.max_steps}, so the training stopped and no "
            f"model was written; {kept}. Give a lower trainer.learning_rate (it is {args.learning_rate:g}){clip}, or "
            "look for damaged data, and start again with --overwrite."
        )


def _any_not_finite(tensors: Iterable[Tensor]) -> Tensor | None:
    """Whether any is not finite, without waiting for the device: a sum holds what its parts hold."""
    sums = [t.sum(dtype=torch.float32) for t in tensors]
    return ~torch.isfinite(torch.stack([s.to(sums[0].device) for s in sums])).all() if sums else None


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _of(names: list[str]) -> str:
    return f" of {_listed(names)}" if names else ""
