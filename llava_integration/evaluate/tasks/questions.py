"""What the task files beside this one name: the folder of their questions, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_integration.answer.scoring import normalise
from llava_integration.evaluate.lmms.questions import DATASETS, find


def __getattr__(name: str) -> str:
    """Folder of a task's questions, looked for whenever a task file is read."""
    if name in DATASETS:
        return str(find(name))
    raise AttributeError(name)


def exact_match(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 for an answer that is the expected one after ``scoring.normalise``, else 0: over all kinds, and for its own."""
    right = float(normalise(results[0]) == normalise(doc["answer"]))
    kind = doc["kind"].replace("yes/no: ", "yes no ").replace(" ", "_")
    return {"exact_match": right, f"exact_match_{kind}": right}
