"""Tasks over data of one's own: image folders, Hugging Face datasets, pairs of images and masks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vst.data.folders import picture_names
from vst.data.images import SUFFIXES, open_image, upright_size
from vst.protocol.tasks import TwoParts, register


@register
class Folder(TwoParts):
    """Classification of two image folders with one subfolder a class.

    Args:
        train, test: folders; the classes are the training folder's subfolders, in alphabetical order.
    """

    source = "folder"

    def __init__(self, *, train: str, test: str) -> None:
        self.classes = sorted(p.name for p in _folder(train).iterdir() if p.is_dir() and not p.name.startswith("."))
        paths, labels = self._part(train)
        self.train_count = len(paths)
        test_paths, test_labels = self._part(test)
        self.test_count = len(test_paths)
        self.pictures, self._labels = [*paths, *test_paths], [*labels, *test_labels]
        if not self.pictures:
            raise ValueError(f"{train} and {test} hold no picture; expected CLASS/PICTURE files in both.")

    def _part(self, root: str) -> tuple[list[Path], list[int]]:
        numbers = {name: i for i, name in enumerate(self.classes)}
        paths = [p for p in _files(_folder(root)) if len(p.relative_to(root).parts) > 1]
        names = [p.relative_to(root).parts[0] for p in paths]
        if unknown := sorted(set(names) - set(numbers)):
            raise ValueError(
                f"{root} has the class folders {unknown[:5]} that the training folder lacks; expected the same classes."
            )
        return paths, [numbers[n] for n in names]

    def label(self, row: int) -> int:
        return self._labels[row]


@register
class Pairs(TwoParts):
    """Segmentation of folders of images and masks whose files have the same relative names up to the ending.

    Args:
        train_images, train_masks, test_images, test_masks: folders.
        classes: how many, or their names.
        reduce_zero: masks count from 1 and 0 is ignored (as ADE20K's); labels are lowered by one.
    """

    source = "pairs"
    kind = "segmentation"

    def __init__(
        self,
        *,
        train_images: str,
        train_masks: str,
        test_images: str,
        test_masks: str,
        classes: int | list[str],
        reduce_zero: bool = False,
    ) -> None:
        self.classes = [f"class {i}" for i in range(classes)] if isinstance(classes, int) else list(classes)
        self.reduce_zero = reduce_zero
        train, test = _pairs(train_images, train_masks), _pairs(test_images, test_masks)
        self.train_count, self.test_count = len(train), len(test)
        self.pictures, self._masks = [p for p, _ in (*train, *test)], [m for _, m in (*train, *test)]

    def mask(self, row: int) -> Image.Image:
        return _reduced(open_image(self._masks[row])) if self.reduce_zero else open_image(self._masks[row])

    def size(self, row: int) -> tuple[int, int]:
        return upright_size(self.pictures[row])


@register
class HuggingFace(TwoParts):
    """A Hugging Face dataset on disk (``save_to_disk``) or hub, with a column ``image``.

    Args:
        path: folder or hub id. name: of a configuration.
        train, test: splits.
        label: column of class numbers (classification).
        mask: column of masks instead (segmentation); needs classes.
        classes: how many, or their names; default: as the column tells.
        reduce_zero: as for ``pairs``.
    """

    source = "hf"

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        train: str = "train",
        test: str = "test",
        label: str = "label",
        mask: str | None = None,
        classes: int | list[str] | None = None,
        reduce_zero: bool = False,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError('A Hugging Face dataset needs datasets: pip install "vfm-stitch-tree[hub]".') from error
        whole: Any = datasets.load_from_disk(path) if os.path.isdir(path) else datasets.load_dataset(path, name)
        if not hasattr(whole, "keys"):
            raise ValueError(f"{path} is one dataset; expected a DatasetDict of a training and a test split.")
        if missing := [part for part in (train, test) if part not in whole]:
            raise ValueError(f"{path} has no split {missing}; it has {list(whole)}: name two of these.")
        self.train_count, self.test_count = len(whole[train]), len(whole[test])
        self.pictures = datasets.concatenate_datasets([whole[train], whole[test]])
        column = mask or label
        if column not in self.pictures.features:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(self.pictures.features)}.")
        self.kind, self._column, self.reduce_zero = "segmentation" if mask else "classification", column, reduce_zero
        names = getattr(self.pictures.features[column], "names", None)
        self._labels = None if mask else list(self.pictures[column])
        if odd := [value for value in self._labels or () if not isinstance(value, int)]:
            raise ValueError(
                f"Column {column!r} of {path} holds {odd[0]!r}; expected class numbers, or a ClassLabel column."
            )
        if classes is None and names is None:
            if self._labels is None:
                raise ValueError(f"The masks of {path} do not tell their classes; give the option classes.")
            classes = max((int(v) for v in self._labels), default=-1) + 1
        given = names if classes is None else classes
        self.classes = [f"class {i}" for i in range(given)] if isinstance(given, int) else list(given or [])

    def label(self, row: int) -> int:
        assert self._labels is not None
        return int(self._labels[row])

    def mask(self, row: int) -> Image.Image:
        image = self.pictures[row][self._column]
        return _reduced(image) if self.reduce_zero else image

    def size(self, row: int) -> tuple[int, int]:
        return upright_size(self.pictures[row]["image"])


def _folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"The folder {path} does not exist; give a folder of pictures.")
    return Path(path)


def _files(root: Path, *, repeated: bool = False) -> list[Path]:
    """Pictures below a folder, sorted by relative path."""
    return [root / name for name in picture_names(root, repeated=repeated)]


def _pairs(images: str, masks: str) -> list[tuple[Path, Path]]:
    pictures = {p.relative_to(images).with_suffix(""): p for p in _files(_folder(images))}
    # One mask may stand for several pictures by links to it, and a picture that is a link to another has one to spare.
    targets = {p.relative_to(masks).with_suffix(""): p for p in _files(_folder(masks), repeated=True)}
    spare = {t for t in set(targets) - set(pictures) if any(Path(images, f"{t}{s}").is_file() for s in SUFFIXES)}
    if alone := sorted(map(str, (set(pictures) ^ set(targets)) - spare)):
        raise ValueError(
            f"{len(alone)} files of {images} and {masks} have no partner ({', '.join(alone[:3])}); expected an image "
            "and a mask of the same name each."
        )
    return [(pictures[name], targets[name]) for name in sorted(pictures)]


def _reduced(mask: Image.Image) -> Image.Image:
    values = np.array(mask).astype(np.int32)
    return Image.fromarray(np.where(values == 0, 255, np.where(values == 255, 255, values - 1)))
