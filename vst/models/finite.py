"""Numbers that are not finite, in weights: what a damaged file or a training gone wrong leaves behind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating tensors that hold a number which is not finite, in their order; none of those on meta."""
    return [n for n, t in tensors.items() if t.is_floating_point() and not t.is_meta and not _finite(t)]


def some(names: list[str], most: int = 3) -> str:
    """How many tensors, and the names of the first of them, for a message."""
    return f"{len(names)} tensors ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"


def _finite(tensor: Tensor) -> bool:
    # A sum takes no memory and is finite where all numbers are, but for overflow: then each is looked at.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())
