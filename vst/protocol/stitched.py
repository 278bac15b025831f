"""One stitched model on cached trunk states: stitch, then the target's frozen tail.

Shape suffixes: B batch, T tokens (prefix + patches), N patches, D width.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from vst.measure.cost import Cost, tree_cost
from vst.protocol.cells import Cell
from vst.protocol.features import Models
from vst.tree.branch import Branch
from vst.tree.config import BranchConfig, VSTConfig
from vst.tree.stitches import Stitch, StitchSpec, joined


class Stitched:
    """The stitched model of a cell: a branch whose tail is the whole target, on the source's tokens.

    Its random start depends on the cell's place and seed alone, so all chains of a place begin alike.

    Args:
        cell: which. models: frozen.
    """

    def __init__(self, cell: Cell, models: Models) -> None:
        self.cell = cell
        self.source, self.target = models[cell.source], models[cell.target]
        spec = self.target.spec
        family = StitchSpec.parse(cell.family)
        config = BranchConfig("target", spec, (cell.depth,), (cell.enter,), spec.depth, family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{cell.seed} {cell.place}".encode()))
            self.branch = Branch(config, self.source.spec, self.target)
        self.stitch.to(models.device)

    @property
    def stitch(self) -> Stitch:
        """What is trained."""
        return self.branch.stitches[str(self.cell.depth)]

    @property
    def reads(self) -> tuple[int, ...]:
        """Source depths that the stitch reads, ascending."""
        return self.branch.config.reads(self.cell.depth)

    def read(self, tokens: Mapping[tuple[str, int], Tensor]) -> Tensor:
        """What the stitch reads, ``[B, Ts, R Ds]``, of tokens ``[B, Ts, Ds]`` by model and depth."""
        return joined({depth: tokens[self.cell.source, depth] for depth in self.reads}, self.reads)

    def seam(self, x: Tensor) -> Tensor:
        """Source tokens ``[B, Ts, R Ds]`` at the R depths that are read to what the tail is fed, ``[B, Tt, Dt]``."""
        return self.stitch(x, self.source)

    def end(self, z: Tensor) -> Tensor:
        """Through the tail: ``[B, Tt, Dt]`` to patch tokens ``[B, N, Dt]`` of the target's last block (before norm)."""
        return self.target.patches(self.branch.run_tail(z, self.cell.depth))

    def cost(self) -> Cost:
        """Of one picture: source blocks, stitch, tail; without a head."""
        config = VSTConfig(
            self.source.spec, (self.branch.config,), self.source.grid, keep_trunk=False, feature_layer=-1
        )
        return tree_cost(config)
