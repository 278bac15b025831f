"""Toy questions in easy-VQA's layout, and what a record of conversations asks and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
EASY_VQA: dict[str, list] = {
    "train": [
        ["what is the blue shape?", "circle", 0],
        ["is there a red shape?", "no", 0],
        ["what color is the shape?", "blue", 0],
        ["is no circle present?", "no", 0],
        ["what shape is present?", "triangle", 10],
        ["is there a triangle?", "yes", 10],
        ["what is the color of the shape?", "teal", 2],
    ],
    "test": [
        ["is there a triangle?", "no", 1],
        ["what shape is in the image?", "circle", 1],
        ["what is the color of the circle?", "gray", 0],
    ],
}


def png(colour: tuple[int, int, int], path: Path, size: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)


@pytest.fixture
def vqa(tmp_path):
    root = tmp_path / "easy-vqa"
    for split, asked in EASY_VQA.items():
        (root / split).mkdir(parents=True)
        (root / split / "questions.json").write_text(json.dumps(asked))
        for number in {number for *_, number in asked}:
            png((number, 0, 0), root / f"{split}/images/{number}.png")
    return root


def turns_of(record: dict) -> list[tuple[str, str]]:
    """A record's questions and answers, once its form was checked."""
    turns = record["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert ["<image>" in turn["value"] for turn in turns] == [True] + [False] * (len(turns) - 1)
    assert turns[0]["value"].startswith("<image>\n")
    texts = [turn["value"].removeprefix("<image>\n") for turn in turns]
    return list(zip(texts[::2], texts[1::2], strict=True))
