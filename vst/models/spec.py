"""What is known of a model without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vst.models.fields import check_fields, line, mapping, one_of, shown, whole

FAMILIES = ("clip", "dinov2", "siglip", "dinov3", "vit")
MLPS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
POSITIONS = ("learned", "rotary")
# Far beyond any model: what a config can ask memory for.
MOST_DEPTH, MOST_WIDTH, MOST_PATCH, MOST_GRID = 512, 2**16, 2**10, 2**10


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
        line(self.source, "VFMSpec.source")
        for name, known in (("family", FAMILIES), ("mlp", MLPS), ("position", POSITIONS)):
            one_of(getattr(self, name), f"VFMSpec.{name}", known)
        if isinstance(self.license, str) and self.license.strip():  # of several lines, perhaps
            line(" ".join(self.license.split()), "VFMSpec.license")
        limits = {
            "width": (1, MOST_WIDTH),
            "depth": (1, MOST_DEPTH),
            "heads": (1, MOST_WIDTH),
            "patch": (1, MOST_PATCH),
            "hidden": (1, 4 * MOST_WIDTH),
            "image_size": (1, MOST_GRID * MOST_PATCH),
            "registers": (0, 1024),
            "norm_eps": (1e-12, 1),
            "rope_temperature": (1e-6, 1e9),
            "mean": (0, 1),  # pixels are in 0..1, not in 0..255
            "std": (1e-4, 16),
        }
        check_fields(self, limits, prefix=f"{self.source}: VFMSpec.")
        if self.width % self.heads:
            raise ValueError(f"{self.source}: width {self.width} is not a multiple of its {self.heads} heads.")
        if not self.patch <= self.image_size <= MOST_GRID * self.patch:
            raise ValueError(
                f"{self.source}: VFMSpec.image_size is {self.image_size}; expected 1 to {MOST_GRID} times its patch of "
                f"{self.patch} pixels."
            )
        if self.position == "rotary" and self.width // self.heads % 4:
            raise ValueError(
                f"{self.source}: VFMSpec.heads is {self.heads}; expected heads of a width of 4, 8, 12, ... (of "
                f"{self.width}) with rotary positions."
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
        image_size = whole(image_size, f"{self.source}: image size")
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
            ValueError: an unknown or a missing key, a value of another type or beyond its range.
        """
        values = mapping(values, "A VFMSpec")
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"VFMSpec has no field {shown(sorted(unknown))}; known fields: {sorted(known)}.")
        try:
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**plain)
        except TypeError as error:
            raise ValueError(f"A VFMSpec needs more fields than were given: {error}.") from error
