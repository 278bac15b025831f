"""Files of a checkpoint: JSON and safetensors, whole or in shards, read with a sentence for whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, with or without a byte order mark.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def tensor_files(place: Path, source: str) -> dict[str, str]:
    """Tensor name -> name of the file that holds it, for one file or for the shards of a folder.

    Args:
        place: a safetensors file, or a folder with ``model.safetensors`` or shards and their index.
        source: what to call it in errors.

    Raises:
        ValueError: damaged or pickled files.
        FileNotFoundError: no safetensors.
    """
    if not place.is_dir():
        if not place.is_file():
            raise FileNotFoundError(f"{source}: there is no file {place}; expected a safetensors file.")
        if place.suffix != ".safetensors":
            raise ValueError(
                f"{source}: {place.name} is no safetensors file, and pickles are not loaded; save its tensors with "
                "safetensors.torch.save_file."
            )
        with _open(place, source) as file:
            return dict.fromkeys(file.keys(), place.name)
    index, single = place / "model.safetensors.index.json", place / "model.safetensors"
    if single.is_file():
        with _open(single, source) as file:
            return dict.fromkeys(file.keys(), single.name)
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(f == Path(str(f)).name for f in files.values()):
            raise ValueError(f"{index} has no weight_map from tensor names to files beside it; fetch it again.")
        if absent := sorted({f for f in files.values() if not (place / f).is_file()}):
            raise FileNotFoundError(f"{source} lacks {', '.join(absent)}, which its index names; fetch it again.")
        return files
    if other := sorted(path.name for path in place.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{source} holds {', '.join(other[:3])}{', ...' if len(other) > 3 else ''}; expected model.safetensors, or "
            "model.safetensors.index.json beside its shards: rename the file, or fetch the index."
        )
    if any(place.glob("*.bin")) or any(place.glob("*.pt*")):
        raise ValueError(
            f"{source} holds pickled weights only, and pickles are not loaded; convert it to safetensors "
            "(load it with its own library and save it again)."
        )
    raise FileNotFoundError(
        f"{source} has neither model.safetensors nor model.safetensors.index.json; pickled weights are not loaded, so "
        "a checkpoint that has only those has to be converted."
    )


def load_tensors(folder: Path, keys: Mapping[str, str], source: str) -> dict[str, Tensor]:
    """Tensors by name, fp32, from the files of a folder that :func:`tensor_files` says they lie in.

    Raises:
        ValueError: a damaged file, a tensor that is not there, or one of a quantised type.
    """
    tensors = {}
    for file_name in sorted(set(keys.values())):
        with _open(folder / file_name, source) as file:
            held = set(file.keys())
            for key in (k for k, f in keys.items() if f == file_name):
                if key not in held:
                    raise ValueError(f"{source}: its index says that {file_name} holds {key}, but it does not.")
                tensor = file.get_tensor(key)
                if tensor.dtype not in _DTYPES:
                    raise ValueError(
                        f"{source}: {key} is {tensor.dtype}; quantised weights are not supported, so use the model's "
                        "checkpoint in float32, float16 or bfloat16."
                    )
                tensors[key] = tensor.float()
    return tensors


def _open(path: Path, source: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{source}: {path.name} is damaged or incomplete ({error}); fetch it again.") from error
