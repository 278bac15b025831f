"""One picture: from a file of any kind to upright RGB, cut square, resized and normalised for a model."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vst.data import large
from vst.data.rgb import SIDEWAYS, Colour, load, to_rgb, turn_of

CUTS = ("crop", "squash", "pad")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_PIXELS = 178_956_970  # where Pillow itself refuses
PICTURE_MB = 768  # MiB that one decoded picture may take: any of MAX_PIXELS, but for formats that decode with copies
# Pillow knows the suffix only where it was built with the decoder.
AVIF = (".avif",) if ".avif" in Image.registered_extensions() else ()
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", *AVIF)
# Only these decoders may look at a file: Pillow would otherwise hand a disguised EPS to an outside program.
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"] + ["AVIF"] * len(AVIF)


class UnreadableImage(ValueError):
    """A picture that cannot be had; ``reason`` says why without naming the file."""

    def __init__(self, reason: str, path: str | os.PathLike | None = None):
        super().__init__(reason if path is None else f"{os.fspath(path)}: {reason}")
        self.reason = reason


def picture_of(given: Any) -> Image.Image:
    """A picture from what people have at hand: a PIL picture, a path, or a uint8 array ``[height, width, 3]``.

    Raises:
        UnreadableImage: the path leads to no picture.
        ValueError: anything else.
    """
    if isinstance(given, Image.Image):
        if not given.width * given.height:
            raise UnreadableImage(f"has {given.width} x {given.height} pixels, where 1 at least are expected")
        return given
    if isinstance(given, (str, os.PathLike)):
        return open_image(given)
    array = isinstance(given, np.ndarray)
    if array and given.dtype == np.uint8 and given.ndim == 3 and given.shape[2] == 3 and given.size:
        return Image.fromarray(np.ascontiguousarray(given))
    what = f"{type(given).__name__}" + (f" of shape {list(given.shape)} and type {given.dtype}" if array else "")
    raise ValueError(
        f"A picture was given as a {what}; expected a PIL picture, a path, a uint8 array [height, width, 3], or a list "
        "of these: turn it into one (PIL.Image.open reads a file, and io.BytesIO makes bytes one)."
    )


def upright_size(image: Image.Image | str | os.PathLike) -> tuple[int, int]:
    """Width and height of a picture once it is upright, from its header alone.

    Raises:
        OSError: a path that leads to no picture.
    """
    if not isinstance(image, Image.Image):
        with Image.open(image, formats=FORMATS) as opened:
            return upright_size(opened)
    width, height = image.size
    return (height, width) if turn_of(image) in SIDEWAYS else (width, height)


def open_image(path: str | os.PathLike, max_pixels: int = MAX_PIXELS, picture_mb: float = PICTURE_MB) -> Image.Image:
    """Open and decode one file, in whatever mode it has (``to_rgb`` makes it RGB).

    A JPEG of four times :data:`vst.data.large.ENOUGH` pixels or more is decoded at half its size or less.

    Args:
        path: a file.
        max_pixels: largest width x height, checked from the header before anything is decoded. Pillow's own limit
            (``PIL.Image.MAX_IMAGE_PIXELS``) holds as well.
        picture_mb: MiB that the picture may take while it is decoded, checked at the same place.

    Returns:
        The picture, decoded, with no file left open.

    Raises:
        UnreadableImage: the file is missing, a folder, empty, no picture, truncated or too large. A program that sets
            ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` (lmms-eval does on import) gets truncated pictures padded instead.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a pipe or device would block for ever
            raise UnreadableImage("is a folder" if path.is_dir() else "is no file" if path.exists() else "is missing")
        if path.stat().st_size == 0:
            raise UnreadableImage("is empty (0 bytes)")
        return decode_file(path, max_pixels, picture_mb)
    except UnreadableImage as error:
        raise UnreadableImage(error.reason, path) from error.__cause__
    except OSError as error:
        raise UnreadableImage(f"cannot be read ({reason_of(error)})", path) from error


def cut(image: Image.Image, how: str, background: Colour = (255, 255, 255)) -> Image.Image:
    """Bring a picture to the shape that is then resized to a square.

    Args:
        image: picture [height, width].
        how: ``crop`` takes the centre square of the original pixels; ``squash`` leaves the picture as it is (the resize
            squashes it); ``pad`` centres it on a square of ``background``, as LLaVA's expand2square does.
        background: colour of the padding, 0..255.

    Raises:
        ValueError: ``how`` is none of ``CUTS``.
    """
    _check_cut(how)
    width, height = image.size
    if how == "squash" or width == height:
        return image
    if how == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


@dataclass(frozen=True)
class ImageTransform:
    """From a picture to one model's input. Picklable and hashable; equal transforms give equal tensors.

    Attributes:
        size: side of the square input in pixels.
        mean, std: of the model's normalisation, RGB, for pixel values in 0..1.
        cut: one of ``CUTS``; ``pad`` pads with the mean colour, as LLaVA does.
        interpolation: one of ``INTERPOLATIONS`` (Pillow's resize, which antialiases).

    Raises:
        ValueError: a field is out of range.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    cut: str = "crop"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size is {self.size!r}, but must be one positive whole number, the side of a square.")
        for field in ("mean", "std"):
            values = getattr(self, field)
            if isinstance(values, str) or not isinstance(values, Iterable) or len(values := tuple(values)) != 3:
                raise ValueError(f"{field} is {values!r}, but must be three numbers, one for each of R, G and B.")
            object.__setattr__(self, field, tuple(float(value) for value in values))
        if min(self.mean) < 0 or max(self.mean) > 1:
            raise ValueError(f"mean is {self.mean}, but must be for pixel values in 0..1; divide it by 255.")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}, but each value must be greater than 0.")
        _check_cut(self.cut)
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(f"interpolation is {self.interpolation!r}, but must be one of {known}.")

    @property
    def background(self) -> Colour:
        """The mean colour, 0..255, rounded down as LLaVA does."""
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue

    def __call__(self, image: Any) -> Tensor:
        """Turn a picture of any mode into a float32 tensor [3, size, size], normalised.

        Args:
            image: a PIL picture, a path, a uint8 array [height, width, 3]; or a list of these, which gives a batch
                [pictures, 3, size, size].

        Raises:
            UnreadableImage: a path that leads to no picture.
            ValueError: anything else, or a picture that cannot be made RGB.
        """
        if isinstance(image, (list, tuple)):
            if not image:
                raise ValueError("An empty list of pictures was given; expected at least one.")
            return torch.stack([self(one) for one in image])
        image = picture_of(image)
        return self.resize_only(cut(to_rgb(image), self.cut, self.background))

    def resize_only(self, cut_image: Image.Image) -> Tensor:
        """Do the same with an RGB picture that was cut already, so that several models can share one cut original.

        Raises:
            ValueError: the picture is not RGB.
        """
        if cut_image.mode != "RGB":
            raise ValueError(f"The picture's mode is {cut_image.mode}, but must be RGB; call to_rgb first.")
        resized = cut_image.resize((self.size, self.size), INTERPOLATIONS[self.interpolation])
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels - mean) / std).contiguous()


def _check_cut(how: str) -> None:
    if how not in CUTS:
        raise ValueError(f"The cut is {how!r}, but must be one of {', '.join(CUTS)}.")


def decode_file(file: Path | io.BytesIO, max_pixels: int, picture_mb: float = PICTURE_MB) -> Image.Image:
    """Open and decode a file or the bytes of one.

    Raises:
        UnreadableImage: it is no picture, damaged or too large.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            return decode_opened(image, max_pixels, picture_mb)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(f"is no picture of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise many types on damaged headers
        raise UnreadableImage(f"cannot be opened ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """What an error says went wrong, without the path that it may name."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__  # strerror leaves out the path


def decode_opened(image: Image.Image, max_pixels: int, picture_mb: float = PICTURE_MB) -> Image.Image:
    """Decode a picture that Pillow has opened, after a look at its size.

    Raises:
        UnreadableImage: it is damaged or too large.
    """
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise UnreadableImage(f"has {width} x {height} pixels, where 1 to {max_pixels:,} are allowed")
    try:
        large.draft(image)
        if (needed := large.megabytes(image, (width, height))) > picture_mb:
            raise UnreadableImage(
                f"has {width} x {height} pixels and takes {needed:,.0f} MB to decode, where picture_mb allows "
                f"{picture_mb:g}"
            )
        load(image)
    except UnreadableImage:
        raise
    except Exception as error:  # as above, for damaged data
        raise UnreadableImage(f"cannot be decoded ({reason_of(error)})") from error
    return image


def in_rgb(image: Image.Image) -> Image.Image:
    """A picture upright and in RGB, as :func:`to_rgb` makes it.

    Raises:
        UnreadableImage: its data cannot be decoded or its mode not be converted.
    """
    try:
        return to_rgb(image)
    except (OSError, ValueError) as error:
        raise UnreadableImage(f"cannot be made RGB ({reason_of(error)})") from error
