"""The processes of a fit: one or many, with or without DeepSpeed (through accelerate, imported here alone)."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vst.fit.config import FitConfig
from vst.fit.op_builds import clear_stale_locks
from vst.models.fields import mapping
from vst.results.folders import read_json


def accelerator_for(config: FitConfig) -> Any:
    """An ``accelerate.Accelerator`` for this process, as the config and the launcher want it.

    Raises:
        ImportError: accelerate is missing.
        ValueError: a DeepSpeed config that does not suit.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    except ImportError as error:
        raise ImportError('Fitting needs accelerate: pip install "vfm-stitch-tree[fit]".') from error
    gpu = torch.cuda.is_available()
    plugin = None
    if config.deepspeed is not None:
        if not Path(config.deepspeed).is_file():
            raise ValueError(f"deepspeed is {config.deepspeed!r}, which is no file; expected the path of its config.")
        advice = "give a config of DeepSpeed"
        facts = _without_auto(mapping(read_json(config.deepspeed, advice), f"The config in {config.deepspeed}"))
        stage = facts.get("zero_optimization", {}).get("stage", 0)
        if stage > 2:
            raise ValueError(
                f"{config.deepspeed} asks for ZeRO stage {stage}; stitches are a few MB, use stage 0, 1 or 2."
            )
        facts.setdefault("gradient_accumulation_steps", 1)
        if facts["gradient_accumulation_steps"] != 1:
            raise ValueError(f"{config.deepspeed} accumulates gradients; set gradient_accumulation_steps to 1.")
        if any(facts.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")):
            raise ValueError(f"{config.deepspeed} sets a precision; leave it out and use precision (--fit.precision).")
        facts["train_micro_batch_size_per_gpu"] = 1  # a formality: batches are drawn here, by config.batch_size
        facts.pop("train_batch_size", None)
        if "RANK" not in os.environ:
            raise ValueError(
                "A DeepSpeed config needs a launcher, also for one process: use torchrun --nproc_per_node 1 ..."
            )
        if os.environ.get("LOCAL_RANK", "0") == "0":
            clear_stale_locks()
        plugin = DeepSpeedPlugin(hf_ds_config=facts)
    handlers = []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or plugin is not None:
        # The report is one process' work: the others wait for it longer than the default ten minutes.
        backend = "nccl" if gpu else "gloo"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timedelta(hours=6)))
    # On a CPU, cpu=True would make accelerate drop DeepSpeed without a word.
    return Accelerator(cpu=not gpu and plugin is None, deepspeed_plugin=plugin, kwargs_handlers=handlers)


def _without_auto(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config without what it leaves to transformers' Trainer ("auto"): DeepSpeed has defaults for it."""
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in facts.items() if v != "auto"}


def check_engine(config: FitConfig, model: Any) -> None:
    """Make sure that a DeepSpeed config was not dropped on the way.

    Raises:
        RuntimeError: it was.
    """
    if config.deepspeed is not None and type(model).__name__ != "DeepSpeedEngine":
        raise RuntimeError(
            f"A DeepSpeed config was given, but the model was wrapped as {type(model).__name__}: start the script with "
            "torchrun or accelerate launch and without ACCELERATE_USE_CPU."
        )


def gathered(accelerator: Any, skipped: dict[str, str]) -> dict[str, str]:
    """Skipped pictures of all processes, by name."""
    from accelerate.utils import gather_object

    merged: dict[str, str] = {}
    for part in gather_object([skipped]):
        merged.update(part)
    return dict(sorted(merged.items()))


def leave_group() -> None:
    """Give up the process group, if there is one, once every process has come this far.

    The last thing that a script of several processes does: gloo's threads, left alone, may free tensors while the
    interpreter is being taken down, and abort the process (https://github.com/pytorch/pytorch/pull/179291).
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # what refers to the group goes before it: freed later, it can wait for gloo's threads for ever
        if "gloo" in dist.get_backend():
            with suppress(RuntimeError):  # a process that is gone already leaves nothing to wait for
                dist.barrier()
        dist.destroy_process_group()
