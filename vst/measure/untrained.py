"""Models for timing: random weights of the specs that a tree's config holds, so that no source has to be reached."""

from __future__ import annotations

from vst.fit.matching import Teacher
from vst.models.checkpoints import load_vfm
from vst.models.vfm import VFM
from vst.tree.config import VSTConfig
from vst.tree.encoder import VSTEncoder


def untrained_tree(config: VSTConfig) -> VSTEncoder:
    """A tree of random fp32 weights, which takes the time and the memory of the trained one."""
    tree = VSTEncoder(config)
    for module in tree.modules():
        if isinstance(module, VFM):
            module.reset_parameters()
    return tree.eval()


def untrained_teacher(tree: VSTEncoder) -> Teacher:
    """The frozen models of a fit whose steps are to be timed.

    Each target's stem and the blocks before the tree's own tail are random, which the tail may or may not be: a step
    takes as long, while its targets mean nothing.
    """
    config = tree.config
    heads = {
        b.name: load_vfm(b.spec, grid=config.grid, pretrained=False, stop=min(b.enters), norm=False)
        for b in config.branches
    }
    return Teacher(tree, heads)
