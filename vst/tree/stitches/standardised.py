"""A map between standardised spaces, and the same map with the standardisation folded into its linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vst.tree.ridge import RidgeFit

_STATISTICS = ("x_mean", "x_std", "y_mean", "y_std")


class Standardised(nn.Module):
    """``inner`` between standardised spaces: ``inner((x - x_mean) / x_std) * y_std + y_mean``."""

    inner: Any
    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor

    def __init__(self, inner: nn.Module, source_width: int, target_width: int) -> None:
        super().__init__()
        self.inner = inner
        self.folded = False  # whether the statistics change nothing, and are not applied
        for name in _STATISTICS:
            width, value = (source_width if name.startswith("x") else target_width), float(name.endswith("std"))
            self.register_buffer(name, torch.full((width,), value))
        self.register_load_state_dict_post_hook(_looked_at)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., Dx]`` to ``[..., Dy]``."""
        if self.folded:
            return self.inner(x)
        return self.inner((x - self.x_mean) / self.x_std) * self.y_std + self.y_mean

    def plain(self) -> bool:
        """Whether the statistics change nothing."""
        held = [(getattr(self, name), float(name.endswith("std"))) for name in _STATISTICS]
        return not any(x.is_meta for x, _ in held) and all(bool((x == value).all()) for x, value in held)

    def set_statistics(self, fit: RidgeFit) -> None:
        """Take means and standard deviations from a fit."""
        for name in _STATISTICS:
            getattr(self, name).copy_(getattr(fit, name))
        self.folded = False

    @torch.no_grad()
    def fold(self) -> None:
        """Move the statistics into the linear layers where tokens come in and go out: the same map with fewer steps.

        With ``a = x_mean``, ``s = x_std``, ``b = y_mean``, ``t = y_std``: a layer ``W x + c`` that tokens come into
        becomes ``(W / s) x + c - (W / s) a``, one that they go out of ``(t W) h + t c + b``. Computed in float64. A map
        whose ends are not known (see :func:`ends`) stays as it is.
        """
        found = ends(self.inner)
        if found is None or self.folded:
            return
        if self.plain():
            self.folded = True
            return
        mean, std, y_mean, y_std = (getattr(self, name).double() for name in _STATISTICS)
        into, out = found
        new = {layer: (layer.weight.double(), layer.bias.double()) for layer in dict.fromkeys([*into, *out])}
        for layer in into:
            weight, bias = new[layer]
            weight = weight / std
            new[layer] = weight, bias - weight @ mean
        for i, layer in enumerate(out):  # their outputs are added up: one of them brings the mean
            weight, bias = new[layer]
            new[layer] = weight * y_std[:, None], bias * y_std + (0 if i else y_mean)
        for layer, (weight, bias) in new.items():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        for name in _STATISTICS:
            getattr(self, name).fill_(float(name.endswith("std")))
        self.folded = True


def ends(inner: nn.Module) -> tuple[Sequence[nn.Linear], Sequence[nn.Linear]] | None:
    """The linear layers that an affine change of a map's inputs and outputs can be folded into; None: not known.

    A linear layer is both, a sequence has its first and its last; any other map tells by a method ``ends``, whose
    second layers' outputs are added up.
    """
    told: Any = getattr(inner, "ends", None)
    if told is not None:
        return told()
    # Exact types: a class of somebody's own that is derived from these may do more in its forward.
    parts = list(inner) if type(inner) is nn.Sequential else [inner]
    if not parts or (len(parts) > 1 and parts[0] is parts[-1]):  # one layer at both ends cannot be two
        return None
    first, last = parts[0], parts[-1]
    if type(first) is not nn.Linear or type(last) is not nn.Linear or first.bias is None or last.bias is None:
        return None
    return [first], [last]


def _looked_at(module: Standardised, incompatible: Any) -> None:
    """After a state dict was loaded into a folded map: it may be one that was not."""
    module.folded = module.folded and module.plain()
