"""The offline demo of LLaVA on a tree: a small language model, a published set of questions, and scenes of emoji."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def record(name: str, image: str, turns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """One conversation about one picture in LLaVA's format.

    Args:
        name: the record's id.
        image: the picture's path, relative to wherever the reader is told that pictures are.
        turns: questions and answers, in order; the picture comes before the first.
    """
    conversation: list[dict[str, str]] = []
    for question, answer in turns:
        start = "" if conversation else "<image>\n"
        conversation += [{"from": "human", "value": start + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": conversation}
