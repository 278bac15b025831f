"""What a model is built of: timm's blocks as a spec says, tables of positions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GluMlp, create_rope_embed, get_act_layer
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vst.models.placement import placed
from vst.models.spec import VFMSpec


def block_of(spec: VFMSpec, layer_norm: Any) -> nn.Module:
    """One block, unfilled; ``layer_norm`` makes a norm of a width."""
    ratio = (spec.hidden + 0.5) / spec.width  # timm takes int(width * ratio): the half keeps rounding from losing one
    scale = 1.0 if spec.layer_scale else None
    if spec.position == "rotary":
        if spec.mlp not in ("gelu", "swiglu"):
            raise ValueError(f"{spec.source}: rotary blocks have a gelu or swiglu MLP, not {spec.mlp}.")
        return EvaBlock(
            spec.width,
            spec.heads,
            qkv_bias=spec.qkv_bias,
            mlp_ratio=ratio,
            swiglu_mlp=spec.mlp == "swiglu",
            swiglu_align_to=8 if spec.mlp == "swiglu" else 0,
            rotate_half=True,
            num_prefix_tokens=spec.prefix,
            init_values=scale,
            norm_layer=layer_norm,
        )
    if spec.mlp == "swiglu":
        mlp: Any = partial(GluMlp, gate_last=False)
        ratio, act = (2 * spec.hidden + 0.5) / spec.width, nn.SiLU
    else:
        from timm.layers import Mlp

        mlp, act = Mlp, get_act_layer(spec.mlp)
    return Block(
        spec.width,
        spec.heads,
        mlp_ratio=ratio,
        qkv_bias=spec.qkv_bias,
        init_values=scale,
        norm_layer=layer_norm,
        act_layer=act,
        mlp_layer=mlp,
    )


def run_rotary(block: nn.Module, x: Tensor, rope: Tensor) -> Tensor:
    """A block of a rotary model on tokens ``[B, T, D]``, with the table of :func:`rope_table`."""
    attention: Any = block.attn
    with placed(attention.qkv):  # timm reads its weight there without calling it
        return block(x, rope=rope)


def rope_table(spec: VFMSpec, grid: int) -> Tensor | None:
    """DINOv3's sine and cosine table ``[N, 2 * head width]``, fp32; a function of the grid alone."""
    if spec.position != "rotary":
        return None
    with torch.device("cpu"):  # also when the model around it is being built on meta
        rope: Any = create_rope_embed(
            rope_type="dinov3",
            dim=spec.width,
            num_heads=spec.heads,
            feat_shape=[grid, grid],
            temperature=spec.rope_temperature,
            grid_indexing="ij",
            rotate_half=True,
            dtype=torch.float32,  # whatever type the model around it is being built in
        )
        return rope.get_embed().detach().clone()


def resample_positions(table: Tensor, grid: int, *, antialias: bool) -> Tensor:
    """Bicubic resampling of a position table ``[1, n * n, D]`` to ``[1, grid * grid, D]``, computed in fp32."""
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise ValueError(f"A position table of {table.shape[1]} entries is not square; expected n * n patches.")
    if side == grid:
        return table
    image = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False, antialias=antialias)
    return image.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(table.dtype)
