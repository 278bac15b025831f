"""Trees of ViT-L to time, filled with random weights where they are: a checkpoint would change no time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from gpu_steps.options import made, options
from vst.models.vfm import VFM
from vst.tree.baseline import FullEncoders
from vst.tree.config import VSTConfig, feature_depth
from vst.tree.encoder import VSTEncoder
from vst.tree.options import TreeArgs

FILES = {"pair": "trees/dinov2-clip-l.yaml", "four": "trees/four-vit-l.yaml"}
_TINY = {"width": 64, "heads": 2, "hidden": 128}  # of a dry run, with 24 blocks all the same


def plan(tree: str, grid: int, splits: list[int], dry: bool) -> VSTConfig:
    """A tree of ``configs/trees`` at a grid, with these splits; narrow where it is a dry run."""
    args = made(TreeArgs, options(FILES[tree], "tree"), splits=splits, image_size=14 * grid)
    config = args.plan()
    if dry:
        branches = tuple(replace(b, spec=replace(b.spec, **_TINY)) for b in config.branches)
        config = replace(config, trunk=replace(config.trunk, **_TINY), branches=branches)
    return config


def random_tree(config: VSTConfig, device: str, dtype: torch.dtype) -> VSTEncoder:
    """A tree, made on its device."""
    return _filled(VSTEncoder.skeleton(config), device, dtype)  # type: ignore[return-value]


def random_full(config: VSTConfig, device: str, dtype: torch.dtype) -> FullEncoders:
    """All of its models in full, made on their device."""
    with torch.device("meta"):
        models = {
            name: VFM(spec, config.grid, stop=feature_depth(spec, config.feature_layer), norm=config.feature_norm)
            for name, spec in config.specs.items()
        }
    return _filled(FullEncoders(config, models).requires_grad_(False), device, dtype)  # type: ignore[return-value]


@torch.no_grad()
def _filled(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    module = module.to_empty(device=device).to(dtype)
    for tensor in (*module.parameters(), *(b for n, b in module.named_buffers() if ".stitches." in n)):
        if tensor.ndim > 1:
            tensor.normal_(0, 0.02)
        else:
            tensor.fill_(1)  # of norms and scales: activations stay as large as a trained model's
    return module
