"""timm models whose weights lie on disk: a folder as timm saves it, or ``timm:NAME@FILE`` for a file of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from vst.models.checkpoints import timm_hub
from vst.models.checkpoints.files import load_tensors, tensor_files
from vst.models.checkpoints.preparation import warn_normalisation
from vst.models.inputs import check_tensors
from vst.models.spec import VFMSpec

# What a folder may ask of timm's constructors, and how large a number may be; a plain ViT or DINOv3 needs no more.
_LARGEST = {
    "img_size": 2**15,
    "patch_size": 1024,
    "in_chans": 3,
    "num_classes": 2**20,
    "embed_dim": 2**16,
    "depth": 1024,
    "num_heads": 2**12,
    "reg_tokens": 1024,
    "mlp_ratio": 1024,
    "init_values": 1024,
}
_FLAGS = ("qkv_bias", "class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm", "dynamic_img_size")
_NAMES = ("global_pool", "act_layer", "norm_layer", "pos_embed")
_TRAINING = ("drop_rate", "drop_path_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate")
# Where weights come from is the folder itself; what belongs to a head is left aside with it.
_KEPT = {"tag", "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "license"}


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one that timm wrote: it names an ``architecture`` and no ``model_type``."""
    return config.get("model_type") is None and config.get("architecture") is not None


def describe(name: str) -> VFMSpec:
    """Spec of ``timm:NAME@FILE``: the model that timm calls NAME; the file is not opened for it."""
    model, source = _split(name), f"timm:{name}"
    spec = replace(timm_hub.describe(model[0]), source=source)
    if "." not in model[0]:
        warn_normalisation(source, f"{model[0]} names no weights of timm's", spec.mean, spec.std)
    return spec


def read(name: str, spec: VFMSpec, parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of ``timm:NAME@FILE`` in VFM's layout."""
    model, place = _split(name)
    files = tensor_files(place, spec.source)
    folder = place if place.is_dir() else place.parent
    return _tensors(timm_hub.built(model), spec, load_tensors(folder, files, spec.source))


def describe_config(config: Mapping[str, Any], source: str) -> VFMSpec:
    """Spec of a folder from the config.json that timm wrote into it.

    Raises:
        ValueError: a config that timm cannot build, or a model that a VFM cannot represent.
    """
    spec = timm_hub.spec_from_module(_built(config, source), source)
    own = _own(config, source)
    if lacking := [name for name in ("mean", "std") if own.get(name) is None]:
        warn_normalisation(source, f"its config.json names no {' and no '.join(lacking)}", spec.mean, spec.std)
    return spec


def read_config(config: Mapping[str, Any], spec: VFMSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of such a folder in VFM's layout."""
    return _tensors(_built(config, spec.source), spec, tensors)


def _split(name: str) -> tuple[str, Path]:
    model, _, file = name.partition("@")
    if not model or not file:
        raise ValueError(f"timm:{name} lacks a name or a file; write timm:NAME@FILE.safetensors.")
    return model, Path(file).expanduser()


def _own(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """timm's description of the weights; older files hold it without a name of its own."""
    own = config.get("pretrained_cfg", config)
    if not isinstance(own, Mapping):
        raise ValueError(f"{source} has a config.json with pretrained_cfg {own!r}; expected settings by name.")
    return own


def _built(config: Mapping[str, Any], source: str) -> nn.Module:
    name, arguments = config["architecture"], config.get("model_args")
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"{source} has a config.json with architecture {name!r}, which timm {timm.__version__} lacks.")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{source} has a config.json with model_args {arguments!r}; expected settings by name.")
    for key, value in arguments.items():
        _check_argument(source, key, value)
    own = {k: v for k, v in _own(config, source).items() if k in _KEPT and k in {f.name for f in fields(PretrainedCfg)}}
    size = own.get("input_size", [3, 1, 1])
    _check_argument(source, "img_size", size[1:] if isinstance(size, list) and len(size) == 3 else size)
    given = {k: v for k, v in arguments.items() if k != "num_classes"}
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, pretrained_cfg=own or None, num_classes=0, **given)
    except Exception as error:  # timm's constructors check little: what they meet in a strange config is of any type
        raise ValueError(
            f"{source} has a config.json that timm {timm.__version__} cannot build ({type(error).__name__}: "
            f"{timm_hub.first_line(error)}); compare it with the one that timm saved."
        ) from error


def _check_argument(source: str, key: str, value: Any) -> None:
    sizes = value if key in ("img_size", "patch_size") and isinstance(value, list) and len(value) == 2 else [value]
    if key in _LARGEST:
        kinds = (int, float) if key in ("mlp_ratio", "init_values") else (int,)
        low = 0 if key in ("num_classes", "reg_tokens") else 1e-9
        fits = all(isinstance(s, kinds) and not isinstance(s, bool) and low <= s <= _LARGEST[key] for s in sizes)
        fits, expected = fits or (key == "init_values" and value is None), f"a number above 0, {_LARGEST[key]} at most"
    elif key in _FLAGS:
        fits, expected = value in (None, True, False), "true or false"
    elif key in _NAMES:
        fits, expected = value is None or isinstance(value, str), "a name"
    elif key in _TRAINING:
        fits, expected = isinstance(value, (int, float)) and 0 <= value < 1, "a number in 0..1"
    else:
        known = ", ".join([*_LARGEST, *_FLAGS, *_NAMES])
        raise ValueError(
            f"{source} has a config.json with model_args {key!r}, which is not known here; known: {known}."
        )
    if not fits:
        raise ValueError(f"{source} has a config.json with {key} {value!r}; expected {expected}.")


def _tensors(module: nn.Module, spec: VFMSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors into a module that was built without memory, and read them as any other's of timm."""
    expected = {n: t.shape for n, t in module.state_dict().items()}
    # A head that was trained with the model is no part of it here; what the module itself needs of these names stays.
    own = {n: t for n, t in tensors.items() if n in expected or n.partition(".")[0] not in timm_hub.HEAD}
    hint = "Check that the file holds the model of that name, with the tensor names that timm gives it."
    check_tensors(spec.source, expected, {n: t.shape for n, t in own.items()}, hint)
    module.load_state_dict(own, strict=True, assign=True)
    return timm_hub.tensors_from_module(module, spec)
