"""Pictures are opened or refused with a reason, cut, and transformed as other people's processors do."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures_kit import CLIP, MEAN, SMALL, STD, flat, photo, png_header_only
from PIL import Image, ImageFile
from torchvision.transforms import v2

from vst.data import images
from vst.data.images import ImageTransform, UnreadableImage, cut, open_image

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
