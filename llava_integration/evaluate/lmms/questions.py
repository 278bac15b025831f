"""The data of the local tasks: questions with their pictures in folders that lmms-eval reads without any network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_integration.answer import easy_vqa, scenes
from llava_integration.answer.ask import Question
from vst.demo import assets as pictures
from vst.results.folders import read_json, write_json

TASKS = Path(__file__).parents[1] / "tasks"
"""Folder of the task files, for lmms-eval's ``--include_path``."""

STYLE, SEED = "fluent", 1000
"""Of the scenes: a style that the demo does not train on."""

COUNT = 500
_FACTS = "vst.json"


@dataclass(frozen=True)
class Source:
    """Where the questions of one task come from.

    Attributes:
        draw: of how many there are to be, of a folder for pictures, and of ``root``.
        root: makes that folder ready and gives its path.
    """

    draw: Callable[[int, Path, Path], list[Question]]
    root: Callable[[], Path]


def _scenes(kinds: Sequence[str]) -> Callable[[int, Path, Path], list[Question]]:
    return lambda count, folder, root: scenes.questions(folder, root, count, STYLE, SEED, kinds)


DATASETS = {
    "vst_easy_vqa": Source(lambda count, folder, root: easy_vqa.questions(root, count), easy_vqa.prepare),
    "vst_scenes": Source(_scenes(scenes.KINDS), pictures.prepare_emoji),
    "vst_labels": Source(_scenes((scenes.LABEL,)), pictures.prepare_emoji),
}
"""By task."""


def home() -> Path:
    """Where the questions live: ``$VST_TASKS``, else ``tasks`` in :func:`vst.demo.assets.home`."""
    given = os.environ.get("VST_TASKS")
    return Path(given).expanduser() if given else pictures.home() / "tasks"


def written(task: str) -> bool:
    """Whether a task's questions are there."""
    return (home() / task / _FACTS).is_file()


def find(task: str) -> Path:
    """Folder of a task's questions.

    Raises:
        FileNotFoundError: they were not written.
    """
    folder = home() / task
    if not written(task):
        raise FileNotFoundError(
            f"{folder} does not hold the questions of {task}; write them with python -m llava_integration tasks, or "
            "name the folder that holds them in VST_TASKS."
        )
    _count(folder, task)
    return folder


def write(
    folder: Path | None = None,
    count: int = COUNT,
    tasks: Sequence[str] = tuple(DATASETS),
    overwrite: bool = False,
    **roots: Path,
) -> Path:
    """Write the questions of local tasks; what is there with as many questions is left as it is.

    Args:
        folder: where to, one folder a task; default: :func:`home`.
        count: questions a task; fewer of easy-VQA are a part of more.
        tasks: of ``DATASETS``.
        overwrite: replace what is there with another number of questions.
        roots: folder of pictures by task; default: the demo's own, made ready where it is missing.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown task, or more questions than there are.
        FileExistsError: another number of questions is there and ``overwrite`` is False, or something else is there.
    """
    folder = home() if folder is None else Path(folder)
    if unknown := set(tasks) - set(DATASETS):
        raise ValueError(f"There are no questions for {', '.join(sorted(unknown))}; expected {', '.join(DATASETS)}.")
    if count < 1:
        raise ValueError(f"count is {count}, but must be at least 1.")
    for task in tasks:
        target = folder / task
        if (target / _FACTS).is_file():
            there = _count(target, task)
            if there == count:
                continue
            if not overwrite:
                raise FileExistsError(
                    f"{target} holds {there} questions, not {count}; give overwrite, that count, or another folder."
                )
        elif target.exists():
            raise FileExistsError(f"{target} holds something else than questions ({_FACTS}); give another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as name:
            source = DATASETS[task]
            root = roots[task] if task in roots else source.root()
            _save(source.draw(count, Path(name) / "pictures", root), Path(name) / "new")
            write_json(Path(name) / "new" / _FACTS, {"task": task, "count": count})
            if overwrite and target.exists():
                os.replace(target, Path(name) / "old")
            try:
                os.replace(Path(name) / "new", target)
            except OSError:
                if not (target / _FACTS).is_file():  # else another process was faster, with the same questions
                    raise
    return folder


def _count(folder: Path, task: str) -> int:
    """How many questions a folder holds, once it is sure that they are the task's."""
    facts = read_json(folder / _FACTS)
    if not isinstance(facts, dict) or facts.get("task") != task or not isinstance(facts.get("count"), int):
        raise ValueError(
            f"{folder / _FACTS} does not tell of questions of {task}; give another folder, or move this one away."
        )
    return facts["count"]


def _save(questions: Sequence[Question], folder: Path) -> None:
    """As a dataset of ``image``, ``question``, ``answer``, ``kind`` and ``picture`` (which picture it is about)."""
    from datasets import Dataset, DatasetDict, Features, Image, Value
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": q.image.read_bytes(), "path": None} for q in questions],
        "question": [q.question for q in questions],
        "answer": [q.answer for q in questions],
        "kind": [q.kind for q in questions],
        "picture": [q.image.stem for q in questions],
    }
    features = Features({name: Image() if name == "image" else Value("string") for name in columns})
    DatasetDict({"test": Dataset.from_dict(columns, features=features)}).save_to_disk(folder)
