"""Pictures of odd modes and of very many pixels: a stated rule for each, in bounded memory, or the reason why not."""

import json
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import small_tokenizer
from PIL import Image

from llava_integration.train.data import Conversations, DataConfig
from vst import fit_stitches
from vst.data import images, large
from vst.data.folders import picture_names
from vst.data.images import ImageTransform, UnreadableImage, open_image, upright_size
from vst.data.pictures import ImageSet, Skipped
from vst.data.rgb import to_rgb
from vst.protocol.sources import _pairs

SMALL = ImageTransform(8, (0.5,) * 3, (0.5,) * 3)


def photo(width=60, height=40, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


# --- modes


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


# --- what a transform takes


def test_a_transform_takes_what_people_have(tmp_path):
    image = photo()
    image.save(tmp_path / "a.png")
    want = SMALL(image)
    for same in (np.asarray(image), tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image)[:, ::-1][:, ::-1]):
        torch.testing.assert_close(SMALL(same), want, atol=0, rtol=0)
    batch = SMALL([image, np.asarray(image), tmp_path / "a.png"])
    torch.testing.assert_close(batch, torch.stack([want] * 3), atol=0, rtol=0)


@pytest.mark.parametrize(
    "given",
    [
        None,
        b"bytes",
        5,
        torch.zeros(3, 8, 8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        np.zeros((8, 8), dtype=np.uint8),
        np.zeros((3, 8, 8), dtype=np.uint8),
        np.zeros((0, 8, 3), dtype=np.uint8),
        np.zeros((8, 8, 3), dtype=np.float32),
        {"image": 1},
        [],
        [photo(), None],
    ],
)
def test_a_transform_refuses_the_rest_in_one_sentence(given):
    with pytest.raises(ValueError, match="expected") as caught:
        SMALL(given)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_transform_names_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UnreadableImage, match=r"gone.png: is missing"):
        SMALL(tmp_path / "gone.png")


# --- very many pixels


@pytest.fixture
def low(monkeypatch):
    """Limits that small pictures pass."""
    monkeypatch.setattr(large, "_BAND", 700)
    monkeypatch.setattr(large, "_SHORTEST", 20)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_bands_change_no_bit(low, monkeypatch, tmp_path, mode, orientation):
    image = photo(61, 47)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
    elif mode in ("RGBA", "LA"):
        image.putalpha(photo(61, 47, 1).convert("L"))
        image = image.convert(mode)
    else:
        image = image.convert(mode)
    image.info["transparency"] = 3 if mode in ("P", "L") else None
    if image.info["transparency"] is None:
        del image.info["transparency"]
    image.getexif()[0x0112] = orientation
    banded = to_rgb(image)
    monkeypatch.setattr(large, "_BAND", 10**9)
    whole = to_rgb(image)
    assert banded.size == whole.size == ((47, 61) if orientation == 6 else (61, 47)) == upright_size(image)
    assert banded.tobytes() == whole.tobytes()


def test_the_very_large_are_shrunk_by_a_whole_factor(low, monkeypatch):
    monkeypatch.setattr(large, "ENOUGH", 3000)
    assert [large.factor(s) for s in ((119, 100), (120, 100), (180, 150), (400, 39), (400, 40), (4000, 10))] == [
        1, 2, 3, 1, 2, 1,
    ]  # fmt: skip
    image = photo(181, 151)
    small = to_rgb(image)
    assert small.size == (61, 51)
    assert small.tobytes() == image.reduce(3).tobytes()
    cover = photo(181, 151).convert("RGBA")
    cover.putalpha(photo(181, 151, 1).convert("L"))
    canvas = Image.new("RGBA", cover.size, (255, 255, 255, 255))
    assert to_rgb(cover).tobytes() == Image.alpha_composite(canvas, cover).convert("RGB").reduce(3).tobytes()


