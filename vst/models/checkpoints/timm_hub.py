"""timm models: the spec is read off the module that timm builds, and everything a VFM does not model is refused."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.layers import GELUTanh, GluMlp, Mlp, PatchEmbed, QuickGELU, SwiGLU
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vst.models.checkpoints.preparation import three, warn_normalisation, warn_resampling
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM

_FAMILIES = ("clip", "dinov2", "siglip", "dinov3")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LAYER_NORMS = (nn.LayerNorm, TimmLayerNorm)
_IGNORED = ("drop", "drop1", "drop2", "drop_path1", "drop_path2", "attn_drop", "proj_drop")  # nothing in evaluation
HEAD = ("attn_pool", "fc_norm", "head", "head_drop")


def describe(name: str) -> VFMSpec:
    """Spec of ``timm:NAME``; the model is built without memory for its weights."""
    return spec_from_module(built(name), f"timm:{name}")


def built(name: str) -> nn.Module:
    """The module that timm calls by a name, on ``meta`` and without a head.

    Raises:
        ValueError: timm does not know the name.
    """
    _check_name(name)
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, NotImplementedError):  # some timm versions compute with numbers while they build
        return timm.create_model(name, pretrained=False, num_classes=0)


def read(name: str, spec: VFMSpec, parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of ``timm:NAME`` in VFM's layout; fetched through timm and its cache."""
    _check_name(name)
    try:
        module = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        raise RuntimeError(
            f"The weights of timm:{name} could not be fetched ({type(error).__name__}: {first_line(error)}); connect "
            f"to the Hugging Face hub once, or load what lies on disk with timm:{name}@FILE.safetensors, or hf:FOLDER."
        ) from error
    return tensors_from_module(module, spec)


def from_module(module: nn.Module, source: str) -> tuple[VFMSpec, dict[str, Tensor]]:
    """Spec and tensors of a timm module that was built elsewhere.

    Args:
        module: a timm ``VisionTransformer``, or an ``Eva`` with DINOv3's rotary positions.
        source: what to call it in the spec and in errors.

    Raises:
        ValueError: a module that a VFM cannot represent; says in which point.
    """
    spec = spec_from_module(module, source)
    return spec, tensors_from_module(module, spec)


def spec_from_module(module: nn.Module, source: str) -> VFMSpec:
    """Derive a spec from a timm module and check that a VFM built from it has the same blocks.

    Raises:
        ValueError: a module that a VFM cannot represent.
    """
    if type(module) not in (VisionTransformer, Eva):
        raise _refusal(source, f"its class is {type(module).__name__}, not VisionTransformer or Eva")
    model: Any = module
    rotary = isinstance(model, Eva)
    if rotary:
        _check_rope(model, source)
    elif model.pos_embed is None:
        raise _refusal(source, "it has no position table")
    embed = model.patch_embed
    if type(embed) is not PatchEmbed or not isinstance(embed.norm, nn.Identity):
        raise _refusal(source, "its patch embedding is not one plain convolution")
    patch, size, grid = embed.patch_size, embed.img_size, embed.grid_size
    if patch[0] != patch[1] or size[0] != size[1] or embed.proj.in_channels != 3:
        raise _refusal(source, f"its input is not square RGB (patch {patch}, size {size})")
    if not len(model.blocks):
        raise _refusal(source, "it has no blocks")
    block, plain = model.blocks[0], EvaBlock if rotary else Block
    if odd := next((b for b in model.blocks if type(b) is not plain), None):
        raise _refusal(source, f"it has blocks of the class {type(odd).__name__}, not {plain.__name__}")
    config = getattr(model, "pretrained_cfg", None) or {}
    warn_resampling(source, config.get("interpolation"))
    where = f"{source}: its pretrained_cfg"
    given = {name: three(where, name, config.get(name)) for name in ("mean", "std")}
    mean, std = given["mean"] or _MEAN, given["std"] or _STD
    if lacking := [name for name, value in given.items() if value is None]:
        warn_normalisation(source, f"timm's settings name no {' and no '.join(lacking)}", mean, std)
    registers = 0 if model.reg_token is None else model.reg_token.shape[1]
    spec = VFMSpec(
        source=source,
        family=_family(config.get("architecture") or ""),
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        patch=patch[0],
        hidden=block.mlp.fc2.in_features,
        image_size=grid[0] * patch[0],
        mlp=_mlp(block.mlp, source),
        cls=model.cls_token is not None,
        registers=registers,
        layer_scale=getattr(block, "gamma_1", None) is not None or not isinstance(getattr(block, "ls1", None), _NONE),
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        qkv_bias=_has_qkv_bias(block.attn),
        norm_eps=block.norm1.eps,
        position="rotary" if rotary else "learned",
        rope_temperature=model.rope.temperature if rotary else 100.0,
        antialias=True,
        mean=mean,
        std=std,
        license=config.get("license") or "unknown",
    )
    _compare(model, spec, grid[0])
    return spec


def tensors_from_module(module: nn.Module, spec: VFMSpec) -> dict[str, Tensor]:
    """State dict of a timm module in VFM's layout: no head, prefix positions folded into their tokens."""
    state = {n: t for n, t in module.state_dict().items() if n.partition(".")[0] not in HEAD}
    if isinstance(module.norm, nn.Identity):  # pooled models keep the final norm behind the pooling
        state |= {f"norm.{n}": t for n, t in module.fc_norm.state_dict().items()}  # type: ignore[union-attr]
    if "pos_embed" in state:
        state |= fold_positions(state, 0 if module.no_embed_class else spec.prefix)
    return state


