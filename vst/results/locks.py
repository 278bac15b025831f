"""One writer a run folder: an advisory lock that the system lets go of when its holder dies."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

LOCK = ".lock"


@dataclass
class _Hold:
    owner: int  # the process
    file: int | None  # the open lock file; None where there can be none
    made: bool  # whether the folder was made for it
    times: int = 1  # how often it was asked for


_held: dict[Path, _Hold] = {}
_guard = threading.RLock()


class FolderInUse(RuntimeError):
    """Another process writes to the folder."""


def hold(folder: str | os.PathLike) -> None:
    """Take a run folder for this process until :func:`let_go`, or the process' end; it is made where it is missing.

    What runs inside one process shares its folders: each ``hold`` is undone by one ``let_go``. The lock is a POSIX
    record lock on the hidden file ``.lock``: it ends with its process however that ends, and forked children, such as
    the workers of a data loader, do not keep it alive. A file that a killed process left is in nobody's way. Where the
    file system knows no locks, a warning is given and the folder is not guarded.

    Args:
        folder: the run's.

    Raises:
        FolderInUse: another process holds it.
        ValueError: it is a file.
    """
    folder = Path(folder).resolve()
    with _guard:
        if folder in _held:
            _held[folder].times += 1
            return
        _held[folder] = _taken(folder)


def let_go(folder: str | os.PathLike) -> None:
    """Undo one :func:`hold`; the last one takes the lock file away, and a folder that was made and stayed empty."""
    folder = Path(folder).resolve()
    with _guard:
        if folder not in _held:
            return
        hold = _held[folder]
        hold.times -= 1
        if hold.times:
            return
        del _held[folder]
        if hold.file is None:
            return
        if hold.owner == os.getpid():  # a forked child has no part in the lock
            (folder / LOCK).unlink(missing_ok=True)
            if hold.made:
                with suppress(OSError):  # something was written
                    folder.rmdir()
        os.close(hold.file)


@contextmanager
def held(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a run folder for a block of code."""
    hold(folder)
    try:
        yield
    finally:
        let_go(folder)


def _taken(folder: Path) -> _Hold:
    while True:
        made = True
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            made = False
        # Who let go of an empty folder takes it away, at any moment between these calls.
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(folder.stat().st_mode):
                raise ValueError(f"{folder} is a file, but a run needs a folder; give another name.")
            return _Hold(os.getpid(), _locked(folder / LOCK), made)


def _locked(path: Path) -> int | None:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder is gone
            raise
        except OSError as error:
            if os.access(path.parent, os.W_OK):
                _unguarded(path.parent, error)
            return None  # else a folder that can only be read, and needs no guard
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.read(file, 32).decode("ascii", "replace").strip()
            os.close(file)
            who = f"another process (number {owner} where it runs)" if owner else "another process"
            raise FolderInUse(
                f"{path.parent} is in use by {who}; wait until that has ended, end it, or give another folder."
            ) from error
        except OSError as error:
            os.close(file)
            _unguarded(path.parent, error)
            return None
        try:
            current = os.stat(path).st_ino
        except FileNotFoundError:
            current = None
        if current == os.fstat(file).st_ino:
            os.ftruncate(file, 0)
            os.write(file, f"{os.getpid()}\n".encode())
            return file
        os.close(file)  # its holder took the file away between the two calls: what was locked is nobody's any more


def _unguarded(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"{folder} cannot be locked ({error.strerror}): see to it that no other process writes to it.", stacklevel=4
    )
