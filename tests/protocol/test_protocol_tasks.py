"""Tasks against known pixels and masks, and what is said of bad data."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vst.data.probes import IGNORED, ClassCounts, LinearHead
from vst.demo import emoji
from vst.protocol import TaskConfig
from vst.protocol.tasks import check_classes, draw, labels_of, make_task


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def folder(root, classes=("cat", "dog"), count=6):
    for part in ("train", "test"):
        for name in classes:
            for i in range(count):
                save(root / part / name / f"{i}.png", np.full((8, 8, 3), i))
    return TaskConfig("folder", {"train": str(root / "train"), "test": str(root / "test")})


def pairs(root, mask, size=(6, 6), count=6, **options):
    for part in ("train", "test"):
        for i in range(count):
            save(root / part / "images" / f"{i}.png", np.zeros((*size, 3)))
            save(root / part / "masks" / f"{i}.png", mask)
    given = {f"{p}_{k}": str(root / p / k) for p in ("train", "test") for k in ("images", "masks")}
    return TaskConfig("pairs", {**given, "classes": 3, **options})


def test_image_folders(tmp_path):
    config = folder(tmp_path)
    task = make_task("pets", config)
    assert task.classes == ["cat", "dog"]
    division = draw("pets", task, config, 0)
    assert (len(division.train), len(division.validation), len(division.test)) == (10, 2, 12)
    assert not {*division.train, *division.validation} & set(division.test)
    for row in (*division.train, *division.test):
        assert task.classes[task.label(row)] == task.pictures[row].parent.name
        assert ("train" in task.pictures[row].parts) == (row not in division.test)
    assert draw("pets", task, config, 0) == division != draw("pets", task, config, 1)
    limited = TaskConfig("folder", config.options, train=4, validation=1, test=3)
    assert [len(p) for p in vars(draw("pets", task, limited, 0)).values()] == [4, 1, 3]
    real, link = tmp_path / "elsewhere", Path(config.options["train"]) / "dog"
    link.rename(real)
    link.symlink_to(real)  # a class may lie on another disk
    assert len(make_task("pets", config).pictures) == len(task.pictures)


def test_masks_are_cut_as_their_pictures_and_resized_by_the_nearest_pixel(tmp_path):
    mask = np.zeros((4, 8), np.uint8)
    mask[:, :2], mask[:2, 2:4], mask[2:, 4:6], mask[0, 5] = 9, 1, 2, 255  # the crop takes columns 2 to 5
    task = make_task("t", pairs(tmp_path, mask, (4, 8)))
    (cropped,) = labels_of("t", task, [0], "crop", 4)
    expected = torch.tensor([[1, 1, 0, IGNORED], [1, 1, 0, 0], [0, 0, 2, 2], [0, 0, 2, 2]])
    assert torch.equal(cropped.long(), expected)
    doubled = labels_of("t", task, [0], "crop", 8)[0].long()
    assert torch.equal(doubled, expected.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_masks_that_count_from_one(tmp_path):
    mask = np.array([[0, 1], [3, 255]])
    task = make_task("t", pairs(tmp_path, mask, (2, 2), reduce_zero=True))
    (labels,) = labels_of("t", task, [0], "crop", 2)
    assert labels.tolist() == [[IGNORED, 0], [2, IGNORED]]


def test_bad_data_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"Task 'one' has 1 class \(cat\); expected at least two"):
        make_task("one", folder(tmp_path / "one", ["cat"]))
    config = folder(tmp_path / "few", count=2)
    with pytest.raises(ValueError, match="Task 'few' has no validation pictures"):
        draw("few", make_task("few", config), config, 0)
    empty = folder(tmp_path / "empty")
    for path in (tmp_path / "empty" / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="Task 'empty' has no test pictures"):
        draw("empty", make_task("empty", empty), empty, 0)
    with pytest.raises(ValueError, match=r"the mask of picture 0 is 5 x 6 pixels, its picture 6 x 6"):
        labels_of("t", make_task("t", pairs(tmp_path / "size", np.zeros((6, 5)))), [0], "crop", 4)
    with pytest.raises(ValueError, match=r"gives picture 2 the label 7; expected 0 to 2"):
        labels_of("t", make_task("t", pairs(tmp_path / "label", np.full((6, 6), 7))), [2], "crop", 4)
    with pytest.raises(ValueError, match="has mode RGB; expected one channel"):
        labels_of("t", make_task("t", pairs(tmp_path / "rgb", np.zeros((6, 6, 3)))), [0], "crop", 4)
    alone = pairs(tmp_path / "alone", np.zeros((6, 6)))
    (tmp_path / "alone" / "test" / "masks" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"1 files of .* have no partner"):
        make_task("t", alone)
    with pytest.raises(ValueError, match=r"hold only the class \[1\]"):
        check_classes("t", torch.tensor([1, 1, IGNORED]))
    (tmp_path / "few" / "test" / "fox").mkdir()
    save(tmp_path / "few" / "test" / "fox" / "0.png", np.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match=r"class folders \['fox'\] that the training folder lacks"):
        make_task("few", config)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make_task("t", TaskConfig("folder", {"train": "nowhere", "test": "nowhere"}))
    with pytest.raises(ValueError, match=r"needs \['test'\]"):
        make_task("t", TaskConfig("folder", {"train": "x"}))
    with pytest.raises(ValueError, match="known sources"):
        make_task("t", TaskConfig("x"))


def test_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(np.full((8, 8, 3), i, np.uint8)) for i in range(6)]
    masks = [Image.fromarray(np.full((8, 8), i % 3, np.uint8)) for i in range(6)]
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
    )
    part = datasets.Dataset.from_dict({"image": images, "mask": masks, "label": [0, 1] * 3}, features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "d"))
    task = make_task("t", TaskConfig("hf", {"path": str(tmp_path / "d")}))
    assert (task.kind, task.classes) == ("classification", ["x", "y"])
    assert labels_of("t", task, [0, 1, 7], "crop", 4).tolist() == [0, 1, 1]
    seg = make_task("t", TaskConfig("hf", {"path": str(tmp_path / "d"), "mask": "mask", "classes": 3}))
    assert labels_of("t", seg, [2, 10], "crop", 4).unique().tolist() == [1, 2]
    with pytest.raises(ValueError, match="no column 'kind'"):
        make_task("t", TaskConfig("hf", {"path": str(tmp_path / "d"), "label": "kind"}))
    with pytest.raises(ValueError, match=r"no split \['val'\]"):
        make_task("t", TaskConfig("hf", {"path": str(tmp_path / "d"), "test": "val"}))
    part.save_to_disk(str(tmp_path / "one"))
    with pytest.raises(ValueError, match="is one dataset; expected a DatasetDict"):
        make_task("t", TaskConfig("hf", {"path": str(tmp_path / "one")}))
    words = datasets.Dataset.from_dict({"image": images, "label": ["x", None] * 3}).cast_column(
        "image", datasets.Image()
    )
    datasets.DatasetDict({"train": words, "test": words}).save_to_disk(str(tmp_path / "w"))
    with pytest.raises(ValueError, match=r"Column 'label' of .* holds 'x'; expected class numbers"):
        make_task("t", TaskConfig("hf", {"path": str(tmp_path / "w")}))


def test_masks_tell_at_most_255_classes_apart(tmp_path):
    options = dict.fromkeys(("train_images", "train_masks", "test_images", "test_masks"), str(tmp_path))
    make_task("t", TaskConfig("pairs", {**options, "classes": 255}))
    with pytest.raises(ValueError, match="256 classes; masks have at most 255"):
        make_task("t", TaskConfig("pairs", {**options, "classes": 256}))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Emoji in three styles: a disc whose alpha is known."""
    root = tmp_path_factory.mktemp("emoji")
    entries = []
    y, x = np.mgrid[:32, :32]
    alpha = (((y - 16) ** 2 + (x - 16) ** 2) < 144).astype(np.uint8) * 255
    for i in range(20):
        entries.append(
            {"code": f"{i:04x}", "name": "N", "category": "AB"[i % 2], "subcategory": f"{'AB'[i % 2]}{i % 4}"}
        )
        for style, ending in emoji.STYLES.items():
            (root / style).mkdir(exist_ok=True)
            pixels = np.dstack([np.full((32, 32, 3), 40 * (i % 2) + 90, np.uint8), alpha])
            Image.fromarray(pixels).save(root / style / f"{i:04x}.{ending}")
    (root / "emoji.json").write_text(json.dumps(entries))
    return str(root)


