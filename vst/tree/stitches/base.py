"""Stitch layers: from a trunk's tokens at one depth, or at several, to what another model's tail expects.

A family is one class with one ``@register`` line, in a file beside this one or in a module of yours. Every stitch maps
the trunk's tokens ``[B, Ps + N, R Ds]`` to the target's ``[B, Pt + N, Dt]`` (P prefix tokens, N patches, D width, R
depths that are read, side by side) and treats prefix tokens alike:

* a class token is stitched to a class token where both models have one, by a map of its own;
* the source's registers are dropped;
* what the target has and the source lacks is a learned token that starts as the target's mean at that depth.

Maps work between standardised spaces (per channel; the statistics are stored with the stitch), because a few outlier
channels would otherwise rule both the error and the step sizes.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vst.models.fields import checked, hints_of, mapping, shown
from vst.models.placement import Lent
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM
from vst.tree.ridge import RidgeSums
from vst.tree.stitches.standardised import Standardised

STITCHES: dict[str, type[Stitch]] = {}
DEFAULT_STITCH = "mlp_skip"


def register(cls: type[Stitch]) -> type[Stitch]:
    """Make a family known by its ``family`` name.

    Raises:
        TypeError: it says that it has a closed form, and has no ``start`` that would take it.
    """
    if cls.closed_form and cls.start is Stitch.start:
        raise TypeError(f"Stitch family {cls.family!r} says closed_form; give it a start that takes the closed form.")
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
        if not isinstance(self.family, str) or self.family not in STITCHES:
            raise ValueError(
                f"Unknown stitch family {shown(self.family)}; known families: {', '.join(sorted(STITCHES))}. If it is "
                "one of your own, import the module that registers it first (on a command line: --import MODULE)."
            )
        options, build = mapping(self.options, "Stitch options"), STITCHES[self.family].__init__
        known = [n for n, p in inspect.signature(build).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        if unknown := set(options) - set(known):
            raise ValueError(
                f"Stitch family {self.family!r} has no option {sorted(unknown)}; its options: {known or 'none'}."
            )
        hints = hints_of(build)
        plain = {n: checked(v, hints.get(n, Any), f"{self.family} stitch: {n}") for n, v in options.items()}
        if any(plain[n] is not v for n, v in options.items()):
            object.__setattr__(self, "options", plain)

    @classmethod
    def parse(cls, value: StitchSpec | str | Mapping[str, Any]) -> StitchSpec:
        """From ``"mlp"``, ``"lora(rank=16)"`` or ``{"family": "lora", "rank": 16}``.

        Raises:
            ValueError: text of another form, an unknown family, or an option that the family does not have.
        """
        if isinstance(value, StitchSpec):
            return value
        if isinstance(value, str):
            return cls._of_text(value)
        options = dict(mapping(value, "stitch"))
        return cls(options.pop("family", DEFAULT_STITCH), options)

    @classmethod
    def _of_text(cls, text: str) -> StitchSpec:
        family, bracket, inside = text.strip().partition("(")
        if not bracket:
            return cls(family)
        family, inside = family.strip(), inside.strip()
        options: dict[str, Any] = {}
        for part in inside.removesuffix(")").split(","):
            name, equals, value = part.partition("=")
            if not inside.endswith(")") or not equals or name.strip() in options:
                raise ValueError(f"stitch is {text!r}; expected a family and its options, each once: lora(rank=16).")
            options[name.strip()] = _value(value.strip())
        return cls(family, options)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict; inverse of :meth:`parse`."""
        return {"family": self.family, **self.options}

    def __str__(self) -> str:
        """The family, with its options where it has any: ``mlp_skip(reads=2)``."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.family}({options})" if options else self.family

    def reads(self, split: int) -> tuple[int, ...]:
        """Trunk depths whose outputs the stitch reads when the tree is split at ``split``, ascending.

        Raises:
            ValueError: an option with which none could be read.
        """
        return STITCHES[self.family].depths(split, **self.options)

    def build(self, source: VFMSpec, target: VFMSpec, split: int) -> Stitch:
        """A new stitch with its family's plain start (before any fit)."""
        return STITCHES[self.family](source, target, split, **self.options)


