"""The tower to beat: every model in full, one after another, each on its own pixels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vst.checkpoints import load_vfm
from vst.config import VSTConfig, feature_depth
from vst.images import ImageTransform
from vst.modules import ModuleMap
from vst.vfm import VFM


class FullEncoders(nn.Module):
    """The models of a tree's features in full, fused alike; with one name, a single-model tower.

    Args:
        config: of the tree to compare with.
        models: by branch name, models that hold their stem and the blocks up to the features.

    Raises:
        ValueError: models that are not the tree's.
    """

    def __init__(self, config: VSTConfig, models: Mapping[str, VFM]) -> None:
        super().__init__()
        if not models or set(models) - set(config.names):
            raise ValueError(f"Models were given for {sorted(models)}; expected some of {config.names}.")
        self.config = config
        self.models: ModuleMap[VFM] = ModuleMap({n: models[n] for n in config.names if n in models})
        self.fuse = config.fuser() if set(models) == set(config.names) else None

    @classmethod
    def load(cls, config: VSTConfig, names: list[str] | None = None, *, pretrained: bool = True) -> FullEncoders:
        """Load the named models (default: all) from their sources."""
        models = {
            name: load_vfm(
                spec.source,
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

    def branch_tokens(self, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Patch tokens ``[B, N, D]`` by name, from pixels by name."""
        out = {}
        for name, model in self.models.items():
            x = model.taps(pixels[name], [model.stop])[model.stop]
            out[name] = model.patches(x if model.norm is None else model.norm(x))
        return out

    def forward(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """Fused tokens (of one model: its own, normalised alike)."""
        parts = list(self.branch_tokens(pixels).values())
        if self.fuse is not None:
            return self.fuse(parts)
        if len(parts) == 1:
            from vst.fusion import Fusion

            return Fusion("channel", {"only": parts[0].shape[-1]}, normalise=self.config.normalise)(parts)
        raise ValueError(f"Only some models of the tree are held ({list(self.models)}); call branch_tokens instead.")
