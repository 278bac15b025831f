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
from torch.nn.utils.parametrize import is_parametrized

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
    """Whether a module's tensors are kept elsewhere, in parts or computed, or somebody acts around a part's calls."""
    return any(hasattr(tensor, "full_tensor") for tensor in module.parameters()) or any(
        hasattr(part, "_hf_hook") or part._forward_pre_hooks or part._forward_hooks or is_parametrized(part)
        for part in module.modules()
    )


def tensors_of(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, on a device, wherever they are kept."""
    out: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        if "parametrizations" in path.split("."):
            continue  # what a tensor is computed from: the tensor itself stands under its own name
        with placed(part):
            computed = list(part.parametrizations) if is_parametrized(part) else []
            own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            own += [(name, getattr(part, name)) for name in computed]
            out |= {f"{path}.{name}" if path else name: gathered(tensor).to(device) for name, tensor in own}
    return out
