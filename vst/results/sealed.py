"""Folders of several files, such as training states: sizes and digests written last, by which damage is found."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vst.results.folders import read_json, write_json

SEAL = "digests.json"


def seal(folder: Path) -> None:
    """Write ``digests.json``: of every file in the folder its ``bytes`` and ``sha256``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(_digest, files)
    facts = [{"bytes": path.stat().st_size, "sha256": d} for path, d in zip(files, digests, strict=True)]
    write_json(folder / SEAL, {path.relative_to(folder).as_posix(): f for path, f in zip(files, facts, strict=True)})


def damage(folder: Path) -> str | None:
    """What is wrong with a folder since it was sealed, in words, or None. Files that came later are not looked at.

    A folder without ``digests.json`` was written by a version that left none, and passes.
    """
    if not (folder / SEAL).exists():
        return None
    try:
        sealed = read_json(folder / SEAL)
        facts = {name: (fact["bytes"], fact["sha256"]) for name, fact in sealed.items()}
    except (ValueError, AttributeError, TypeError, KeyError):
        return f"{SEAL} is damaged"
    for name, (size, _) in facts.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    with ThreadPoolExecutor(4) as pool:
        digests = dict(zip(facts, pool.map(_digest, (folder / name for name in facts)), strict=True))
    return next((f"{name} is not what was written" for name, (_, d) in facts.items() if digests[name] != d), None)


def newest_sound(
    folders: Sequence[Path], kind: str, implausible: Callable[[Path], str | None], start_again: str
) -> Path | None:
    """The newest of several states that is what was written; None where there is none at all.

    A damaged one is passed over for the one before it, with a warning.

    Args:
        folders: the newest first.
        kind: what they are called.
        implausible: tells in words what cannot be in one, or None; it is all that tells where there is no seal.
        start_again: what to do where none is sound.

    Raises:
        ValueError: none is sound.
    """
    complaints: list[str] = []
    for folder in folders:
        wrong = damage(folder) or implausible(folder)
        if wrong is None:
            if complaints:
                warnings.warn(f"{'; '.join(complaints)}; going on from {folder.name}.", stacklevel=3)
            return folder
        complaints.append(f"The {kind} {folder} is damaged ({wrong})")
    if complaints:
        raise ValueError(
            f"{'; '.join(complaints)}, and there is no other to go on from: put back what was written, or "
            f"{start_again}."
        )
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
