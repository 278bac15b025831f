"""What is known of a model without its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

FAMILIES = ("clip", "dinov2", "siglip", "dinov3", "vit")
MLPS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
POSITIONS = ("learned", "rotary")

# Wide enough for every published ViT, and narrow enough that a damaged or hostile file is refused before it is built.
_WHOLE = {
    "width": (1, 2**16),
    "depth": (1, 1024),
    "heads": (1, 2**12),
    "patch": (1, 1024),
    "hidden": (1, 2**20),
    "image_size": (1, 2**15),
    "registers": (0, 1024),
}
_FLAGS = ("cls", "layer_scale", "pre_norm", "qkv_bias", "antialias")
_MAX_GRID = 1024


@dataclass(frozen=True)
class VFMSpec:
    """Everything that is known of a model without its weights; counts, grids, processors and costs derive from it.

    Attributes:
        source: exact source string, such as ``timm:vit_large_patch14_dinov2.lvd142m``.
        family: one of ``FAMILIES``.
        width, depth, heads, patch: of the transformer; patch in pixels.
        hidden: width of the MLP's hidden layer (of each of the two halves for ``swiglu``).
        image_size: side in pixels that the position table was made for.
        mlp: one of ``MLPS``.
        cls: whether there is a class token. registers: how many register tokens follow it.
        layer_scale, pre_norm, qkv_bias: block layout; ``pre_norm`` is CLIP's norm between stem and blocks.
        norm_eps: epsilon of every LayerNorm.
        position: ``learned`` table or ``rotary`` (DINOv3, with ``rope_temperature``).
        antialias: whether the position table is resampled with antialiasing, as the source's own code does.
        mean, std: the model's image normalisation, RGB, for pixel values in 0..1.
        license: licence of the weights, as the source states it.

    Raises:
        ValueError: a field of another type or out of its range, or fields that do not fit each other.
    """

    source: str
    family: str
    width: int
    depth: int
    heads: int
    patch: int
    hidden: int
    image_size: int
    mlp: str = "gelu"
    cls: bool = True
    registers: int = 0
    layer_scale: bool = False
    pre_norm: bool = False
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    position: str = "learned"
    rope_temperature: float = 100.0
    antialias: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    license: str = "unknown"

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip() or not self.source.isprintable():
            raise ValueError(f"VFMSpec.source is {_shown(self.source)}; expected one line of text: correct the spec.")
        self._check("license", isinstance(self.license, str), "text")
        for name, known in (("family", FAMILIES), ("mlp", MLPS), ("position", POSITIONS)):
            self._check(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        for name, (low, high) in _WHOLE.items():
            value = getattr(self, name)
            self._check(name, type(value) is int and low <= value <= high, f"a whole number from {low} to {high}")
        for name in _FLAGS:
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        for name, most in (("norm_eps", 1.0), ("rope_temperature", math.inf)):
            value = getattr(self, name)
            fits = _is_number(value) and 0 < value <= most
            self._check(name, fits, "a finite number above 0" + (f", at most {most}" if most < math.inf else ""))
        for name in ("mean", "std"):
            value = getattr(self, name)
            three = isinstance(value, (tuple, list)) and len(value) == 3 and all(map(_is_number, value))
            self._check(name, three, "three finite numbers, for R, G and B")
            object.__setattr__(self, name, tuple(float(v) for v in value))
        self._check("mean", min(self.mean) >= 0 and max(self.mean) <= 1, "values in 0..1 (divide what is for 0..255)")
        spread = 1e-4 <= min(self.std) <= max(self.std) <= 16
        self._check("std", spread, "values above 0, for pixels in 0..1")
        if self.width % self.heads:
            raise ValueError(f"{self.source}: width {self.width} is not a multiple of its {self.heads} heads.")
        sides = self.patch <= self.image_size <= _MAX_GRID * self.patch
        self._check("image_size", sides, f"1 to {_MAX_GRID} times its patch of {self.patch} pixels")
        fours = self.position != "rotary" or self.width // self.heads % 4 == 0
        self._check("heads", fours, f"heads of a width of 4, 8, 12, ... (of {self.width}) with rotary positions")

    def _check(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            value = _shown(getattr(self, name))
            raise ValueError(
                f"{self.source}: VFMSpec.{name} is {value}; expected {expected}: correct the spec, or the config that "
                "it comes from."
            )

    @property
    def prefix(self) -> int:
        """Number of leading tokens that are not patches: CLS and registers."""
        return int(self.cls) + self.registers

    def grid(self, image_size: int) -> int:
        """Patches a side for a square image of ``image_size`` pixels.

        Raises:
            ValueError: the size is not a positive multiple of the patch.
        """
        if image_size < self.patch or image_size % self.patch:
            low = max(self.patch, image_size // self.patch * self.patch)
            raise ValueError(
                f"{self.source}: image size {image_size} is not a multiple of its patch of {self.patch} pixels; "
                f"use {low} or {low + self.patch}."
            )
        return image_size // self.patch

    @property
    def block_weights(self) -> int:
        """Entries of a block's matrices: its MACs (multiply-accumulates) a token without the attention products."""
        return 4 * self.width**2 + (3 if self.mlp == "swiglu" else 2) * self.width * self.hidden

    def block_macs(self, patches: int) -> int:
        """MACs of one block for one picture of ``patches`` patch tokens (prefix tokens are added here)."""
        tokens = patches + self.prefix
        return tokens * self.block_weights + 2 * tokens * tokens * self.width

    def stem_macs(self, patches: int) -> int:
        """MACs of the patch embedding for one picture."""
        return patches * 3 * self.patch**2 * self.width

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VFMSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown or a missing key.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"A VFMSpec was given as {_shown(values)}; expected its fields by name.")
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"VFMSpec has no field {sorted(map(str, unknown))}; known fields: {sorted(known)}.")
        try:
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**plain)
        except TypeError as error:
            raise ValueError(f"A VFMSpec needs more fields than were given: {error}.") from error


def _is_number(value: Any) -> bool:
    # Huge whole numbers have no float: math.isfinite would raise on them.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