def _value(text: str) -> Any:
    """A number, a truth value or a quoted text as Python writes it; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@dataclass
class Calibration:
    """What a closed-form start needs, streamed over a few hundred pictures."""

    patches: RidgeSums = field(default_factory=RidgeSums)
    cls: RidgeSums = field(default_factory=RidgeSums)
    prefix_sum: Tensor | float = 0.0
    images: int = 0

    def update(self, source: VFMSpec, target: VFMSpec, x: Tensor, y: Tensor) -> None:
        """Add source tokens x ``[B, Ps + N, R Ds]`` and target tokens y ``[B, Pt + N, Dt]`` of the same pictures."""
        self.patches.update(x[:, source.prefix :].flatten(0, 1), y[:, target.prefix :].flatten(0, 1))
        if source.cls and target.cls:
            self.cls.update(x[:, 0], y[:, 0])
        self.prefix_sum = self.prefix_sum + y[:, : target.prefix].double().sum(0)
        self.images += len(x)


def joined(taps: Mapping[int, Tensor], depths: Sequence[int]) -> Tensor:
    """The trunk's tokens at one depth ``[B, T, D]``, or at several side by side, ``[B, T, len(depths) D]``."""
    return taps[depths[0]] if len(depths) == 1 else torch.cat([taps[depth] for depth in depths], dim=-1)


class Stitch(nn.Module):
    """Base of all families; see the module's docstring for the contract.

    A family tells what it can do: its ``lookback`` (how many blocks before the split it reads the trunk; or, by
    :meth:`depths`, where it reads it several times), whether it has a ``closed_form``, which models it
    :meth:`supports` (and in words what it ``needs``), and what it costs (:meth:`macs`).

    Args:
        source, target: the two models.
        split: trunk depth at which the tree is split.

    Raises:
        ValueError: the family cannot bridge the two models.
    """

    family: ClassVar[str]
    lookback: ClassVar[int] = 0
    closed_form: ClassVar[bool] = False
    needs: ClassVar[str] = ""

    def __init__(self, source: VFMSpec, target: VFMSpec, split: int) -> None:
        super().__init__()
        if not self.supports(source, target):
            others = [name for name, cls in STITCHES.items() if cls.supports(source, target)]
            raise ValueError(
                f"A {self.family} stitch cannot bridge {source.source} (width {source.width}) to {target.source} "
                f"(width {target.width}): it needs {self.needs or 'other models'}; use {' or '.join(sorted(others))}."
            )
        self.source, self.target, self.split = source, target, split
        self.maps_cls = source.cls and target.cls
        learned = target.prefix - int(self.maps_cls)
        self.learned = nn.Parameter(torch.zeros(1, learned, target.width)) if learned else None

    @classmethod
    def depths(cls, split: int, **options: Any) -> tuple[int, ...]:
        """Trunk depths that a stitch of these options reads, ascending; one, unless a family says otherwise."""
        return (split - cls.lookback,)

    @classmethod
    def supports(cls, source: VFMSpec, target: VFMSpec) -> bool:
        """Whether the family can bridge two models."""
        return True

    def forward(self, x: Tensor, trunk: VFM | Lent) -> Tensor:
        """Trunk tokens ``[B, Ps + N, R Ds]`` at the :meth:`depths` to ``[B, Pt + N, Dt]``, in x's dtype."""
        cls, patches = self.transform(x, trunk.model if isinstance(trunk, Lent) else trunk)
        parts = [] if cls is None else [cls]
        if self.learned is not None:
            parts.append(self.learned.to(patches.dtype).expand(x.shape[0], -1, -1))
        return torch.cat([*parts, patches], dim=1) if parts else patches

    def transform(self, x: Tensor, trunk: VFM) -> tuple[Tensor | None, Tensor]:
        """The family's own map: class token ``[B, 1, Dt]`` (None unless ``maps_cls``) and patches ``[B, N, Dt]``."""
        raise NotImplementedError

    @torch.no_grad()
    def start(self, calibration: Calibration, form: str | None = "ridge", *, penalty: float = 1e-3) -> float | None:
        """Statistics, learned tokens and the closed-form map, from streamed sums.

        Args:
            calibration: of this split.
            form: one of :data:`vst.tree.ridge.CLOSED_FORMS`; None keeps the random map, between the right statistics.
            penalty: of the ridge fit of patches; the class token's, with far fewer rows, is a hundred times larger.

        Returns:
            Share of the target's per-channel variance explained at the seam; None where no closed form was taken, as
            none was asked for or the family has none.
        """
        if self.learned is not None:
            mean = calibration.prefix_sum / max(calibration.images, 1)
            self.learned.copy_(torch.as_tensor(mean)[int(self.maps_cls) :])
        return None

    def fold(self) -> None:
        """The same map with fewer steps, for inference: see :meth:`Standardised.fold`."""
        for module in self.modules():
            if isinstance(module, Standardised):
                module.fold()

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for one picture with ``tokens`` patch tokens (matrix products only).

        By default every ``nn.Linear`` once a patch token; a family that does otherwise says so.
        """
        return tokens * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
