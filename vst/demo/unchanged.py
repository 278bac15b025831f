"""Whether a folder of assets is still what was made: told by its files' times, and by their bytes where those moved.

To look at the files is cheap, to read them is not. Only where a size, a time or a place on the disk is another than at
the last look are they read as a whole, and compared with what was made. What is known stands in ``digests.json`` beside
the folders: ``ready.json`` is compared as a whole by versions that know no digests.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from vst.results.folders import write_json

DIGESTS = "digests.json"


def object_in(path: Path) -> dict[str, Any]:
    """A JSON object whose values are objects; what is no such file counts as none, so that folders are looked at."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    found = found if isinstance(found, dict) else {}
    return {name: facts for name, facts in found.items() if isinstance(facts, dict)}


def contents(folder: Path) -> dict[str, int]:
    """Number of files and their bytes."""
    sizes = [stat.st_size for _, stat in _files(folder)]
    return {"files": len(sizes), "bytes": sum(sizes)}


def looked_at(folder: Path) -> bool:
    """Whether no file was written to, put there or taken away since :func:`remember`."""
    facts = object_in(folder.parent / DIGESTS).get(folder.name, {})
    return facts.get("looks") == _looks(folder)


def unchanged(folder: Path) -> bool:
    """Whether the bytes are those of :func:`remember`; of a folder made by a version that kept none, True."""
    known = object_in(folder.parent / DIGESTS).get(folder.name, {}).get("sha256")
    return known is None or known == _digest(folder)


def remember(folder: Path) -> None:
    """Note a folder's bytes and looks; the caller holds the lock of the assets."""
    looks = _looks(folder)  # before the bytes are read: what is written meanwhile shows
    path = folder.parent / DIGESTS
    write_json(path, object_in(path) | {folder.name: {"sha256": _digest(folder), "looks": looks}})


def _files(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Every file by its path in the folder."""
    out = {}
    for path in (os.path.join(at, name) for at, _, names in os.walk(folder) for name in names):
        with suppress(FileNotFoundError):  # a link to nothing, or taken away at this moment: it counts as missing
            out[os.path.relpath(path, folder)] = os.stat(path)
    return sorted(out.items())


def _looks(folder: Path) -> str:
    kept = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in _files(folder)]
    return hashlib.sha256(repr(kept).encode()).hexdigest()


def _digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for name, _ in _files(folder):
        own = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                own.update(block)
        whole.update(f"{name} {own.hexdigest()}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()
