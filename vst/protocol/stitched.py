"""One stitched model on cached trunk states: stitch, then the target's frozen tail.

Shape suffixes: B batch, T tokens (prefix + patches), N patches, D width.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vst.measure.cost import Cost, tree_cost
from vst.models.vfm import VFM
from vst.protocol.cells import Cell
from vst.protocol.features import Models
from vst.results.folders import atomic_path
from vst.tree.config import BranchConfig, VSTConfig
from vst.tree.stitch import StitchSpec


class Stitched(nn.Module):
    """``tail_target[enter:](stitch(x))`` for x at the source's ``reads`` depth. Only the stitch is a parameter.

    Its random start depends on the cell's place and seed alone, so all chains of a place begin alike.

    Args:
        cell: which. models: frozen.
    """

    def __init__(self, cell: Cell, models: Models) -> None:
        super().__init__()
        self.cell = cell
        self._frozen = (models[cell.source], models[cell.target])  # in a tuple: frozen models are no submodules
        self.spec = StitchSpec(cell.family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{cell.seed} {cell.place}".encode()))
            self.stitch = self.spec.build(self.source.spec, self.target.spec, cell.depth).to(models.device)

    @property
    def source(self) -> VFM:
        """The model whose blocks run first."""
        return self._frozen[0]

    @property
    def target(self) -> VFM:
        """The model whose tail is entered."""
        return self._frozen[1]

    @property
    def reads(self) -> int:
        """Source depth that the stitch reads."""
        return self.spec.reads(self.cell.depth)

    def seam(self, x: Tensor) -> Tensor:
        """Source tokens ``[B, Ts, Ds]`` to what the tail is fed, ``[B, Tt, Dt]``."""
        return self.stitch(x, self.source)

    def end(self, z: Tensor) -> Tensor:
        """Through the tail: ``[B, Tt, Dt]`` to patch tokens ``[B, N, Dt]`` of the target's last block (before norm)."""
        return self.target.patches(self.target.run(z, self.cell.enter, self.target.spec.depth))

    def cost(self) -> Cost:
        """Of one picture: source blocks, stitch, tail; without a head."""
        a, b, cell = self.source.spec, self.target.spec, self.cell
        branch = BranchConfig("target", b, (cell.depth,), (cell.enter,), b.depth, self.spec)
        config = VSTConfig(a, (branch,), self.source.grid, keep_trunk=False, feature_layer=-1)
        return tree_cost(config)


def save_module(path: Path, module: nn.Module, facts: Mapping[str, Any]) -> None:
    """Write a module's state and JSON-able facts into one safetensors file, atomically."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})


def load_module(path: Path, module: nn.Module) -> dict[str, Any]:
    """Read a file of :func:`save_module` into a module; returns its facts."""
    with safe_open(path, framework="pt") as file:
        module.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
        return json.loads(file.metadata()["facts"])
