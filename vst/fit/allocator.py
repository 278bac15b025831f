"""The C library's allocator on a CPU: keep freed memory instead of handing it back.

glibc maps every large block anew and gives it back when it is freed, so each step of a training loop has its
activations zeroed page by page by the kernel.
"""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Take large blocks from the heap and never shrink it, for this process; False where there is no glibc.

    For scripts that train on a CPU: the process keeps what it once used.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(
        mallopt(option, value) == 1
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2**28))
    )
