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
SIDEWAYS = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]


def to_rgb(image: Image.Image, background: Colour = (255, 255, 255)) -> Image.Image:
    """Turn a picture of any mode upright and into RGB.

    The EXIF orientation is applied. Transparency (RGBA, LA, palette or colour key) is composited over ``background``.
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
    image.load()  # before the orientation is asked for: what fails in there is then the EXIF block, not the pixels
    turn = turn_of(image)
    bits = _to_8_bits(image)
    image = large.in_bands(image, lambda band: _flattened(band, bits, background))
    return image if turn is None else image.transpose(turn)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What brings a picture upright, by its EXIF block."""
    with suppress(Exception):  # Pillow raises many types here; a damaged EXIF block takes nothing from the pixels
        return _TURNS.get(image.getexif().get(0x0112, 1))
    return None


def _flattened(image: Image.Image, bits: Callable[[np.ndarray], np.ndarray] | None, background: Colour) -> Image.Image:
    """A picture, or a band of one, in RGB over a background."""
    if bits is not None:
        image = Image.fromarray(bits(np.asarray(image)).astype(np.uint8))
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
    if image.mode.startswith("I;"):
        return lambda grey: (grey.astype(np.int64) + 128) // 257
    if image.mode not in ("I", "F"):
        return None
    numbers = np.asarray(image)
    low, high = float(numbers.min()), float(numbers.max())  # NaN where one is
    most = 65535 if image.mode == "I" else 255
    if not 0 <= low <= high <= most:
        kind, expected = ("whole numbers", "0..255 or 0..65535") if image.mode == "I" else ("numbers", "0..1 or 0..255")
        raise ValueError(f"{kind} from {low:g} to {high:g}; expected {expected}")
    if image.mode == "I":
        return (lambda grey: grey) if high <= 255 else lambda grey: (grey.astype(np.int64) + 128) // 257
    return lambda grey: np.rint(grey * 255 if high <= 1 else grey)
