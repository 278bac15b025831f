"""Stitches that map each token by itself: linear, mlp, mlp_skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vst.models.spec import MOST_WIDTH, VFMSpec
from vst.models.vfm import VFM
from vst.tree.ridge import CLOSED_FORMS, RidgeFit
from vst.tree.stitches.base import Calibration, Stitch, register
from vst.tree.stitches.standardised import Standardised


class Mapped(Stitch):
    """Families that map each token by itself; they have a closed form (:meth:`start_patches`).

    Args:
        reads: trunk depths that are read side by side, the split and others evenly spread before it (all, where there
            are fewer). What a block of the trunk has dropped may still be had at an earlier one.
        inner: from the width that comes in to the map.
    """

    closed_form = True

    def __init__(
        self, source: VFMSpec, target: VFMSpec, split: int, reads: int, inner: Callable[[int], nn.Module]
    ) -> None:
        super().__init__(source, target, split)
        width = source.width * len(self.depths(split, reads=reads))
        self.patches = Standardised(inner(width), width, target.width)
        self.cls = Standardised(nn.Linear(width, target.width), width, target.width) if self.maps_cls else None

    @classmethod
    def depths(cls, split: int, *, reads: int = 1, **options: Any) -> tuple[int, ...]:
        if reads < 1:
            raise ValueError(f"A {cls.family} stitch that reads {reads} depths was asked for; expected at least 1.")
        count = max(min(reads, split), 1)
        return tuple((split * i + count // 2) // count for i in range(1, count + 1))

    def transform(self, x: Tensor, trunk: VFM) -> tuple[Tensor | None, Tensor]:
        cls = None if self.cls is None else self.cls(x[:, :1])
        return cls, self.patches(x[:, self.source.prefix :])

    @torch.no_grad()
    def start(self, calibration: Calibration, form: str | None = "ridge", *, penalty: float = 1e-3) -> float | None:
        super().start(calibration)
        solve = CLOSED_FORMS[form or "ridge"]
        fit = solve(calibration.patches, penalty)
        self.patches.set_statistics(fit)
        cls_fit = None if self.cls is None else solve(calibration.cls, 100 * penalty)
        if self.cls is not None and cls_fit is not None:
            self.cls.set_statistics(cls_fit)
        if form is None:
            return None
        self.start_patches(fit)
        if self.cls is not None and cls_fit is not None:
            self.cls.inner.weight.copy_(cls_fit.weight)
            self.cls.inner.bias.zero_()
        return fit.explained

    def start_patches(self, fit: RidgeFit) -> None:
        """Make the patch map compute the ridge map."""
        raise NotImplementedError

    def macs(self, tokens: int) -> int:
        mapped = sum(m.weight.numel() for m in self.patches.modules() if isinstance(m, nn.Linear))
        return tokens * mapped + (self.cls.inner.weight.numel() if self.cls is not None else 0)


@register
class Linear(Mapped):
    """One affine map per token: ``W x + b``.

    Args:
        reads: trunk depths, see :class:`Mapped`.
    """

    family = "linear"

    def __init__(self, source: VFMSpec, target: VFMSpec, split: int, *, reads: int = 1) -> None:
        super().__init__(source, target, split, reads, lambda width: nn.Linear(width, target.width))

    def start_patches(self, fit: RidgeFit) -> None:
        self.patches.inner.weight.copy_(fit.weight)
        self.patches.inner.bias.zero_()


@register
class MLP(Mapped):
    """Two layers with ReLU, ``W2 relu(W1 x + b1) + b2`` (the paper's stitch).

    Args:
        hidden: width of the hidden layer; the default is the target's width.
        reads: trunk depths, see :class:`Mapped`.
    """

    family = "mlp"

    def __init__(
        self, source: VFMSpec, target: VFMSpec, split: int, *, hidden: int | None = None, reads: int = 1
    ) -> None:
        hidden = _hidden(hidden, target)
        super().__init__(source, target, split, reads, lambda width: _two_layers(width, hidden, target.width))

    def start_patches(self, fit: RidgeFit) -> None:
        first, _, second = self.patches.inner
        width = self.target.width
        if first.out_features < width:
            raise ValueError(
                f"An mlp stitch with {first.out_features} hidden units cannot start from a ridge map of width {width}: "
                f"use hidden >= {width}, or start='random'."
            )
        # Lifted above the calibration range the ReLU passes everything, so W2 = I lowers it to the ridge map again.
        lift = (-(fit.sample @ fit.weight.T).amin(0)).clamp_min(0)
        first.weight[:width].copy_(fit.weight)
        first.bias[:width].copy_(lift)
        second.weight.zero_()
        second.weight[:, :width].copy_(torch.eye(width))
        second.bias.copy_(-lift)


@register
class MLPSkip(Mapped):
    """``linear(x) + W2 relu(W1 x + b1)``: starts as the ridge map exactly and bends from there.

    Args:
        hidden: width of the hidden layer; the default is the target's width.
        reads: trunk depths, see :class:`Mapped`.
    """

    family = "mlp_skip"

    def __init__(
        self, source: VFMSpec, target: VFMSpec, split: int, *, hidden: int | None = None, reads: int = 1
    ) -> None:
        hidden = _hidden(hidden, target)
        super().__init__(source, target, split, reads, lambda width: _Skip(width, hidden, target.width))

    def start_patches(self, fit: RidgeFit) -> None:
        skip = self.patches.inner
        skip.linear.weight.copy_(fit.weight)
        skip.linear.bias.zero_()
        skip.bend[2].weight.zero_()
        skip.bend[2].bias.zero_()


class _Skip(nn.Module):
    def __init__(self, source: int, hidden: int, target: int) -> None:
        super().__init__()
        self.linear = nn.Linear(source, target)
        self.bend = _two_layers(source, hidden, target)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.bend(x)

    def ends(self) -> tuple[list[nn.Linear], list[nn.Linear]]:
        """Layers that tokens come into, and those that they go out of."""
        first, last = self.bend[0], self.bend[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return [self.linear, first], [self.linear, last]


def _two_layers(source: int, hidden: int, target: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(source, hidden), nn.ReLU(), nn.Linear(hidden, target))


def _hidden(hidden: int | None, target: VFMSpec) -> int:
    hidden = target.width if hidden is None else hidden
    if not 1 <= hidden <= 4 * MOST_WIDTH:
        raise ValueError(
            f"A stitch with {hidden} hidden units was asked for; expected at least 1, and at most {4 * MOST_WIDTH}."
        )
    return hidden