def test_emoji_are_tested_in_a_style_and_on_things_that_training_lacks(drawn):
    whole = {}
    for level, classes in (("category", 2), ("subcategory", 4)):
        config = TaskConfig("emoji", {"folder": drawn, "level": level})
        task = make_task("e", config)
        assert len(task.classes) == classes
        whole[level] = draw("e", task, config, 0)
        learn = [task._drawn[r] for r in (*whole[level].train, *whole[level].validation)]
        test = [task._drawn[r] for r in whole[level].test]
        assert {p.style for p in test} == {"fluent"}
        assert {p.style for p in learn} == {"noto", "twemoji"}
        assert not {p.emoji.code for p in learn} & {p.emoji.code for p in test}
        assert len(test) == 8
    assert whole["category"] == whole["subcategory"]  # so that they share features and stitches


def test_pasted_emoji_have_exact_masks(drawn):
    task = make_task("s", TaskConfig("emoji-pasted", {"folder": drawn, "train": 6, "test": 4}))
    assert task.classes == ["background", "A", "B"]
    seen = set()
    for row in range(10):
        picture, mask = task.scene(row)
        again, _ = task.scene(row)
        assert np.array_equal(np.asarray(picture), np.asarray(again))
        pixels, labels = np.asarray(picture).astype(int), np.asarray(mask)
        for label, grey in ((1, 90), (2, 130)):
            inside = np.abs(pixels - grey).max(-1) <= 12
            if (labels == label).any():
                seen.add(label)
                assert inside[labels == label].mean() > 0.75  # edges blend with what lies below
    assert seen == {1, 2}
    train, test = task.divide(0)
    assert (train, test) == (list(range(6)), list(range(6, 10)))


