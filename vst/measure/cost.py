"""What a tree costs, on paper: multiply-accumulates, parameters, memory; and the same counted by torch.

Only matrix products and convolutions are counted (as ``torch.utils.flop_counter`` does); one MAC is two FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vst.models.fields import checked, dtype_of, whole
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM
from vst.tree.config import BranchConfig, VSTConfig
from vst.tree.encoder import VSTEncoder
from vst.tree.splits import several


@dataclass(frozen=True)
class Cost:
    """Of one picture at one split.

    Attributes:
        trunk, stitches, tails: MACs of the trunk (stem included), of the stitches and of the branches' own blocks.
        parameters: that this split needs (buffers included).
    """

    trunk: int
    stitches: int
    tails: int
    parameters: int

    @property
    def macs(self) -> int:
        """All MACs of one picture."""
        return self.trunk + self.stitches + self.tails

    @property
    def flops(self) -> int:
        """Two FLOPs a MAC."""
        return 2 * self.macs


def model_cost(spec: VFMSpec, grid: int, stop: int, *, norm: bool = False) -> Cost:
    """One model alone, up to depth ``stop``, with or without its final norm."""
    patches = grid**2
    with torch.device("meta"):
        model = VFM(spec, grid, stop=stop, norm=norm)
    return Cost(spec.stem_macs(patches) + stop * spec.block_macs(patches), 0, 0, _count_numbers(model))


def tree_cost(config: VSTConfig, split: int | Mapping[str, int] | None = None) -> Cost:
    """A tree at one split.

    Raises:
        ValueError: a split that the tree does not hold.
    """
    checked(config, VSTConfig, "config")
    chosen, patches = config.resolve(split), config.grid**2
    read = [b.reads(chosen[b.name])[-1] for b in config.branches]
    depth = max([*read, config.trunk_stop if config.keep_trunk else 0])
    trunk = config.trunk.stem_macs(patches) + depth * config.trunk.block_macs(patches)
    tree = VSTEncoder.skeleton(config)
    stitches = tails = 0
    parameters = sum(_count_numbers(m) for n, m in tree.trunk.named_children() if n != "blocks")
    parameters += sum(p.numel() for n, p in tree.trunk.named_parameters(recurse=False))
    held = max([depth, *(s for s in chosen.values())])
    parameters += sum(_count_numbers(b) for i, b in tree.trunk.blocks.items() if int(i) < held)
    for b in config.branches:
        split_b, branch = chosen[b.name], tree.branches[b.name]
        stitch = branch.stitches[str(split_b)]
        stitches += stitch.macs(patches)
        tails += (b.stop - b.enter(split_b)) * b.spec.block_macs(patches)
        parameters += _count_numbers(branch.tail.norm) if branch.tail.norm is not None else 0
        parameters += _count_numbers(stitch) + sum(
            _count_numbers(m) for i, m in branch.tail.blocks.items() if int(i) >= b.enter(split_b)
        )
    return Cost(trunk, stitches, tails, parameters)


def full_cost(config: VSTConfig) -> Cost:
    """Every model of the tree's features in full: what today's multi-encoder towers pay."""
    checked(config, VSTConfig, "config")
    grid, norm = config.grid, config.feature_norm
    costs = [model_cost(config.trunk, grid, config.trunk_stop, norm=norm)] if config.keep_trunk else []
    costs += [model_cost(b.spec, grid, b.stop, norm=norm) for b in config.branches]
    return Cost(sum(c.trunk for c in costs), 0, 0, sum(c.parameters for c in costs))


def fit_flops(config: VSTConfig, splits: Sequence[int] | None = None, *, cached: bool = False) -> int:
    """FLOPs of fitting the stitches at some splits (default: all) by FFM in one pass, a picture.

    The trunk runs to the deepest split, every target to the features (not where ``cached``). A tail goes forward, and
    backward to its input alone: its matrices once more, its attention products twice (four for each two). A stitch
    is reckoned with two and a half times its forward pass (linear takes less, lora more): itself, its weights'
    gradients, and its inputs' where another layer of it lies below. What checkpointing recomputes is not counted.

    Raises:
        ValueError: a split that no branch holds.
    """
    checked(config, VSTConfig, "config")
    held = sorted({s for b in config.branches for s in b.splits})
    chosen = held if splits is None else [whole(s, "split") for s in several(splits)]
    if missing := set(chosen) - set(held):
        raise ValueError(f"Split {min(missing)} was asked for; expected some of {held}, which the tree holds.")
    patches, tree = config.grid**2, VSTEncoder.skeleton(config)
    pairs = [(b, s) for b in config.branches for s in chosen if s in b.splits]
    macs = config.trunk.stem_macs(patches) + max(b.reads(s)[-1] for b, s in pairs) * config.trunk.block_macs(patches)
    for b in () if cached else {b.name: b for b, _ in pairs}.values():
        macs += b.spec.stem_macs(patches) + b.stop * b.spec.block_macs(patches)
    for b, split in pairs:
        block = b.spec.block_macs(patches)
        attention = block - (patches + b.spec.prefix) * b.spec.block_weights
        macs += (b.stop - b.enter(split)) * (2 * block + attention)
        macs += 5 * tree.branches[b.name].stitches[str(split)].macs(patches) // 2
    return 2 * macs


def extra_blocks(config: VSTConfig, split: int | Mapping[str, int] | None = None, *, stitch: bool = False) -> float:
    """The paper's figure: what the branches add, in units of the trunk model alone, counting equal blocks.

    Without ``stitch`` a branch adds its own blocks over the trunk's, ``(23 - n) / 23`` for two 24-block models read
    at the last block but one; with it, the stitch's matrices count as a share of the branch's block.
    """
    checked(config, VSTConfig, "config")
    chosen = config.resolve(split)
    tree = VSTEncoder.skeleton(config)
    return sum(_branch_blocks(b, chosen[b.name], tree, stitch) for b in config.branches) / config.trunk_stop


def _branch_blocks(b: BranchConfig, split: int, tree: VSTEncoder, stitch: bool) -> float:
    blocks = float(b.stop - b.enter(split))
    if stitch:  # one token's MACs: a map's weights, or an adapted block's
        layer = tree.branches[b.name].stitches[str(split)]
        blocks += (layer.macs(2) - layer.macs(1)) / b.spec.block_weights
    return blocks


def counted_flops(model: nn.Module, *inputs: Tensor, **options: object) -> int:
    """FLOPs of one call without gradients, as torch counts them."""
    with torch.no_grad():
        return flops_of(lambda: model(*inputs, **options))


def flops_of(call: Callable[[], object]) -> int:
    """FLOPs of whatever a call does, a backward pass included, as torch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The fused CPU attention kernel is not in torch's table; the plain one is made of products that are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def weights_bytes(config: VSTConfig, split: int | Mapping[str, int] | None, dtype: torch.dtype = torch.float32) -> int:
    """Memory of the weights that a split needs."""
    return tree_cost(config, split).parameters * dtype_of(dtype).itemsize


def activation_bytes(config: VSTConfig, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Estimate of the largest working set of one block in inference: its input, its widest inner tensor, its output."""
    checked(config, VSTConfig, "config")
    batch, patches = whole(batch, "batch", (0, None)), config.grid**2
    sizes = []
    for spec in (config.trunk, *(b.spec for b in config.branches)):
        inner = max(4 * spec.width, spec.hidden * (3 if spec.mlp == "swiglu" else 2))
        sizes.append((patches + spec.prefix) * (3 * spec.width + inner))
    return batch * max(sizes) * dtype_of(dtype).itemsize


def _count_numbers(module: nn.Module) -> int:
    """Parameters of a module, and the buffers that are saved with it."""
    return sum(p.numel() for p in module.parameters()) + sum(
        b.numel() for n, b in module.named_buffers() if not n.endswith(("rope", "k_bias"))
    )
