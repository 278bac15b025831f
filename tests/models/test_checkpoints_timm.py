"""timm models and the ready names against timm, block by block."""

import pytest
import timm
from parity import assert_same, offline, pixels, randomise, timm_states  # noqa: F401
from torch import nn

from vst.models.checkpoints import describe, known_names, load_vfm, timm_hub
from vst.models.vfm import VFM

L, B, S = (1024, 24, 16), (768, 12, 12), (384, 12, 6)
SPECS = {  # name: (family, width, depth, heads), patch, image size, prefix tokens, hidden, activation
    "clip-b-224": ("clip", B, 16, 224, 1, 3072, "quick_gelu"),
    "clip-l-224": ("clip", L, 14, 224, 1, 4096, "quick_gelu"),
    "clip-l-336": ("clip", L, 14, 336, 1, 4096, "quick_gelu"),
    "dinov2-s": ("dinov2", S, 14, 518, 1, 1536, "gelu"),
    "dinov2-b": ("dinov2", B, 14, 518, 1, 3072, "gelu"),
    "dinov2-l": ("dinov2", L, 14, 518, 1, 4096, "gelu"),
    "dinov2-g": ("dinov2", (1536, 40, 24), 14, 518, 1, 4096, "swiglu"),
    "dinov2-s-reg": ("dinov2", S, 14, 518, 5, 1536, "gelu"),
    "dinov2-b-reg": ("dinov2", B, 14, 518, 5, 3072, "gelu"),
    "dinov2-l-reg": ("dinov2", L, 14, 518, 5, 4096, "gelu"),
    "dinov2-g-reg": ("dinov2", (1536, 40, 24), 14, 518, 5, 4096, "swiglu"),
    "siglip2-b-224": ("siglip", B, 16, 224, 0, 3072, None),
    "siglip2-l-256": ("siglip", L, 16, 256, 0, 4096, None),
    "siglip2-l-384": ("siglip", L, 16, 384, 0, 4096, None),
    "siglip2-l-512": ("siglip", L, 16, 512, 0, 4096, None),
    "siglip2-so400m-384": ("siglip", (1152, 27, 16), 14, 378, 0, 4304, None),
    "dinov3-s": ("dinov3", S, 16, 256, 5, 1536, "gelu"),
    "dinov3-b": ("dinov3", B, 16, 256, 5, 3072, "gelu"),
    "dinov3-l": ("dinov3", L, 16, 256, 5, 4096, "gelu"),
}
MEANS = {"clip": (0.48145466, 0.4578275, 0.40821073), "siglip": (0.5, 0.5, 0.5)}


def test_every_ready_name_is_in_the_table():
    assert known_names().keys() == SPECS.keys()
    known_names().clear()
    assert known_names()


@pytest.mark.parametrize("name", SPECS)
def test_describe_ready_names(name):
    family, (width, depth, heads), patch, size, prefix, hidden, mlp = SPECS[name]
    spec = describe(name)
    assert spec == describe(known_names()[name])
    assert spec.source == known_names()[name]
    assert (spec.family, spec.width, spec.depth, spec.heads) == (family, width, depth, heads)
    assert (spec.patch, spec.image_size, spec.prefix, spec.hidden) == (patch, size, prefix, hidden)
    assert spec.mlp == mlp or (mlp is None and spec.mlp in ("gelu", "gelu_tanh"))
    assert spec.mean == MEANS.get(family, (0.485, 0.456, 0.406))
    assert spec.pre_norm == (family == "clip")
    assert spec.layer_scale == (family in ("dinov2", "dinov3"))
    assert spec.license == ("dinov3-license" if family == "dinov3" else "apache-2.0")
    assert spec.grid(spec.image_size) == size // patch


TIMM = [
    *sorted({source.removeprefix("timm:") for source in known_names().values()}),
    "vit_small_plus_patch16_dinov3.lvd1689m",  # gated MLP, no biases
    "vit_huge_plus_patch16_dinov3_qkvb.lvd1689m",
    "vit_base_patch16_siglip_gap_224.webli",
    "vit_base_patch16_clip_224.laion2b",
    "vit_base_patch16_224.augreg_in1k",
    "vit_small_patch16_224.dino",
    "deit3_small_patch16_224.fb_in1k",  # positions of patches only
    "vit_little_patch16_reg4_gap_256.sbb_in1k",  # registers without CLS, final norm behind the pooling
]


def small_timm(name: str) -> nn.Module:
    return randomise(timm.create_model(name, pretrained=False, num_classes=0, depth=2, embed_dim=96, num_heads=4))


@pytest.mark.parametrize("name", TIMM)
def test_timm_equals_timm(name):
    model = small_timm(name)
    spec, tensors = timm_hub.from_module(model, f"timm:{name}")
    assert (spec.depth, spec.width, spec.heads, spec.antialias) == (2, 96, 4, True)
    vfm = VFM.from_tensors(spec, tensors, spec.grid(spec.image_size))
    x = pixels(vfm.image_size, 1)
    assert_same(vfm, *timm_states(model, x), x)
    grid = 6
    model.set_input_size((grid * spec.patch, grid * spec.patch))
    x = pixels(grid * spec.patch)
    assert_same(VFM.from_tensors(spec, tensors, grid), *timm_states(model, x), x)


