"""Hugging Face checkpoints against the transformers model that wrote them, block by block."""

import json
import shutil

import pytest
import torch
import transformers
from checkpoints_kit import CASES, SMALL, Case, rewrite
from parity import TOLERANCE, assert_same, offline, pixels, randomise, recorded  # noqa: F401
from safetensors.torch import load_file
from torch import nn

from vst.models.checkpoints import describe, huggingface, load_vfm

pytest_plugins = ("checkpoints_kit",)

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


def hf_states(case: Case, model: nn.Module, x: torch.Tensor) -> tuple[list, torch.Tensor]:
    blocks = model.get_submodule(case.blocks)
    return recorded(model, blocks[0], blocks, model.get_submodule(case.norm), lambda: model(x, **case.call))


@pytest.mark.parametrize("grid", [4, 7, 3])
@pytest.mark.parametrize("name", CASES)
def test_hf_equals_transformers(folders, name, grid):
    model, folder = folders(name)
    vfm = load_vfm(f"hf:{folder}", grid=grid)
    assert vfm.grid == grid
    for key, value in CASES[name].spec.items():
        assert getattr(vfm.spec, key) == value, key
    x = pixels(8 * grid)
    assert_same(vfm, *hf_states(CASES[name], model, x), x)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3"])
def test_hf_hidden_states_are_the_blocks_outputs(folders, name):
    """The same truth through transformers' public output, which leaves out nothing but the final norm."""
    model, folder = folders(name)
    x = pixels(32)
    with torch.no_grad():
        theirs = model(x, output_hidden_states=True).hidden_states
        ours = load_vfm(f"hf:{folder}").taps(x, range(4))
    for depth in range(4):
        torch.testing.assert_close(ours[depth], theirs[depth], atol=TOLERANCE, rtol=0)


