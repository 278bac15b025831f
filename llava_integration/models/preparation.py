"""Pictures that were prepared for another model: told by the files beside a model, and by pixel values out of range."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vst.tree.config import VSTConfig
from vst.tree.folder import CONFIG, read_config, warn_preparation

LOOKS = 8  # calls of a model whose pixel values are looked at; each look waits for the device
_TOLERANCE = 0.05  # what bfloat16 rounds off, and more


def warn_beside(source: Any) -> None:
    """Warn where a folder holds a model on a tree and a processor that prepares pictures in another way."""
    if not isinstance(source, (str, os.PathLike)) or not (Path(source) / CONFIG).is_file():
        return
    try:
        config = read_config(Path(source), inside=True)[1]
    except ValueError:  # no tree's, or damaged, which who reads the model is told
        return
    warn_preparation(Path(source), config)


def looks_left(looks: int, pixels: Tensor, config: VSTConfig) -> int:
    """Warn where pixel values are such as no picture of the tree's preparation has.

    Args:
        looks: how many calls are still to be looked at.
        pixels: ``[B, 3, S, S]``.
        config: of the tree.

    Returns:
        How many are left after this one: 0 once there was a warning.
    """
    captured = pixels.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or pixels.is_meta or captured:
        return looks
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():  # told elsewhere
        return looks
    mean, std = (torch.tensor(values) for values in (config.trunk.mean, config.trunk.std))
    least, most = -mean / std, (1 - mean) / std
    low, high = (edge.cpu() for edge in pixels.detach().float().transpose(0, 1).flatten(1).aminmax(dim=1))
    if bool(((low >= least - _TOLERANCE) & (high <= most + _TOLERANCE)).all()):
        return looks - 1
    warnings.warn(
        f"pixel_values go from {_short(low)} to {_short(high)} (R, G, B), where pictures prepared for this tree lie "
        f"within {_short(least)} to {_short(most)}: they were prepared for another model, or not normalised; use the "
        "processor that is saved with this one.",
        stacklevel=3,
    )
    return 0


def _short(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values.tolist()) + ")"
