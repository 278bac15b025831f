"""Scenes of emoji pasted on smooth random backgrounds, with exact masks: what a dense task is made of, offline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vst.demo import emoji


class PastedScenes(Dataset):
    """Training scenes followed by test scenes: one to four emoji each; their alpha gives the mask.

    Classes are the background and the emoji's categories without flags. Training scenes use two drawing styles, test
    scenes the third and other emoji. Scenes are drawn anew from their number at each look, always alike; as a
    ``Dataset`` they are the pictures alone.

    Args:
        root: the folder ``prepare_emoji()``.
        train, test: how many scenes. side: of a scene in pixels.
        test_style: noto, twemoji or fluent.
        seed: of the division of emoji and of the scenes; scenes of two seeds differ throughout.

    Raises:
        ValueError: an unknown style, or numbers that are not positive.
    """

    def __init__(
        self, root: Path, *, train: int, test: int, side: int = 128, test_style: str = "fluent", seed: int = 0
    ) -> None:
        if test_style not in emoji.STYLES or min(train, test, side) < 1:
            raise ValueError(
                f"test_style {test_style!r}, train {train}, test {test} and side {side} were given; expected one of "
                f"{', '.join(emoji.STYLES)} and positive numbers."
            )
        drawn = [p for p in emoji.pictures(root) if p.emoji.category != "Flags"]
        self.classes = ["background", *sorted({p.emoji.category for p in drawn})]
        self._numbers = {name: i for i, name in enumerate(self.classes)}
        tests = emoji.test_codes([p.emoji for p in drawn], seed)
        self._pools = (
            [p for p in drawn if p.style != test_style and p.emoji.code not in tests],
            [p for p in drawn if p.style == test_style and p.emoji.code in tests],
        )
        self.train, self.test, self.side, self.seed = train, test, side, seed

    def scene(self, row: int) -> tuple[Image.Image, Image.Image]:
        """Picture (RGB) and mask (class numbers) of one scene."""
        side = self.side
        rng = np.random.default_rng([16, row, self.seed] if self.seed else [16, row])
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        picture = coarse.resize((side, side), Image.Resampling.BICUBIC)
        mask = np.zeros((side, side), np.uint8)
        pool = self._pools[int(row >= self.train)]
        for _ in range(rng.integers(1, 5)):
            thing = pool[rng.integers(len(pool))]
            size = int(rng.integers(side // 4, side * 5 // 8))
            with Image.open(thing.path) as image:
                drawn = image.convert("RGBA").resize((size, size), Image.Resampling.BICUBIC)
            left, top = (int(v) for v in rng.integers(0, side - size + 1, 2))
            picture.paste(drawn, (left, top), drawn)
            solid = np.asarray(drawn)[..., 3] > 127
            mask[top : top + size, left : left + size][solid] = self._numbers[thing.emoji.category]
        return picture, Image.fromarray(mask)

    def __len__(self) -> int:
        return self.train + self.test

    def __getitem__(self, row: int) -> Image.Image:
        return self.scene(row)[0]
