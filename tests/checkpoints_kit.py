"""Small random checkpoints of every Hugging Face family, as transformers saves them."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from parity import randomise
from safetensors.torch import load_file, save_file
from torch import nn

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


@dataclass
class Case:
    model: type
    config: type
    extra: dict
    spec: dict
    blocks: str
    norm: str
    call: dict


CLIP_CALL = {"interpolate_pos_encoding": True}
CASES = {
    "clip": Case(
        transformers.CLIPVisionModel,
        transformers.CLIPVisionConfig,
        {"intermediate_size": 48},
        {"family": "clip", "mlp": "quick_gelu", "hidden": 48, "pre_norm": True, "norm_eps": 1e-5, "prefix": 1},
        "encoder.layers",
        "post_layernorm",
        CLIP_CALL,
    ),
    "clip-gelu": Case(
        transformers.CLIPVisionModel,
        transformers.CLIPVisionConfig,
        {"intermediate_size": 48, "hidden_act": "gelu"},
        {"family": "clip", "mlp": "gelu"},
        "encoder.layers",
        "post_layernorm",
        CLIP_CALL,
    ),
    "siglip": Case(
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig,
        {"intermediate_size": 48},
        {"family": "siglip", "mlp": "gelu_tanh", "hidden": 48, "prefix": 0, "mean": (0.5, 0.5, 0.5), "norm_eps": 1e-6},
        "encoder.layers",
        "post_layernorm",
        CLIP_CALL,
    ),
    "dinov2": Case(
        transformers.Dinov2Model,
        transformers.Dinov2Config,
        {"mlp_ratio": 3},
        {
            "family": "dinov2",
            "mlp": "gelu",
            "hidden": 96,
            "layer_scale": True,
            "prefix": 1,
            "antialias": False,
            "norm_eps": 1e-6,
        },
        "encoder.layer",
        "layernorm",
        {},
    ),
    "dinov2-no-qkv-bias": Case(
        transformers.Dinov2Model,
        transformers.Dinov2Config,
        {"qkv_bias": False},
        {"family": "dinov2", "qkv_bias": False},
        "encoder.layer",
        "layernorm",
        {},
    ),
    "dinov2-swiglu": Case(
        transformers.Dinov2Model,
        transformers.Dinov2Config,
        {"use_swiglu_ffn": True},
        {"family": "dinov2", "mlp": "swiglu", "hidden": 88},
        "encoder.layer",
        "layernorm",
        {},
    ),
    "dinov2-registers": Case(
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        {"num_register_tokens": 3},
        {"family": "dinov2", "mlp": "gelu", "registers": 3, "prefix": 4, "antialias": True},
        "encoder.layer",
        "layernorm",
        {},
    ),
    "dinov2-registers-swiglu": Case(
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        {"use_swiglu_ffn": True},
        {"family": "dinov2", "mlp": "swiglu", "registers": 4},
        "encoder.layer",
        "layernorm",
        {},
    ),
    "dinov3": Case(
        transformers.DINOv3ViTModel,
        transformers.DINOv3ViTConfig,
        {"intermediate_size": 48, "num_register_tokens": 2, "rope_theta": 50.0},
        {
            "family": "dinov3",
            "mlp": "gelu",
            "position": "rotary",
            "rope_temperature": 50.0,
            "prefix": 3,
            "norm_eps": 1e-5,
        },
        "model.layer",
        "norm",
        {},
    ),
    "dinov3-gated": Case(
        transformers.DINOv3ViTModel,
        transformers.DINOv3ViTConfig,
        {"intermediate_size": 48, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        {"family": "dinov3", "mlp": "swiglu", "hidden": 48, "qkv_bias": True},
        "model.layer",
        "norm",
        {},
    ),
    "dinov3-bare": Case(
        transformers.DINOv3ViTModel,
        transformers.DINOv3ViTConfig,
        {"intermediate_size": 48, "query_bias": False, "value_bias": False},
        {"family": "dinov3", "qkv_bias": False, "registers": 0, "prefix": 1},
        "model.layer",
        "norm",
        {},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved random model of every case, and the model itself."""
    made = {}

    def get(name: str) -> tuple[nn.Module, Path]:
        if name not in made:
            case, folder = CASES[name], tmp_path_factory.mktemp(name)
            model = randomise(case.model(case.config(**{**SMALL, **case.extra})))
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return get


def rewrite(source: Path, target: Path, rename) -> Path:
    """A copy of a checkpoint whose tensors go through ``rename``: dict to dict."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = rename(load_file(source / "model.safetensors"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors")
    return target
