"""What a step on a processor frees is kept for the next one."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have the C library give no memory back to the system while this process lives.

    A step frees its activations, gigabytes of them, and the next one asks for as many. By default glibc takes each block above
    32 MB from the system and hands it back when it is freed, and the kernel clears every page anew: a fifth of a step of
    MAE-base.

    Returns: whether it does so now. Not where the environment tunes the allocator by itself (`MALLOC_...`, `GLIBC_TUNABLES`),
        nor with another library; another allocator, preloaded, goes its own way.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018, others know the call, not its numbers
        change = library.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return change(MMAP_MAX, 0) == change(TRIM_THRESHOLD, -1) == 1
