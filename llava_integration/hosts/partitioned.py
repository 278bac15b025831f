"""Weights into a module whose parameters DeepSpeed ZeRO-3 has divided among the processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 holds the parameters: each process then has its share of them alone."""
    return any(hasattr(p, "ds_id") for p in module.parameters())


def fill_partitioned(module: nn.Module, read: Callable[[], nn.Module], kept: set[str]) -> None:
    """Copy a module's tensors into its partitioned counterpart, each gathered for as long as that takes.

    Every process has to call this; the first one's values count, and what it keeps is kept by all.

    Args:
        module: partitioned.
        read: gives the same module whole, in main memory.
        kept: names of tensors that a checkpoint has brought; updated to the first process' names.
    """
    from deepspeed import zero
    from deepspeed.runtime.zero import partition_parameters as context

    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    names: list[Any] = [sorted(kept)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(names, src=0)  # checkpoints are read by the first process
    kept.clear()
    kept.update(names[0])
    inside = bool(context.zero_init_context)  # modules that are built there would be divided as well
    if inside:
        context.shutdown_init_context()
    try:
        whole = read().state_dict()
    finally:
        if inside:
            context.restore_init_context()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in kept:
                continue
            with zero.GatheredParameters([parameter], modifier_rank=0):
                if first:
                    parameter.data.copy_(whole[name])
        for name, buffer in module.named_buffers():
            if name in whole and name not in kept:
                buffer.copy_(whole[name])
