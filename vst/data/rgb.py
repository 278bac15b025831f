"""A picture of any mode to upright RGB: orientation, transparency, and numbers of more than 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
from PIL import Image

from vst.data import large

Colour = tuple[int, int, int]

# By EXIF's orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE, _SIGNS = 262, 339  # TIFF's tags: 0 where white is zero; 2 where numbers have a sign
SIDEWAYS = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]


def to_rgb(image: Image.Image, background: Colour = (255, 255, 255)) -> Image.Image:
    """Turn a picture of any mode upright and into RGB.

    The EXIF orientation is applied. Transparency (RGBA, LA, palette or colour key) is composited over ``background``.
    A TIFF in which white is zero is turned.
    16-bit grey is scaled from 0..65535 to 0..255. Whole numbers of 32 bits (Pillow's mode ``I``) are taken as 0..255
    where none is larger, else as 0..65535; numbers with a point (mode ``F``) as 0..1 where none is larger, else as
    0..255. Of an animation the current frame is taken, which is the first one in a picture that was just opened.
    A picture of four times :data:`vst.data.large.ENOUGH` pixels or more is shrunk by a whole factor on the way.

    Args:
        image: picture of any mode.
        background: RGB, 0..255.

    Returns:
        A picture of mode RGB.

    Raises:
        OSError, ValueError: the picture's data cannot be decoded, its mode not be converted, or its numbers lie in no
            range that is known.
    """
    load(image)  # before the orientation is asked for: what fails in there is then the EXIF block, not the pixels
    turn = turn_of(image)
    bits = _to_8_bits(image)
    image = large.in_bands(image, lambda band: _flattened(band, bits, background))
    return image if turn is None else image.transpose(turn)


def load(image: Image.Image) -> None:
    """Decode an opened picture, its colour key in the numbers that it is decoded to.

    Pillow hands a PNG's key over as the file has it, and its grey of 2 or 4 bits, or colours of 16, as 8 bits.

    Raises:
        OSError, ValueError: the data cannot be decoded.
    """
    tiles = getattr(image, "tile", None)  # of a file that is not decoded yet
    key, raw = image.info.get("transparency"), str(tiles[0][3]) if tiles else ""
    image.load()
    if isinstance(key, int) and raw in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    elif isinstance(key, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(number >> 8 for number in key)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What brings a picture upright, by its EXIF block."""
    with suppress(Exception):  # Pillow raises many types here; a damaged EXIF block takes nothing from the pixels
        return _TURNS.get(image.getexif().get(0x0112, 1))
    return None


def _flattened(image: Image.Image, bits: Callable[[np.ndarray], np.ndarray] | None, background: Colour) -> Image.Image:
    """A picture, or a band of one, in RGB over a background."""
    if bits is not None:
        key, numbers = image.info.get("transparency"), np.asarray(image)
        image = Image.fromarray(bits(numbers).astype(np.uint8))
        if isinstance(key, int):
            image.putalpha(Image.fromarray(np.where(numbers == key, 0, 255).astype(np.uint8)))
    if image.mode == "La":  # has no way to RGB of its own
        image = image.convert("LA")
    colour_key = image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info
    if colour_key or image.mode in ("RGBA", "RGBa", "LA", "PA"):
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Callable[[np.ndarray], np.ndarray] | None:
    """How the numbers of a picture become 0..255; None where they are.

    Raises:
        ValueError: the numbers lie in no range that is known.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "L" and tags.get(_SIGNS) == (2,):  # 8 bits with a sign, which Pillow reads without
        if (low := _extremes(image, np.int8)[0]) < 0:
            raise ValueError(f"whole numbers from {low:g}; expected 0..255")
        return None
    scale = _scale_of(image)
    if scale is None or tags.get(_WHITE) != 0:
        return scale
    return lambda numbers: 255 - scale(numbers)  # Pillow turns those of 8 bits alone


def _scale_of(image: Image.Image) -> Callable[[np.ndarray], np.ndarray] | None:
    if image.mode.startswith("I;"):
        return lambda grey: (grey.astype(np.int64) + 128) // 257
    if image.mode not in ("I", "F"):
        return None
    low, high = _extremes(image)
    most = 65535 if image.mode == "I" else 255
    if not 0 <= low <= high <= most:
        kind, expected = ("whole numbers", "0..255 or 0..65535") if image.mode == "I" else ("numbers", "0..1 or 0..255")
        raise ValueError(f"{kind} from {low:g} to {high:g}; expected {expected}")
    if image.mode == "I":
        return (lambda grey: grey) if high <= 255 else lambda grey: (grey.astype(np.int64) + 128) // 257
    return lambda grey: np.rint(grey * 255 if high <= 1 else grey)


def _extremes(image: Image.Image, kind: type | None = None) -> tuple[float, float]:
    """The least and the greatest number of a picture, NaN where one is."""
    numbers = (np.asarray(band) for _, band in large.bands(image))
    found = [(n.min(), n.max()) for n in (n if kind is None else n.view(kind) for n in numbers)]
    lows, highs = zip(*found, strict=True)
    return float(np.min(lows)), float(np.max(highs))
