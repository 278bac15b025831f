"""What a task is: pictures, their labels or masks, and which are for training and which for the test.

A task is one class with one ``@register`` line; its keyword arguments are the options that a config may give.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vst.data.images import cut
from vst.data.probes import IGNORED
from vst.models.fields import checked, hints_of
from vst.protocol.config import TaskConfig

TASKS: dict[str, type[Task]] = {}
VOID = 255
"""Value of a mask's pixels that do not count."""


def register(cls: type[Task]) -> type[Task]:
    """Make a task class known by its ``source`` name."""
    TASKS[cls.source] = cls
    return cls


class Task:
    """Base of all tasks. A *row* is the number of one picture in ``pictures``, whatever it is used for.

    Attributes:
        source: name in configs.
        kind: ``classification`` or ``segmentation``.
        pictures: all of them, as :class:`vst.data.pictures.ImageSet` takes them.
        classes: names, in the order of labels.
    """

    source: ClassVar[str]
    kind: str = "classification"
    pictures: Any
    classes: list[str]

    def label(self, row: int) -> int:
        """Class of a picture (classification)."""
        raise NotImplementedError

    def mask(self, row: int) -> Image.Image:
        """Classes of a picture's pixels (segmentation): integers, ``255`` where none counts."""
        raise NotImplementedError

    def size(self, row: int) -> tuple[int, int] | None:
        """Width and height of a picture whose mask comes from elsewhere; None where they cannot disagree."""
        return None

    def divide(self, seed: int) -> tuple[list[int], list[int]]:
        """Rows that may be trained on and rows that may be tested on."""
        raise NotImplementedError


class TwoParts(Task):
    """A pool of training pictures followed by test pictures, divided by their place."""

    train_count: int
    test_count: int

    def divide(self, seed: int) -> tuple[list[int], list[int]]:
        whole = self.train_count + self.test_count
        return list(range(self.train_count)), list(range(self.train_count, whole))


def make_task(name: str, config: TaskConfig) -> Task:
    """Build a task from its config.

    Raises:
        ValueError: an unknown source or option, or fewer than two classes.
    """
    if config.source not in TASKS:
        raise ValueError(f"Task {name!r} has the source {config.source!r}; known sources: {', '.join(sorted(TASKS))}.")
    cls = TASKS[config.source]
    known = {
        n: p for n, p in inspect.signature(cls.__init__).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    missing = [n for n, p in known.items() if p.default is inspect.Parameter.empty and n not in config.options]
    if missing or set(config.options) - set(known):
        raise ValueError(
            f"Task {name!r} ({config.source}) was given the options {sorted(config.options)}; it takes "
            f"{', '.join(known) or 'none'}{f' and needs {missing}' if missing else ''}."
        )
    hints = hints_of(cls.__init__)
    for option, value in config.options.items():
        checked(value, hints.get(option, Any), f"Task {name!r} ({config.source}): {option}")
    task = cls(**config.options)
    if len(task.classes) < 2:
        raise ValueError(
            f"Task {name!r} has {len(task.classes)} class ({', '.join(task.classes)}); expected at least two: add "
            "another class, or check how the data are laid out."
        )
    if task.kind == "segmentation" and len(task.classes) > VOID:
        raise ValueError(f"Task {name!r} has {len(task.classes)} classes; masks have at most {VOID}, 255 is ignored.")
    return task


@dataclass(frozen=True)
class Division:
    """Rows of one task and seed."""

    train: list[int]
    validation: list[int]
    test: list[int]

    def without(self, unreadable: set[int]) -> Division:
        """The same without pictures that cannot be read."""
        parts = ([r for r in part if r not in unreadable] for part in (self.train, self.validation, self.test))
        return Division(*parts)


def draw(name: str, task: Task, config: TaskConfig, seed: int) -> Division:
    """Draw a task's pictures by the seed.

    Raises:
        ValueError: a part is left empty.
    """
    train, test = (list(part) for part in task.divide(seed))
    rng = random.Random(f"{seed}")
    rng.shuffle(train)
    rng.shuffle(test)
    held = min(config.validation, len(train) // 5)
    validation, train = train[:held], train[held:]
    division = Division(train[: config.train], validation, test[: config.test])
    for part, rows in vars(division).items():
        if not rows:
            raise ValueError(
                f"Task {name!r} has no {part} pictures ({len(train) + held} to train on, {len(test)} to test on); give "
                "at least 5 to train on and 1 to test on."
            )
    return division


def labels_of(name: str, task: Task, rows: Sequence[int], how_cut: str, side: int) -> Tensor:
    """Labels ``[rows]`` (long) or masks ``[rows, side, side]`` (int16, ``IGNORED`` where nothing counts).

    Masks are cut as their pictures are and resized to ``side`` by the nearest pixel.

    Raises:
        ValueError: a label outside the classes, a mask of another size than its picture.
    """
    dense, classes = task.kind == "segmentation", len(task.classes)
    labels = torch.empty((len(rows), side, side) if dense else len(rows), dtype=torch.int16 if dense else torch.long)
    for i, row in enumerate(rows):
        value = _mask(name, task, row, how_cut, side) if dense else torch.tensor(task.label(row))
        bad = (value < 0) & ~(dense & (value == IGNORED)) | (value >= classes)
        if bool(bad.any()):
            raise ValueError(
                f"Task {name!r} gives picture {row} the label {int(value[bad].flatten()[0])}; expected 0 to "
                f"{classes - 1}, one for each of its {classes} classes (in masks 255 is ignored): correct the label, "
                "or the classes."
            )
        labels[i] = value
    return labels


def check_classes(name: str, labels: Tensor) -> None:
    """Make sure that there is something to learn.

    Raises:
        ValueError: the training labels are all alike.
    """
    kinds = sorted({int(value) for part in labels for value in part.unique()} - {IGNORED})
    if len(kinds) < 2:
        raise ValueError(
            f"The training pictures of task {name!r} hold only the class {kinds}; expected at least two: use "
            "more training pictures, or another seed."
        )


def _mask(name: str, task: Task, row: int, how_cut: str, side: int) -> Tensor:
    mask, size = task.mask(row), task.size(row)
    if size is not None and size != mask.size:
        raise ValueError(
            f"Task {name!r}: the mask of picture {row} is {mask.width} x {mask.height} pixels, its picture {size[0]} x "
            f"{size[1]}; expected the same size: correct the pair, or resize the mask by the nearest pixel."
        )
    if mask.mode not in ("L", "P", "I", "I;16", "1"):
        raise ValueError(
            f"Task {name!r}: the mask of picture {row} has mode {mask.mode}; expected one channel of class numbers."
        )
    square = cut(mask, how_cut).resize((side, side), Image.Resampling.NEAREST)
    values = np.array(square).astype(np.int32)
    return torch.from_numpy(np.where(values == VOID, IGNORED, values))