def test_a_very_large_jpeg_is_decoded_smaller(low, monkeypatch, tmp_path):
    photo(640, 480).save(tmp_path / "a.jpg", quality=95)
    whole = SMALL(open_image(tmp_path / "a.jpg"))
    assert open_image(tmp_path / "a.jpg").size == (640, 480)
    monkeypatch.setattr(large, "ENOUGH", 20_000)  # 307,200 pixels are shrunk by 3, which JPEG can by 2
    monkeypatch.setattr(large, "_SHORTEST", 100)
    assert open_image(tmp_path / "a.jpg").size == (320, 240)
    assert upright_size(tmp_path / "a.jpg") == (640, 480)
    torch.testing.assert_close(SMALL(open_image(tmp_path / "a.jpg")), whole, atol=0.05, rtol=0)


def test_a_limit_in_memory(tmp_path):
    image = photo(600, 500)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.webp", lossless=True)
    image.convert("P").save(tmp_path / "c.png")
    one = {"a": SMALL}
    assert all(isinstance(item, dict) for item in (ImageSet(tmp_path, one)[i] for i in range(3)))
    items = [ImageSet(tmp_path, one, picture_mb=1)[i] for i in range(3)]
    assert [isinstance(item, Skipped) for item in items] == [True, True, False]  # 4, 16 and 1 bytes a pixel
    assert "600 x 500 pixels and takes 1 MB to decode, where picture_mb allows 1" in items[0].reason
    assert isinstance(ImageSet(tmp_path, one, picture_mb=2)[0], dict)
    assert isinstance(ImageSet(tmp_path, one, picture_mb=2)[1], Skipped)
    pad = {"a": ImageTransform(8, (0.5,) * 3, (0.5,) * 3, "pad")}
    assert "padding" in ImageSet([photo(1000, 5)], pad, picture_mb=1)[0].reason
    with pytest.raises(ValueError, match="picture_mb is 0"):
        ImageSet(tmp_path, one, picture_mb=0)


@pytest.mark.parametrize(
    ("options", "bytes_a_pixel"),
    [
        ({"format": "JPEG"}, 4),
        ({"format": "JPEG", "progressive": True, "subsampling": 0}, 4 + 2 * 3),  # and the coefficients
        ({"format": "JPEG", "progressive": True, "subsampling": 2}, 4 + 2 * 1.5),
        ({"format": "TIFF"}, 4),
        ({"format": "TIFF", "compression": "tiff_lzw", "tiffinfo": {278: 400}}, 4 + 3),  # and its one strip
        ({"format": "TIFF", "compression": "tiff_lzw", "tiffinfo": {278: 40}}, 4 + 0.3),
    ],
)
def test_what_a_decoder_holds_beside_the_picture_counts(tmp_path, options, bytes_a_pixel):
    photo(600, 400).save(tmp_path / "a", **options)
    with Image.open(tmp_path / "a") as image:
        assert large.megabytes(image, image.size) == pytest.approx(600 * 400 * bytes_a_pixel / 2**20)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory as Linux tells it")
def test_clip_art_of_many_pixels_takes_little_memory(tmp_path):
    image = Image.new("P", (8_200, 8_200))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (0, 0, 4_100, 8_200))
    image.save(tmp_path / "a.png", transparency=0, compress_level=1)
    code = """if True:
        import resource, sys
        from vst.data.images import ImageTransform
        from vst.data.rgb import to_rgb
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        x = ImageTransform(224, (0.0,) * 3, (1.0,) * 3)(sys.argv[1])
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(used / 1024, *x[:, 9, 9].tolist(), x[:, 9, 220].mean().item())
    """
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")], capture_output=True, text=True, check=True
    )
    used, red, green, blue, right = map(float, out.stdout.split())
    assert used < 400  # the decoded picture's 64, and a few bands
    np.testing.assert_allclose([red, green, blue, right], [200 / 255, 100 / 255, 50 / 255, 1], atol=1e-6)


# --- folders that link to each other


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    for folder in (tmp_path, tmp_path / "closed"):
        photo().save(folder / "x.png")
    scan = os.scandir

    def refused(folder):  # as for anyone but root, who may read all
        if os.path.basename(folder) == "closed":
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.warns(UserWarning, match=r"The folder .*closed cannot be read \(Permission denied\)"):
        assert picture_names(tmp_path) == ["x.png"]


