"""What a training run of a language model on a tree is: the options of ``train/mllm.py``, LLaVA-1.5's by default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from llava_integration.train import options
from vst.fit.config import MOST_RATE
from vst.models.fields import Limits, check_fields, one_of

LLM_TUNING = ("none", "full", "lora")

# LLaVA-1.5's published recipe: learning rate and pictures a step, by how the language model is tuned.
_LEARNING_RATE = {"none": 1e-3, "full": 2e-5, "lora": 2e-4}
_BATCH = {"none": 256, "full": 128, "lora": 128}
_PER_DEVICE = {"none": 32, "full": 16, "lora": 16}


@dataclass(frozen=True)
class TuneConfig:
    """What is trained.

    Attributes:
        llm: none (stage 1), full or lora (stage 2).
        projector: whether the projector is trained.
        stitches: whether the tree's stitches are trained; the rest of the tree stays frozen always.
        projector_lr: learning rate of the projector; default: the trainer's (lora: 2e-5, as LLaVA-1.5; a ridge start:
            1e-4, as larger ones wipe it out).
        stitch_lr: learning rate of the stitches; default: the trainer's.
        start: random (as LLaVA-1.5), or ridge: a new projector starts from a closed-form fit of the tower's tokens to
            the words of the answers (see llava_integration/train/start.py).
        start_pictures: conversations that the ridge start looks at.
        lora_rank, lora_alpha, lora_dropout: of LoRA, on every linear layer of the language model's blocks.
    """

    llm: str = "none"
    projector: bool = True
    stitches: bool = False
    projector_lr: float | None = None
    stitch_lr: float | None = None
    start: str = "random"
    start_pictures: int = 512
    lora_rank: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05

    def __post_init__(self) -> None:
        one_of(self.llm, "tune.llm", LLM_TUNING)
        one_of(self.start, "tune.start", ("random", "ridge"))
        limits: dict[str, Limits] = dict.fromkeys(("start_pictures", "lora_rank", "lora_alpha"), (1, 2**31))
        rates: dict[str, Limits] = dict.fromkeys(("projector_lr", "stitch_lr"), (0, MOST_RATE))
        check_fields(self, {**limits, **rates, "lora_dropout": (0, 1)}, prefix="tune.")
        if self.llm == "none" and not self.projector and not self.stitches:
            raise ValueError("tune trains nothing; set tune.projector, tune.stitches or tune.llm.")

    def learning_rates(self) -> dict[str, float | None]:
        """By part; None is the trainer's."""
        projector = self.projector_lr
        if projector is None and self.llm == "lora":
            projector = 2e-5
        elif projector is None and self.start == "ridge":
            projector = 1e-4
        return {"projector": projector, "stitches": self.stitch_lr, "llm": None}


@dataclass(frozen=True)
class TrainerConfig:
    """Options of transformers' ``TrainingArguments``, checked one by one, over LLaVA-1.5's.

    Attributes:
        values: any fields of TrainingArguments.
    """

    values: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self, tune: TuneConfig, batch_size: int | None, output_dir: str, processes: int = 1) -> dict[str, Any]:
        """Keyword arguments of ``TrainingArguments``.

        Args:
            tune: decides LLaVA-1.5's learning rate and batch.
            batch_size: conversations a step over all processes; default: LLaVA-1.5's.
            output_dir: of checkpoints.
            processes: over which the batch is spread (:func:`spread`).

        Raises:
            ValueError: an option that is not known or not served (:mod:`llava_integration.train.options`), or a batch
                that cannot be divided.
        """
        from transformers import TrainingArguments

        options.check(self.values)
        cuda = torch.cuda.is_available()
        total = _BATCH[tune.llm] if batch_size is None else batch_size
        per_device, accumulated = spread(total, self.at_a_time(tune), processes)
        defaults = {
            "learning_rate": _LEARNING_RATE[tune.llm],
            "num_train_epochs": 1,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,  # below 1: a share of all steps
            "weight_decay": 0.0,
            "bf16": cuda and torch.cuda.is_bf16_supported() and not self.values.get("fp16"),
            "use_cpu": not cuda,
            "per_device_train_batch_size": per_device,
            "gradient_accumulation_steps": accumulated,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,  # the first loss that is not finite ends the run
            "save_strategy": "steps",
            "save_steps": 500,
            "save_total_limit": 2,
            "dataloader_num_workers": 4 if cuda else 0,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "output_dir": output_dir,
        }
        if tune.llm != "none" and "train_sampling_strategy" in {f.name for f in fields(TrainingArguments)}:
            defaults["train_sampling_strategy"] = "group_by_length"  # as LLaVA-1.5's second stage
        if tune.stitches and not self.values.get("deepspeed"):
            defaults["ddp_find_unused_parameters"] = True  # a step leaves the stitches of other splits without gradient
        resolved = defaults | dict(self.values) | {"per_device_train_batch_size": per_device}
        options.construct(resolved)
        return resolved

    def at_a_time(self, tune: TuneConfig) -> int:
        """Conversations that a process is to take at a time, if the batch can be divided so; default: LLaVA-1.5's."""
        return self.values.get("per_device_train_batch_size", _PER_DEVICE[tune.llm])


def spread(total: int, wanted: int, processes: int) -> tuple[int, int]:
    """Divide a batch among processes so that a step sees exactly ``total`` conversations.

    Args:
        total: conversations a step.
        wanted: conversations a process takes at a time; where that does not divide its share, the largest number below
            that does.
        processes: over which the batch is spread.

    Returns:
        Conversations a process takes at a time, and how often it does in a step (the gradients are accumulated).

    Raises:
        ValueError: numbers below 1, or a batch of which the processes' shares would be unequal.
    """
    for name, value in (("batch_size", total), ("trainer.per_device_train_batch_size", wanted)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1.")
    share, left = divmod(total, processes)
    if left:
        near = " or ".join(str(n) for n in (share * processes, (share + 1) * processes) if n)
        raise ValueError(
            f"A batch_size of {total} cannot be spread evenly over {processes} processes; give a multiple of their "
            f"number, such as {near}."
        )
    taken = next(n for n in range(min(wanted, share), 0, -1) if share % n == 0)
    return taken, share // taken


def processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
