"""A picture of any mode becomes RGB by a stated rule, against pixels known by construction."""

import warnings

import numpy as np
import pytest
from pictures_kit import flat, photo
from PIL import Image

from vst.data.images import open_image
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
