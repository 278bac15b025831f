"""How a tower is run: as it is, with branches that overlap on a GPU, or compiled; one choice, safe by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vst.measure.overlap import MODES, Overlapped
from vst.models.fields import checked
from vst.tree.baseline import FullEncoders
from vst.tree.encoder import VSTEncoder

EXECUTIONS = ("eager", *MODES, "compile")
_RECOMPILES = 64  # torch stops compiling a function after eight; here every split and shape is one


def runner(tower: VSTEncoder | FullEncoders, execution: str = "eager") -> Callable[..., Any]:
    """A tower's call, with the same tokens to the rounding of its kernels; for inference.

    Args:
        tower: a tree or models in full, in place on its device.
        execution: ``eager``: as it is. ``streams``, ``graphs``: see :class:`vst.measure.overlap.Overlapped`.
            ``compile``: ``torch.compile``; the first call of each split and shape has to compile, on a CPU with a C++
            compiler.

    Raises:
        ValueError: an unknown one, or graphs without a CUDA device.
    """
    checked(tower, VSTEncoder | FullEncoders, "tower")
    if execution == "eager":
        return tower
    if execution in MODES:
        return Overlapped(tower, execution)
    if execution != "compile":
        raise ValueError(f"execution is {execution!r}; expected {', '.join(EXECUTIONS)}.")
    compiled = torch.compile(tower, dynamic=False)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch < 2.6

    @torch.no_grad()
    def call(*args: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch({limit: _RECOMPILES}):
            return compiled(*args, **options)

    return call
