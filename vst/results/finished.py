"""Results that are read again: files that may have been cut or edited, or written by another command or version."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vst.results.folders import read_json

ADVICE = "restore it, or move it away and call again, which makes it from what else is kept"
ROWS = "restore the row, or move it away and call again, which makes it again"


def read_results(path: Path, by: str, advice: str = ADVICE) -> Any:
    """What a finished run found, out of its ``results.json``.

    Args:
        path: of the file.
        by: the command that writes it.
        advice: what to do where it is something else.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds no results.
    """
    stored = read_json(path, advice)
    if not isinstance(stored, dict) or "results" not in stored:
        raise ValueError(f"{path} is not what {by} writes (it holds no results); {advice}.")
    return stored["results"]


@contextmanager
def as_written(path: Path, by: str, advice: str = ADVICE) -> Iterator[None]:
    """Turn what goes wrong with values out of a file that is not as it was written into one sentence that names it.

    Raises:
        ValueError: the block looked for what is not there, or counted with what is no number.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, StopIteration, zlib.error) as error:
        fault = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} is not what {by} writes ({fault or 'a part of it is missing'}); {advice}.") from error
