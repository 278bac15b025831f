"""Sets of pictures in files: their order, what is skipped and why, batches, and fingerprints."""

import os
import random
import warnings

import numpy as np
import pytest
import torch
from pictures_kit import CLIP, MEAN, SMALL, STD, flat, photo, png_header_only
from PIL import Image
from torch.utils.data import DataLoader

from vst.data import pictures
from vst.data.images import ImageTransform
from vst.data.pictures import ImageSet, Skipped, collate


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
