"""The towers to beat: every model in full, one after another, each on its own pixels or on the trunk's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vst.data.images import ImageTransform
from vst.models.checkpoints import load_vfm
from vst.models.inputs import check_pixels
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM
from vst.tree.config import VSTConfig, feature_depth
from vst.tree.modules import ModuleMap
from vst.tree.schedule import IN_TURN, Schedule


class FullEncoders(nn.Module):
    """The models of a tree's features in full, fused alike; with one name, a single-model tower.

    Args:
        config: of the tree to compare with.
        models: by branch name, models that hold their stem and the blocks up to the features.

    Raises:
        ValueError: models that are not the tree's.
    """

    _no_split_modules: ClassVar[list[str]] = ["VFM"]

    def __init__(self, config: VSTConfig, models: Mapping[str, VFM]) -> None:
        super().__init__()
        if not models or set(models) - set(config.names):
            raise ValueError(f"Models were given for {sorted(models)}; expected some of {config.names}.")
        self.config = replace(config, tuned=None)  # these are the published models
        self.models: ModuleMap[VFM] = ModuleMap({n: models[n] for n in config.names if n in models})
        self.fuse = config.fuser() if set(models) == set(config.names) else None

    @classmethod
    def load(cls, config: VSTConfig, names: list[str] | None = None, *, pretrained: bool = True) -> FullEncoders:
        """Load the named models (default: all) from their sources.

        Args:
            config: of the tree to compare with.
            names: of the models that are wanted.
            pretrained: False gives random weights of the specs in the config; no source is asked for anything then.
        """
        models = {
            name: load_vfm(
                spec,
                grid=config.grid,
                pretrained=pretrained,
                stop=feature_depth(spec, config.feature_layer),
                norm=config.feature_norm,
            )
            for name, spec in config.specs.items()
            if names is None or name in names
        }
        return cls(config, models).requires_grad_(False)

    def transforms(self) -> dict[str, ImageTransform]:
        """Each model's own picture preparation, at the tree's grid."""
        return {
            name: ImageTransform(size=m.image_size, mean=m.spec.mean, std=m.spec.std, cut=self.config.cut)
            for name, m in self.models.items()
        }

    def branch_tokens(self, pixels: Mapping[str, Tensor], schedule: Schedule = IN_TURN) -> dict[str, Tensor]:
        """Patch tokens ``[B, N, D]`` by name, from pixels by name; each model's work inside ``schedule.fork``.

        A model that is there twice (the control of doubled tokens) runs once for the same pixels.
        """
        made: dict[str, Tensor] = {}
        same = self.same_tokens(pixels)
        for name in dict.fromkeys(same.values()):
            model = self.models[name]
            with schedule.fork(name, pixels[name]):
                made[name] = model(pixels[name], model.stop, features=True)
        schedule.join(*made.values())
        return {name: made[first].to(pixels[name].device) for name, first in same.items()}

    def same_tokens(self, pixels: Mapping[str, Tensor]) -> dict[str, str]:
        """By name, the first of the models that gives the same tokens: mostly itself."""
        if not isinstance(pixels, Mapping) or (lacking := [name for name in self.models if name not in pixels]):
            told = f"pixels lack {lacking}" if isinstance(pixels, Mapping) else f"pixels is a {type(pixels).__name__}"
            raise ValueError(
                f"{told}; expected a mapping with each model's own, as transforms() make them: {list(self.models)}."
            )
        first: dict[tuple[VFMSpec, int], str] = {}
        return {name: first.setdefault((m.spec, id(pixels[name])), name) for name, m in self.models.items()}

    def forward(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """Fused tokens (of one model: its own, normalised alike)."""
        return self.fused(list(self.branch_tokens(pixels).values()))

    def fused(self, parts: list[Tensor]) -> Tensor:
        """Every model's tokens ``[B, N, D]``, in the order of ``models``, as one.

        Raises:
            ValueError: only some of the tree's models are held, and more than one.
        """
        if self.fuse is not None:
            return self.fuse(parts)
        if len(parts) == 1:
            from vst.tree.fusion import Fusion

            return Fusion("channel", {"only": parts[0].shape[-1]}, normalise=self.config.normalise)(parts)
        raise ValueError(f"Only some models of the tree are held ({list(self.models)}); call branch_tokens instead.")


class FullTower(FullEncoders):
    """All models in full behind the face of a tree: one picture's pixels in, fused tokens out.

    Hosts give a tower one tensor, the trunk's. Other models see it renormalised and, where their patches are of
    another size, resized (bicubic, antialiased) - from the trunk's pixels, where :meth:`FullEncoders.transforms`
    starts from the original picture.

    Args:
        config: of the tree to compare with. Weights are not initialised to anything useful here.
    """

    def __init__(self, config: VSTConfig) -> None:
        super().__init__(
            config,
            {
                name: VFM(spec, config.grid, stop=feature_depth(spec, config.feature_layer), norm=config.feature_norm)
                for name, spec in config.specs.items()
            },
        )
        self.requires_grad_(False)

    @classmethod
    def from_config(cls, config: VSTConfig, *, pretrained: bool = True) -> FullTower:
        """With every model's weights from its source, or random ones, for which no source is needed."""
        with torch.device("meta"):
            tower = cls(config)
        tower.models = FullEncoders.load(config, pretrained=pretrained).models
        return tower

    def forward(self, pixels: Tensor, split: object = None) -> Tensor:  # type: ignore[override]
        """Fused tokens ``[B, tokens, width]`` of pictures ``[B, 3, S, S]`` as the tree's transform makes them.

        ``split`` is taken and has no meaning here.
        """
        return super().forward(self.each(pixels))

    def each(self, pixels: Tensor) -> dict[str, Tensor]:
        """Every model's pixels by name, made of the trunk's ``[B, 3, S, S]``."""
        check_pixels(pixels)
        return {name: self._as_seen_by(m.spec, m.image_size, pixels) for name, m in self.models.items()}

    def _as_seen_by(self, spec: VFMSpec, size: int, pixels: Tensor) -> Tensor:
        trunk = self.config.trunk
        if (spec.mean, spec.std) != (trunk.mean, trunk.std):
            mean, std, own_mean, own_std = (
                torch.tensor(v, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
                for v in (trunk.mean, trunk.std, spec.mean, spec.std)
            )
            pixels = ((pixels.float() * std + mean - own_mean) / own_std).to(pixels.dtype)
        if pixels.shape[-1] != size:
            pixels = F.interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True).to(pixels.dtype)
        return pixels
