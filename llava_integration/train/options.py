"""Which of transformers' ``TrainingArguments`` a training serves, and what it answers to the others.

A run trains with its own loss, order of the data, checkpoints and export, and evaluates nothing; an option that needs
another of these is refused by name, before anything is loaded. Options that neither table names (of another version of
transformers) are handed on as they are.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union

import torch

from vst.results.folders import read_json

# fmt: off
SERVED = frozenset((
    # how long, how fast
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "average_tokens_across_devices", "label_smoothing_factor",
    "neftune_noise_alpha",
    # numbers and memory
    "bf16", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "full_determinism", "seed", "data_seed", "use_cpu", "skip_memory_metrics", "debug",
    # what is told
    "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node",
    "log_level", "log_level_replica", "include_num_input_tokens_seen", "disable_tqdm", "report_to", "run_name",
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "do_train",
    # what is kept
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "restore_callback_states_from_checkpoint",
    # data and processes
    "train_sampling_strategy", "group_by_length", "dataloader_drop_last", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "deepspeed", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout",
))

_EVALUATION = "a run has no data to evaluate on; score the model that it leaves (eval/lmms.py)"
_HUB = "a checkpoint of a run is no whole model; upload the run's folder when it is finished (hf upload)"
REFUSED: Mapping[str, str] = {
    "output_dir": "it is set by the run itself; give out, the run's folder",
    "gradient_accumulation_steps": "it is set by the run itself; give batch_size, conversations a step over all "
    "processes, with trainer.per_device_train_batch_size",
    "remove_unused_columns": "it is set by the run itself, whose batches are the model's arguments already",
    **dict.fromkeys(
        ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_do_concat_batches",
         "eval_use_gather_object", "eval_accumulation_steps", "per_device_eval_batch_size", "prediction_loss_only",
         "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "do_eval", "do_predict",
         "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "label_names"),
        _EVALUATION,
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
         "hub_revision"),
        _HUB,
    ),
    "optim_target_modules": "GaLore and its like group parameters by themselves, and here each part has its own rate",
    "use_liger_kernel": "its loss takes the place of the one over labelled positions alone",
    "liger_kernel_config": "its loss takes the place of the one over labelled positions alone",
    "use_cache": "a training step has no use for a cache of keys and values",
    "auto_find_batch_size": "it would change how many conversations a step sees; give a smaller "
    "trainer.per_device_train_batch_size, which leaves batch_size as it is (--dry-run estimates the memory)",
    "accelerator_config": "it divides batches in its own way, and batch_size says how many conversations a step sees",
    "parallelism_config": "models in pieces are trained with ZeRO-3 alone; give trainer.deepspeed",
    "fsdp": "checkpoints and export know ZeRO-3 alone; give trainer.deepspeed configs/deepspeed/zero3.json",
    "fsdp_config": "checkpoints and export know ZeRO-3 alone; give trainer.deepspeed configs/deepspeed/zero3.json",
    "save_on_each_node": "a run has one folder, which all nodes see",
    "enable_jit_checkpoint": "what it writes is no checkpoint that a run goes on from; save_steps decides how often "
    "there is one",
    "ignore_data_skip": "a resumed run sees what an uninterrupted one would have seen",
    "dataloader_in_order": "batches in the order in which workers finish cannot be had again by a resumed run",
    "length_column_name": "conversations are sorted by the length of their own text and pictures",
    "resume_from_checkpoint": "resume (--resume) goes on with the run in out",
    "local_rank": "the launcher says it (torchrun)",
}
# fmt: on
OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_npu_fused",
    "adamw_apex_fused",
    "adamw_anyprecision",
    "adafactor",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_8bit",
    "paged_ademamix_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "sgd",
    "adagrad",
    "rmsprop",
    "grokadamw",
    "stable_adamw",
)  # fmt: skip
_SCHEDULES_BY_SCORE = ("reduce_lr_on_plateau", "greedy")

_POSITIVE = (lambda v: v > 0, "a number above 0")
_FROM_ZERO = (lambda v: v >= 0, "a number from 0 up")
_SHARE = (lambda v: 0 <= v < 1, "a number from 0 to below 1")
_COUNT = (lambda v: v >= 1, "at least 1")
_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_epochs": _POSITIVE, "logging_steps": _POSITIVE, "save_steps": _POSITIVE, "adam_epsilon": _FROM_ZERO,
    "learning_rate": _FROM_ZERO, "weight_decay": _FROM_ZERO, "max_grad_norm": _FROM_ZERO, "warmup_steps": _FROM_ZERO,
    "warmup_ratio": _SHARE, "adam_beta1": _SHARE, "adam_beta2": _SHARE, "label_smoothing_factor": _SHARE,
    "max_steps": (lambda v: v >= 1 or v == -1, "at least 1, or -1 for all epochs"), "save_total_limit": _COUNT,
    "dataloader_num_workers": _FROM_ZERO, "dataloader_prefetch_factor": _COUNT, "torch_empty_cache_steps": _COUNT,
    "ddp_timeout": _POSITIVE, "neftune_noise_alpha": _FROM_ZERO, "seed": _FROM_ZERO, "data_seed": _FROM_ZERO,
}  # fmt: skip


def check(values: Mapping[str, Any]) -> None:
    """See that a training can serve these fields of ``TrainingArguments``, without loading or setting up anything.

    Raises:
        ValueError: a name that TrainingArguments does not have, an option that is not served, a value of another type
            or outside its range, or one that does not go with the others or with this machine.
    """
    from transformers import TrainingArguments

    known: dict[str, Field[Any]] = {f.name: f for f in fields(TrainingArguments) if f.init}
    hints = typing.get_type_hints(TrainingArguments)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see transformers' TrainingArguments."
            raise ValueError(f"trainer.{name} is no option of transformers' TrainingArguments; {hint}")
        set_by_run = "set by the run itself" in REFUSED.get(name, "")
        if name in REFUSED and (set_by_run or value != _default(known[name])):
            raise ValueError(f"trainer.{name} is {value!r}, but {REFUSED[name]}.")
        _check_type(name, value, hints[name])
        if name in _RANGES and value is not None:
            fits, expected = _RANGES[name]
            if not (math.isfinite(value) and fits(value)):
                raise ValueError(f"trainer.{name} is {value!r}; expected {expected}.")
    _check_together(values)


def construct(values: Mapping[str, Any]) -> None:
    """See that transformers takes these fields together; the processes are not set up, nor is DeepSpeed.

    Raises:
        ValueError: it does not.
    """
    from transformers import TrainingArguments

    # Asked for its device, it would set up the processes.
    unbound = type("Unbound", (TrainingArguments,), {"device": torch.device("cpu")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when the options are used
        try:
            unbound(**{k: v for k, v in values.items() if k != "deepspeed"})
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(f"The options of trainer do not suit: {' '.join(str(error).split())}") from error


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Where the type is plain; others are transformers' to read."""
    kinds = set(typing.get_args(hint)) if typing.get_origin(hint) in (Union, UnionType) else {hint}
    if not kinds <= {int, float, bool, str, NoneType}:
        return
    if float in kinds:
        kinds.add(int)
    if type(value) not in kinds:
        expected = " or ".join(sorted("nothing" if kind is NoneType else kind.__name__ for kind in kinds))
        raise ValueError(f"trainer.{name} is {value!r}, of type {type(value).__name__}; expected {expected}.")


