"""Stitch layers: from a trunk's tokens at one depth to what another model's tail expects.

A family is one class with one ``@register`` line. Every stitch maps the trunk's tokens ``[B, Ps + N, Ds]`` to the
target's ``[B, Pt + N, Dt]`` (P prefix tokens, N patches, D width) and treats prefix tokens alike:

* a class token is stitched to a class token where both models have one, by a map of its own;
* the source's registers are dropped;
* what the target has and the source lacks is a learned token that starts as the target's mean at that depth.

Maps work between standardised spaces (per channel; the statistics are stored with the stitch), because a few outlier
channels would otherwise rule both the error and the step sizes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vst.models.spec import VFMSpec
from vst.models.vfm import VFM
from vst.tree.modules import ModuleMap
from vst.tree.ridge import RidgeFit, RidgeSums

STITCHES: dict[str, type[Stitch]] = {}
DEFAULT_STITCH = "mlp_skip"


def register(cls: type[Stitch]) -> type[Stitch]:
    """Make a family known by its ``family`` name."""
    STITCHES[cls.family] = cls
    return cls


@dataclass(frozen=True)
class StitchSpec:
    """A family and its options, such as ``StitchSpec("lora", {"rank": 16})``.

    Raises:
        ValueError: an unknown family, or an option that the family does not have.
    """

    family: str = DEFAULT_STITCH
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.family not in STITCHES:
            raise ValueError(f"Unknown stitch family {self.family!r}; known families: {', '.join(sorted(STITCHES))}.")
        known = [
            name
            for name, p in inspect.signature(STITCHES[self.family].__init__).parameters.items()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        if unknown := set(self.options) - set(known):
            raise ValueError(
                f"Stitch family {self.family!r} has no option {sorted(unknown)}; its options: {known or 'none'}."
            )

    @classmethod
    def parse(cls, value: StitchSpec | str | Mapping[str, Any]) -> StitchSpec:
        """From ``"mlp"`` or ``{"family": "lora", "rank": 16}``."""
        if isinstance(value, StitchSpec):
            return value
        if isinstance(value, str):
            return cls(value)
        options = dict(value)
        return cls(options.pop("family", DEFAULT_STITCH), options)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict; inverse of :meth:`parse`."""
        return {"family": self.family, **self.options}

    def reads(self, split: int) -> int:
        """Trunk depth whose output the stitch reads when the tree is split at ``split``."""
        return split - STITCHES[self.family].lookback

    def build(self, source: VFMSpec, target: VFMSpec, split: int) -> Stitch:
        """A new stitch with its family's plain start (before any fit)."""
        return STITCHES[self.family](source, target, split, **self.options)


