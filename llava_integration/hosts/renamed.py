"""Parameter names that transformers' older loaders leave alone.

Before 5.0 ``from_pretrained`` renames every tensor of a checkpoint whose name contains ``gamma`` or ``beta``, and what
is so renamed finds no place and is dropped. LayerScale of DINOv2 and DINOv3 is named so; in a tower it is ``lambda``.
"""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)
NEW = {"gamma": "lambda", "beta": "offset"}


def rename(model: M) -> M:
    """Give the parameters their other names, in place; the modules still find them by their own. Returns the model."""
    for module in model.modules():
        names = tuple(name for name in module._parameters if _other(name) != name)
        for name in names:
            module._parameters[_other(name)] = module._parameters.pop(name)
        if names:
            module.__class__ = _finding(type(module), names)  # type: ignore[arg-type]
    return model


def own_names(model: nn.Module) -> dict[str, str]:
    """The name in a renamed model, by the name that the model itself would have."""
    out = {}
    for name in model.state_dict():
        head, dot, tail = name.rpartition(".")
        old = {_other(known): known for known in _known(model.get_submodule(head))}.get(tail, tail)
        out[head + dot + old] = name
    return out


def _known(module: nn.Module) -> tuple[str, ...]:
    return getattr(type(module), "renamed", ())


def _other(name: str) -> str:
    for old, new in NEW.items():
        name = name.replace(old, new)
    return name


@cache
def _finding(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The same class, whose forward finds renamed parameters where it expects them."""
    members: dict[str, object] = {name: property(attrgetter(_other(name))) for name in names}
    return type(kind.__name__, (kind,), {**members, "renamed": names, "__module__": kind.__module__})
