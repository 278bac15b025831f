"""A picture of any mode becomes RGB by a stated rule, or says why not, against pixels known by construction."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from pictures_kit import SMALL, flat, photo
from PIL import Image

from vst.data.images import open_image
from vst.data.pictures import ImageSet, Skipped
from vst.data.rgb import to_rgb


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def test_cmyk_jpeg(tmp_path):
    flat((0, 255, 255, 0), "CMYK", (16, 16)).save(tmp_path / "a.jpg", quality=100)
    image = open_image(tmp_path / "a.jpg")
    assert image.mode == "CMYK"
    np.testing.assert_allclose(pixels(to_rgb(image)), np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=3)


def test_palette_with_transparency_shows_the_background(tmp_path):
    image = flat(0, "P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    image = open_image(tmp_path / "a.png")
    assert image.mode == "P"
    assert pixels(to_rgb(image)) == [[[255, 255, 255], [200, 100, 50]]]
    assert pixels(to_rgb(image, (1, 2, 3))) == [[[1, 2, 3], [200, 100, 50]]]


def test_palette_without_transparency(tmp_path):
    image = flat(1, "P", (1, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "a.png")
    assert pixels(to_rgb(open_image(tmp_path / "a.png"))) == [[[200, 100, 50]]]


def test_a_colour_key_is_transparency(tmp_path):
    image = flat((9, 8, 7), size=(2, 1))
    image.putpixel((1, 0), (1, 1, 1))
    image.save(tmp_path / "a.png", transparency=(9, 8, 7))
    assert pixels(to_rgb(open_image(tmp_path / "a.png"))) == [[[255, 255, 255], [1, 1, 1]]]


@pytest.mark.parametrize(("mode", "colour"), [("L", 77), ("1", 1)])
def test_grey_and_black_and_white(tmp_path, mode, colour):
    flat(colour, mode, (1, 1)).save(tmp_path / "a.png")
    value = 77 if mode == "L" else 255
    assert pixels(to_rgb(open_image(tmp_path / "a.png"))) == [[[value] * 3]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 257 * 100, 257 * 100 + 128, 257 * 100 + 129, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    image = open_image(tmp_path / f"a.{suffix}")
    assert image.mode.startswith("I")
    assert [pixel[0] for pixel in pixels(to_rgb(image))[0]] == [0, 1, 100, 100, 101, 255]
    assert [pixel[2] for pixel in pixels(to_rgb(image.convert("I")))[0]] == [0, 1, 100, 100, 101, 255]


def test_la_and_rgba_are_composited(tmp_path):
    la = flat((100, 255), "LA", (3, 1))
    la.putpixel((1, 0), (100, 0))
    la.putpixel((2, 0), (100, 51))  # a fifth of 100 and four of 255
    la.save(tmp_path / "la.png")
    assert pixels(to_rgb(open_image(tmp_path / "la.png"))) == [[[100] * 3, [255] * 3, [224] * 3]]
    rgba = flat((10, 20, 30, 0), "RGBA", (2, 1))
    rgba.putpixel((1, 0), (10, 20, 30, 255))
    rgba.save(tmp_path / "rgba.png")
    assert pixels(to_rgb(open_image(tmp_path / "rgba.png"), (0, 0, 255))) == [[[0, 0, 255], [10, 20, 30]]]


# Where a pixel of the stored corner "a b / c d" stands once the picture is upright, by EXIF's table.
UPRIGHT = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, orientation, suffix):
    corners = {"a": (250, 0, 0), "b": (0, 250, 0), "c": (0, 0, 250), "d": (250, 250, 0)}
    image = flat((0, 0, 0), size=(64, 32))
    for index, colour in enumerate(corners.values()):
        image.paste(colour, (index % 2 * 32, index // 2 * 16, index % 2 * 32 + 32, index // 2 * 16 + 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    upright = to_rgb(open_image(tmp_path / f"a.{suffix}"))
    assert upright.size == ((32, 64) if orientation > 4 else (64, 32))
    width, height = upright.size
    for index, name in enumerate(UPRIGHT[orientation]):
        centre = (index % 2 * width // 2 + width // 4, index // 2 * height // 2 + height // 4)
        np.testing.assert_allclose(upright.getpixel(centre), corners[name], atol=12)


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    photo().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert to_rgb(open_image(tmp_path / "a.jpg")).size == (60, 40)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [flat(colour, size=(4, 4)) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for suffix, options in (("gif", {}), ("png", {}), ("webp", {"lossless": True})):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=10, **options)
        with Image.open(path) as image:
            assert image.n_frames == 3
        assert pixels(to_rgb(open_image(path))) == [[[255, 0, 0]] * 4] * 4


def test_to_rgb_leaves_the_picture_given_alone():
    image = flat((10, 20, 30, 40), "RGBA")
    before = image.tobytes()
    to_rgb(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


# --- numbers, odd modes and colour keys


@pytest.mark.parametrize("factor", [1.0, 255.0])
def test_numbers_with_a_point_have_one_of_two_ranges(tmp_path, factor):
    """0..1 or 0..255; both are the picture that they were made from."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(grey.astype(np.float32) / 255 * np.float32(factor))
    image.save(tmp_path / "a.tif")
    image = open_image(tmp_path / "a.tif")
    assert image.mode == "F"
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., 1], grey)
    torch.testing.assert_close(ImageSet(tmp_path, {"a": SMALL})[0]["a"], SMALL(Image.fromarray(grey)), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("numbers", "mode"),
    [
        ([0.0, float("nan")], "F"),
        ([0.0, float("inf")], "F"),
        ([-0.5, 0.5], "F"),
        ([0.0, 256.0], "F"),
        ([0.0, 65535.0], "F"),
        ([-1, 5], "I"),
        ([0, 65536], "I"),
    ],
)
def test_numbers_of_no_known_range_are_told(tmp_path, numbers, mode):
    image = Image.fromarray(np.array([numbers] * 2, dtype=np.float32 if mode == "F" else np.int32))
    assert image.mode == mode
    image.save(tmp_path / "a.tif")
    skipped = ImageSet(tmp_path, {"a": SMALL})[0]
    assert isinstance(skipped, Skipped)
    assert "numbers from" in skipped.reason
    assert "expected 0..1 or 0..255" in skipped.reason or "expected 0..255 or 0..65535" in skipped.reason
    with pytest.raises(ValueError, match="numbers from"):
        SMALL(image)


