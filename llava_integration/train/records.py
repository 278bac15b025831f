"""Files of records, as people write them: one list as JSON, or one record a line as JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def read_records(files: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Records of all files, with names ``FILE:NUMBER``, counted from 1.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds something else than its ending says.
    """
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no file of conversations {file}; give a JSON or JSONL file (files).")
        records = _lines(file) if file.lower().endswith(".jsonl") else _whole(file)
        for number, record in enumerate(records, 1):
            yield f"{file}:{number}", record


def _whole(file: str) -> list[Any]:
    try:
        records = json.loads(Path(file).read_bytes())
    except (ValueError, RecursionError) as error:
        by_line = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.doc[error.pos] == "{"
        advice = "it holds one record a line, so let its name end in .jsonl" if by_line else "mend it"
        raise ValueError(f"{file} is no valid JSON ({_fault(error)}); {advice}.") from error
    if not isinstance(records, list):
        raise ValueError(f"{file} holds no list of records; expected one, or one record a line in a .jsonl file.")
    return records


def _lines(file: str) -> Iterator[Any]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            is_list = number == 1 and line.lstrip(b"\xef\xbb\xbf").lstrip()[:1] == b"["
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                advice = "it begins a list, so let its name end in .json" if is_list else "mend the line or cut it out"
                raise ValueError(f"{file}:{number} is no valid JSON ({_fault(error)}); {advice}.") from error
            if is_list:
                raise ValueError(f"{file} holds a list, not one record a line; let its name end in .json.")
            yield record


def _fault(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        if error.object[:2] == b"\x1f\x8b":
            return "it is compressed by gzip: unpack it"
        return f"byte {error.object[error.start]:#04x} at {error.start} is not UTF-8: save it in that encoding"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
