"""How much of a range of this process's memory is there: the system provides a page when it is first written."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any


@cache
def _mincore() -> Any:
    """Return the system's mincore; None where there is none (Windows)."""
    import ctypes

    try:
        found = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p), ctypes.c_int
    return found


def resident(address: int, nbytes: int) -> int:
    """Return how many of the bytes from `address` on are in main memory, in whole pages but for the first and the last.

    Counts for anonymous memory that is mapped. 0 where the system cannot be asked (Windows). mincore(2) of Linux and of macOS:
    bit 0 of a page's byte says that it is there.
    """
    ask = _mincore()
    if nbytes <= 0 or ask is None:
        return 0
    import ctypes
    import mmap

    import numpy as np

    page = mmap.PAGESIZE
    start = address // page * page
    there = np.zeros(-(-(address + nbytes - start) // page), np.uint8)
    if ask(start, address + nbytes - start, there.ctypes.data):
        raise OSError(ctypes.get_errno(), f"mincore: {nbytes} bytes from {address:#x} on {sys.platform}")
    there &= 1
    n = int(there.sum()) * page
    n -= (address - start) * int(there[0])
    return n - (start + len(there) * page - address - nbytes) * int(there[-1])