def _check_together(values: Mapping[str, Any]) -> None:
    cpu = values.get("use_cpu") is True or not torch.cuda.is_available()
    if values.get("fp16") and values.get("bf16"):
        raise ValueError("trainer.fp16 and trainer.bf16 are both true; give one.")
    if values.get("fp16") and cpu:
        raise ValueError("trainer.fp16 is true, but a CPU does not train in fp16; give trainer.bf16, or neither.")
    if (optim := values.get("optim")) is not None and str(getattr(optim, "value", optim)) not in OPTIMIZERS:
        raise ValueError(
            f"trainer.optim is {optim!r}, which is no optimizer, or one that groups parameters or keeps weights in a "
            f"way of its own; expected one of {', '.join(OPTIMIZERS)}."
        )
    schedule = values.get("lr_scheduler_type")
    if str(getattr(schedule, "value", schedule)) in _SCHEDULES_BY_SCORE:
        raise ValueError(f"trainer.lr_scheduler_type is {schedule!r}, which goes by scores, but {_EVALUATION}.")
    strategy = values.get("save_strategy")
    if str(getattr(strategy, "value", strategy)) == "best":
        raise ValueError(f"trainer.save_strategy is {strategy!r}, which goes by scores, but {_EVALUATION}.")
    _check_reports(values.get("report_to", "none"))
    _check_deepspeed(values.get("deepspeed"))


def _check_reports(wanted: Any) -> None:
    from transformers.integrations import get_available_reporting_integrations

    if wanted is None or wanted in ("none", "all", ["none"], ["all"]):
        return
    here = get_available_reporting_integrations()
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name not in here:
            raise ValueError(
                f"trainer.report_to is {wanted!r}, but {name!r} is not installed here; install it, or take one of "
                f"{', '.join(['none', *here])}."
            )


def _check_deepspeed(config: Any) -> None:
    if config is None:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError('trainer.deepspeed needs DeepSpeed: pip install "vfm-stitch-tree[deepspeed]".')
    if isinstance(config, str) and not config.lstrip().startswith("{"):
        if not Path(config).is_file():
            raise ValueError(f"trainer.deepspeed is {config!r}, and there is no such file; see configs/deepspeed.")
        if not isinstance(read_json(config, "mend it (trainer.deepspeed)"), dict):
            raise ValueError(f"trainer.deepspeed is {config!r}, which holds no DeepSpeed config (a JSON object).")
