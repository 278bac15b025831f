"""How a tower is run: as it is, with branches that overlap on a GPU, compiled, or both; one choice, safe by default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vst.measure.overlap import MODES, Overlapped
from vst.models.fields import checked
from vst.tree.baseline import FullEncoders, FullTower
from vst.tree.encoder import VSTEncoder
from vst.tree.splits import Split

EXECUTIONS = ("eager", *MODES, "compile", "compiled-graphs")
CAPTURED = ("graphs", "compiled-graphs")
"""Executions that capture CUDA graphs, and so run on a GPU alone."""
_RECOMPILES = 64  # torch stops compiling a function after eight; here every split and shape is one


def runner(tower: VSTEncoder | FullEncoders, execution: str = "eager") -> Callable[..., Any]:
    """A tower's call, with the same tokens to the rounding of its kernels; for inference.

    Args:
        tower: a tree or models in full, in place on its device.
        execution: ``eager``: as it is. ``streams``, ``graphs``: see :class:`vst.measure.overlap.Overlapped`.
            ``compile``: ``torch.compile``; the first call of each split and shape has to compile, on a CPU with a C++
            compiler. ``compiled-graphs``: that, launched by CUDA graphs (:class:`CompiledGraphs`).

    Raises:
        ValueError: an unknown one, or graphs without a CUDA device.
    """
    checked(tower, VSTEncoder | FullEncoders, "tower")
    if execution == "eager":
        return tower
    if execution in MODES:
        return Overlapped(tower, execution)
    if execution == "compiled-graphs":
        return CompiledGraphs(tower)
    if execution != "compile":
        raise ValueError(f"execution is {execution!r}; expected {', '.join(EXECUTIONS)}.")
    return _compiled(tower)


class CompiledGraphs(Overlapped):
    """CUDA graphs over the compiled tower: fused kernels, launched at once; one stream, branches in turn.

    What is compiled is compiled by the warm-up calls, before a graph is captured. Everything else is as of
    :class:`vst.measure.overlap.Overlapped` with graphs.

    Args:
        tower: a tree or models in full.

    Raises:
        ValueError: the tower is not on a CUDA device.
    """

    def __init__(self, tower: VSTEncoder | FullEncoders) -> None:
        super().__init__(tower, "graphs")
        # What a tower of one tensor makes of it for each model is made before a graph, as Overlapped does.
        self._call = _compiled(partial(FullEncoders.forward, tower) if isinstance(tower, FullTower) else tower)

    def _run(self, pixels: Tensor | Mapping[str, Tensor], split: Split | None) -> Tensor:
        return self._call(pixels, split=split) if isinstance(self.tower, VSTEncoder) else self._call(pixels)


def _compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(call, dynamic=False)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch < 2.6

    @torch.no_grad()
    def run(*args: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch({limit: _RECOMPILES}):
            return compiled(*args, **options)

    return run
