"""DeepSpeed compiles its operators when they are first used: locks of builds that were killed, and those going on.

A process that finds the file ``lock`` in an operator's build folder waits for it to go, without a word and without end
(``torch.utils.file_baton``), though its maker may have been killed long ago.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_QUIET_S = 600.0  # a build that goes on writes its folder more often


def builds_folder() -> Path:
    """Where torch builds extensions: ``TORCH_EXTENSIONS_DIR``, or its folder in the user's cache."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    # As torch.utils.cpp_extension has it, which cannot be imported everywhere: it replaces distutils in the process.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def stale_locks() -> list[Path]:
    """Locks of builds that no process of this machine is at; another machine with the same folder may be."""
    return [lock for lock in _locks() if _holder(lock) is None]


def clear_stale_locks() -> None:
    """Tell of every build that is going on or was left; the lock of one that was clearly left is removed.

    That is: no process of this machine has it open, it is this user's, and its folder has not changed for ten minutes.
    """
    for lock in _locks():
        operator, holder = lock.parent.name, _holder(lock)
        if holder is not None:
            _say(
                f"DeepSpeed's operator {operator} is being built in {lock.parent} by process {holder}: waiting for it."
            )
        elif _is_left(lock):
            lock.unlink(missing_ok=True)
            _say(f"Removed {lock}, which a build of the operator {operator} left when it was killed.")
        else:
            _say(
                f"{lock} says that the operator {operator} is being built, but no process of this machine is at it: if "
                "none of another machine is either, this run waits for ever; stop it and delete the file."
            )


def _locks() -> list[Path]:
    root = builds_folder()
    return sorted({*root.glob("*/lock"), *root.glob("*/*/lock")})


def _is_left(lock: Path) -> bool:
    try:
        if not Path("/proc/self/fd").is_dir() or lock.stat().st_uid != os.getuid():
            return False  # who has it open cannot be seen
        changed = max(path.stat().st_mtime for path in (lock.parent, *lock.parent.iterdir()))
    except OSError:  # it has just gone
        return False
    return time.time() - changed > _QUIET_S


def _holder(lock: Path) -> int | None:
    """The process of this machine that has the lock open, as its maker has until it is done."""
    with suppress(OSError):
        wanted = os.path.realpath(lock)
        for process, file in _open_files():
            if file == wanted:
                return process
    return None


def _open_files() -> Iterator[tuple[int, str]]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or gone
            for file in os.scandir(process / "fd"):
                with suppress(OSError):
                    yield int(process.name), os.readlink(file.path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
