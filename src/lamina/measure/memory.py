"""How much memory there is, and giving back what is not needed any more."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path


def free_memory() -> float:
    """Return how much memory could be taken now [bytes]; infinite where that is not known."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, AttributeError, IndexError):
        return float("inf")


def give_back() -> None:
    """Give freed memory back to the system, where the C library keeps it for itself (glibc).

    Buffers of some megabytes come from its heap, which only shrinks from its end: after a few
    layers hundreds of megabytes there are free and still count as the process's own.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], object] | None:
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found
