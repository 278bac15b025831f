"""lmms-eval: a model on a tree under its name ``vst_llava``, tasks of our own, and :func:`evaluate` from Python.

Nothing here needs lmms-eval to be imported; what runs it does.
"""

from __future__ import annotations

from llava_integration.evaluate.lmms.evaluation import EvaluationFailed, evaluate
from llava_integration.evaluate.lmms.questions import DATASETS, TASKS, write
from llava_integration.evaluate.lmms.suites import SUITES

__all__ = ["DATASETS", "SUITES", "TASKS", "EvaluationFailed", "evaluate", "write"]
