"""Sources, and Hugging Face checkpoints against the transformers model that wrote them, block by block."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from parity import TOLERANCE, assert_same, offline, pixels, randomise, recorded  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import nn

from vst.models import checkpoints
from vst.models.checkpoints import describe, huggingface, load_vfm

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


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


def rewrite(source: Path, target: Path, rename) -> Path:
    """A copy of a checkpoint whose tensors go through ``rename``: dict to dict."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = rename(load_file(source / "model.safetensors"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors")
    return target


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


def test_unknown_sources():
    with pytest.raises(ValueError, match=r"did you mean 'dinov2-l'.*timm:NAME, hf:ID-or-folder, open_clip:ARCH/TAG"):
        describe("dinov2l")
    for bad in ("facebook/dinov2-large", "clip", "foo:bar", "timm:", "", "TIMM:vit_small_patch14_dinov2"):
        with pytest.raises(ValueError, match=r"is no known model source.*clip-l-336"):
            load_vfm(bad)


def test_grid_and_image_size(folders):
    source = f"hf:{folders('dinov3')[1]}"
    assert load_vfm(source, image_size=48).grid == load_vfm(source, grid=6).grid == 6
    assert load_vfm(source).grid == 4
    with pytest.raises(ValueError, match="grid=6 and image_size=48 were both given"):
        load_vfm(source, grid=6, image_size=48)
    with pytest.raises(ValueError, match="use 48 or 56"):
        load_vfm(source, image_size=50)
    with pytest.raises(TypeError, match="blocks"):
        load_vfm(source, blocks=3)


def test_random_weights_need_no_network():
    one, same, other = (load_vfm("dinov2-s", pretrained=False, seed=s, grid=3, stop=2) for s in (1, 1, 2))
    assert all(torch.equal(t, same.state_dict()[n]) for n, t in one.state_dict().items())
    assert not torch.equal(one.pos_embed, other.pos_embed)
    tail = load_vfm("dinov2-s", pretrained=False, seed=1, grid=3, start=1, stop=2, stem=False, norm=False)
    assert all(torch.equal(t, one.state_dict()[n]) for n, t in tail.state_dict().items())
    assert not tail.training


@pytest.fixture
def described(monkeypatch):
    """Names in the order in which they were described in earnest."""
    names = []
    for reader in checkpoints._READERS.values():
        real = reader.describe
        monkeypatch.setattr(reader, "describe", lambda name, real=real: names.append(name) or real(name))
    return names


def test_a_source_is_described_once(tiny, described):
    from vst import VSTEncoder

    source = tiny("clip")
    for _ in range(2):
        load_vfm("dinov2-s", pretrained=False, grid=2, stop=1)
        VSTEncoder.plan("dinov2-s", [source, "timm:vit_small_patch14_dinov2.lvd142m"], [1], 56)
        load_vfm(source, stop=1)
    assert sorted(described) == sorted([source.removeprefix("hf:"), "vit_small_patch14_dinov2.lvd142m"])
    assert describe("dinov2-s") is describe("timm:vit_small_patch14_dinov2.lvd142m")


def test_a_changed_folder_is_described_anew(tiny, described, tmp_path, monkeypatch):
    one, other = (Path(tiny("clip", width).removeprefix("hf:")) for width in (32, 48))
    folder = tmp_path / "model"
    shutil.copytree(one, folder)
    assert [describe(f"hf:{folder}").width for _ in range(2)] == [32, 32]
    shutil.copy(other / "config.json", folder / "config.json")
    assert [describe(f"hf:{folder}").width for _ in range(2)] == [48, 48]
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert [describe(f"hf:{folder}").license for _ in range(2)] == ["mit", "mit"]
    assert len(described) == 3
    monkeypatch.chdir(tmp_path)  # a relative path is another folder elsewhere
    assert describe("hf:model").width == 48
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(one, tmp_path / "elsewhere" / "model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert describe("hf:model").width == 32


def test_failures_are_not_kept(tiny, described, tmp_path):
    folder = tmp_path / "model"
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            describe(f"hf:{folder}/here")
    shutil.copytree(Path(tiny("clip").removeprefix("hf:")), folder / "here")
    assert describe(f"hf:{folder}/here").width == 32


def test_a_hub_id_is_described_once(tiny, described, monkeypatch):
    import huggingface_hub

    folder = tiny("siglip").removeprefix("hf:")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: folder)
    assert describe("hf:someone/model") is describe("hf:someone/model")
    assert described == ["someone/model"]
