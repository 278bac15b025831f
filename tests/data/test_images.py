"""Pictures of every awkward kind, against pixels known by construction and other people's processors."""

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2

from vst.data import images, pictures
from vst.data.images import ImageTransform, UnreadableImage, cut, open_image
from vst.data.pictures import ImageSet, Skipped, collate
from vst.data.rgb import to_rgb

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = ImageTransform(32, MEAN, STD)
SMALL = ImageTransform(8, (0.5,) * 3, (0.5,) * 3)


def photo(width=60, height=40, seed=0):
    """Smooth noise: pictures that resizing treats as it treats photographs."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def flat(colour, mode="RGB", size=(6, 4)):
    return Image.new(mode, size, colour)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def png_header_only(width, height):
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


# --- to_rgb


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


# --- open_image


@pytest.fixture
def no_decoding(monkeypatch):
    def load(self):
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


def test_a_bomb_is_refused_from_its_header(tmp_path, no_decoding):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header_only(50_000, 50_000))
    assert path.stat().st_size < 200
    with pytest.raises(UnreadableImage, match="pixels") as caught:
        open_image(path)
    assert "decoded" not in caught.value.reason


def test_max_pixels_is_the_limit_to_the_pixel(tmp_path, no_decoding):
    path = tmp_path / "a.png"
    path.write_bytes(png_header_only(100, 50))
    with pytest.raises(UnreadableImage, match="100 x 50 pixels"):
        open_image(path, max_pixels=4999)
    with pytest.raises(UnreadableImage, match="pixels were decoded"):
        open_image(path, max_pixels=5000)


def test_what_cannot_be_opened_says_why(tmp_path):
    photo(300, 300).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture at all")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (tmp_path / "header.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
    expected = {
        "truncated.jpg": "truncated",
        "empty.jpg": "empty",
        "text.png": "no picture",
        "folder.png": "folder",
        "missing.png": "missing",
        "script.jpg": "no picture",
        "header.png": "",
        "pipe.png": "",
    }
    for name, why in expected.items():
        with pytest.raises(UnreadableImage, match=f"{name}: .*{why}") as caught:
            open_image(tmp_path / name)
        assert why in caught.value.reason
        assert str(tmp_path) not in caught.value.reason
        assert isinstance(caught.value, ValueError)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_no_file_stays_open(tmp_path):
    photo().save(tmp_path / "a.jpg")
    photo().save(tmp_path / "a.gif", save_all=True, append_images=[photo(seed=1)])
    before = len(os.listdir("/proc/self/fd"))
    kept = [open_image(tmp_path / name) for name in ("a.jpg", "a.gif") for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(kept) == 10


# --- cut and transform


def expand2square(pil_img, background_color):
    """LLaVA's, written out one pixel at a time."""
    array = np.asarray(pil_img)
    height, width = array.shape[:2]
    side = max(width, height)
    result = np.empty((side, side, 3), dtype=np.uint8)
    for y in range(side):
        for x in range(side):
            sy, sx = y - (side - height) // 2, x - (side - width) // 2
            result[y, x] = array[sy, sx] if 0 <= sy < height and 0 <= sx < width else background_color
    return Image.fromarray(result)


@pytest.mark.parametrize("size", [(60, 40), (41, 60), (33, 33), (60, 31)])
def test_cuts(size):
    image = photo(*size)
    array, side = np.asarray(image), min(size)
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    np.testing.assert_array_equal(cut(image, "crop"), array[top : top + side, left : left + side])
    np.testing.assert_array_equal(cut(image, "squash"), array)
    np.testing.assert_array_equal(cut(image, "pad", (1, 2, 3)), expand2square(image, (1, 2, 3)))


