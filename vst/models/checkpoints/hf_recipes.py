"""What each parameter of a VFM is made of in a Hugging Face file, by family.

A recipe maps a VFM parameter to the tensors on disk that make it: several are concatenated (query, key, value), and
``cls_token`` is the sum of the token and its position.
"""

from __future__ import annotations

from collections.abc import Collection

from vst.models.spec import VFMSpec

Recipe = dict[str, list[str]]


def _pairs(ours: str, *theirs: str, bias: bool = True) -> Recipe:
    """Weight and bias of one layer, made of one layer or of several."""
    return {f"{ours}.{kind}": [f"{t}.{kind}" for t in theirs] for kind in ("weight", "bias")[: 1 + bias]}


def _clip_stem(_: VFMSpec) -> Recipe:
    return {
        "cls_token": ["embeddings.class_embedding", "embeddings.position_embedding.weight"],
        "pos_embed": ["embeddings.position_embedding.weight"],
        **_pairs("patch_embed.proj", "embeddings.patch_embedding", bias=False),
        **_pairs("norm_pre", "pre_layrnorm"),
        **_pairs("norm", "post_layernorm"),
    }


def _siglip_stem(_: VFMSpec) -> Recipe:
    return {
        "pos_embed": ["embeddings.position_embedding.weight"],
        **_pairs("patch_embed.proj", "embeddings.patch_embedding"),
        **_pairs("norm", "post_layernorm"),
    }


def _dinov2_stem(spec: VFMSpec) -> Recipe:
    return {
        "cls_token": ["embeddings.cls_token", "embeddings.position_embeddings"],
        "pos_embed": ["embeddings.position_embeddings"],
        **({"reg_token": ["embeddings.register_tokens"]} if spec.registers else {}),
        **_pairs("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        **_pairs("norm", "layernorm"),
    }


def _dinov3_stem(spec: VFMSpec) -> Recipe:
    return {
        "cls_token": ["embeddings.cls_token"],
        **({"reg_token": ["embeddings.register_tokens"]} if spec.registers else {}),
        **_pairs("patch_embed.proj", "embeddings.patch_embeddings"),
        **_pairs("norm", "norm"),
    }


def _clip_block(_: VFMSpec, i: int, names: Collection[str]) -> Recipe:
    at = f"encoder.layers.{i}"
    return {
        **_pairs("norm1", f"{at}.layer_norm1"),
        **_pairs("attn.qkv", *(f"{at}.self_attn.{x}_proj" for x in "qkv")),
        **_pairs("attn.proj", f"{at}.self_attn.out_proj"),
        **_pairs("norm2", f"{at}.layer_norm2"),
        **_pairs("mlp.fc1", f"{at}.mlp.fc1"),
        **_pairs("mlp.fc2", f"{at}.mlp.fc2"),
    }


def _dinov2_block(spec: VFMSpec, i: int, names: Collection[str]) -> Recipe:
    at = f"encoder.layer.{i}"
    qkv = [f"{at}.attention.attention.{x}" for x in ("query", "key", "value")]
    if spec.mlp != "swiglu":
        fc1, fc2 = [f"{at}.mlp.fc1"], f"{at}.mlp.fc2"
    elif f"{at}.mlp.gate_proj.weight" in names:
        fc1, fc2 = [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"], f"{at}.mlp.down_proj"
    else:  # packed as gate, value: timm's own order
        fc1, fc2 = [f"{at}.mlp.weights_in"], f"{at}.mlp.weights_out"
    return {
        **_pairs("norm1", f"{at}.norm1"),
        **_pairs("attn.qkv", *qkv, bias=spec.qkv_bias),
        **_pairs("attn.proj", f"{at}.attention.output.dense"),
        "ls1.gamma": [f"{at}.layer_scale1.lambda1"],
        **_pairs("norm2", f"{at}.norm2"),
        **_pairs("mlp.fc1", *fc1),
        **_pairs("mlp.fc2", fc2),
        "ls2.gamma": [f"{at}.layer_scale2.lambda1"],
    }


def _dinov3_block(spec: VFMSpec, i: int, names: Collection[str]) -> Recipe:
    at = f"layer.{i}"
    biases = {f"attn.{x}_bias": [f"{at}.attention.{x}_proj.bias"] for x in "qv"} if spec.qkv_bias else {}
    up = {"mlp.fc1_g": "gate_proj", "mlp.fc1_x": "up_proj"} if spec.mlp == "swiglu" else {"mlp.fc1": "up_proj"}
    parts = {
        **_pairs("norm1", f"{at}.norm1"),
        **_pairs("attn.qkv", *(f"{at}.attention.{x}_proj" for x in "qkv"), bias=False),
        **biases,
        **_pairs("attn.proj", f"{at}.attention.o_proj"),
        "gamma_1": [f"{at}.layer_scale1.lambda1"],
        **_pairs("norm2", f"{at}.norm2"),
        **_pairs("mlp.fc2", f"{at}.mlp.down_proj"),
        "gamma_2": [f"{at}.layer_scale2.lambda1"],
    }
    for ours, theirs in up.items():
        parts |= _pairs(ours, f"{at}.mlp.{theirs}")
    return parts


STEMS = {"clip": _clip_stem, "siglip": _siglip_stem, "dinov2": _dinov2_stem, "dinov3": _dinov3_stem}
BLOCKS = {"clip": _clip_block, "siglip": _clip_block, "dinov2": _dinov2_block, "dinov3": _dinov3_block}
