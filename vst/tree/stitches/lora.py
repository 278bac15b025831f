"""A stitch that adapts the trunk's own next block."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vst.models.placement import gathered, hooked, placed, tensors_of
from vst.models.spec import MOST_WIDTH, VFMSpec
from vst.models.vfm import VFM
from vst.tree.modules import ModuleMap
from vst.tree.stitches.base import Stitch, register


@register
class LoRA(Stitch):
    """The trunk's own next block, adapted by low-rank factors: reads depth ``split - 1``, gives depth ``split``.

    The factors follow the LoRA paper (Hu et al. 2021): ``W + (alpha / rank) * B A`` with A uniform and B zero at the
    start, on every matrix of the block. The merged weight is formed at each call, so training and a loaded tree take
    the same path and need no other library.

    Args:
        rank: inner width of the factors.
        alpha: scale; the default is twice the rank.

    Raises:
        ValueError: the two models' widths differ.
    """

    family = "lora"
    lookback = 1
    needs = "equal widths, as it adapts a block of the trunk"

    @classmethod
    def supports(cls, source: VFMSpec, target: VFMSpec) -> bool:
        return source.width == target.width

    def __init__(
        self, source: VFMSpec, target: VFMSpec, split: int, *, rank: int = 16, alpha: float | None = None
    ) -> None:
        super().__init__(source, target, split)
        if not 1 <= rank <= MOST_WIDTH:
            raise ValueError(
                f"A lora stitch of rank {rank} was asked for; expected at least 1, and at most {MOST_WIDTH}."
            )
        if alpha is not None and not alpha > 0:
            raise ValueError(f"A lora stitch of alpha {alpha} was asked for; expected above 0.")
        self.scale = (2.0 * rank if alpha is None else alpha) / rank
        block = self._bare()
        self.adapted = [name for name, m in block.named_modules() if isinstance(m, nn.Linear)]
        self.factors: ModuleMap[_Factors] = ModuleMap()
        for name in self.adapted:
            out_width, in_width = block.get_parameter(f"{name}.weight").shape
            self.factors[name.replace(".", "_")] = _Factors(in_width, rank, out_width)

    def transform(self, x: Tensor, trunk: VFM) -> tuple[Tensor | None, Tensor]:
        block = trunk.blocks[str(self.split - 1)]
        merged = {}
        for name in self.adapted:
            product = self.factors[name.replace(".", "_")]()
            with placed(layer := block.get_submodule(name)):
                weight = gathered(layer.weight).to(x.device)  # type: ignore[arg-type] # of an nn.Linear
            merged[f"{name}.weight"] = weight + (self.scale * product).to(weight.dtype)
        if hooked(block):  # its hooks would put the plain weights back in place of the merged ones
            merged = tensors_of(block, x.device) | merged
            block = self._bare()
        y = functional_call(block, merged, (x,), {} if trunk.rope is None else {"rope": trunk.rope.to(x.device)})
        return (y[:, :1] if self.maps_cls else None), y[:, self.source.prefix :]

    def _bare(self) -> nn.Module:
        """The trunk's block without its weights."""
        with torch.device("meta"):
            model = VFM(self.source, 1, start=self.split - 1, stop=self.split, stem=False, norm=False)
        return model.blocks[str(self.split - 1)]

    def macs(self, tokens: int) -> int:
        merge = sum(p.lora_A.numel() * p.lora_B.shape[0] for p in self.factors.values())
        return self.source.block_macs(tokens) + merge


class _Factors(nn.Module):
    def __init__(self, in_width: int, rank: int, out_width: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, in_width))
        self.lora_B = nn.Parameter(torch.zeros(out_width, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self) -> Tensor:
        return self.lora_B @ self.lora_A
