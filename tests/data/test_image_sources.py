"""Sets of pictures from memory, generators, and the datasets of torch and Hugging Face."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from pictures_kit import CLIP, MEAN, SMALL, STD, flat, photo, png_header_only
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vst.data.images import ImageTransform, open_image
from vst.data.pictures import ImageSet, Skipped, collate


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


def test_datasets_is_not_imported():
    code = "import sys, vst.data.images; print('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
