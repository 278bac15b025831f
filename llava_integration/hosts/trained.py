"""What of a tower is trained where the host says that the tower is.

Hosts know one switch: all parameters whose names contain ``vision_tower``. Of a tree that is its stitches, unless the
tower's name ends in ``+whole``; and of either, what the split in use reaches, since a parameter that no loss reaches
ends a run of several processes.
"""

from __future__ import annotations

import logging
from collections.abc import Set

import torch
from torch import nn

from llava_integration.hosts.renamed import rename
from llava_integration.hosts.stamp import stitches_of
from vst.tree.encoder import VSTEncoder

LOG = logging.getLogger("llava_integration")


def reached(tree: VSTEncoder) -> set[str]:
    """Names of the parameters that the split in use needs."""
    return {name for name, _ in rename(VSTEncoder.skeleton(tree.config.at(tree.split))).named_parameters()}


def may_train(tree: VSTEncoder, whole: bool) -> set[str]:
    """Names of the tensors that a host may train, at any split."""
    return set(tree.state_dict()) if whole else set(stitches_of(tree))


def hold(name: str, tree: VSTEncoder, whole: bool) -> bool:
    """Freeze again what a host freed with all of the tower; True where that was done.

    What was freed by name, stitches alone, is left as it is.

    Args:
        name: of the tower, for the log.
        tree: the tower's.
        whole: train all that the split in use reaches, not its stitches alone.
    """
    freed = {n: p for n, p in tree.named_parameters() if p.requires_grad}
    if not freed or set(freed) <= may_train(tree, False):
        return False
    kept = reached(tree) & may_train(tree, whole) & set(freed)
    if kept == set(freed):
        return False
    for other in set(freed) - kept:
        freed[other].requires_grad_(False)
    what = "all that its split reaches is" if whole else "its stitches alone are"
    LOG.warning(
        "%s was set to be trained: %s, %d of the %d tensors, at split %s%s",
        name, what, len(kept), len(freed), tree.split, "" if whole else "; +whole behind the name trains all of it",
    )  # fmt: skip
    return True


def choose(tree: VSTEncoder, whole: bool) -> None:
    """Train what another split reaches, where :func:`hold` had chosen for the one before."""
    kept = reached(tree) & may_train(tree, whole)
    for name, parameter in tree.named_parameters():
        parameter.requires_grad_(name in kept)


def warn_of_training(name: str, tree: VSTEncoder, trained: Set[str]) -> None:
    """Say beforehand what is known to end badly in a training."""
    if any(p.dtype == torch.float16 for n, p in tree.named_parameters() if n in trained):
        LOG.warning(
            "%s is trained in float16, where an optimizer without float32 copies ends in numbers that are not finite: "
            "train in bfloat16 (--bf16 True)",
            name,
        )
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.distributed.get_world_size() > 1 and (idle := trained - reached(tree)):
        LOG.warning(
            "%d trained tensors of %s are not reached by its split %s, and DistributedDataParallel ends with 'Expected "
            "to have finished reduction': name the split (vst:PATH@SPLIT), or freeze them",
            len(idle), name, tree.split,
        )  # fmt: skip


def freed(tree: nn.Module) -> set[str]:
    """Names of the parameters that want a gradient."""
    return {n for n, p in tree.named_parameters() if p.requires_grad}
