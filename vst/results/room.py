"""A disk that is full, told in one sentence, whichever library was writing."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch.save tell it in words alone; the latter's do not say why a write failed.
_WORDS = re.compile(
    rf"os error ({'|'.join(map(str, _FULL))})\b|no space left|file too large|quota exceeded"
    r"|inline_container|PytorchStreamWriter|unexpected pos",
    re.IGNORECASE,
)


class NoRoom(OSError):
    """The disk, a quota or the largest size of a file left no room for what was to be written."""


@contextmanager
def room_for(what: str, advice: str = "make room and call again") -> Iterator[None]:
    """Turn what libraries raise where a disk is full into one sentence; of nested blocks the outer one's is told.

    Args:
        what: is written, with its place: "the state at step 5 in runs/fit".
        advice: what to do.

    Raises:
        NoRoom: a write failed for want of room.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if full or _WORDS.search(str(error)):
            raise NoRoom(errno.ENOSPC, f"No room to save {what}; {advice}.") from error
        raise
