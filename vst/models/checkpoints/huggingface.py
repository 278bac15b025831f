"""Hugging Face checkpoints, read from disk: config.json and safetensors, never through transformers' classes.

What a file holds is dispatched on ``model_type``. Names on disk have outlived several rewrites of the live modules, so
a conversion of the file holds for every version of transformers; the other forms that files are found in are renamed
to the usual one first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vst.models.checkpoints import timm_files
from vst.models.checkpoints.files import load_tensors, read_json, tensor_files
from vst.models.checkpoints.hf_layouts import LAYOUTS, Layout
from vst.models.checkpoints.preparation import PROCESSOR_FILES, of_processor
from vst.models.inputs import check_tensors
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM

_REGISTERS = "embeddings.register_tokens"
_CONFIG_FILES = ["config.json", *PROCESSOR_FILES, "README.md"]
_WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]


def describe(name: str) -> VFMSpec:
    """Spec of ``hf:NAME``, a folder or a hub id; of a hub id only the config files are fetched."""
    folder, source = _folder(name, _CONFIG_FILES), f"hf:{name}"
    config = _config(folder, name)
    if timm_files.is_timm(config):
        return timm_files.describe_config(config, source)
    spec = _layout(config, name).spec(source, config)
    mean, std = of_processor(folder, source, spec.mean, spec.std)
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
    config = _config(folder, name)
    files = tensor_files(folder, spec.source)
    if timm_files.is_timm(config):
        return timm_files.read_config(config, spec, load_tensors(folder, files, spec.source))
    layout = _layout(config, name)
    disk: dict[str, str] = {}  # usual name -> name in the file
    for key in files:
        if (usual := layout.rename(key)) is not None:
            disk[usual] = key
    if not spec.registers and _REGISTERS in disk:
        key = disk[_REGISTERS]
        if not load_tensors(folder, {key: files[key]}, spec.source)[key].numel():
            del disk[_REGISTERS]  # transformers writes the empty table of a model without registers
    recipe = layout.recipe(spec, disk)
    check_tensors(spec.source, {n: () for names in recipe.values() for n in names}, dict.fromkeys(disk, ()))
    with torch.device("meta"):
        wanted = {n: p.shape for n, p in VFM(spec, spec.grid(spec.image_size), **parts).named_parameters()}
    needed = {disk[n] for w in wanted for n in recipe[w]}
    loaded = load_tensors(folder, {key: files[key] for key in needed}, spec.source)
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


def _config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"hf:{name} has no config.json; expected a folder as save_pretrained writes it.")
    return read_json(path)


def _layout(config: Mapping[str, Any], name: str) -> Layout:
    kind = config.get("model_type")
    if kind in ("siglip2", "siglip2_vision_model"):
        raise ValueError(
            f"hf:{name} is SigLIP2's NaFlex variant, which takes patches and not pixels; use a fixed-resolution one, "
            "such as google/siglip2-large-patch16-256."
        )
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise ValueError(f"hf:{name} has model_type {kind!r}; known are {', '.join(LAYOUTS)}.")
    return LAYOUTS[kind]


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