@pytest.mark.parametrize("how", images.CUTS)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_transform_equals_torchvision(how, interpolation):
    image = photo()
    square = {
        "crop": image.crop((10, 0, 50, 40)),
        "squash": image,
        "pad": expand2square(image, tuple(int(value * 255) for value in MEAN)),
    }[how]
    reference = v2.Compose(
        [
            v2.Resize((32, 32), v2.InterpolationMode(interpolation)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    transform = ImageTransform(32, MEAN, STD, how, interpolation)
    result = transform(image)
    assert result.dtype == torch.float32
    assert result.shape == (3, 32, 32)
    assert result.is_contiguous()
    torch.testing.assert_close(result, reference(square).as_subclass(torch.Tensor), atol=1e-6, rtol=0)
    torch.testing.assert_close(transform.resize_only(square), result, atol=0, rtol=0)


@pytest.mark.parametrize("how", ["crop", "pad"])
def test_transform_equals_the_processor_of_clip(how):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(
        size={"shortest_edge": 48}, crop_size=48, image_mean=MEAN, image_std=STD
    )
    image = photo(90, 90) if how == "crop" else photo(90, 50)
    square = image if how == "crop" else expand2square(image, tuple(int(value * 255) for value in MEAN))
    reference = processor(square, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ImageTransform(48, MEAN, STD, how)(image), reference, atol=1e-2, rtol=0)


def test_transform_takes_any_mode():
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"):
        assert torch.isfinite(SMALL(flat(0, mode))).all(), mode
    with pytest.raises(ValueError, match="RGBA"):
        SMALL.resize_only(flat(0, "RGBA"))


def test_transform_is_a_value():
    listed = ImageTransform(32, list(MEAN), list(STD))
    assert listed == CLIP
    assert hash(listed) == hash(CLIP)
    assert pickle.loads(pickle.dumps(CLIP)) == CLIP
    assert ImageTransform(32, MEAN, STD, "pad").background == (122, 116, 104)  # LLaVA's grey


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"size": 0}, "size"),
        ({"size": (32, 24)}, "square"),
        ({"size": 32.0}, "size"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"mean": 0.5}, "mean"),
        ({"mean": (122.0, 116.0, 104.0)}, "255"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"cut": "center"}, "crop, squash, pad"),
        ({"interpolation": "cubic"}, "bicubic"),
    ],
)
def test_a_transform_out_of_range(changes, word):
    with pytest.raises(ValueError, match=word):
        ImageTransform(**{"size": 32, "mean": MEAN, "std": STD, **changes})


# --- ImageSet over files


