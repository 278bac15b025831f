"""open_clip models: their own CLIP ViT is renamed, their timm towers go the way of every timm model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from vst.models.checkpoints import timm_hub
from vst.models.checkpoints.preparation import three, warn_normalisation, warn_resampling
from vst.models.inputs import check_tensors
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM

_STEM = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
    "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
}
_BLOCK = {
    "ln_1.": "norm1.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "ls_1.": "ls1.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "ls_2.": "ls2.",
}


def describe(name: str) -> VFMSpec:
    """Spec of ``open_clip:ARCH/TAG``; the model is built without memory for its weights."""
    return from_visual(_build(name, weights=False), f"open_clip:{name}", tag_config(name))[0]


def read(name: str, spec: VFMSpec, parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of ``open_clip:ARCH/TAG`` in VFM's layout; fetched through open_clip and its cache."""
    if not name.partition("/")[2]:
        raise ValueError(
            f"open_clip:{name} names no weights; write open_clip:{name}/TAG "
            f"({', '.join(_open_clip().list_pretrained_tags_by_model(name)) or 'it has no tags'}), or pretrained=False."
        )
    return from_visual(_build(name, weights=True), f"open_clip:{name}", tag_config(name))[1]


def from_visual(visual: Any, source: str, config: Mapping[str, Any] | None = None) -> tuple[VFMSpec, dict[str, Tensor]]:
    """Spec and tensors of the image tower (``model.visual``) of an open_clip model.

    Args:
        visual: open_clip's ``VisionTransformer``, or a ``TimmModel``.
        source: what to call it in the spec and in errors.
        config: the tag's entry in open_clip's table, for mean and standard deviation.

    Raises:
        ValueError: a tower that a VFM cannot represent.
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if type(visual) is TimmModel:
        spec, tensors = timm_hub.from_module(visual.trunk, source)
        spec = replace(spec, license="unknown")  # open_clip's weights need not be timm's
    elif type(visual) is VisionTransformer:
        spec = _spec(visual, source)
        tensors = _tensors(visual, spec)
    else:
        raise ValueError(f"{source} has an image tower of class {type(visual).__name__}; expected a ViT or a timm ViT.")
    config = config or {}
    settings = {key: three(f"{source}: its settings", key, config.get(key)) for key in ("mean", "std")}
    given = {key: value for key, value in settings.items() if value is not None}
    if config and (lacking := [key for key in settings if key not in given]):
        warn_normalisation(source, f"open_clip's settings name no {' and no '.join(lacking)}", spec.mean, spec.std)
    warn_resampling(source, config.get("interpolation"))
    return replace(spec, **given), tensors  # type: ignore[arg-type]


def _spec(visual: Any, source: str) -> VFMSpec:
    from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU, ResidualAttentionBlock

    blocks = visual.transformer.resblocks
    patch, size = visual.patch_size, visual.image_size
    acts = {"quick_gelu" if type(b.mlp.gelu) is QuickGELU else timm_hub.activation(b.mlp.gelu) for b in blocks}
    norms = [visual.ln_pre, visual.ln_post, *(n for b in blocks for n in (b.ln_1, b.ln_2))]
    plain = {
        "square": patch[0] == patch[1] and size[0] == size[1],
        "pre-norm": not isinstance(visual.ln_pre, nn.Identity),
        "plain blocks": all(type(b) is ResidualAttentionBlock for b in blocks),
        "one known activation": len(acts) == 1 and acts <= {"gelu", "gelu_tanh", "quick_gelu"},
        "LayerNorm": all(type(n) in (nn.LayerNorm, LayerNorm, LayerNormFp32) for n in norms),
        "one epsilon": len({getattr(n, "eps", None) for n in norms}) == 1,
        "no attention pooling": visual.attn_pool is None,
    }
    if lacking := [what for what, holds in plain.items() if not holds]:
        raise ValueError(f"{source} cannot be represented; a VFM of an open_clip ViT expects: {', '.join(lacking)}.")
    block = blocks[0]
    return VFMSpec(
        source=source,
        family="clip",
        width=visual.conv1.out_channels,
        depth=len(blocks),
        heads=block.attn.num_heads,
        patch=patch[0],
        hidden=block.mlp.c_fc.out_features,
        image_size=visual.grid_size[0] * patch[0],
        mlp=str(acts.pop()),
        layer_scale=not isinstance(block.ls_1, nn.Identity),
        pre_norm=True,
        norm_eps=block.ln_1.eps,
        antialias=True,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )


def _tensors(visual: nn.Module, spec: VFMSpec) -> dict[str, Tensor]:
    state = {}
    for key, tensor in visual.state_dict().items():
        if key == "proj":
            continue
        head, _, rest = key.partition("transformer.resblocks.")
        if rest and not head:
            number, _, inner = rest.partition(".")
            ours = next((new + inner[len(old) :] for old, new in _BLOCK.items() if inner.startswith(old)), inner)
            state[f"blocks.{number}.{ours}"] = tensor
        else:
            state[_STEM.get(key, key)] = tensor
    state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    state["pos_embed"] = state["pos_embed"][None]
    state |= timm_hub.fold_positions(state, 1)
    with torch.device("meta"):
        expected = {n: p.shape for n, p in VFM(spec, spec.grid(spec.image_size)).named_parameters()}
    check_tensors(spec.source, expected, {n: t.shape for n, t in state.items()})
    return state


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise RuntimeError(
            'open_clip: sources need the package open_clip_torch; install it with pip install "vfm-stitch-tree[hub]".'
        ) from error
    return open_clip


def tag_config(name: str) -> dict[str, Any]:
    """The tag's entry in open_clip's table; checks architecture and tag."""
    open_clip = _open_clip()
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        close = get_close_matches(architecture, open_clip.list_models(), n=3)
        raise ValueError(
            f"open_clip has no architecture {architecture!r}; "
            + (f"close names: {', '.join(close)}." if close else "open_clip.list_models() lists them.")
        )
    config = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    if tag and not config:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise ValueError(f"open_clip has no weights {tag!r} for {architecture}; it has: {', '.join(tags) or 'none'}.")
    return dict(config)


def _build(name: str, *, weights: bool) -> nn.Module:
    config, open_clip = tag_config(name), _open_clip()
    architecture, _, tag = name.partition("/")
    options: dict[str, Any] = {"pretrained_hf": False, "force_quick_gelu": bool(config.get("quick_gelu"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # open_clip warns of the activation that is set right here
        try:
            if weights:
                return open_clip.create_model(architecture, pretrained=tag, **options).visual
            # Only both keep the weights from being drawn: it moves the model to a device once it is built.
            with torch.device("meta"):
                return open_clip.create_model(architecture, pretrained=None, device="meta", **options).visual
        except Exception as error:
            what, first = "The weights of" if weights else "The configuration of", timm_hub.first_line(error)
            raise RuntimeError(
                f"{what} open_clip:{name} could not be fetched ({type(error).__name__}: {first}); connect to the "
                "Hugging Face hub once, or load a local folder with hf:FOLDER."
            ) from error
