"""Hugging Face checkpoints that are damaged, or are no model that a VFM can be, are refused with their reason."""

import json
import shutil

import pytest
import torch
from checkpoints_kit import rewrite
from parity import offline  # noqa: F401
from safetensors.torch import load_file

from vst.models.checkpoints import describe, load_vfm

pytest_plugins = ("checkpoints_kit",)


def _without(name):
    return lambda t: {n: v for n, v in t.items() if n != name}


def _with(name, value):
    return lambda t: {**t, name: value}


BAD_TENSORS = {
    "missing": (_without("encoder.layers.1.mlp.fc1.bias"), "1 missing .*encoder.layers.1.mlp.fc1.bias"),
    "foreign": (_with("encoder.layers.0.self_attn.q_norm.weight", torch.ones(8)), "1 foreign .*q_norm.weight"),
    "one block more": (_with("encoder.layers.3.layer_norm1.weight", torch.ones(32)), "foreign .*layers.3.layer_norm1"),
    "wrong shape": (
        _with("encoder.layers.2.mlp.fc2.weight", torch.ones(32, 50)),
        r"blocks.2.mlp.fc2.weight is \[32, 50",
    ),
    "shapes that cannot be joined": (_with("encoder.layers.0.self_attn.q_proj.weight", torch.ones(32, 9)), "together"),
    "positions of another grid": (
        _with("embeddings.position_embedding.weight", torch.ones(26, 32)),
        r"pos_embed is \[",
    ),
    "positions of no grid": (_with("embeddings.position_embedding.weight", torch.ones(14, 32)), r"pos_embed is \["),
    "quantised": (_with("post_layernorm.weight", torch.ones(32, dtype=torch.int8)), "quantised weights"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_hf_refuses_a_file_that_does_not_fit(folders, tmp_path, case):
    change, message = BAD_TENSORS[case]
    bad = rewrite(folders("clip")[1], tmp_path / "bad", change)
    with pytest.raises(ValueError, match=message) as error:
        load_vfm(f"hf:{bad}")
    assert f"hf:{bad}" in str(error.value)


def test_hf_refuses_registers_that_the_config_denies(folders, tmp_path):
    _, folder = folders("dinov3")
    shutil.copytree(folder, tmp_path / "bad")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps({**config, "num_register_tokens": 0}))
    with pytest.raises(ValueError, match=r"foreign .*register_tokens"):
        load_vfm(f"hf:{tmp_path / 'bad'}")


def test_hf_damaged_files(folders, tmp_path):
    model, folder = folders("clip")
    shutil.copytree(folder, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or incomplete .*fetch it again"):
        load_vfm(f"hf:{tmp_path / 'cut'}")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_vfm(f"hf:{tmp_path / 'cut'}")

    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="20KB")
    first = sorted(shards.glob("*.safetensors"))[0]
    data = first.read_bytes()
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {first.name}"):
        load_vfm(f"hf:{shards}")
    first.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=f"{first.name} is damaged"):
        load_vfm(f"hf:{shards}")
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    with pytest.raises(ValueError, match="weight_map"):
        load_vfm(f"hf:{shards}")
    (shards / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        describe(f"hf:{shards}")


def test_hf_pickles_are_refused(folders, tmp_path):
    _, folder = folders("clip")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        load_vfm(f"hf:{tmp_path}")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickles are not loaded; convert it to safetensors"):
        load_vfm(f"hf:{tmp_path}")


BAD_CONFIGS = {
    "naflex": ({"model_type": "siglip2"}, "takes patches and not pixels"),
    "naflex tower": ({"model_type": "siglip2_vision_model"}, "takes patches and not pixels"),
    "another model": ({"model_type": "vit"}, "model_type 'vit'; known are clip, "),
    "no model type": ({}, "model_type None"),
    "grey": ({"model_type": "dinov2", "num_channels": 1}, "takes 1 channels"),
    "oblong": ({"model_type": "dinov2", "image_size": [224, 196]}, "image_size"),
    "activation": ({"model_type": "clip_vision_model", "hidden_act": "relu"}, "hidden_act 'relu'"),
    "key bias": ({"model_type": "dinov3_vit", "key_bias": True}, "'key_bias': True"),
    "one bias": ({"model_type": "dinov3_vit", "value_bias": False}, "'value_bias': False"),
    "no MLP bias": ({"model_type": "dinov3_vit", "mlp_bias": False}, "'mlp_bias': False"),
    "gated with gelu": ({"model_type": "dinov3_vit", "use_gated_mlp": True}, "'hidden_act': 'gelu'"),
    "wrong type": ({"model_type": "dinov2", "hidden_size": "big"}, "hidden_size|wrong type|big"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_hf_refuses_a_config_that_it_cannot_represent(tmp_path, case):
    config, message = BAD_CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        describe(f"hf:{tmp_path}")


def test_hf_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        describe(f"hf:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a Hugging Face id"):
        describe(f"hf:{tmp_path}/nothing/here")
    with pytest.raises(RuntimeError, match=r"hf:owner/model could not be fetched .*local folder"):
        describe("hf:owner/model")
