"""Many pictures: folders, tables and iterables, each decoded once, cut once, then resized for each model."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vst.data.folders import picture_names
from vst.data.images import (
    MAX_PIXELS,
    PICTURE_MB,
    SUFFIXES,
    ImageTransform,
    UnreadableImage,
    cut,
    decode_file,
    decode_opened,
    in_rgb,
    open_image,
    reason_of,
)


@dataclass(frozen=True)
class Skipped:
    """One picture that could not be read."""

    name: str
    reason: str


Limits = tuple[int, float]
"""Pixels of a picture, and MiB that it may take to decode."""


class ImageSet(Dataset):
    """Pictures from anywhere, each read as ``{transform name: float32 tensor [3, size, size]}`` or ``Skipped``.

    Args:
        source: a folder (searched recursively, sorted by relative path; hidden files and ``__MACOSX`` are ignored), a
            list of paths, a Hugging Face ``Dataset`` (column ``image``, or the first column of images), a torch
            ``Dataset`` of PIL images or of tuples that start with one, or any finite iterable of those.
        transforms: by name; all with the same ``cut``. The picture is cut once; where it is padded, it is with the mean
            colour of the first transform.
        limit: take only the first so many pictures.
        max_pixels: pictures with more pixels are skipped, before they are decoded or padded to that size.
        picture_mb: pictures that take more MiB than this to decode or to pad are skipped; each worker process may
            hold one such picture.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: there is no picture, the source is of no known kind, or the transforms disagree about the cut.
    """

    def __init__(
        self,
        source: Any,
        transforms: Mapping[str, ImageTransform],
        limit: int | None = None,
        max_pixels: int = MAX_PIXELS,
        picture_mb: float = PICTURE_MB,
    ):
        if not transforms:
            raise ValueError("transforms is empty, but must name at least one ImageTransform.")
        if len(cuts := {transform.cut for transform in transforms.values()}) > 1:
            raise ValueError(
                f"The transforms cut in different ways ({', '.join(sorted(cuts))}), but a picture is cut once for all; "
                "give each the same cut."
            )
        for name, value in (("limit", limit), ("max_pixels", max_pixels), ("picture_mb", picture_mb)):
            if value is not None and not value >= 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        self.transforms = dict(transforms)
        self._limits = max_pixels, picture_mb
        self._pictures = _pictures_of(source, limit, self._limits)
        self._length = len(self._pictures) if limit is None else min(limit, len(self._pictures))
        if self._length == 0:
            raise ValueError(f"The source, a {type(source).__name__}, is empty, but must hold at least one picture.")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor] | Skipped:
        """Read one picture; one that cannot be read comes back as ``Skipped`` instead of raising."""
        return self.read(index)

    def read(self, index: int, view: Callable[[Image.Image], Image.Image] | None = None) -> dict[str, Tensor] | Skipped:
        """Read one picture, changed by ``view`` once it is cut, before it is resized for each model."""
        index = self._position(index)
        first = next(iter(self.transforms.values()))
        try:
            image = in_rgb(self._pictures.read(index))
            if first.cut == "pad":
                self._check_padding(image)
        except UnreadableImage as error:
            return Skipped(self.name(index), error.reason)
        image = cut(image, first.cut, first.background)
        image = image if view is None else view(image)
        tensors = {transform: transform.resize_only(image) for transform in set(self.transforms.values())}
        return {name: tensors[transform] for name, transform in self.transforms.items()}

    def _check_padding(self, image: Image.Image) -> None:
        (max_pixels, picture_mb), pixels = self._limits, max(image.size) ** 2
        if pixels > max_pixels or 4 * pixels > picture_mb * 2**20:
            raise UnreadableImage(
                f"padding {image.width} x {image.height} takes over {max_pixels:,} pixels or {picture_mb:g} MB"
            )

    def name(self, index: int) -> str:
        """Name of a picture: its path, relative where the source is a folder, or its place."""
        return self._pictures.name(self._position(index))

    def fingerprint(self) -> str:
        """SHA-256, in hex, over which pictures these are, in order.

        Files count with path, size and time of change; Hugging Face datasets with their own fingerprint and length;
        everything else with the bytes of its pictures, so that a torch ``Dataset`` is read through once.
        """
        digest = hashlib.sha256()
        for part in self._pictures.identity(self._length):
            digest.update(len(part).to_bytes(8, "big") + part)  # lengths keep "ab", "c" and "a", "bc" apart
        return digest.hexdigest()

    def _position(self, index: int) -> int:
        if not -self._length <= index < self._length:
            raise IndexError(f"Picture {index} was asked for, but there are {self._length}.")
        return index % self._length


def collate(
    items: Sequence[dict[str, Tensor] | Skipped],
) -> tuple[dict[str, Tensor], list[int], list[Skipped]]:
    """Make a batch of what an ``ImageSet`` returned.

    Returns:
        The tensors [kept, 3, size, size] by transform name (empty where no picture could be read), the positions in
        ``items`` they came from, and what was skipped.
    """
    skipped = [item for item in items if isinstance(item, Skipped)]
    readable = {place: item for place, item in enumerate(items) if not isinstance(item, Skipped)}
    names = next(iter(readable.values()), {})
    return {name: torch.stack([item[name] for item in readable.values()]) for name in names}, list(readable), skipped


def _image_in(item: Any, what: str) -> Image.Image:
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise ValueError(f"{what} is a {kind}, but must be a PIL image or a tuple that starts with one.")
    return image


class _Pictures(Protocol):
    """Where pictures come from: files, a table or items in memory."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> Image.Image:
        """Return one decoded picture, or raise ``UnreadableImage``."""

    def identity(self, length: int) -> Iterator[bytes]:
        """Yield what tells the first ``length`` pictures from others."""


