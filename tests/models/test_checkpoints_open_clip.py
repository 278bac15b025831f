"""open_clip models against open_clip, block by block."""

import json
import sys

import pytest
import torch
from parity import assert_same, offline, pixels, randomise, recorded, timm_states  # noqa: F401
from safetensors.torch import save_file
from torch import nn

from vst.models.checkpoints import describe, load_vfm, openclip
from vst.models.vfm import VFM

open_clip = pytest.importorskip("open_clip")


@pytest.fixture
def architectures(tmp_path, monkeypatch):
    """Small architectures in open_clip's registry, for the time of a test."""
    from open_clip import factory

    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    vit = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "mlp_ratio": 3.0}
    timm_tower = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
    siglip = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
    configs = {
        "tiny-clip": {"vision_cfg": vit},
        "tiny-quick": {"vision_cfg": {**vit, "ls_init_value": 0.1}, "quick_gelu": True},
        "tiny-scaled": {"vision_cfg": {**vit, "scale_fc": True}},
        "tiny-pooled": {"vision_cfg": {**vit, "attentional_pool": True, "attn_pooler_heads": 2}},
        "tiny-timm": {"vision_cfg": {**timm_tower, "image_size": 224}},
        "base-siglip": {"vision_cfg": {**siglip, "image_size": 224}, "custom_text": True},
        "tiny-resnet": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}},
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"embed_dim": 64, "text_cfg": text, **config}))
    open_clip.add_model_config(tmp_path)
    return configs


def open_clip_states(visual: nn.Module, x: torch.Tensor) -> tuple[list, torch.Tensor]:
    if hasattr(visual, "trunk"):
        return timm_states(visual.trunk, x)
    blocks = visual.transformer.resblocks
    return recorded(visual, blocks[0], blocks, visual.ln_post, lambda: visual(x))


@pytest.mark.parametrize(
    ("name", "mlp", "prefix"),
    [("tiny-clip", "gelu", 1), ("tiny-quick", "quick_gelu", 1), ("tiny-timm", "gelu", 1), ("base-siglip", None, 0)],
)
def test_open_clip_equals_open_clip(architectures, name, mlp, prefix):
    visual = randomise(open_clip.create_model(name).visual)
    spec, tensors = openclip.from_visual(visual, f"open_clip:{name}")
    assert spec == describe(f"open_clip:{name}")
    assert mlp is None or spec.mlp == mlp
    assert (spec.prefix, spec.antialias) == (prefix, True)
    x = pixels(spec.image_size, 1)
    assert_same(VFM.from_tensors(spec, tensors, spec.grid(spec.image_size)), *open_clip_states(visual, x), x)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-timm", "ViT-B-32", "ViT-L-14", "ViT-B-16-SigLIP2-256"])
def test_open_clip_description_draws_no_weights(architectures, name, monkeypatch):
    """A description of bigG took over a minute where every weight was drawn first."""
    built, create = [], open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: built.append(create(*a, **k)) or built[-1])
    describe(f"open_clip:{name}")
    assert len(built) == 1
    assert {t.device.type for t in built[0].state_dict().values()} == {"meta"}


def test_open_clip_tag(architectures, tmp_path, monkeypatch):
    """A tag brings its weights, normalisation and activation: open_clip itself only warns of the latter."""
    from open_clip import pretrained

    model = randomise(open_clip.create_model("tiny-clip", force_quick_gelu=True))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    tag = {"file": str(tmp_path / "w.safetensors"), "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (1, 1, 2)}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-clip", {"mine": tag})
    vfm = load_vfm("open_clip:tiny-clip/mine")
    assert (vfm.spec.mlp, vfm.spec.mean, vfm.spec.std) == ("quick_gelu", (0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
    x = pixels(32)
    assert_same(vfm, *open_clip_states(model.visual, x), x)
    with pytest.raises(ValueError, match="no weights 'yours' for tiny-clip; it has: mine"):
        describe("open_clip:tiny-clip/yours")


def test_open_clip_errors(architectures, monkeypatch):
    with pytest.raises(ValueError, match="no architecture 'tiny-clop'; close names: tiny-clip"):
        describe("open_clip:tiny-clop")
    with pytest.raises(ValueError, match="names no weights"):
        load_vfm("open_clip:tiny-clip")
    with pytest.raises(ValueError, match=r"expects: .*plain blocks"):
        describe("open_clip:tiny-scaled")
    with pytest.raises(ValueError, match="no attention pooling"):
        describe("open_clip:tiny-pooled")
    with pytest.raises(ValueError, match="image tower of class ModifiedResNet"):
        describe("open_clip:tiny-resnet")
    with pytest.raises(RuntimeError, match=r"open_clip:ViT-B-16/dfn2b could not be fetched"):
        load_vfm("open_clip:ViT-B-16/dfn2b")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(RuntimeError, match=r'pip install "vfm-stitch-tree\[hub\]"'):
        describe("open_clip:tiny-clip/mine")
