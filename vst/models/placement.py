"""Weights that somebody else places: hooks on a model's modules bring them for a call and take them away after it.

accelerate offloads a model so (``device_map`` of transformers): each module that holds tensors gets a hook around its
``forward``. torch's FSDP keeps a part of each tensor in every process and gathers them around such calls. What reads a
module's tensors without calling it has to ask for them, and a module that is handed to a call would be moved like any
other input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vst.models.vfm import VFM


class Lent:
    """A model that a call may read, without being an input of it that is moved to where the call is computed."""

    def __init__(self, model: VFM) -> None:
        self.model = model


def placed(module: nn.Module) -> AbstractContextManager[None]:
    """While open, the module's own tensors are there to be read, as they are during its call."""
    hook = getattr(module, "_hf_hook", None)
    return nullcontext() if hook is None else _brought(module, hook)


@contextmanager
def _brought(module: nn.Module, hook: Any) -> Iterator[None]:
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which every process may hold a part; then all processes have to ask for it together."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def hooked(module: nn.Module) -> bool:
    """Whether a module's tensors are kept elsewhere or in parts, or somebody acts around calls of a part of it."""
    return any(hasattr(tensor, "full_tensor") for tensor in module.parameters()) or any(
        hasattr(part, "_hf_hook") or part._forward_pre_hooks or part._forward_hooks for part in module.modules()
    )


def tensors_of(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, on a device, wherever they are kept."""
    out: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        with placed(part):
            own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            out |= {f"{path}.{name}" if path else name: gathered(tensor).to(device) for name, tensor in own}
    return out
