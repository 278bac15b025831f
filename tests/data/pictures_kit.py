"""Transforms and made pictures: smooth, of one colour, or of a header only."""

import struct
import zlib

import numpy as np
from PIL import Image

from vst.data.images import ImageTransform

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = ImageTransform(32, MEAN, STD)
SMALL = ImageTransform(8, (0.5,) * 3, (0.5,) * 3)


def photo(width=60, height=40, seed=0):
    """Smooth noise: pictures that resizing treats as it treats photographs."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def flat(colour, mode="RGB", size=(6, 4)):
    return Image.new(mode, size, colour)


def png_header_only(width, height):
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