def test_hf_default_grid_floors_like_the_convolution(tmp_path):
    """384 pixels with a patch of 14 make 27 patches a side; here 35 with a patch of 8 make 4."""
    case = CASES["siglip"]
    model = randomise(case.model(case.config(**{**SMALL, "image_size": 35, "intermediate_size": 48})))
    model.save_pretrained(tmp_path)
    vfm = load_vfm(f"hf:{tmp_path}")
    assert (vfm.spec.image_size, vfm.grid) == (32, 4)
    x = pixels(35)
    blocks = model.encoder.layers
    states, final = recorded(model, blocks[0], blocks, model.post_layernorm, lambda: model(x))
    assert_same(vfm, states, final, x[:, :, :32, :32])


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_hf_full_model_ignores_the_text_tower(tmp_path, kind):
    vision = {**SMALL, "intermediate_size": 48}
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=TEXT)
    model = randomise(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind.lower()
    names = load_file(tmp_path / "model.safetensors")
    assert any(n.startswith("text_model.") for n in names)
    assert any(n.startswith("vision_model.") for n in names)
    tower, x = model.vision_model, pixels(40)
    tower = getattr(tower, "vision_model", tower)
    run = lambda: tower(x, interpolate_pos_encoding=True)  # noqa: E731
    states = recorded(tower, tower.encoder.layers[0], tower.encoder.layers, tower.post_layernorm, run)
    assert_same(load_vfm(f"hf:{tmp_path}", image_size=40), *states, x)


def test_hf_vision_config_left_to_its_defaults(tmp_path):
    """A full model's config.json may name nothing but what differs from transformers' defaults."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {"image_size": 256}}))
    spec = describe(f"hf:{tmp_path}")
    truth = transformers.SiglipVisionConfig(image_size=256)
    assert (spec.width, spec.depth, spec.heads, spec.patch, spec.hidden) == (
        truth.hidden_size,
        truth.num_hidden_layers,
        truth.num_attention_heads,
        truth.patch_size,
        truth.intermediate_size,
    )
    assert (spec.image_size, spec.mlp, spec.norm_eps) == (256, "gelu_tanh", truth.layer_norm_eps)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("clip_vision_model", transformers.CLIPVisionConfig),
        ("siglip_vision_model", transformers.SiglipVisionConfig),
        ("dinov2", transformers.Dinov2Config),
        ("dinov2_with_registers", transformers.Dinov2WithRegistersConfig),
        ("dinov3_vit", transformers.DINOv3ViTConfig),
    ],
)
def test_hf_defaults_are_those_of_transformers(kind, config):
    truth = config()
    for key, value in huggingface.LAYOUTS[kind].defaults.items():
        assert getattr(truth, key) == value, key


def _prefixed(prefix):
    return lambda tensors: {prefix + n: t for n, t in tensors.items()}


def _live_dinov2(tensors):
    """Names of the live modules of transformers 5, SwiGLU unpacked."""
    out = {}
    names = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    names |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    names |= {"mlp.weights_out": "mlp.down_proj"}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "mlp.weights_in" in name:
            gate, up = tensor.chunk(2)
            out[name.replace("weights_in", "gate_proj")] = gate
            out[name.replace("weights_in", "up_proj")] = up
        else:
            out[name] = tensor
    return out


FORMS = {
    "clip with prefix": ("clip", _prefixed("vision_model.")),
    "clip with position ids": (
        "clip",
        lambda t: {**_prefixed("vision_model.")(t), "vision_model.embeddings.position_ids": torch.arange(17)[None]},
    ),
    "siglip with prefix": ("siglip", _prefixed("vision_model.")),
    "dinov2 of a classifier": (
        "dinov2",
        lambda t: {
            **_prefixed("dinov2.")(t),
            "classifier.weight": torch.zeros(5, 64),
            "classifier.bias": torch.ones(5),
        },
    ),
    "dinov2 live names": ("dinov2", _live_dinov2),
    "dinov2 swiglu live names": ("dinov2-swiglu", _live_dinov2),
    "dinov3 below model": (
        "dinov3",
        lambda t: {n.replace("layer.", "model.layer.", 1) if n.startswith("layer.") else n: v for n, v in t.items()},
    ),
    "dinov3 below encoder": (
        "dinov3",
        lambda t: {n.replace("layer.", "encoder.layer.", 1) if n.startswith("layer.") else n: v for n, v in t.items()},
    ),
    "dinov2 without mask token": ("dinov2", lambda t: {n: v for n, v in t.items() if "mask_token" not in n}),
}


@pytest.mark.parametrize("form", FORMS)
def test_hf_other_forms_of_names(folders, tmp_path, form):
    name, rename = FORMS[form]
    _, folder = folders(name)
    want = load_vfm(f"hf:{folder}").state_dict()
    got = load_vfm(f"hf:{rewrite(folder, tmp_path / 'copy', rename)}").state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want)


def test_hf_shards_and_parts(folders, tmp_path):
    model, folder = folders("dinov2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    whole, sharded = load_vfm(f"hf:{folder}"), load_vfm(f"hf:{tmp_path}")
    assert all(torch.equal(t, sharded.state_dict()[n]) for n, t in whole.state_dict().items())
    tail = load_vfm(f"hf:{tmp_path}", start=1, stop=2, stem=False)
    assert {n.split(".")[1] for n in tail.state_dict() if n.startswith("blocks.")} == {"1"}
    x = torch.randn(2, whole.tokens, 32)
    with torch.no_grad():
        torch.testing.assert_close(tail.run(x, 1, 2), whole.run(x, 1, 2), atol=0, rtol=0)
        torch.testing.assert_close(tail.norm(x), whole.norm(x), atol=0, rtol=0)


def test_hf_reads_only_what_is_asked_for(folders, monkeypatch):
    _, folder = folders("clip")
    read: list[str] = []
    load = huggingface.load_tensors

    def spy(folder, keys, source):
        read.extend(keys)
        return load(folder, keys, source)

    monkeypatch.setattr(huggingface, "load_tensors", spy)
    load_vfm(f"hf:{folder}", start=1, stop=2, stem=False, norm=False)
    assert read
    assert all(name.startswith("encoder.layers.1.") for name in read)


def test_hf_half_precision_files_load_as_fp32(folders, tmp_path):
    _, folder = folders("clip")
    half = rewrite(folder, tmp_path / "half", lambda t: {n: v.half() for n, v in t.items()})
    vfm = load_vfm(f"hf:{half}")
    assert {p.dtype for p in vfm.parameters()} == {torch.float32}
    want = load_vfm(f"hf:{folder}").blocks["0"].attn.qkv.weight.half().float()
    assert torch.equal(vfm.blocks["0"].attn.qkv.weight, want)


def test_hf_normalisation_and_licence(folders, tmp_path):
    _, folder = folders("dinov2")
    assert describe(f"hf:{folder}").mean == (0.485, 0.456, 0.406)
    assert describe(f"hf:{folder}").license == "unknown"
    shutil.copytree(folder, tmp_path / "copy")
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 0.5, 2], "do_normalize": True}
    (tmp_path / "copy" / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "copy" / "README.md").write_text("---\ntags:\n- x\nlicense: apache-2.0\n---\n# Model\nlicense: no\n")
    spec = describe(f"hf:{tmp_path / 'copy'}")
    assert (spec.mean, spec.std, spec.license) == ((0.1, 0.2, 0.3), (1.0, 0.5, 2.0), "apache-2.0")
    (tmp_path / "copy" / "README.md").write_text("---\nlicense: other\nlicense_name: dinov3-license\n---\n")
    (tmp_path / "copy" / "preprocessor_config.json").write_text(json.dumps({**processor, "do_normalize": False}))
    spec = describe(f"hf:{tmp_path / 'copy'}")
    assert (spec.mean, spec.std, spec.license) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "dinov3-license")
