"""Pictures of very many pixels, in bounded memory: decoded smaller where the format can, then worked on by bands.

Nothing here changes a picture of fewer than ``4 * ENOUGH`` pixels by a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import Image

ENOUGH = 16_000_000
"""Pixels that no model needs more of: pictures with at least four times as many are shrunk towards this count."""
_SHORTEST = 1024  # a long and narrow picture keeps so many pixels across
_BAND = 4_000_000  # pixels that are composited at a time

# Bytes of a pixel as Pillow keeps it; all other modes take four. WebP's decoder holds three more copies.
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
_COPIES = {"WEBP": 4, "AVIF": 3}


def factor(size: tuple[int, int]) -> int:
    """By which whole number a picture is shrunk; 1 for all but the very large."""
    width, height = size
    return max(1, min(math.isqrt(width * height // ENOUGH), min(width, height) // _SHORTEST))


def draft(image: Image.Image) -> None:
    """Let a JPEG that is opened and not yet decoded come out at a half, quarter or eighth, where it is very large."""
    if image.format in ("JPEG", "MPO") and (by := factor(image.size)) > 1:
        width, height = image.size
        image.draft(None, (width // by, height // by))


def megabytes(image: Image.Image) -> float:
    """MiB that decoding an opened picture takes."""
    width, height = image.size
    return width * height * _BYTES.get(image.mode, 4) * _COPIES.get(image.format or "", 1) / 2**20


def in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert a picture pixel by pixel, a band of rows at a time, and shrink what is very large.

    Args:
        image: decoded.
        convert: from a picture to one of mode RGB and the same size.
    """
    width, height = image.size
    by, rows = factor(image.size), max(1, _BAND // width)
    if by == 1 and rows >= height:
        return convert(image)
    rows = -(-rows // by) * by
    out = Image.new("RGB", (-(-width // by), -(-height // by)))
    for top in range(0, height, rows):
        band = convert(image.crop((0, top, width, min(top + rows, height))))
        out.paste(band if by == 1 else band.reduce(by), (0, top // by))
    return out
