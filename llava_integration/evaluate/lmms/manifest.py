"""The entry point by which lmms-eval finds the model; importing it makes transformers know the tree as well.

So ``--model llava_hf`` reads a saved model too: the packages of all entry points are imported before a model is chosen.
"""

from __future__ import annotations

from typing import Any

import llava_integration  # noqa: F401 (registers the Auto classes)
from llava_integration.evaluate.lmms.record import NAME


def manifest() -> Any:
    """What lmms-eval wants to know: a name and the class behind it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path="llava_integration.evaluate.lmms.model.VSTLlava")
