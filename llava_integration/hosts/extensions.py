"""What torch builds in the background for DeepSpeed, and locks that a build left behind.

``torch.utils.cpp_extension`` takes a file ``lock`` in the folder of an extension and holds it open until the build is
done. A process that is killed leaves it there, and every later run waits for it without a word.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

HELD_FOR = 3600  # seconds: where nobody can tell who holds a lock, no build takes longer


def extensions_folder() -> Path:
    """Where torch builds extensions: ``TORCH_EXTENSIONS_DIR``, or its cache."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def stale_locks(folder: str | Path | None = None) -> list[Path]:
    """Locks in a folder of extensions that no living process holds.

    Args:
        folder: of the extensions; default: :func:`extensions_folder`.
    """
    root = extensions_folder() if folder is None else Path(folder)
    locks = [lock for pattern in ("*/lock", "*/*/lock") for lock in sorted(root.glob(pattern)) if lock.is_file()]
    return [lock for lock in locks if not _is_held(lock)]


def stale_lock_message(locks: list[Path]) -> str:
    """What to do about such locks."""
    names = ", ".join(str(lock) for lock in locks)
    return (
        f"a build of an extension was ended before it was done and left {names}, for which every later run under "
        "DeepSpeed waits without end: see that no other machine builds there, and remove it."
    )


def _is_held(lock: Path) -> bool:
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(lock.resolve()):
                return True
        except OSError:  # it has ended since, or is somebody else's
            continue
    try:
        made = lock.stat()
    except OSError:  # the build has ended since
        return True
    seen = Path("/proc/self/fd").is_dir() and made.st_uid == os.getuid()
    return not seen and time.time() - made.st_mtime < HELD_FOR
