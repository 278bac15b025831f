"""How each Hugging Face ``model_type`` is configured and named on disk.

The defaults are those of transformers' configuration classes: config.json leaves out what equals them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vst.models.checkpoints.hf_recipes import BLOCKS, STEMS, Recipe
from vst.models.spec import VFMSpec

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALVES = (0.5, 0.5, 0.5)

_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class Layout:
    """One ``model_type``.

    Attributes:
        family: of the spec.
        defaults: what config.json may leave out.
        renames: pattern and replacement, applied in order to a name on disk to reach the usual form.
        dropped: pattern of usual names that are no part of the vision trunk: heads, mask token, text tower.
        fixed: fields of the spec that the ``model_type`` itself decides.
        nested: whether the vision tower's config is the sub-dict ``vision_config``.
        overrides: a second sub-dict that, as in transformers, takes the place of the first where it is given.
    """

    family: str
    defaults: Mapping[str, Any]
    renames: tuple[tuple[str, str], ...]
    dropped: str
    fixed: Mapping[str, Any]
    nested: bool = False
    overrides: str | None = None

    def rename(self, key: str) -> str | None:
        """The usual form of a tensor's name on disk; ``None`` for what is left aside."""
        for pattern, new in self.renames:
            key = re.sub(pattern, new, key)
        return None if re.match(self.dropped, key) else key

    def complete(self, source: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """The vision tower's settings, and transformers' own defaults for what config.json leaves out.

        Raises:
            ValueError: no settings of the vision tower, or one of another type than it has in transformers.
        """
        if self.nested:
            given = [config.get(n) for n in ("vision_config", self.overrides) if n]
            tower = next((c for c in reversed(given) if c is not None), None)
            if not isinstance(tower, Mapping):
                raise ValueError(
                    f"{source} has a config.json with vision_config {tower!r}; expected the settings of its vision "
                    "tower, as save_pretrained writes them."
                )
            kind = f"{config['model_type']}_vision_model"
            if tower.get("model_type", kind) != kind:
                raise ValueError(f"{source} has a vision_config of {tower['model_type']!r}; expected {kind!r}.")
            config = tower
        values = {name: config.get(name, default) for name, default in self.defaults.items()}
        for name, default in self.defaults.items():
            _check_kind(source, name, values[name], default)
        return values

    def spec(self, source: str, config: Mapping[str, Any]) -> VFMSpec:
        """Spec from the content of a config.json.

        Raises:
            ValueError: a configuration that a VFM cannot represent.
        """
        config = self.complete(source, config)
        if config["num_channels"] != 3:
            raise ValueError(f"{source} takes {config['num_channels']} channels; expected 3 (RGB).")
        patch = _square(source, "patch_size", config["patch_size"])
        size = _square(source, "image_size", config["image_size"])
        return VFMSpec(
            source=source,
            family=self.family,
            width=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            patch=patch,
            image_size=size // patch * patch,  # the patch convolution leaves a remainder aside
            norm_eps=config["layer_norm_eps"],
            **self.fixed,
            **_MLPS[self.family](source, config),
        )

    def recipe(self, spec: VFMSpec, names: Collection[str]) -> Recipe:
        """VFM parameter -> usual names of the tensors on disk that make it, for the whole model.

        Args:
            spec: of the model.
            names: the usual names that the files hold, where a family has two forms.
        """
        parts = STEMS[self.family](spec)
        for i in range(spec.depth):
            parts |= {f"blocks.{i}.{n}": s for n, s in BLOCKS[self.family](spec, i, names).items()}
        return parts

    def combine(self, name: str, tensors: list[Tensor]) -> Tensor:
        """Make one VFM parameter from the tensors of its recipe."""
        if name == "cls_token":
            token = tensors[0].reshape(1, 1, -1)
            return token + tensors[1].reshape(-1, token.shape[-1])[:1] if len(tensors) == 2 else token
        if name == "pos_embed":
            table = tensors[0].reshape(1, -1, tensors[0].shape[-1])
            return table[:, 1:].clone() if self.fixed["cls"] else table
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


_SIZES = ("patch_size", "image_size")


def _check_kind(source: str, name: str, value: Any, default: Any) -> None:
    """Refuse a setting that is of another type than transformers' own default for it."""
    if name in _SIZES:
        return  # one number or two, which `_square` reads
    if isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, str):
        fits, expected = isinstance(value, str), "a name"
    elif isinstance(default, float) or name == "mlp_ratio":
        fits, expected = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6,
            "a number above 0",
        )
    else:
        fits, expected = type(value) is int and 0 <= value <= 2**31, "a whole number"
    if not fits:
        raise ValueError(f"{source} has a config.json with {name} {value!r}; expected {expected}.")


def _square(source: str, name: str, value: Any) -> int:
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    if not all(type(side) is int and 0 < side <= 2**31 for side in sides) or sides[0] != sides[-1]:
        raise ValueError(f"{source} has {name} {value!r}; expected one whole number above 0, or two equal ones.")
    return sides[0]


