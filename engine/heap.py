"""The C library's heap, told to keep what tensors give back.

A pass takes and frees gigabytes. By default glibc returns them to the system, which then clears the same pages for the
next pass, one fault each: 50,000 to 100,000 a pass, 6 to 10 % of its time (docs/log.md).
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
_NEVER = -1
_LARGEST_ON_HEAP = (1 << 30, 32 << 20)
"""Bytes of an allocation, the most that is taken (older glibc takes no more than the second); larger ones still come
from the system and go back to it."""


def keep_freed() -> None:
    """For the whole process; it holds its peak of memory until it ends. Without glibc nothing changes.

    Threads share one heap from now on: what one of them frees is there for the next. Those that have another keep it,
    so this comes before them, or `MALLOC_ARENA_MAX=1` before all.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        any(mallopt(_M_MMAP_THRESHOLD, largest) for largest in _LARGEST_ON_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
        mallopt(_M_ARENA_MAX, 1)