def test_folders_that_link_to_each_other_count_once(tmp_path):
    names = [f"f{i}" for i in range(4)]
    for name in names:
        (tmp_path / name).mkdir()
        for other in names:
            if other != name:
                (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    photo().save(tmp_path / "f2/x.png")
    photo().save(tmp_path / "f0/y.png")
    assert picture_names(tmp_path) == ["f0/y.png", "f2/x.png"]
    # from inside one of them the others are reached by their links, each once
    assert picture_names(tmp_path / "f1") == ["to-f0/y.png", "to-f2/x.png"]


def test_a_picture_that_is_one_real_file_counts_once(tmp_path):
    (tmp_path / "in").mkdir()
    photo().save(tmp_path / "in/z.png")
    photo(seed=1).save(tmp_path / "out.png")
    (tmp_path / "in/a.png").symlink_to("z.png")
    (tmp_path / "in/b.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "in/c.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "in/d.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "in/sub").symlink_to(tmp_path / "in")
    assert picture_names(tmp_path / "in") == ["b.png", "d.png", "z.png"]


def test_one_mask_may_serve_several_pictures(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(3):
        photo(seed=i).save(tmp_path / f"images/{i}.png")
    (tmp_path / "images/again.png").symlink_to("1.png")
    Image.new("L", (60, 40)).save(tmp_path / "masks/0.png")
    for name in ("1", "2", "again"):
        (tmp_path / f"masks/{name}.png").symlink_to("0.png")
    pairs = _pairs(str(tmp_path / "images"), str(tmp_path / "masks"))
    assert [(p.stem, m.stem) for p, m in pairs] == [("0", "0"), ("1", "1"), ("2", "2")]
    (tmp_path / "masks/more.png").symlink_to("0.png")
    with pytest.raises(ValueError, match=r"1 files of .* have no partner \(more\)"):
        _pairs(str(tmp_path / "images"), str(tmp_path / "masks"))


def test_a_real_folder_wins_over_a_link_to_it(tmp_path):
    (tmp_path / "real").mkdir()
    photo().save(tmp_path / "real/x.png")
    (tmp_path / "a-link").symlink_to(tmp_path / "real")
    (tmp_path / "elsewhere").mkdir()
    assert picture_names(tmp_path) == ["real/x.png"]
    (tmp_path / "up").symlink_to(tmp_path.parent)  # leads back out of the folder: nothing there is its own
    assert picture_names(tmp_path) == ["real/x.png"]


def test_ordinary_pictures_are_left_as_they_are():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert large.factor((8000, 7900)) == 1  # below 64 million pixels
        assert large.factor((8000, 8000)) == 2
        assert images.PICTURE_MB * 2**20 >= 4 * images.MAX_PIXELS


def test_a_fit_skips_what_takes_too_much_memory(tree_of, picture_folder):
    photo(600, 500).save(picture_folder / "large.png")
    options = {"calibration": 8, "heldout": 4, "epochs": 1, "batch_size": 8, "show_progress": False}
    result = fit_stitches(tree_of(splits=[1]), str(picture_folder), picture_mb=1, **options)
    assert list(result.skipped) == ["large.png"]
    assert "picture_mb allows 1" in result.skipped["large.png"]
    assert not fit_stitches(tree_of(splits=[1]), str(picture_folder), **options).skipped
    with pytest.raises(ValueError, match="picture_mb is 0"):
        fit_stitches(tree_of(splits=[1]), str(picture_folder), picture_mb=0, **options)


def test_conversations_skip_what_takes_too_much_memory(tmp_path):
    photo(600, 500).save(tmp_path / "large.png")
    photo().save(tmp_path / "small.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    records = [{"image": name, "conversations": turns} for name in ("large.png", "small.png")]
    (tmp_path / "data.json").write_text(json.dumps(records))
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    for limit, names in (({"picture_mb": 1}, 1), ({}, 0)):
        config = DataConfig([str(tmp_path / "data.json")], images=str(tmp_path), **limit)
        sample = Conversations(config, tokenizer, SMALL, 4)[0]
        assert len(sample["skipped"]) == names
        assert names == 0 or "picture_mb allows 1" in next(iter(sample["skipped"].values()))
    with pytest.raises(ValueError, match="picture_mb is 0"):
        DataConfig(["x.json"], picture_mb=0)