@dataclass
class Calibration:
    """What a closed-form start needs, streamed over a few hundred pictures."""

    patches: RidgeSums = field(default_factory=RidgeSums)
    cls: RidgeSums = field(default_factory=RidgeSums)
    prefix_sum: Tensor | float = 0.0
    images: int = 0

    def update(self, source: VFMSpec, target: VFMSpec, x: Tensor, y: Tensor) -> None:
        """Add source tokens x ``[B, Ps + N, Ds]`` and target tokens y ``[B, Pt + N, Dt]`` of the same pictures."""
        self.patches.update(x[:, source.prefix :].flatten(0, 1), y[:, target.prefix :].flatten(0, 1))
        if source.cls and target.cls:
            self.cls.update(x[:, 0], y[:, 0])
        self.prefix_sum = self.prefix_sum + y[:, : target.prefix].double().sum(0)
        self.images += len(x)


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
        for name, width, value in (
            ("x_mean", source_width, 0.0),
            ("x_std", source_width, 1.0),
            ("y_mean", target_width, 0.0),
            ("y_std", target_width, 1.0),
        ):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., Dx]`` to ``[..., Dy]``."""
        return self.inner((x - self.x_mean) / self.x_std) * self.y_std + self.y_mean

    def set_statistics(self, fit: RidgeFit) -> None:
        """Take means and standard deviations from a fit."""
        for name in ("x_mean", "x_std", "y_mean", "y_std"):
            getattr(self, name).copy_(getattr(fit, name))


class Stitch(nn.Module):
    """Base of all families; see the module's docstring for the contract.

    Args:
        source, target: the two models.
        split: trunk depth at which the tree is split.

    Raises:
        ValueError: the family cannot bridge the two models.
    """

    family: ClassVar[str]
    lookback: ClassVar[int] = 0

    def __init__(self, source: VFMSpec, target: VFMSpec, split: int) -> None:
        super().__init__()
        self.source, self.target, self.split = source, target, split
        self.maps_cls = source.cls and target.cls
        learned = target.prefix - int(self.maps_cls)
        self.learned = nn.Parameter(torch.zeros(1, learned, target.width)) if learned else None

    def forward(self, x: Tensor, trunk: VFM) -> Tensor:
        """Trunk tokens ``[B, Ps + N, Ds]`` at depth ``split - lookback`` to ``[B, Pt + N, Dt]``, in x's dtype."""
        cls, patches = self.transform(x, trunk)
        parts = [] if cls is None else [cls]
        if self.learned is not None:
            parts.append(self.learned.to(patches.dtype).expand(len(x), -1, -1))
        return torch.cat([*parts, patches], dim=1) if parts else patches

    def transform(self, x: Tensor, trunk: VFM) -> tuple[Tensor | None, Tensor]:
        """The family's own map: class token ``[B, 1, Dt]`` (None unless ``maps_cls``) and patches ``[B, N, Dt]``."""
        raise NotImplementedError

    @torch.no_grad()
    def start(
        self, calibration: Calibration, *, ridge: bool = True, penalty: float = 1e-3, orthogonal: bool = False
    ) -> float | None:
        """Statistics, learned tokens and (unless ``ridge`` is False) the closed-form map, from streamed sums.

        Args:
            calibration: of this split.
            ridge: False keeps the random map, between the right statistics.
            penalty: of the ridge fit of patches; the class token's, with far fewer rows, is a hundred times larger.
            orthogonal: use the orthogonal Procrustes map (:meth:`vst.tree.ridge.RidgeSums.solve_orthogonal`) instead.

        Returns:
            Share of the target's per-channel variance explained at the seam, None where the family has no such fit.
        """
        if self.learned is not None:
            mean = calibration.prefix_sum / max(calibration.images, 1)
            self.learned.copy_(torch.as_tensor(mean)[int(self.maps_cls) :])
        return None

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for one picture with ``tokens`` patch tokens (matrix products only).

        By default every ``nn.Linear`` once a patch token; a family that does otherwise says so.
        """
        return tokens * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


class _Mapped(Stitch):
    """Families that map each token by itself."""

    def __init__(self, source: VFMSpec, target: VFMSpec, split: int, inner: Callable[[], nn.Module]) -> None:
        super().__init__(source, target, split)
        self.patches = Standardised(inner(), source.width, target.width)
        self.cls = (
            Standardised(nn.Linear(source.width, target.width), source.width, target.width) if self.maps_cls else None
        )

    def transform(self, x: Tensor, trunk: VFM) -> tuple[Tensor | None, Tensor]:
        cls = None if self.cls is None else self.cls(x[:, :1])
        return cls, self.patches(x[:, self.source.prefix :])

    @torch.no_grad()
    def start(
        self, calibration: Calibration, *, ridge: bool = True, penalty: float = 1e-3, orthogonal: bool = False
    ) -> float | None:
        super().start(calibration)
        sums = calibration.patches
        fit = sums.solve_orthogonal() if orthogonal else sums.solve(penalty)
        self.patches.set_statistics(fit)
        cls_fit = None
        if self.cls is not None:
            cls_fit = calibration.cls.solve_orthogonal() if orthogonal else calibration.cls.solve(100 * penalty)
        if self.cls is not None and cls_fit is not None:
            self.cls.set_statistics(cls_fit)
        if not ridge:
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
        return tokens * mapped + (self.source.width * self.target.width if self.cls is not None else 0)


@register
class Linear(_Mapped):
    """One affine map per token: ``W x + b``."""

    family = "linear"

    def __init__(self, source: VFMSpec, target: VFMSpec, split: int) -> None:
        super().__init__(source, target, split, lambda: nn.Linear(source.width, target.width))

    def start_patches(self, fit: RidgeFit) -> None:
        self.patches.inner.weight.copy_(fit.weight)
        self.patches.inner.bias.zero_()


@register
class MLP(_Mapped):
    """Two layers with ReLU, ``W2 relu(W1 x + b1) + b2`` (the paper's stitch).

    Args:
        hidden: width of the hidden layer; the default is the target's width.
    """

    family = "mlp"

    def __init__(self, source: VFMSpec, target: VFMSpec, split: int, *, hidden: int | None = None) -> None:
        hidden = _hidden(hidden, target)
        super().__init__(source, target, split, lambda: _two_layers(source.width, hidden, target.width))

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
class MLPSkip(_Mapped):
    """``linear(x) + W2 relu(W1 x + b1)``: starts as the ridge map exactly and bends from there.

    Args:
        hidden: width of the hidden layer; the default is the target's width.
    """

    family = "mlp_skip"

    def __init__(self, source: VFMSpec, target: VFMSpec, split: int, *, hidden: int | None = None) -> None:
        hidden = _hidden(hidden, target)
        super().__init__(source, target, split, lambda: _Skip(source.width, hidden, target.width))

    def start_patches(self, fit: RidgeFit) -> None:
        skip = self.patches.inner
        skip.linear.weight.copy_(fit.weight)
        skip.linear.bias.zero_()
        skip.bend[2].weight.zero_()
        skip.bend[2].bias.zero_()


@register
class LoRA(Stitch):
    """The trunk's own next block, adapted by low-rank factors: reads depth ``split - 1``, gives depth ``split``.

    The factors follow the LoRA paper (Hu et al. 2021): ``W + (alpha / rank) * B A`` with A uniform and B zero at the
    start, on every matrix of the block. The merged weight is formed at each call, so training and a loaded tree take
    the same path and need no other library.

    Args:
        rank: inner width of the factors.
        alpha: scale; the default is twice the rank.

    Raises:
        ValueError: the two models' widths differ.
    """

    family = "lora"
    lookback = 1

    def __init__(
        self, source: VFMSpec, target: VFMSpec, split: int, *, rank: int = 16, alpha: float | None = None
    ) -> None:
        super().__init__(source, target, split)
        if source.width != target.width:
            raise ValueError(
                f"A lora stitch adapts a block of {source.source} (width {source.width}) and cannot bridge to "
                f"{target.source} (width {target.width}): use linear, mlp or mlp_skip."
            )
        if rank < 1:
            raise ValueError(f"A lora stitch of rank {rank} was asked for; expected at least 1.")
        self.scale = (2.0 * rank if alpha is None else alpha) / rank
        with torch.device("meta"):
            block = VFM(source, 1, start=split - 1, stop=split, stem=False, norm=False).blocks[str(split - 1)]
        self.adapted = [name for name, m in block.named_modules() if isinstance(m, nn.Linear)]
        self.factors: ModuleMap[_Factors] = ModuleMap()
        for name in self.adapted:
            out_width, in_width = block.get_parameter(f"{name}.weight").shape
            self.factors[name.replace(".", "_")] = _Factors(in_width, rank, out_width)

    def transform(self, x: Tensor, trunk: VFM) -> tuple[Tensor | None, Tensor]:
        block = trunk.blocks[str(self.split - 1)]
        merged = {}
        for name in self.adapted:
            pair = self.factors[name.replace(".", "_")]
            weight = block.get_parameter(f"{name}.weight")
            merged[f"{name}.weight"] = weight + (self.scale * (pair.lora_B @ pair.lora_A)).to(weight.dtype)
        y = functional_call(block, merged, (x,), {} if trunk.rope is None else {"rope": trunk.rope})
        return (y[:, :1] if self.maps_cls else None), y[:, self.source.prefix :]

    def macs(self, tokens: int) -> int:
        merge = sum(p.lora_A.numel() * p.lora_B.shape[0] for p in self.factors.values())
        return self.source.block_macs(tokens) + merge


class _Factors(nn.Module):
    def __init__(self, in_width: int, rank: int, out_width: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, in_width))
        self.lora_B = nn.Parameter(torch.zeros(out_width, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))


class _Skip(nn.Module):
    def __init__(self, source: int, hidden: int, target: int) -> None:
        super().__init__()
        self.linear = nn.Linear(source, target)
        self.bend = _two_layers(source, hidden, target)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.bend(x)


def _two_layers(source: int, hidden: int, target: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(source, hidden), nn.ReLU(), nn.Linear(hidden, target))


def _hidden(hidden: int | None, target: VFMSpec) -> int:
    hidden = target.width if hidden is None else hidden
    if hidden < 1:
        raise ValueError(f"A stitch with {hidden} hidden units was asked for; expected at least 1.")
    return hidden
