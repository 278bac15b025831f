"""Pictures of very many pixels, in bounded memory: decoded smaller where the format can, then worked on by bands.

Nothing here changes a picture of fewer than ``4 * ENOUGH`` pixels by a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from PIL import Image

ENOUGH = 16_000_000
"""Pixels that no model needs more of: pictures with at least four times as many are shrunk towards this count."""
_SHORTEST = 1024  # a long and narrow picture keeps so many pixels across
_BAND = 4_000_000  # pixels that are composited at a time

# Bytes of a pixel as Pillow keeps it; all other modes take four. WebP's decoder holds three more copies.
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
_COPIES = {"WEBP": 4, "AVIF": 3}
_BITS, _COMPRESSION, _ROWS, _TILE_WIDTH, _TILE_HEIGHT = 258, 259, 278, 322, 323  # TIFF's tags


def factor(size: tuple[int, int]) -> int:
    """By which whole number a picture is shrunk; 1 for all but the very large."""
    width, height = size
    return max(1, min(math.isqrt(width * height // ENOUGH), min(width, height) // _SHORTEST))


def draft(image: Image.Image) -> None:
    """Let a JPEG that is opened and not yet decoded come out at a half, quarter or eighth, where it is very large."""
    if image.format in ("JPEG", "MPO") and (by := factor(image.size)) > 1:
        width, height = image.size
        image.draft(None, (width // by, height // by))


def megabytes(image: Image.Image, size: tuple[int, int]) -> float:
    """MiB that decoding an opened picture takes.

    Args:
        image: opened, after :func:`draft`.
        size: width and height in the file.
    """
    width, height = image.size
    kept = width * height * _BYTES.get(image.mode, 4) * _COPIES.get(image.format or "", 1)
    return (kept + _beside(image, *size)) / 2**20


def _beside(image: Image.Image, width: int, height: int) -> float:
    """Bytes that a decoder holds beside the picture: all of a progressive JPEG, one strip or tile of a TIFF."""
    if image.info.get("progressive"):
        shares = [across * down for _, across, down, *_ in getattr(image, "layer", ())]
        return 2 * width * height * sum(shares) / max(shares, default=1)  # coefficients of 16 bits
    tags = getattr(image, "tag_v2", {})
    if tags.get(_COMPRESSION, 1) == 1:
        return 0
    bits = sum(tags.get(_BITS, (8,)))
    rows, columns = tags.get(_TILE_HEIGHT) or tags.get(_ROWS) or height, tags.get(_TILE_WIDTH) or width
    return min(rows, height) * min(columns, width) * bits / 8


def in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert a picture pixel by pixel, a band of rows at a time, and shrink what is very large.

    Args:
        image: decoded.
        convert: from a picture to one of mode RGB and the same size.
    """
    width, height = image.size
    by = factor(image.size)
    if by == 1 and _BAND // width >= height:
        return convert(image)
    out = Image.new("RGB", (-(-width // by), -(-height // by)))
    for top, part in bands(image, by):
        band = convert(part)
        out.paste(band if by == 1 else band.reduce(by), (0, top // by))
    return out


def bands(image: Image.Image, by: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """Bands of rows of a decoded picture and where they begin; of a multiple of ``by`` rows, but for the last."""
    width, height = image.size
    rows = -(-max(1, _BAND // width) // by) * by
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))
