"""Evaluate a trained model with lmms-eval, or with a config that has rows sweep over many of them.

As ``python -m llava_integration evaluate`` and ``sweep``: see --help, and --config configs/llava/sweep.yaml --help.
"""

import sys
from pathlib import Path

import yaml

from llava_integration.evaluate.lmms.commands import evaluate
from llava_integration.evaluate.sweep import sweep
from vst.parsing import command


def has_rows(words: list[str]) -> bool:
    """Whether a config among the words of the command line is a sweep's."""
    files = [Path(after) for word, after in zip(words, [*words[1:], ""], strict=True) if word == "--config"]
    files += [Path(word.partition("=")[2]) for word in words if word.startswith("--config=")]
    return any("rows" in (yaml.safe_load(file.read_text()) or {}) for file in files if file.is_file())


if __name__ == "__main__":
    command(sweep if has_rows(sys.argv[1:]) else evaluate)
