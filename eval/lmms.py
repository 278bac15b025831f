"""Evaluate a model with lmms-eval: ``python eval/lmms.py --model FOLDER --out FOLDER`` (``--help`` tells all)."""

from llava_integration.lmms.commands import evaluate
from vst.cli import command

if __name__ == "__main__":
    command(evaluate)
