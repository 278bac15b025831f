"""A branch of a tree: its stitches, one a split, and the retained later blocks of its model."""

from __future__ import annotations

from torch import Tensor, nn

from vst.models.placement import Lent
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM
from vst.tree.config import BranchConfig
from vst.tree.modules import ModuleMap
from vst.tree.stitches import Stitch


class Branch(nn.Module):
    """A branch: its stitches, new, one a split, and its tail.

    Args:
        config: of the branch. trunk: of the model whose tokens it is fed.
        tail: the branch's model from its first entered block on at least.
    """

    def __init__(self, config: BranchConfig, trunk: VFMSpec, tail: VFM) -> None:
        super().__init__()
        self.config = config
        self.stitches: ModuleMap[Stitch] = ModuleMap(
            {str(split): config.stitch.build(trunk, config.spec, split) for split in config.splits}
        )
        self.tail = tail

    def run_tail(self, tokens: Tensor, split: int) -> Tensor:
        """Stitched tokens ``[B, T, D]`` through the tail's blocks (no norm)."""
        return self.tail.run(tokens, self.config.enter(split), self.config.stop)

    def forward(self, x: Tensor, split: int, trunk: VFM | Lent) -> Tensor:
        """Trunk tokens at ``config.reads(split)``, joined, to the branch's features, patch tokens ``[B, N, D]``."""
        x = self.stitches[str(split)](x, trunk)
        return self.tail(x, self.config.stop, start=self.config.enter(split), features=True)
