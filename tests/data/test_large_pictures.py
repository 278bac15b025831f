"""Pictures of very many pixels are shrunk in bounded memory, or skipped with the reason why."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import small_tokenizer
from pictures_kit import SMALL, photo
from PIL import Image

from llava_integration.train.data import Conversations, DataConfig
from vst import fit_stitches
from vst.data import images, large
from vst.data.images import ImageTransform, open_image, upright_size
from vst.data.pictures import ImageSet, Skipped
from vst.data.rgb import to_rgb


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
