"""Which tree to build, as it is asked for: sources, splits and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vst.tree.config import VSTConfig
from vst.tree.encoder import VSTEncoder


@dataclass(frozen=True)
class TreeArgs:
    """Which tree to build.

    Attributes:
        trunk: source of the model that sees the pixels: timm:NAME, hf:ID-or-folder, open_clip:ARCH/TAG or a ready name.
        branches: sources of the other models, or a mapping from names to sources.
        splits: trunk depths to hold stitches for, for all branches or by branch name.
        image_size: side of the pictures in pixels, a multiple of the trunk's patch; default: the trunk's own.
        enters: by branch name, its own depth for each split; default: the same relative depth.
        stitch: family, or {family: ..., option: ...}; default: the library's.
        keep_trunk: whether the trunk's own tail is a branch.
        feature_layer: hidden state that is read of every model (-2: last block but one, as LLaVA).
        feature_norm: apply each model's final norm to it.
        fusion: channel, additive, interleave or sequence.
        fusion_weights: of additive, one a branch.
        normalise: layer or none, before fusion.
        cut: crop, squash or pad: how a picture becomes square.
        split: default split; default: the deepest.
        pretrained: false for random weights (timing, tests).
        seed: of random weights.
    """

    trunk: str
    branches: list[str] | dict[str, str]
    splits: list[int] | dict[str, list[int]]
    image_size: int | None = None
    enters: dict[str, list[int]] | None = None
    stitch: str | dict[str, Any] | None = None
    keep_trunk: bool = True
    feature_layer: int = -2
    feature_norm: bool = False
    fusion: str = "channel"
    fusion_weights: list[float] | None = None
    normalise: str = "layer"
    cut: str = "crop"
    split: int | None = None
    pretrained: bool = True
    seed: int = 0

    def build(self) -> VSTEncoder:
        """The tree, with new stitches."""
        return VSTEncoder.from_vfms(**vars(self))

    def plan(self) -> VSTConfig:
        """The tree's config; nothing is built or loaded."""
        return VSTEncoder.plan(**{k: v for k, v in vars(self).items() if k not in ("pretrained", "seed")})