class _Files:
    def __init__(self, names: list[str], root: Path, limits: Limits):
        self.names, self.root, self.limits = names, root, limits

    @classmethod
    def under(cls, folder: Path, limits: Limits) -> _Files:
        if not folder.exists():
            raise FileNotFoundError(
                f"The folder {folder} does not exist; give a folder with {', '.join(SUFFIXES)} files."
            )
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file; give the folder it is in, or a list of paths.")
        names = picture_names(folder)
        if not names:
            raise ValueError(f"The folder {folder} holds no picture; expected files that end in {', '.join(SUFFIXES)}.")
        return cls(names, folder, limits)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> Image.Image:
        return open_image(self.root / self.names[index], *self.limits)

    def identity(self, length: int) -> Iterator[bytes]:
        for name in self.names[:length]:
            try:
                stat = (self.root / name).stat()
                facts = f"{stat.st_size} {stat.st_mtime_ns}"
            except OSError:
                facts = "missing"
            yield os.fsencode(name)
            yield facts.encode()


class _Table:
    """A Hugging Face dataset, known by what it can do so that the package need not be there."""

    def __init__(self, dataset: Any, limits: Limits):
        features = dataset.features
        columns = [name for name in features if type(features[name]).__name__ == "Image"]
        if "image" in features:
            columns.insert(0, "image")
        if not columns:
            raise ValueError(f"The dataset has no column of images, only {', '.join(features)}; cast one to Image().")
        self.column, self.limits, self.id = columns[0], limits, str(dataset._fingerprint)
        if dataset.format["type"] != "custom" and type(features[self.column]).__name__ == "Image":
            # Bytes instead of pictures: then size is checked before decoding, and a bad one is skipped alone.
            dataset = dataset.with_format(None).select_columns([self.column])
            dataset = dataset.cast_column(self.column, type(features[self.column])(decode=False))
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"row {index}"

    def read(self, index: int) -> Image.Image:
        value = self.dataset[index][self.column]
        if value is None:
            raise UnreadableImage("is missing (None)")
        if not isinstance(value, Mapping):
            return decode_opened(_image_in(value, f"Column {self.column!r} of row {index}"), *self.limits)
        if value.get("bytes") is None:
            return open_image(value.get("path") or "", *self.limits)
        return decode_file(io.BytesIO(value["bytes"]), *self.limits)

    def identity(self, length: int) -> Iterator[bytes]:
        yield self.id.encode()
        yield str(length).encode()


class _Items:
    """A torch dataset, or pictures that are in memory."""

    def __init__(self, items: Any, limits: Limits):
        self.items, self.limits = items, limits

    @classmethod
    def loaded(cls, items: Iterable, limits: Limits) -> _Items:
        """Decode each at once: a generator may close its file, and worker processes would share one that is open."""
        pictures: list[Image.Image | UnreadableImage] = []
        for index, item in enumerate(items):
            try:
                pictures.append(decode_opened(_image_in(item, f"Item {index} of the source"), *limits))
            except UnreadableImage as error:
                pictures.append(error)
        return cls(pictures, limits)

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> Image.Image:
        try:
            item = self.items[index]
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what a loader meets in a bad file
            raise UnreadableImage(f"cannot be read ({reason_of(error)})") from error
        if isinstance(item, UnreadableImage):
            raise item
        return decode_opened(_image_in(item, f"Item {index} of the source"), *self.limits)

    def identity(self, length: int) -> Iterator[bytes]:
        for index in range(length):
            try:
                image = self.read(index)
            except UnreadableImage as error:
                yield error.reason.encode()
                continue
            yield f"{image.mode} {image.size} {image.getpalette()} {image.info.get('transparency')}".encode()
            yield image.info.get("exif", b"")  # turns the picture
            yield image.tobytes()


def _pictures_of(source: Any, limit: int | None, limits: Limits) -> _Pictures:
    if isinstance(source, (str, os.PathLike)):
        if not str(source):  # which would be the working folder
            raise ValueError("The source is '', but must be the path of a folder of pictures.")
        return _Files.under(Path(source), limits)
    if all(hasattr(source, name) for name in ("features", "column_names", "_fingerprint", "__getitem__")):
        return _Table(source, limits)
    if isinstance(source, Dataset) and hasattr(source, "__len__"):
        return _Items(source, limits)
    if isinstance(source, (Image.Image, Mapping)) or not isinstance(source, Iterable):
        raise ValueError(
            f"The source is a {type(source).__name__}, but must be a folder, a list of paths, one split of a dataset, "
            "or an iterable of PIL images."
        )
    items = islice(source, limit)
    first = list(islice(items, 1))
    if not first or not isinstance(first[0], (str, os.PathLike)):
        return _Items.loaded(chain(first, items), limits)
    paths = [*first, *items]
    if not all(isinstance(path, (str, os.PathLike)) for path in paths):
        raise ValueError("The source mixes paths with other things, but must be a list of paths or of PIL images.")
    return _Files([os.fspath(path) for path in paths], Path(), limits)