def test_whole_numbers_of_32_bits():
    """What an 8-bit picture holds is not taken for the darkest 256th of a 16-bit one."""
    grey = np.arange(256, dtype=np.int32).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(grey)))[..., 0], grey)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(grey * 257)))[..., 0], grey)
    dark = Image.fromarray(grey.astype(np.uint16))  # 16 bits say their range themselves
    assert np.asarray(to_rgb(dark)).max() == 1


def test_every_mode_of_pillow_becomes_rgb_or_says_why():
    base = photo()
    grey = np.asarray(base.convert("L"))
    alpha = Image.fromarray(np.full_like(grey, 255))
    la = Image.merge("LA", [base.convert("L"), alpha])
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX", "RGBa", "I", "F", "I;16"):
        assert to_rgb(base.convert("L").convert(mode) if mode == "I;16" else base.convert(mode)).mode == "RGB", mode
    for odd in (la, la.convert("La"), base.convert("P").convert("PA"), Image.fromarray(grey.astype(np.uint16))):
        assert to_rgb(odd).mode == "RGB", odd.mode
    np.testing.assert_array_equal(np.asarray(to_rgb(la))[..., 0], grey)
    np.testing.assert_array_equal(np.asarray(to_rgb(la.convert("La")))[..., 0], grey)
    assert "numbers" not in str(ImageSet([base.convert("PA")], {"a": SMALL})[0])


def png(bits, colour, rows, key):
    """A PNG with a colour key, written out: Pillow writes none of other than 8 bits."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = len(rows[0]) * 8 // bits // (3 if colour == 2 else 1)
    head = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", head), (b"tRNS", key), (b"IDAT", data), (b"IEND", b""))
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_colour_key_of_any_depth_is_transparent(tmp_path, bits):
    levels = np.arange(min(2**bits, 256)) * (257 if bits == 16 else 1)
    grey = np.resize(levels, (4, 64))
    digits = (grey[..., None] >> np.arange(bits)[::-1]) & 1
    rows = [row.tobytes() for row in np.packbits(digits.reshape(4, -1).astype(np.uint8), axis=1)]
    (tmp_path / "a.png").write_bytes(png(bits, 0, rows, struct.pack(">H", levels[1])))
    want = np.where(grey == levels[1], 255, np.rint(grey * 255 / (2**bits - 1)))
    np.testing.assert_array_equal(np.asarray(to_rgb(open_image(tmp_path / "a.png")))[..., 1], want)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.open(tmp_path / "a.png")))[..., 1], want)


def test_a_colour_key_of_16_bits(tmp_path):
    colours = np.array([[[1000, 40000, 65535], [1000, 40000, 100]]], dtype=">u2")
    (tmp_path / "a.png").write_bytes(png(16, 2, [colours.tobytes()], colours[0, 0].tobytes()))
    found = np.asarray(to_rgb(open_image(tmp_path / "a.png")))[0]
    np.testing.assert_array_equal(found[0], [255] * 3)
    np.testing.assert_allclose(found[1], colours[0, 1] / 257, atol=1)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_a_tiff_in_which_white_is_zero_is_turned(tmp_path, kind):
    grey = np.arange(256).reshape(16, 16)
    numbers = {"uint16": grey * 257, "float32": grey / np.float32(255)}.get(kind, grey).astype(kind)
    Image.fromarray(numbers).save(tmp_path / "black.tif")
    photometric = struct.pack("<HHI", 262, 3, 1)  # what zero means: 1 black, 0 white
    data = (tmp_path / "black.tif").read_bytes()
    assert data.count(photometric + b"\1\0") == 1
    (tmp_path / "white.tif").write_bytes(data.replace(photometric + b"\1\0", photometric + b"\0\0"))
    black, white = (np.asarray(to_rgb(open_image(tmp_path / f"{name}.tif")))[..., 0] for name in ("black", "white"))
    np.testing.assert_array_equal(black, grey)
    np.testing.assert_array_equal(white, 255 - grey)


def test_numbers_of_8_bits_with_a_sign(tmp_path):
    Image.fromarray(np.array([[0, 5], [127, 9]], dtype=np.uint8)).save(tmp_path / "a.tif", tiffinfo={339: 2})
    Image.fromarray(np.array([[0, 5], [255, 9]], dtype=np.uint8)).save(tmp_path / "b.tif", tiffinfo={339: 2})
    data = ImageSet(tmp_path, {"a": SMALL})
    assert isinstance(data[0], dict)
    assert "whole numbers from -1; expected 0..255" in data[1].reason