@pytest.fixture
def folder(tmp_path):
    """Six good pictures, four bad ones and what must be overlooked."""
    root = tmp_path / "pictures"
    for place in ("b/deep", "a", ".hidden", "__MACOSX"):
        (root / place).mkdir(parents=True)
    names = ["b/deep/2.png", "a/10.JPG", "a/9.webp", "z.bmp", "b/1.tiff", "c.gif"]
    for seed, name in enumerate(names):
        photo(seed=seed).save(root / name)
    (root / "bomb.png").write_bytes(png_header_only(50_000, 50_000))
    (root / "empty.jpg").touch()
    (root / "text.png").write_text("no picture")
    data = (root / "a/10.JPG").read_bytes()
    (root / "b/truncated.jpeg").write_bytes(data[: len(data) // 2])
    for name in (".hidden/a.png", "__MACOSX/a.png", "a/._10.jpg", "notes.txt", "png"):
        photo().save(root / name, format="PNG")
    return root


ORDER = ["a/10.JPG", "a/9.webp", "b/1.tiff", "b/deep/2.png", "b/truncated.jpeg", "bomb.png", "c.gif", "empty.jpg",
         "text.png", "z.bmp"]  # fmt: skip
BAD = ["b/truncated.jpeg", "bomb.png", "empty.jpg", "text.png"]


def test_a_folder_is_read_in_order_and_bad_pictures_are_skipped(folder):
    pictures = ImageSet(folder, {"clip": CLIP, "small": SMALL})
    assert [pictures.name(index) for index in range(len(pictures))] == ORDER
    for index, name in enumerate(ORDER):
        item = pictures[index]
        if name in BAD:
            assert isinstance(item, Skipped)
            assert item.name == name
            assert item.reason
        else:
            with Image.open(folder / name) as image:
                rgb = image.convert("RGB")
            assert list(item) == ["clip", "small"]
            torch.testing.assert_close(item["clip"], CLIP(rgb), atol=0, rtol=0)
            torch.testing.assert_close(item["small"], SMALL(rgb), atol=0, rtol=0)
    torch.testing.assert_close(pictures[-1]["clip"], pictures[9]["clip"])
    with pytest.raises(IndexError):
        pictures[10]
    with pytest.raises(IndexError):
        pictures.name(10)


def test_a_folder_reads_the_same_by_str_and_with_a_limit(folder):
    assert ImageSet(str(folder), {"a": CLIP}).fingerprint() == ImageSet(folder, {"b": SMALL}).fingerprint()
    limited = ImageSet(folder, {"a": SMALL}, limit=3)
    assert [limited.name(index) for index in range(len(limited))] == ORDER[:3]
    assert len(ImageSet(folder, {"a": SMALL}, limit=99)) == 10
    torch.testing.assert_close(limited[-3]["a"], limited[0]["a"], atol=0, rtol=0)
    assert limited.name(-1) == ORDER[2]
    with pytest.raises(IndexError):
        limited[3]
    with pytest.raises(ValueError, match="limit"):
        ImageSet(folder, {"a": SMALL}, limit=0)


def test_linked_folders_are_read_once_and_end(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    photo().save(tmp_path / "elsewhere/x.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "a/back").symlink_to(folder)
    pictures = ImageSet(folder, {"a": SMALL})
    assert [pictures.name(index) for index in range(len(pictures))] == sorted([*ORDER, "linked/x.png"])


def test_a_list_of_paths_keeps_its_order(folder):
    paths = [str(folder / "z.bmp"), str(folder / "gone.png"), str(folder / "a/9.webp")]
    pictures = ImageSet(paths, {"a": SMALL})
    assert [pictures.name(index) for index in range(3)] == paths
    assert isinstance(pictures[1], Skipped)
    assert "missing" in pictures[1].reason
    with Image.open(paths[2]) as image:
        torch.testing.assert_close(pictures[2]["a"], SMALL(image), atol=0, rtol=0)
    assert len(pictures.fingerprint()) == 64

    def fingerprint_of_missing(*names):
        return ImageSet(names, {"a": SMALL}).fingerprint()

    assert fingerprint_of_missing("x", "missingx") != fingerprint_of_missing("xmissing", "x")


def test_workers_give_the_same_batches_and_count_what_is_skipped(folder):
    def batches(workers):
        loader = DataLoader(
            ImageSet(folder, {"clip": CLIP, "small": SMALL}), batch_size=3, num_workers=workers, collate_fn=collate
        )
        return list(loader)

    plain, parallel = batches(0), batches(2)
    assert [item.name for _, _, skipped in parallel for item in skipped] == BAD
    assert len(plain) == len(parallel) == 4
    for start, one, other in zip(range(0, 10, 3), plain, parallel, strict=True):
        names = ORDER[start : start + 3]
        assert one[1] == other[1] == [place for place, name in enumerate(names) if name not in BAD]
        assert one[2] == other[2]
        assert one[0].keys() == other[0].keys() == {"clip", "small"}
        assert one[0]["clip"].shape == (len(one[1]), 3, 32, 32)
        for name in ("clip", "small"):
            torch.testing.assert_close(one[0][name], other[0][name], atol=0, rtol=0)


def test_collate_of_nothing_readable():
    skipped = [Skipped("a", "bad"), Skipped("b", "worse")]
    assert collate(skipped) == ({}, [], skipped)
    tensors, kept, left = collate([skipped[0], {"a": torch.ones(3, 2, 2)}])
    assert tensors["a"].shape == (1, 3, 2, 2)
    assert (kept, left) == ([1], skipped[:1])


def test_a_picture_is_opened_once_and_equal_transforms_are_computed_once(folder, monkeypatch):
    opened, resized = [], []
    real_open, real_resize = pictures.open_image, ImageTransform.resize_only
    monkeypatch.setattr(pictures, "open_image", lambda *args: opened.append(args) or real_open(*args))
    monkeypatch.setattr(
        ImageTransform, "resize_only", lambda self, image: resized.append(self) or real_resize(self, image)
    )
    item = ImageSet(folder, {"a": CLIP, "b": SMALL, "c": ImageTransform(32, MEAN, STD)})[0]
    assert list(item) == ["a", "b", "c"]
    assert len(opened) == 1
    assert sorted(transform.size for transform in resized) == [8, 32]
    torch.testing.assert_close(item["a"], item["c"], atol=0, rtol=0)


def test_padding_takes_the_first_transforms_mean_and_stays_within_max_pixels():
    one, two = ImageTransform(8, (0.0,) * 3, (1.0,) * 3, "pad"), ImageTransform(8, (1.0,) * 3, (1.0,) * 3, "pad")
    wide = flat((255, 0, 0), size=(16, 8))
    item = ImageSet([wide], {"one": one, "two": two})[0]
    assert item["one"][:, 0, 0].tolist() == [0, 0, 0]
    assert item["two"][:, 0, 0].tolist() == [-1, -1, -1]  # black, normalised by the second mean
    long = ImageSet([flat(0, "L", (20_000, 1))], {"a": one}, max_pixels=1_000_000)
    assert "padding" in long[0].reason
    assert isinstance(ImageSet([flat(0, "L", (20_000, 1))], {"a": SMALL}, max_pixels=1_000_000)[0], dict)


def test_fingerprint_of_files(folder):
    def fingerprint(**options):
        return ImageSet(folder, {"a": SMALL}, **options).fingerprint()

    first = fingerprint()
    assert first == fingerprint()
    assert len(first) == 64
    assert int(first, 16)
    assert fingerprint(limit=9) != first
    stat = (folder / "z.bmp").stat()
    os.utime(folder / "z.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    touched = fingerprint()
    assert touched != first
    (folder / "z.bmp").rename(folder / "y.bmp")
    renamed = fingerprint()
    assert renamed not in (first, touched)
    with (folder / "y.bmp").open("ab") as file:
        file.write(b"\0")
    os.utime(folder / "y.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint() not in (first, touched, renamed)


def test_folders_without_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone does not exist.*\.jpg"):
        ImageSet(tmp_path / "gone", {"a": SMALL})
    with pytest.raises(ValueError, match=rf"{tmp_path.name} holds no picture.*\.jpg.*\.ppm"):
        ImageSet(tmp_path, {"a": SMALL})
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    with pytest.raises(ValueError, match="holds no picture"):
        ImageSet(str(tmp_path), {"a": SMALL})
    with pytest.raises(ValueError, match=r"notes\.txt is a file"):
        ImageSet(tmp_path / "notes.txt", {"a": SMALL})


# --- ImageSet over other things


def test_pictures_in_memory_and_generators():
    pictures = [photo(seed=seed) for seed in range(3)]
    from_list = ImageSet(pictures, {"a": SMALL})
    from_generator = ImageSet((picture for picture in pictures), {"a": SMALL})
    assert len(from_list) == len(from_generator) == 3
    for index in range(3):
        torch.testing.assert_close(from_list[index]["a"], SMALL(pictures[index]), atol=0, rtol=0)
        torch.testing.assert_close(from_generator[index]["a"], SMALL(pictures[index]), atol=0, rtol=0)
    assert from_list.fingerprint() == from_generator.fingerprint()

    def endless():
        while True:
            yield photo()

    assert len(ImageSet(endless(), {"a": SMALL}, limit=4)) == 4


def test_fingerprint_of_pictures_in_memory():
    def fingerprint(*pictures):
        return ImageSet(pictures, {"a": SMALL}).fingerprint()

    changed = photo()
    changed.putpixel((0, 0), (1, 2, 3))
    palette = photo().convert("P", palette=Image.Palette.ADAPTIVE)
    other_palette = palette.copy()
    other_palette.putpalette(bytes(reversed(palette.getpalette())))
    prints = [
        fingerprint(photo()),
        fingerprint(changed),
        fingerprint(photo(), photo()),
        fingerprint(flat(0, "L", (6, 4))),
        fingerprint(flat(0, "L", (4, 6))),
        fingerprint(palette),
        fingerprint(other_palette),
        fingerprint(photo(), changed),
        fingerprint(changed, photo()),
    ]
    assert len(set(prints)) == len(prints)
    assert prints[0] == fingerprint(photo())


def test_lazily_opened_pictures_are_safe_in_workers(tmp_path):
    photo(400, 300).save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    source = [
        Image.open(io.BytesIO(data)),
        Image.open(io.BytesIO(data[: len(data) // 2])),
        Image.open(io.BytesIO(data)),
    ]
    loader = DataLoader(ImageSet(source, {"a": SMALL}), batch_size=1, num_workers=2, collate_fn=collate)
    results = list(loader)
    assert [kept for _, kept, _ in results] == [[0], [], [0]]
    assert "truncated" in results[1][2][0].reason
    torch.testing.assert_close(results[0][0]["a"], results[2][0]["a"], atol=0, rtol=0)


def test_a_generator_may_close_its_files(tmp_path):
    photo().save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-400])

    def opened():
        for name in ("good.jpg", "bad.jpg"):
            with Image.open(tmp_path / name) as image:
                yield image

    pictures = ImageSet(opened(), {"a": SMALL})
    torch.testing.assert_close(pictures[0]["a"], SMALL(open_image(tmp_path / "good.jpg")), atol=0, rtol=0)
    assert pictures[1] == pictures[1]
    assert "truncated" in pictures[1].reason


class Labelled(Dataset):
    def __init__(self, folder):
        self.paths = sorted(folder.glob("*.png"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return Image.open(self.paths[index]), index


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(photo(seed=0), 0), (photo(seed=1), 1)])


def test_torch_datasets(tmp_path):
    for name in ("a.png", "b.png"):
        photo(seed=ord(name[0])).save(tmp_path / name)
    (tmp_path / "c.png").write_text("no picture")
    pictures = ImageSet(Labelled(tmp_path), {"a": SMALL})
    assert len(pictures) == 3
    torch.testing.assert_close(pictures[1]["a"], SMALL(photo(seed=ord("b"))), atol=0, rtol=0)
    assert isinstance(pictures[2], Skipped)
    assert pictures[2].name == pictures.name(2)
    first = pictures.fingerprint()
    photo(seed=99).save(tmp_path / "a.png")
    assert pictures.fingerprint() != first
    assert len(ImageSet(Stream(), {"a": SMALL})) == 2


def hugging_face(pictures, **columns):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({**{name: datasets.Value("int64") for name in columns}, "image": datasets.Image()})
    return datasets.Dataset.from_dict({**columns, "image": pictures}, features=features)


def test_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    good = io.BytesIO()
    photo(seed=1).save(good, format="PNG")
    photo(seed=2).save(tmp_path / "a.png")
    rows = [
        {"bytes": good.getvalue(), "path": None},
        {"bytes": png_header_only(50_000, 50_000), "path": None},
        {"bytes": good.getvalue()[:-300], "path": None},
        None,
        {"bytes": None, "path": str(tmp_path / "a.png")},
    ]
    dataset = hugging_face(rows, label=list(range(5)))
    for form in (
        dataset,
        dataset.with_format("torch"),
        dataset.with_format("pandas"),
        dataset.rename_column("image", "picture"),
    ):
        pictures = ImageSet(form, {"a": SMALL})
        assert len(pictures) == 5
        items = [pictures[index] for index in range(5)]
        assert [isinstance(item, Skipped) for item in items] == [False, True, True, True, False]
        torch.testing.assert_close(items[0]["a"], SMALL(photo(seed=1)), atol=0, rtol=0)
        torch.testing.assert_close(items[4]["a"], SMALL(photo(seed=2)), atol=0, rtol=0)
    loader = DataLoader(ImageSet(dataset, {"a": SMALL}), batch_size=5, num_workers=2, collate_fn=collate)
    ((tensors, kept, skipped),) = loader
    assert tensors["a"].shape == (2, 3, 8, 8)
    assert kept == [0, 4]
    assert [item.name for item in skipped] == ["row 1", "row 2", "row 3"]

    first = ImageSet(dataset, {"a": SMALL}).fingerprint()
    assert ImageSet(dataset, {"b": CLIP}).fingerprint() == first
    assert ImageSet(dataset, {"a": SMALL}, limit=3).fingerprint() != first
    assert ImageSet(dataset.select([4, 3, 2, 1, 0]), {"a": SMALL}).fingerprint() != first

    mirrored = dataset.select([0]).with_transform(
        lambda batch: {"image": [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in batch["image"]]}
    )
    torch.testing.assert_close(
        ImageSet(mirrored, {"a": SMALL})[0]["a"],
        SMALL(photo(seed=1).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        atol=0,
        rtol=0,
    )
    with pytest.raises(ValueError, match="no column of images, only label"):
        ImageSet(dataset.remove_columns("image"), {"a": SMALL})
    with pytest.raises(ValueError, match="one split"):
        ImageSet(datasets.DatasetDict(train=dataset), {"a": SMALL})


@pytest.mark.parametrize("source", [[], (), iter([])])
def test_an_empty_source(source):
    with pytest.raises(ValueError, match="empty"):
        ImageSet(source, {"a": SMALL})


@pytest.mark.parametrize(
    "source", [5, None, photo(), {"a": photo()}, [photo(), "a.png"], ["a.png", photo()], [np.ones(3)]]
)
def test_a_source_of_no_known_kind(source):
    with pytest.raises(ValueError, match="PIL image"):
        ImageSet(source, {"a": SMALL})


def test_transforms_that_do_not_fit_together():
    with pytest.raises(ValueError, match="crop, squash"):
        ImageSet([photo()], {"a": SMALL, "b": ImageTransform(8, MEAN, STD, "squash")})
    with pytest.raises(ValueError, match="at least one"):
        ImageSet([photo()], {})
    with pytest.raises(ValueError, match="max_pixels"):
        ImageSet([photo()], {"a": SMALL}, max_pixels=0)


def test_the_order_of_the_disk_does_not_matter(folder, monkeypatch):
    real = os.walk

    def shuffled(*args, **options):
        for place, subfolders, files in real(*args, **options):
            random.shuffle(subfolders)
            random.shuffle(files)
            yield place, subfolders, files

    first = ImageSet(folder, {"a": SMALL})
    monkeypatch.setattr(os, "walk", shuffled)
    for _ in range(5):
        again = ImageSet(folder, {"a": SMALL})
        assert [again.name(index) for index in range(len(again))] == ORDER
        assert again.fingerprint() == first.fingerprint()


def test_datasets_is_not_imported():
    code = "import sys, vst.data.images; print('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("damage", range(30))
def test_damaged_bytes_never_raise(tmp_path, damage):
    rng = np.random.default_rng(damage)
    suffix = ("png", "jpg", "gif", "webp", "tiff", "bmp")[damage % 6]
    path = tmp_path / f"a.{suffix}"
    photo().save(path)
    data = bytearray(path.read_bytes())
    for position in rng.integers(0, len(data), 20):
        data[position] = rng.integers(0, 256)
    path.write_bytes(data[: rng.integers(1, len(data) + 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        item = ImageSet(tmp_path, {"a": SMALL}, max_pixels=1_000_000)[0]
    assert isinstance(item, Skipped) or item["a"].shape == (3, 8, 8)
