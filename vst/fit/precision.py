"""Which arithmetic a device has, and which one a run uses."""

from __future__ import annotations

import re
import warnings

import torch

from vst.models.fields import shown


def has_bf16(device: torch.device) -> bool:
    """Whether products of bf16 are made by the device itself, and so faster than fp32's.

    CUDA from compute capability 8.0 on; x86 with avx512_bf16 or amx_bf16 and ARM with bf16, where torch can tell
    (``torch.cpu.get_capabilities``); nothing else. Other CPUs take bf16 too, but convert it back and forth.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and any(_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether frozen models and stitches run under bf16 autocast (parameters stay fp32).

    Args:
        precision: bf16, fp32 or auto: bf16 on a GPU that has it.

    Raises:
        ValueError: another precision.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}; expected auto, fp32 or bf16.")
    if precision == "auto":
        return device.type == "cuda" and has_bf16(device)
    if precision == "bf16" and device.type == "cpu" and _capabilities() and not has_bf16(device):
        warnings.warn("This CPU has no bf16 arithmetic, and is faster with precision fp32.", stacklevel=2)
    return precision == "bf16"


def _capabilities() -> dict[str, object]:
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}


def usable_device(device: str | int | torch.device) -> str:
    """``cpu``, ``cuda`` or ``cuda:N`` from one of these, ``auto``, a GPU's number or a ``torch.device``.

    Raises:
        ValueError: something else, or a CUDA device that is not there.
    """
    name = f"cuda:{device}" if type(device) is int else str(device)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name, re.ASCII)
    if found is None or (name != "cpu" and int(found[1] or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"device is {shown(device)}; expected auto, cpu, or cuda where a CUDA device is present "
            f"({torch.cuda.device_count()} are)."
        )
    return name