def test_fashion_mnist(tmp_path):
    rng = np.random.default_rng(0)
    images = {"train": rng.integers(0, 256, (5, 28, 28), np.uint8), "t10k": rng.integers(0, 256, (2, 28, 28), np.uint8)}
    for part, values in images.items():
        n = len(values)
        head = b"\0\0\x08\x03" + b"".join(v.to_bytes(4, "big") for v in (n, 28, 28))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
        labels = b"\0\0\x08\x01" + n.to_bytes(4, "big") + bytes(range(n))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    task = make_task("f", TaskConfig("fashion-mnist", {"folder": str(tmp_path)}))
    assert [task.label(r) for r in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    assert np.array_equal(np.asarray(task.pictures[5]), images["t10k"][0])
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09a"))
    with pytest.raises(ValueError, match="no IDX file of bytes, or is cut short"):
        make_task("f", TaskConfig("fashion-mnist", {"folder": str(tmp_path)}))


def test_heads_and_scores_written_out():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5)
    head = LinearHead("classification", 5, 2)
    torch.nn.init.normal_(head.linear.weight)
    wanted = x.mean(1) @ head.linear.weight.detach().T
    torch.testing.assert_close(head(head.pool(x)), wanted)
    assert float(head.loss(wanted, torch.tensor([0, 1, 1]))) == pytest.approx(
        float(-wanted.log_softmax(1)[range(3), [0, 1, 1]].mean())
    )
    dense = LinearHead("segmentation", 5, 2)
    torch.nn.init.normal_(dense.linear.weight)
    logits = dense(dense.pool(x))
    assert logits.shape == (3, 2, 2, 2)
    torch.testing.assert_close(logits[1, :, 1, 0], x[1, 2] @ dense.linear.weight.T)
    void = torch.full((3, 8, 8), IGNORED)
    assert dense.loss(logits, void).item() == 0  # and not the quotient of nothing by nothing
    mixed = torch.cat([void[:1], torch.ones(2, 8, 8, dtype=torch.long)])
    torch.testing.assert_close(dense.loss(logits, mixed), dense.loss(logits[1:], mixed[1:]))
    given = torch.tensor([[0, 0, 1, 1], [2, 2, 1, 0]])
    labels = torch.tensor([[0, 1, 1, IGNORED], [2, 0, 1, 0]])
    counts = ClassCounts(4)
    for g, w in zip(given, labels, strict=True):
        counts.update(g, w)
    assert counts.score("classification") == pytest.approx(5 / 7)
    assert counts.score("segmentation") == pytest.approx(np.mean([2 / 4, 2 / 3, 1 / 2]))  # class 3 occurs nowhere
