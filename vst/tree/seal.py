"""What a file of weights says of itself, so that damage to it or to its config does not pass for another tree.

The header of a saved safetensors file tells, under ``vst``, the parts of the config that its numbers were made with, a
sum over each tensor's bits, and of stitches alone the sums of the weights that they were trained on. A file without it
(of an earlier version, or written by another tool) is taken as it is. What is only said about a model (its source, its
licence) and how its tokens are joined may be changed in a config.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vst.models.fields import shown
from vst.tree.config import VSTConfig

_KEY = "vst"
_SAID = ("source", "family", "license")


def write_sealed(
    path: Path, tensors: Mapping[str, Tensor], config: VSTConfig, onto: Mapping[str, int] | None = None
) -> None:
    """Write a safetensors file with its seal; the same tensors and config give the same bytes.

    Args:
        path: of the file. tensors, config: what is saved, and made with.
        onto: of stitches alone, the sums of the bits of the weights that they, and changes, were trained on.
    """
    held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    seal = {"config": made_with(config), "sums": {k: bit_sum(held[k]) for k in sorted(held)}}
    seal |= {"onto": dict(sorted(onto.items()))} if onto else {}
    save_file(held, path, metadata={"format": "pt", _KEY: json.dumps(seal, separators=(",", ":"))})
    _order_metadata(path)


def check_config(path: Path, metadata: Mapping[str, str] | None, config: VSTConfig) -> None:
    """Refuse a config that was changed after the weights in ``path`` were saved with it.

    Raises:
        ValueError: names the first part that is another.
    """
    own = json.loads(json.dumps(made_with(config)))
    for name, values in _seal(path, metadata).get("config", {}).items():
        saved = {} if not isinstance(values, dict) else {"tuned": None, **values} if name == "the tree" else values
        for key, value in saved.items():
            if (now := own.get(name, {}).get(key)) != value:
                raise ValueError(
                    f"{path.parent}: the config says {key} {shown(now)} of {name}, and {path.name} was saved with "
                    f"{shown(value)}: the config was changed or damaged; restore it, or fetch the tree again."
                )


def check_sums(path: Path, metadata: Mapping[str, str] | None, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors, with their names, whose bits are not those that were saved; none is asked for without a seal.

    Raises:
        ValueError: names them.
    """
    sums = _seal(path, metadata).get("sums", {})
    odd = sorted(name for name, tensor in tensors if name in sums and bit_sum(tensor) != sums[name]) if sums else []
    if odd:
        raise ValueError(
            f"{path} holds other numbers than were saved in {len(odd)} tensors ({', '.join(odd[:3])}"
            f"{', ...' if len(odd) > 3 else ''}): the file is damaged, or was changed by something that kept its "
            "header; fetch it again, or save the tree again."
        )


def sealed_onto(path: Path, metadata: Mapping[str, str] | None) -> dict[str, int]:
    """By name, the sums of the bits of the weights that a file's stitches were trained on; none without such a seal."""
    return _seal(path, metadata).get("onto", {})


def made_with(config: VSTConfig) -> dict[str, dict[str, Any]]:
    """The parts of a config that the saved numbers depend on, by model."""
    values = config.to_dict()
    out: dict[str, dict[str, Any]] = {
        "the tree": {k: values[k] for k in ("grid", "feature_layer", "feature_norm")},
        "the trunk": {k: v for k, v in values["trunk"].items() if k not in _SAID},
    }
    out["the tree"]["tuned"] = None if config.tuned is None else config.tuned.made_with()
    for b in values["branches"]:
        own = {k: b[k] for k in ("splits", "enters", "stop", "stitch")}
        out[b["name"]] = {k: v for k, v in b["spec"].items() if k not in _SAID} | own
    return out


def bit_sum(tensor: Tensor) -> int:
    """The sum of a tensor's bits, eight bytes at a time taken as whole numbers: any single change shows."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = len(data) // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum(dtype=torch.int64))


def _seal(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        seal = json.loads((metadata or {}).get(_KEY, "{}"))
        if isinstance(seal, dict) and all(isinstance(v, dict) for v in seal.values()):
            return seal
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{path} has a damaged header: fetch it again.")


def _order_metadata(path: Path) -> None:
    """The library writes metadata in an order of chance; the header keeps its length."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps({"__metadata__": header.pop("__metadata__"), **header}, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