def fold_positions(state: Mapping[str, Tensor], prefix: int) -> dict[str, Tensor]:
    """Add the first ``prefix`` positions into ``cls_token`` and ``reg_token``; what is left belongs to patches.

    Args:
        state: ``pos_embed`` as ``[1, prefix + N, D]``, and ``cls_token`` ``[1, 1, D]``, ``reg_token`` ``[1, R, D]``
            where the model has them.
        prefix: 0 where the table holds patches only.
    """
    table = state["pos_embed"]
    folded, at = {"pos_embed": table[:, prefix:].clone()}, 0
    for name in ("cls_token", "reg_token"):
        if prefix and name in state:
            count = state[name].shape[1]
            folded[name], at = state[name] + table[:, at : at + count], at + count
    return folded


_NONE = (nn.Identity, type(None))


def _check_name(name: str) -> None:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}; "
            + (f"close names: {', '.join(close)}." if close else "timm.list_pretrained() lists its names.")
        )
    tags = [n for n in timm.list_pretrained(f"{architecture}*") if n.partition(".")[0] == architecture]
    if "." in name and name not in tags:
        raise ValueError(f"timm {timm.__version__} has no weights {name!r}; it has: {', '.join(tags) or 'none'}.")


def _refusal(source: str, why: str) -> ValueError:
    return ValueError(
        f"{source} cannot be represented: {why}; a VFM is a plain pre-norm ViT with learned positions, or a DINOv3."
    )


def _family(architecture: str) -> str:
    words = architecture.split("_")
    return next((family for family in _FAMILIES if family in words), "vit")


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")


def _check_rope(model: Any, source: str) -> None:
    rope = model.rope
    if type(rope) is not RotaryEmbeddingDinoV3 or model.pos_embed is not None:
        raise _refusal(source, "its positions are not DINOv3's rotary ones")
    expected = {"grid_offset": 0.0, "grid_indexing": "ij", "normalize_coords": "separate", "rotate_half": True}
    given = {name: getattr(rope, name, value) for name, value in expected.items()}
    if given != expected or rope.min_period is not None or rope.temperature is None:
        raise _refusal(source, f"its rotary positions are set up otherwise ({given})")


def activation(module: nn.Module) -> str | None:
    """Which of the known activations a module is; ``None`` for another."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    if type(module) is nn.SiLU:
        return "silu"
    for known, label in ((timm.layers.GELU, "gelu"), (GELUTanh, "gelu_tanh"), (QuickGELU, "quick_gelu")):
        if type(module) is known:
            return label
    return None


def _mlp(mlp: nn.Module, source: str) -> str:
    label = activation(mlp.act) if hasattr(mlp, "act") else None  # type: ignore[arg-type]
    if type(mlp) is Mlp and label in ("gelu", "gelu_tanh", "quick_gelu"):
        return str(label)
    if label == "silu" and (type(mlp) is SwiGLU or (type(mlp) is GluMlp and not mlp.gate_last)):
        return "swiglu"
    act = type(getattr(mlp, "act", None)).__name__
    raise _refusal(source, f"its MLP is {type(mlp).__name__} with {act}")


def _has_qkv_bias(attention: Any) -> bool:
    return getattr(attention, "q_bias", None) is not None or getattr(attention.qkv, "bias", None) is not None


def _compare(model: Any, spec: VFMSpec, grid: int) -> None:
    """Refuse whatever a VFM of this spec would not compute in the same way."""
    with torch.device("meta"):
        ours = VFM(spec, grid)
    for i, theirs in enumerate(model.blocks):
        mine = ours.blocks[str(i)]
        if (a := _anatomy(theirs)) != (b := _anatomy(mine)):
            at = next(name for name in [*a, *b] if a.get(name) != b.get(name))
            raise _refusal(spec.source, f"blocks.{i}.{at} is {a.get(at)}, not {b.get(at)}")
    norms = [model.norm_pre] * spec.pre_norm
    norms.append(model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm)
    if any(type(n) not in _LAYER_NORMS or n.eps != spec.norm_eps for n in norms):
        raise _refusal(spec.source, f"it has no LayerNorm with epsilon {spec.norm_eps} before or after its blocks")
    expected = {n: tuple(p.shape) for n, p in ours.named_parameters()}
    with torch.device("meta"):
        given = {n: tuple(t.shape) for n, t in tensors_from_module(model, spec).items()}
    if expected != given:
        at = next(name for name in [*given, *expected] if given.get(name) != expected.get(name))
        raise _refusal(spec.source, f"its tensor {at} is {given.get(at)}, not {expected.get(at)}")


def _anatomy(block: nn.Module) -> dict[str, str]:
    """What each module of a block computes, by name; what acts only in training is left out."""
    parts = {}
    for name, module in block.named_modules():
        last = name.rpartition(".")[2]
        if not name or last in _IGNORED:
            continue
        kind = activation(module) or type(module).__name__
        if type(module) in _LAYER_NORMS:
            kind = f"LayerNorm(eps={module.eps})"
        elif isinstance(module, nn.Linear):
            kind = f"Linear({module.in_features}, {module.out_features}, bias={module.bias is not None})"
        elif last == "attn":
            prefix = getattr(module, "num_prefix_tokens", None)
            half = getattr(module, "rotate_half", None)
            kind += f"({module.num_heads} heads, scale {module.scale:.6f}, prefix {prefix}, rotate_half {half})"
        parts[name] = kind
    return parts