def _activation(source: str, value: str) -> str:
    if value not in _ACTIVATIONS:
        raise ValueError(f"{source} has hidden_act {value!r}; expected one of {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[value]


def _plain_mlp(source: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden": config["intermediate_size"], "mlp": _activation(source, config["hidden_act"])}


def _dinov2_mlp(source: str, config: Mapping[str, Any]) -> dict[str, Any]:
    hidden = int(config["hidden_size"] * config["mlp_ratio"])
    # Only the variant with registers has them among its defaults.
    extra = {"qkv_bias": config["qkv_bias"], "registers": config.get("num_register_tokens", 0)}
    if config["use_swiglu_ffn"]:
        return {"hidden": (int(hidden * 2 / 3) + 7) // 8 * 8, "mlp": "swiglu", **extra}
    return {"hidden": hidden, "mlp": _activation(source, config["hidden_act"]), **extra}


def _dinov3_mlp(source: str, config: Mapping[str, Any]) -> dict[str, Any]:
    gated, hidden = config["use_gated_mlp"], config["intermediate_size"]
    expected = {
        "key_bias": False,
        "proj_bias": True,
        "mlp_bias": True,
        "value_bias": config["query_bias"],
        "hidden_act": "silu" if gated else "gelu",
        "intermediate_size": -(-hidden // 8) * 8 if gated else hidden,
    }
    if wrong := {k: config[k] for k, v in expected.items() if config[k] != v}:
        raise ValueError(
            f"{source} has {wrong}, which a VFM cannot represent; expected { ({k: expected[k] for k in wrong}) }."
        )
    return {
        "hidden": hidden,
        "mlp": "swiglu" if gated else "gelu",
        "qkv_bias": config["query_bias"],
        "registers": config["num_register_tokens"],
        "rope_temperature": config["rope_theta"],
    }


_MLPS = {"clip": _plain_mlp, "siglip": _plain_mlp, "dinov2": _dinov2_mlp, "dinov3": _dinov3_mlp}


_COMMON = {"num_channels": 3, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_PREFIX = (r"^vision_model\.", "")
_POSITION_IDS = r"embeddings\.position_ids$"
_TEXT = r"text_model\.|text_projection\.|visual_projection\.|logit_scale$|logit_bias$|classifier\.|"

_CLIP: dict[str, Any] = {
    "family": "clip",
    "defaults": {
        **_COMMON,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "renames": (_PREFIX,),
    "dropped": _TEXT + _POSITION_IDS,
    "fixed": {"cls": True, "pre_norm": True, "antialias": False, "mean": _CLIP_MEAN, "std": _CLIP_STD},
}
_SIGLIP: dict[str, Any] = {
    "family": "siglip",
    "defaults": {
        **_COMMON,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "renames": (_PREFIX,),
    "dropped": _TEXT + r"head\.|" + _POSITION_IDS,
    "fixed": {"cls": False, "antialias": False, "mean": _HALVES, "std": _HALVES},
}
_DINOV2_DEFAULTS = {
    **_COMMON,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
_DINO_DROPPED = r"embeddings\.mask_token$|classifier\."
_DINOV2: dict[str, Any] = {
    "family": "dinov2",
    "renames": (
        (r"^dinov2(_with_registers)?\.", ""),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
    ),
    "dropped": _DINO_DROPPED,
}
_DINOV2_FIXED = {"cls": True, "layer_scale": True, "mean": _IMAGENET_MEAN, "std": _IMAGENET_STD}

LAYOUTS: dict[str, Layout] = {
    "clip": Layout(**_CLIP, nested=True, overrides="vision_config_dict"),
    "clip_vision_model": Layout(**_CLIP),
    "siglip": Layout(**_SIGLIP, nested=True),
    "siglip_vision_model": Layout(**_SIGLIP),
    "dinov2": Layout(
        **_DINOV2,
        defaults={**_DINOV2_DEFAULTS, "patch_size": 14},
        fixed={**_DINOV2_FIXED, "antialias": False},
    ),
    "dinov2_with_registers": Layout(
        **_DINOV2,
        defaults={**_DINOV2_DEFAULTS, "patch_size": 16, "num_register_tokens": 4},
        fixed={**_DINOV2_FIXED, "antialias": True},
    ),
    "dinov3_vit": Layout(
        family="dinov3",
        defaults={
            "num_channels": 3,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "rope_theta": 100.0,
            "image_size": 224,
            "patch_size": 16,
            "query_bias": True,
            "key_bias": False,
            "value_bias": True,
            "proj_bias": True,
            "mlp_bias": True,
            "use_gated_mlp": False,
            "num_register_tokens": 0,
        },
        renames=((r"^(dinov3_vit\.)?(model\.|encoder\.)*(?=layer\.\d|embeddings\.|norm\.)", ""),),
        dropped=_DINO_DROPPED,
        fixed={"cls": True, "layer_scale": True, "position": "rotary", "mean": _IMAGENET_MEAN, "std": _IMAGENET_STD},
    ),
}
