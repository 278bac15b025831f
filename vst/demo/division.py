"""The demo's pictures of one seed: what stitches are fitted to, and two tasks whose test shows nothing that was seen.

Test pictures show emoji and a drawing style that neither stitches nor probes met before.

scenes          dense: which category each pixel belongs to, in scenes of emoji pasted on backgrounds
subcategories   global: which of the 20 largest subcategories a single emoji is of
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vst.demo import emoji
from vst.demo.assets import prepare_emoji
from vst.demo.config import DemoConfig
from vst.demo.pasted import PastedScenes

SCENES, SUBCATEGORIES = "scenes", "subcategories"
TEST_STYLE = "fluent"
MASK_SIDE = 64  # pixels a side that segmentation is scored at
_SINGLE_SIDE = 128  # of a single emoji, as large as a scene


@dataclass(frozen=True)
class TaskData:
    """Pictures and labels of one task.

    Attributes:
        kind: ``classification`` or ``segmentation``.
        classes: names, in the order of labels.
        train, test: RGB pictures.
        train_labels, test_labels: class numbers ``[pictures]``, or masks ``[pictures, MASK_SIDE, MASK_SIDE]`` (long).
    """

    kind: str
    classes: list[str]
    train: list[Image.Image]
    test: list[Image.Image]
    train_labels: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Division:
    """Pictures of one seed.

    Attributes:
        fit: for the stitches, without labels, by kind (``scenes``, ``singles``). heldout: for the stitches' errors.
        tasks: by name.
    """

    fit: dict[str, list[Image.Image]]
    heldout: list[Image.Image]
    tasks: dict[str, TaskData]

    def pictures(self, counts: Mapping[str, int]) -> list[Image.Image]:
        """The first so many of each kind, for a fit."""
        return [picture for kind, count in counts.items() for picture in self.fit[kind][:count]]

    @classmethod
    def draw(cls, root: Path, config: DemoConfig, seed: int) -> Division:
        """Draw everything by the seed.

        Raises:
            ValueError: more pictures are asked for than there are emoji.
        """
        single, seen, unseen = _single(root, config, seed)
        kinds, cut = config.kinds, config.probe_train
        if kinds["singles"] > len(seen):
            raise ValueError(f"pictures is {config.pictures}, but the emoji give only {2 * len(seen)}; lower it.")
        scenes = PastedScenes(
            root, train=max(cut, kinds["scenes"]), test=config.probe_test, test_style=TEST_STYLE, seed=seed
        )
        first = scenes.train
        shown = [scenes.scene(row) for row in (*range(cut), *range(first, first + config.probe_test))]
        masks = torch.stack([_mask(mask) for _, mask in shown])
        pictures = [picture for picture, _ in shown]
        dense = TaskData("segmentation", scenes.classes, pictures[:cut], pictures[cut:], masks[:cut], masks[cut:])
        fit = {
            "scenes": [scenes[row] for row in range(kinds["scenes"])],
            "singles": [_open(p) for p in seen[: kinds["singles"]]],
        }
        held = config.heldout // 2
        heldout = [*dense.test[: config.heldout - held], *(_open(p) for p in unseen[:held])]
        return cls(fit, heldout, {SCENES: dense, SUBCATEGORIES: single})


def _single(root: Path, config: DemoConfig, seed: int) -> tuple[TaskData, list[emoji.Picture], list[emoji.Picture]]:
    """The subcategories, and all single emoji that may be seen and that may not."""
    rng = random.Random(seed)
    drawn = [p for p in emoji.pictures(root) if p.emoji.category != "Flags"]
    tests = emoji.test_codes([p.emoji for p in drawn], seed)
    chosen = emoji.subcategory_task(root, 20)
    labels = {e.code: label for e, label in chosen}
    rng.shuffle(drawn)
    seen = [p for p in drawn if p.style != TEST_STYLE and p.emoji.code not in tests]
    unseen = [p for p in drawn if p.style == TEST_STYLE and p.emoji.code in tests]
    parts = []
    for pool, count, what in ((seen, config.probe_train, "probe_train"), (unseen, config.probe_test, "probe_test")):
        own = [p for p in pool if p.emoji.code in labels]
        if count > len(own):
            raise ValueError(f"{what} is {count}, but the emoji give only {len(own)}; lower it.")
        parts.append(own[:count])
    (train, train_labels), (test, test_labels) = (
        ([_open(p) for p in part], torch.tensor([labels[p.emoji.code] for p in part])) for part in parts
    )
    classes = sorted({e.subcategory for e, _ in chosen})
    return TaskData("classification", classes, train, test, train_labels, test_labels), seen, unseen


def demo_pictures(labels: bool, seed: int = 0) -> dict[str, Any]:
    """Single emoji for :func:`vst.trunk.compare.compare_trunks`: pictures, with subcategories as labels or without."""
    task, _, _ = _single(prepare_emoji(), DemoConfig(probe_train=400), seed)
    out: dict[str, Any] = {"images": task.train, "heldout_images": task.test}
    if labels:
        out |= {"labels": task.train_labels.tolist(), "heldout_labels": task.test_labels.tolist()}
    return out


def _open(picture: emoji.Picture) -> Image.Image:
    return emoji.open_picture(picture, size=_SINGLE_SIDE)


def _mask(mask: Image.Image) -> Tensor:
    small = mask.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(small)).long()
