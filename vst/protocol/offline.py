"""Tasks that need no data of one's own: emoji in three drawing styles, emoji pasted on backgrounds, Fashion-MNIST."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vst.demo import emoji
from vst.demo.pasted import PastedScenes
from vst.protocol.tasks import Task, TwoParts, register

LEVELS = ("category", "subcategory")


@register
class EmojiTask(Task):
    """Which category (9) or subcategory (99) an emoji belongs to: trained on two drawing styles, tested on the third.

    Two fifths of every subcategory's emoji are the test's: they are trained on in no style.

    Args:
        level: category or subcategory; both draw the same pictures, so they share features.
        test_style: noto, twemoji or fluent.
        folder: of prepared emoji; default: fetched once from npm.
    """

    source = "emoji"

    def __init__(self, *, level: str = "category", test_style: str = "fluent", folder: str | None = None) -> None:
        if level not in LEVELS or test_style not in emoji.STYLES:
            raise ValueError(
                f"level {level!r} and test_style {test_style!r} were given; expected one of {', '.join(LEVELS)} and "
                f"one of {', '.join(emoji.STYLES)}."
            )
        self._drawn = emoji.pictures(_emoji_folder(folder))
        self.pictures = [p.path for p in self._drawn]
        self.level, self.test_style = level, test_style
        self.classes = sorted({getattr(p.emoji, level) for p in self._drawn})
        self._numbers = {name: i for i, name in enumerate(self.classes)}

    def label(self, row: int) -> int:
        return self._numbers[getattr(self._drawn[row].emoji, self.level)]

    def divide(self, seed: int) -> tuple[list[int], list[int]]:
        tests = emoji.test_codes([p.emoji for p in self._drawn], seed)
        train = [i for i, p in enumerate(self._drawn) if p.style != self.test_style and p.emoji.code not in tests]
        return train, [i for i, p in enumerate(self._drawn) if p.style == self.test_style and p.emoji.code in tests]


@register
class PastedEmoji(TwoParts):
    """Segmentation of :class:`vst.demo.pasted.PastedScenes`.

    Args:
        train, test: how many scenes. side: of a scene in pixels.
        test_style: noto, twemoji or fluent.
        folder: as for ``emoji``.
    """

    source = "emoji-pasted"
    kind = "segmentation"

    def __init__(
        self,
        *,
        train: int = 1000,
        test: int = 400,
        side: int = 128,
        test_style: str = "fluent",
        folder: str | None = None,
    ) -> None:
        scenes = PastedScenes(_emoji_folder(folder), train=train, test=test, side=side, test_style=test_style)
        self.classes, self.scene = scenes.classes, scenes.scene
        self.train_count, self.test_count = train, test
        self.pictures: Any = scenes

    def mask(self, row: int) -> Image.Image:
        return self.scene(row)[1]


@register
class FashionMNIST(TwoParts):
    """Ten kinds of clothing in grey pictures of 28 x 28 pixels: 60,000 to train on, 10,000 to test on.

    Args:
        folder: of the four ``.gz`` files in IDX form; default: fetched once as a Debian package (needs apt-get).
    """

    source = "fashion-mnist"

    def __init__(self, *, folder: str | None = None) -> None:
        if folder is None:
            from vst.demo.fashion import prepare_fashion

            folder = str(prepare_fashion())
        names = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
        self.classes = list(names)
        parts = [(read_idx(Path(folder), f"{p}-images-idx3"), read_idx(Path(folder), f"{p}-labels-idx1"))
                 for p in ("train", "t10k")]  # fmt: skip
        self.train_count, self.test_count = (len(images) for images, _ in parts)
        self._labels = np.concatenate([labels for _, labels in parts])
        self.pictures: Any = _Grey(np.concatenate([images for images, _ in parts]))

    def label(self, row: int) -> int:
        return int(self._labels[row])


class _Grey(Dataset):
    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row])


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An array of bytes in the IDX format, from ``NAME-ubyte.gz``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    path = folder / f"{name}-ubyte.gz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected Fashion-MNIST's four files there.")
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3] if len(raw) > 4 else 0
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim))
    if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * ndim + int(np.prod(shape)):
        raise ValueError(f"{path} is no IDX file of bytes, or is cut short: fetch it again.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def _emoji_folder(folder: str | None) -> Path:
    if folder is not None:
        return Path(folder)
    from vst.demo.assets import prepare_emoji

    return prepare_emoji()
