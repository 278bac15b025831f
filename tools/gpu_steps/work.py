"""What a step is given, what it says, and what is kept of it: nothing with a path of the machine."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vst.results.folders import atomic_path, read_json, write_json

ROOT = Path(__file__).parents[2]
SAID = "said.json"
RUNS = "runs"
_KEPT = ("run.json", "environment.json", "results.json", "tables.md", "*.png", "rows/*.json")
_TEXT = (".json", ".md")


class Skipped(Exception):
    """A step has nothing to do here; the message says why."""


class Incomplete(Exception):
    """A step did less than it was to do; the message says what is missing."""


@dataclass(frozen=True)
class Work:
    """What a step is given.

    Attributes:
        out: folder of results, which may be published.
        scratch: folder of everything else: run folders under ``runs/``, pictures, what was said last.
        dry: in miniature, to see that everything works.
    """

    out: Path
    scratch: Path
    dry: bool

    @property
    def device(self) -> str:
        """cuda where there is one, else cpu."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    def say(self, text: str, outcome: str = "running") -> None:
        """Leave a word for the summary, which finds it there also where the step is ended from outside."""
        write_json(self.scratch / SAID, {"outcome": outcome, "said": clean(text)})

    def folder(self, name: str) -> Path:
        """Of a run whose results are kept, once the step is over, under that name beside the step's own."""
        return self.scratch / RUNS / name

    def attempt(self, parts: dict[str, Callable[[], Any]]) -> None:
        """Call every part, whatever becomes of the others.

        Raises:
            Incomplete: one or more raised an error; each traceback goes to the log.
        """
        failed = []
        for name, part in parts.items():
            try:
                part()
            except Exception as error:
                traceback.print_exc()
                failed.append(f"{name}: {sentence(error)}")
        if failed:
            raise Incomplete("; ".join(failed))


def needs(*packages: str) -> None:
    """See that packages are installed.

    Raises:
        Skipped: some are not.
    """
    if lacking := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise Skipped(f"packages are not installed ({', '.join(lacking)})")


def sentence(error: BaseException) -> str:
    """An error in one line, without a path of the machine, and not a long one."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return clean(text if len(text) <= 300 else f"{text[:300]} ...")


def clean(text: str) -> str:
    """A text without this machine's folders."""
    names = {ROOT: ".", Path(sys.prefix): "PYTHON", Path(tempfile.gettempdir()): "TMP", Path.home(): "~"}
    if given := os.environ.get("VST_HOME"):
        names[Path(given).expanduser()] = "VST_HOME"
    for path, name in sorted(names.items(), key=lambda item: -len(str(item[0]))):
        if len(str(path)) > 1:
            text = text.replace(f"{path}{os.sep}", f"{name}{os.sep}").replace(str(path), name)
    return text


def keep(scratch: Path, out: Path) -> None:
    """Copy what can be published of a step's runs, whole or not, to the folder of its results."""
    for run in sorted((scratch / RUNS).glob("*/")):
        for source in sorted(
            {path for pattern in _KEPT for path in run.glob(pattern) if not path.name.startswith(".")}
        ):
            data = source.read_bytes()
            if source.suffix in _TEXT:
                data = clean(data.decode("utf-8", errors="surrogateescape")).encode("utf-8", errors="surrogateescape")
            with atomic_path(out / run.name / source.relative_to(run)) as temporary:
                temporary.write_bytes(data)


def said(scratch: Path) -> dict[str, str]:
    """What a step said last; empty where it never came to a word."""
    path = scratch / SAID
    return read_json(path) if path.is_file() else {}
