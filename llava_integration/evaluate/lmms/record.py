"""What was evaluated: kept beside the scores, so that a number can be traced to its model, prompt and versions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vst.results.folders import environment

NAME = "vst_llava"
"""The model's name in lmms-eval, and the key of its record in lmms-eval's results (config.resolved_cli_args)."""


def describe(model: Any, **options: Any) -> dict[str, Any]:
    """The facts of a language model on a tree that a score depends on.

    Args:
        model: the whole model.
        options: what it was loaded and asked with; put first.

    Returns:
        For JSON: ``options``, the tree (models, split, splits held, fusion, image size), projector and versions; an
        empty ``prompts`` to be filled with one resolved prompt a task.
    """
    vision = model.config.vision_config
    tree = vision.tree_config()
    projector = model.config.projector_spec().to_dict() if hasattr(model.config, "projector_spec") else None
    return {
        **options,
        "split": None if vision.full or not tree.branches else model.model.vision_tower.split,
        "splits": tree.splits,
        "full": vision.full,
        "fusion": tree.fusion,
        "models": tree.names,
        "image_size": tree.image_size,
        "projector": projector,
        "language_model": model.config.text_config.model_type,
        "versions": environment("cpu")["versions"],
        "prompts": {},
    }


def publish(record: dict[str, Any], requests: Iterable[Any]) -> None:
    """Let lmms-eval's own results hold the record.

    A model has no say in them. But each task knows the options of the command line, which are copied into the results
    after the last answer; that is where the record is put.
    """
    for request in requests:
        task = getattr(request.args[2], "__self__", None)
        options = getattr(task, "args", None)
        if options is not None:
            setattr(options, NAME, record)
            return
