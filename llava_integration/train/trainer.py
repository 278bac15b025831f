"""transformers' Trainer with what a frozen tower asks for: small checkpoints, a split drawn for each step, progress."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from llava_integration.train.checkpoints import SECONDS, finish_checkpoint, spent_before
from llava_integration.train.config import TuneConfig
from llava_integration.train.finite import StopAtNonFinite
from llava_integration.train.sampling import GroupedByLength
from llava_integration.train.tuning import groups
from vst.results.folders import atomic_path, read_json, write_json
from vst.results.progress import Progress
from vst.results.room import room_for
from vst.tree.splits import Split

TRAINED, SKIPPED = "trained.safetensors", "skipped.json"
_MAKE_ROOM = "make room and call again with --resume, which goes on from the last checkpoint that was saved"


class MLLMTrainer(Trainer):
    """Trains a LLaVA model whose tower is a tree.

    Checkpoints hold the trained parameters and the state of the optimizer, not the frozen weights (DeepSpeed writes its
    own, whole). Pictures that were skipped are collected in ``skipped``. The first loss, gradient or trained weight
    that is not finite ends the training (:class:`llava_integration.train.finite.NotFinite`), before anything is saved.

    Args:
        tune: what is trained (the model is prepared for it already).
        splits: to draw from at each step, the same in all processes; empty leaves the tower's split alone.
        title: of the progress.
        others: arguments of ``transformers.Trainer``.
    """

    def __init__(
        self, *, tune: TuneConfig, splits: Sequence[Split] = (), title: str = "training", **others: Any
    ) -> None:
        self.tune, self.skipped = tune, {}  # type: ignore[var-annotated]
        self._began, self._before = time.monotonic(), 0.0
        super().__init__(**others)
        if self.args.label_smoothing_factor:
            self.compute_loss_func = _Smoothed(self.args.label_smoothing_factor)
        self.remove_callback(PrinterCallback)
        self.finite = StopAtNonFinite(self)
        self.add_callback(self.finite)
        self.add_callback(_Watch(self, title))
        if splits:
            whole: Any = self.model
            self.add_callback(_DrawSplit(whole.model.vision_tower, splits, self.args.seed))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's, whose loss is looked at."""
        loss = super().training_step(*args, **kwargs)
        self.finite.see(loss)
        return loss

    def spent(self) -> float:
        """Seconds since the trainer was made, with those that led to the checkpoint gone on from."""
        return self._before + time.monotonic() - self._began

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, with logits only at positions where some row of the batch has a label.

        Most positions (prompts, pictures) have none, and logits over a vocabulary are the largest tensor of a step.
        What the batch says of skipped pictures is kept.
        """
        self.skipped.update(inputs.pop("skipped", {}))
        shifted = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        wanted = (shifted != -100).any(0).nonzero().flatten()
        kept = shifted[:, wanted].contiguous()
        inputs |= {"logits_to_keep": wanted}
        inputs |= {"shift_labels": kept} if self.compute_loss_func is None else {"labels": kept}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Batches of like length by what the data says of itself; the Trainer's own way opens every picture first."""
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        if getattr(self.args, "train_sampling_strategy", "") != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedByLength(data.lengths, step, seed)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' training, with the time of the calls before a checkpoint that is gone on from."""
        self._before = spent_before(Path(resume_from_checkpoint) if resume_from_checkpoint else None)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing after the last step, where the Trainer would make one more before it looks whether any is left."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer with a learning rate for each part."""
        if self.optimizer is None:
            owner: Any = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, owner)
            own = groups(owner, self.tune, options["lr"], self.args.weight_decay)
            self.optimizer_cls_and_kwargs = (kind, {**options, "params": own})
        return super().create_optimizer(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint's share of the model; DeepSpeed's own checkpoint holds it already."""
        self.finite.check_weights()
        if _internal_call and self.is_deepspeed_enabled:
            Path(str(output_dir or self.args.output_dir)).mkdir(parents=True, exist_ok=True)
            return
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """transformers' checkpoint, from an empty folder on; what a full disk leaves of one is taken away."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with room_for(f"the checkpoint at step {self.state.global_step} in {folder.parent}", _MAKE_ROOM):
                super()._save_checkpoint(*args, **kwargs)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        tensors = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
        with atomic_path(Path(str(output_dir or self.args.output_dir)) / TRAINED) as path:
            save_file(tensors, path, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        tensors = load_file(Path(resume_from_checkpoint) / TRAINED)
        expected = {n for n, p in model.named_parameters() if p.requires_grad}
        if expected != set(tensors):
            raise ValueError(
                f"{resume_from_checkpoint} holds {len(tensors)} trained tensors, this run trains {len(expected)} of "
                "other names: resume with the options that the run was started with."
            )
        model.load_state_dict(tensors, strict=False)


class _Smoothed:
    """Cross entropy with label smoothing, over the labels that the model's own loss is over.

    Args:
        factor: share of a label's weight that is spread evenly over the vocabulary.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Of logits ``[B, T, V]`` and labels ``[B, T]`` at the same positions; -100 counts nothing."""
        counted = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        logits = outputs["logits"].flatten(0, 1).float()
        targets = labels.flatten().to(logits.device)
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.factor)
        return loss / (counted.to(loss.device) if torch.is_tensor(counted) else counted)


class _DrawSplit(TrainerCallback):
    """A split for each step, by seed and step, so that a resumed run draws what it would have drawn."""

    def __init__(self, tower: Any, splits: Sequence[Split], seed: int) -> None:
        self.tower, self.splits, self.seed = tower, list(splits), seed
        self.own = tower.split

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tower.split = random.Random(f"{self.seed} {state.global_step}").choice(self.splits)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tower.split = self.own


class _Watch(TrainerCallback):
    """Progress with loss, learning rate and time left; marks whole checkpoints; sees that DeepSpeed is really there."""

    def __init__(self, trainer: MLLMTrainer, title: str) -> None:
        self.trainer, self.title = trainer, title
        self.bar: Progress | None = None
        self.note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.deepspeed and type(self.trainer.deepspeed).__name__ != "DeepSpeedEngine":
            wrapped = type(self.trainer.model_wrapped).__name__
            raise RuntimeError(
                f"A DeepSpeed config was given, but the model was wrapped as {wrapped}: start the script with torchrun "
                "and without ACCELERATE_USE_CPU."
            )
        if args.deepspeed and state.is_world_process_zero:
            print(f"training runs in {type(self.trainer.deepspeed).__name__}, {args.world_size} processes")
        if state.is_world_process_zero:
            self.bar = Progress(self.title, state.max_steps, show=True)
            self.bar.skip(state.global_step)
        skipped = Path(str(args.output_dir)) / SKIPPED
        if state.global_step and skipped.is_file():
            self.trainer.skipped.update(read_json(skipped))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.3f}  lr {float(logs['learning_rate']):.2e}"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.bar is not None:
            self.bar.step(self.note)
        control.should_log |= state.global_step >= state.max_steps  # however rarely losses are told, the last one is
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            with room_for(f"the checkpoint at step {state.global_step} in {folder.parent}", _MAKE_ROOM):
                write_json(folder.parent / SKIPPED, self.trainer.skipped)
                write_json(folder / SECONDS, {"seconds": self.trainer.spent()})
                finish_checkpoint(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