def test_timm_positions_of_registers_are_folded():
    """A table that also has entries for CLS and registers, unlike DINOv2's."""
    model = randomise(
        timm.create_model("vit_small_patch16_224", depth=2, embed_dim=64, num_heads=4, num_classes=0, reg_tokens=3)
    )
    assert model.pos_embed.shape[1] == 14 * 14 + 4
    spec, tensors = timm_hub.from_module(model, "timm:x")
    x = pixels(224, 1)
    assert_same(VFM.from_tensors(spec, tensors, 14), *timm_states(model, x), x)


def test_timm_load_goes_through_create_model(monkeypatch):
    """The whole way of ``load_vfm``, with timm's download replaced by a random model."""
    name, create = "vit_small_patch16_dinov3_qkvb.lvd1689m", timm.create_model
    made = []

    def fake(name, pretrained, num_classes):
        model = create(name, pretrained=False, num_classes=num_classes, depth=2, embed_dim=64, num_heads=4)
        if pretrained:
            made.append(randomise(model))
        return model

    monkeypatch.setattr(timm, "create_model", fake)
    vfm = load_vfm(f"timm:{name}", image_size=96)
    (model,) = made
    x = pixels(96)
    assert_same(vfm, *timm_states(model, x), x)


REFUSED = {
    "timm:resnet18": "its class is ResNet",
    "timm:eva02_base_patch14_448": "not DINOv3's rotary ones",
    "timm:beit_base_patch16_224": "its class is Beit",
    "timm:vit_base_patch16_rope_224": "not DINOv3's rotary ones",
    "timm:aimv2_large_patch14_224": "patch embedding",
    "timm:vit_nope": "timm .* has no model 'vit_nope'",
    "timm:vit_large_patch14_dinov3.lvd142m": "close names: .*vit_large_patch1",
    "timm:vit_large_patch14_dinov2.lvd": "it has: vit_large_patch14_dinov2.lvd142m",
}


@pytest.mark.parametrize("source", REFUSED)
def test_timm_refuses(source):
    with pytest.raises(ValueError, match=REFUSED[source]):
        describe(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "blocks.0.attn.q_norm"),
        ({"scale_attn_norm": True}, "blocks.0.attn.norm"),
        ({"scale_mlp_norm": True}, "blocks.0.mlp.norm"),
        ({"proj_bias": False}, "bias=False"),
        ({"act_layer": nn.ReLU}, "Mlp with ReLU"),
        ({"pos_embed": "none"}, "no position table"),
        ({"final_norm": False}, "no LayerNorm"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "ResPostBlock"),
        ({"attn_layer": "diff"}, "DiffAttention"),
        ({"norm_layer": timm.layers.RmsNorm}, "RmsNorm|epsilon"),
        ({"in_chans": 1}, "not square RGB"),
        ({"img_size": (224, 192)}, "not square RGB"),
    ],
)
def test_timm_refuses_variants(options, message):
    base = {"num_classes": 0, "depth": 2, "embed_dim": 64, "num_heads": 4}
    model = timm.create_model("vit_small_patch16_224", **base, **options)
    with pytest.raises(ValueError, match=f"timm:x cannot be represented: .*{message}"):
        timm_hub.from_module(model, "timm:x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_rotate_half": False}, "rotary positions are set up otherwise|rotate_half False"),
        ({"use_post_norm": True}, "EvaBlockPostNorm|ls1|tensor"),
        ({"scale_mlp": True}, "blocks.0.mlp.norm"),
        ({"attn_type": "rope"}, "blocks.0.attn"),
        ({"swiglu_mlp": True}, "blocks.0.mlp"),
        ({"rope_type": "cat"}, "not DINOv3's rotary ones"),
        ({"rope_grid_offset": 0.5}, "rotary positions are set up otherwise"),
    ],
)
def test_timm_refuses_variants_of_dinov3(options, message):
    base = {"num_classes": 0, "depth": 2, "embed_dim": 64, "num_heads": 4}
    model = timm.create_model("vit_small_patch16_dinov3", **base, **options)
    if "rope_grid_offset" in options and not model.rope.grid_offset:
        pytest.skip("this timm does not hand the offset on, so the model is a plain one")
    with pytest.raises(ValueError, match=f"timm:x cannot be represented: .*({message})"):
        timm_hub.from_module(model, "timm:x")


def test_timm_offline_says_how_to_go_on():
    with pytest.raises(RuntimeError, match=r"timm:vit_small_patch14_dinov2.lvd142m could not be fetched .*hf:FOLDER"):
        load_vfm("timm:vit_small_patch14_dinov2.lvd142m")
