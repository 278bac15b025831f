"""Hugging Face checkpoints, read from disk: config.json and safetensors, never through transformers' classes.

What a file holds is dispatched on ``model_type``. Names on disk have outlived several rewrites of the live modules, so
a conversion of the file holds for every version of transformers; the other forms that files are found in are renamed
to the usual one first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vst.models.checkpoints.hf_layouts import LAYOUTS, Layout
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM, check_tensors

RGB = tuple[float, float, float]

_REGISTERS = "embeddings.register_tokens"
_CONFIG_FILES = ["config.json", "preprocessor_config.json", "README.md"]
_WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]


def describe(name: str) -> VFMSpec:
    """Spec of ``hf:NAME``, a folder or a hub id; of a hub id only the config files are fetched."""
    folder = _folder(name, _CONFIG_FILES)
    layout, config = _config(folder, name)
    spec = layout.spec(f"hf:{name}", config)
    mean, std = _normalisation(folder, spec)
    return replace(spec, mean=mean, std=std, license=_license(folder, config))


def folder_state(name: str) -> tuple[tuple[str, int, int], ...] | None:
    """Path, size and time of change of the files that a local folder's spec comes from; None where it is no folder."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    files = [path.resolve() for file in _CONFIG_FILES if (path := folder / file).is_file()]
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def read(name: str, spec: VFMSpec, parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of ``hf:NAME`` in VFM's layout; only what the asked parts need is read from the files.

    Raises:
        ValueError: missing, foreign or damaged tensors.
        FileNotFoundError: no safetensors.
    """
    folder = _folder(name, _CONFIG_FILES + _WEIGHT_FILES)
    layout, _ = _config(folder, name)
    files = _index(folder, name)
    disk: dict[str, str] = {}  # usual name -> name in the file
    for key in files:
        if (usual := layout.rename(key)) is not None:
            disk[usual] = key
    if not spec.registers and _REGISTERS in disk:
        key = disk[_REGISTERS]
        if not _load(folder, {key: files[key]}, name)[key].numel():
            del disk[_REGISTERS]  # transformers writes the empty table of a model without registers
    recipe = layout.recipe(spec, disk)
    check_tensors(spec.source, {n: () for names in recipe.values() for n in names}, dict.fromkeys(disk, ()))
    with torch.device("meta"):
        wanted = {n: p.shape for n, p in VFM(spec, spec.grid(spec.image_size), **parts).named_parameters()}
    needed = {disk[n] for w in wanted for n in recipe[w]}
    loaded = _load(folder, {key: files[key] for key in needed}, name)
    try:
        made = {w: layout.combine(w, [loaded[disk[n]] for n in recipe[w]]) for w in wanted}
    except RuntimeError as error:  # tensors that cannot even be joined
        raise ValueError(f"hf:{name} holds tensors whose shapes do not fit together ({error}).") from error
    check_tensors(spec.source, wanted, {n: t.shape for n, t in made.items()})
    return made


def _folder(name: str, patterns: list[str]) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"hf:{name} is neither a folder here nor a Hugging Face id such as owner/model.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, no such repository, gated, ...: the hub has many classes for it
        first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise RuntimeError(
            f"hf:{name} could not be fetched ({type(error).__name__}: {first}); check the id, log in if its "
            "licence has to be accepted, or give a local folder: hf:FOLDER."
        ) from error


def _config(folder: Path, name: str) -> tuple[Layout, dict[str, Any]]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"hf:{name} has no config.json; expected a folder as save_pretrained writes it.")
    config = _json(path)
    kind = config.get("model_type")
    if kind in ("siglip2", "siglip2_vision_model"):
        raise ValueError(
            f"hf:{name} is SigLIP2's NaFlex variant, which takes patches and not pixels; use a fixed-resolution one, "
            "such as google/siglip2-large-patch16-256."
        )
    if kind not in LAYOUTS:
        raise ValueError(f"hf:{name} has model_type {kind!r}; known are {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[kind]
    if layout.nested:
        config = {**config.get("vision_config", {}), **(config.get("vision_config_dict") or {})}
    return layout, {**layout.defaults, **{k: v for k, v in config.items() if v is not None}}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def _normalisation(folder: Path, spec: VFMSpec) -> tuple[RGB, RGB]:
    path = folder / "preprocessor_config.json"
    values = _json(path) if path.is_file() else {}
    if values.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = values.get("image_mean") or spec.mean, values.get("image_std") or spec.std
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"{path} has image_mean {mean} and image_std {std}; expected three values each.")
    return (float(mean[0]), float(mean[1]), float(mean[2])), (float(std[0]), float(std[1]), float(std[2]))


def _license(folder: Path, config: Mapping[str, Any]) -> str:
    """From the config if it says so, else from the model card's front matter."""
    if isinstance(config.get("license"), str):
        return config["license"]
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = dict(re.findall(r"^(license|license_name):[ \t]*(\S+)[ \t]*$", front[1] if front else "", re.MULTILINE))
    if found.get("license") == "other":
        return found.get("license_name", "other")
    return found.get("license", "unknown")


def _index(folder: Path, name: str) -> dict[str, str]:
    """Tensor name -> file name, for one file or for shards."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        with _open(single, name) as file:
            return dict.fromkeys(file.keys(), single.name)
    if index.is_file():
        files = _json(index).get("weight_map")
        if not isinstance(files, dict) or not all(f == Path(str(f)).name for f in files.values()):
            raise ValueError(f"{index} has no weight_map from tensor names to files beside it; fetch it again.")
        if absent := sorted({f for f in files.values() if not (folder / f).is_file()}):
            raise FileNotFoundError(f"hf:{name} lacks {', '.join(absent)}, which its index names; fetch it again.")
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ValueError(
            f"hf:{name} holds pickled weights only, and pickles are not loaded; convert it to safetensors "
            "(load it with transformers and save_pretrained it again)."
        )
    raise FileNotFoundError(
        f"hf:{name} has neither model.safetensors nor model.safetensors.index.json; pickled weights are not loaded, so "
        "a checkpoint that has only those has to be converted."
    )


def _open(path: Path, name: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"hf:{name}: {path.name} is damaged or incomplete ({error}); fetch it again.") from error


def _load(folder: Path, keys: Mapping[str, str], name: str) -> dict[str, Tensor]:
    tensors = {}
    for file_name in sorted(set(keys.values())):
        with _open(folder / file_name, name) as file:
            held = set(file.keys())
            for key in (k for k, f in keys.items() if f == file_name):
                if key not in held:
                    raise ValueError(f"hf:{name}: its index says that {file_name} holds {key}, but it does not.")
                tensor = file.get_tensor(key)
                if not tensor.is_floating_point():
                    raise ValueError(f"hf:{name}: {key} is {tensor.dtype}; quantised weights are not supported.")
                tensors[key] = tensor.float()
    return tensors
