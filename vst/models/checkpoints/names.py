"""Ready names for models that are often used, and the parser of exact sources."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches

import timm

SCHEMES = {
    "timm": "timm:NAME",
    "hf": "hf:ID-or-folder",
    "open_clip": "open_clip:ARCH/TAG",
}

# DINOv3's `_qkvb` variants carry the query and value biases as the original does; the plain ones leave them out.
# timm builds SigLIP2 up to 384 pixels with the exact GELU, where the original (as hf:google/siglip2-...) has its tanh
# approximation; the vision tower alone is a third of that download, and the difference is below 5e-4 an activation.
READY = {
    "clip-b-224": "timm:vit_base_patch16_clip_quickgelu_224.openai",
    "clip-l-224": "timm:vit_large_patch14_clip_quickgelu_224.openai",
    "clip-l-336": "timm:vit_large_patch14_clip_quickgelu_336.openai",
    "dinov2-s": "timm:vit_small_patch14_dinov2.lvd142m",
    "dinov2-b": "timm:vit_base_patch14_dinov2.lvd142m",
    "dinov2-l": "timm:vit_large_patch14_dinov2.lvd142m",
    "dinov2-g": "timm:vit_giant_patch14_dinov2.lvd142m",
    "dinov2-s-reg": "timm:vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2-b-reg": "timm:vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-l-reg": "timm:vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2-g-reg": "timm:vit_giant_patch14_reg4_dinov2.lvd142m",
    "siglip2-b-224": "timm:vit_base_patch16_siglip_224.v2_webli",
    "siglip2-l-256": "timm:vit_large_patch16_siglip_256.v2_webli",
    "siglip2-l-384": "timm:vit_large_patch16_siglip_384.v2_webli",
    "siglip2-l-512": "timm:vit_large_patch16_siglip_512.v2_webli",
    "siglip2-so400m-384": "timm:vit_so400m_patch14_siglip_378.v2_webli",
    "dinov3-s": "timm:vit_small_patch16_dinov3_qkvb.lvd1689m",
    "dinov3-b": "timm:vit_base_patch16_dinov3_qkvb.lvd1689m",
    "dinov3-l": "timm:vit_large_patch16_dinov3_qkvb.lvd1689m",
}


def known_names() -> dict[str, str]:
    """Ready names and the exact source that each one stands for."""
    return dict(READY)


def resolve(source: str) -> tuple[str, str]:
    """Split a source into scheme and the rest: ``timm:vit_x`` to ``("timm", "vit_x")``; ready names are looked up.

    Raises:
        ValueError: an unknown scheme or name, or a scheme with nothing behind it; says what was probably meant.
    """
    exact = READY.get(source, source)
    scheme, colon, rest = exact.partition(":")
    if colon and scheme in SCHEMES and rest and not _URL.match(rest):
        return scheme, rest
    meant = _meant(source.strip())
    raise ValueError(
        f"{source!r} is no known model source{f' (did you mean {meant!r}?)' if meant else ''}; use "
        f"{', '.join(SCHEMES.values())} or a ready name: {', '.join(READY)}."
    )


_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+)")


def _meant(source: str) -> str | None:
    """What somebody who wrote this probably wants: a folder, a page of the hub, or a name without its scheme."""
    scheme, colon, rest = source.partition(":")
    bare = rest if colon and scheme.casefold() in (*SCHEMES, "hf-hub") else source
    if url := _URL.search(bare):
        return f"hf:{url['id']}"
    if (ready := bare.strip().casefold()) in READY:
        return ready
    if colon and rest and scheme.casefold() in SCHEMES:
        return f"{scheme.casefold()}:{rest}"
    if bare.startswith("timm/"):
        return f"timm:{bare.removeprefix('timm/')}"
    if bare and os.path.isdir(os.path.expanduser(bare)):  # False where no path could be so long
        return f"hf:{bare}"
    if timm.is_model(bare):
        return f"timm:{bare}"
    if re.fullmatch(r"[\w-]+/[\w.-]+", bare):
        return f"hf:{bare}"
    return next(iter(get_close_matches(bare, [*READY, *SCHEMES], n=1)), None)
