"""Which tasks are run together."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from llava_integration.evaluate.lmms.questions import DATASETS, TASKS

SUITES = {
    "local": tuple(DATASETS),
    "paper": (
        "vqav2_val",
        "mme",
        "gqa",
        "textvqa_val",  # without hints: lmms-eval's default
        "vst_textvqa_val_ocr",  # with the words of an OCR system as hints
        "pope",
        "mmvp",
    ),
}
"""By name. ``local`` needs no network; ``paper`` is lmms-eval's own tasks over data from the Hugging Face hub."""


def manager(tasks: Sequence[str], include: str | None = None) -> Any:
    """lmms-eval's index of tasks; its own hundreds are read (some eight seconds) only where they are asked for.

    Args:
        tasks: names, groups, tags or patterns with ``*``.
        include: folder of more task files.

    Raises:
        ValueError: there is no such task.
    """
    from lmms_eval.tasks import TaskManager

    from llava_integration.evaluate.lmms.record import NAME

    paths = [str(TASKS), *([include] if include else [])]
    for defaults in (False, True):
        index = TaskManager("WARNING", include_path=paths, include_defaults=defaults, model_name=NAME)
        missing = [task for task in tasks if not index.match_tasks([task])]
        if not missing:
            return index
    near = difflib.get_close_matches(missing[0], index.all_tasks, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "python -m lmms_eval tasks list shows its own."
    raise ValueError(f"There is no task {missing[0]!r}; local ones are {', '.join(DATASETS)}; {hint}")
