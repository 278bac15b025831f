"""Stitches, heads and predictions on disk: one safetensors file each, with facts and a checksum of both."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vst.fit.cache import digest
from vst.results.folders import atomic_path


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able facts into one file, atomically."""
    plain, text = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, json.dumps(facts)
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"facts": text, "digest": digest({"facts": text}, plain)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of :func:`save_tensors`; None where there is no file, or (with a warning) it was damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            told = file.metadata() or {}
        text = told.get("facts", "{}")
        if "digest" in told and told["digest"] != digest({"facts": text}, tensors):
            raise ValueError("its checksum is another one")
        return tensors, json.loads(text)
    except (SafetensorError, ValueError) as error:
        _say_damaged(path, error)
        return None


def save_module(path: Path, module: nn.Module, facts: Mapping[str, Any]) -> None:
    """Write a module's state and facts, as :func:`save_tensors` does."""
    save_tensors(path, module.state_dict(), facts)


def load_module(path: Path, module: nn.Module) -> dict[str, Any] | None:
    """Read a file of :func:`save_module` into a module; its facts, or None, with the module as it was."""
    found = load_tensors(path)
    if found is None:
        return None
    tensors, facts = found
    own, given = ({k: v.shape for k, v in part.items()} for part in (module.state_dict(), tensors))
    if own != given:
        _say_damaged(path, "its tensors are others than are expected")
        return None
    module.load_state_dict(tensors)
    return facts


def _say_damaged(path: Path, why: object) -> None:
    warnings.warn(f"{path} is damaged ({why}): what it held is computed anew.", stacklevel=4)
