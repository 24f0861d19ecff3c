"""What the checked emulator counts of a kernel's requests to memory: csrc/emulate/check.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from .ptxas import plain


class Traffic(ctypes.Structure):
    """Requests of warps, bytes that threads asked for, sectors of 32 bytes (of shared memory: passes), passes beyond the first."""

    _fields_ = [(name, ctypes.c_int64) for name in ("requests", "bytes", "sectors", "conflicts")]

    def to_json(self) -> dict[str, int]:
        """Return plain data."""
        return {name: getattr(self, name) for name, _ in self._fields_}


class Counts(ctypes.Structure):
    """Counts of one kernel since the last reset. threads, shared_bytes: of a block, the largest; different_loads, different_stores: the
    sectors that each launch touched at least once, what memory must give if a cache holds all of them."""

    _fields_ = [*((name, ctypes.c_int64) for name in ("launches", "blocks", "barriers", "collectives", "mma", "dp4a", "atomics")),
                *((name, Traffic) for name in ("loads", "stores", "shared_loads", "shared_stores")),
                *((name, ctypes.c_int64) for name in ("threads", "shared_bytes", "different_loads", "different_stores"))]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {name: v.to_json() if isinstance(v := getattr(self, name), Traffic) else v for name, _ in self._fields_}


class Counter:
    """Counts of a library in its checked form."""

    def __init__(self, path: str):
        self.flat = ctypes.CDLL(path)

    def reset(self) -> None:
        """Forget all counts."""
        self.flat.pe_emulated_reset()

    def kernels(self) -> dict[str, tuple[int, Counts]]:
        """Return number and counts of each kernel that was launched since, by name."""
        out = {}
        for i in range(self.flat.pe_emulated_kernels()):
            name, counts = ctypes.create_string_buffer(1024), Counts()
            self.flat.pe_emulated_kernel(i, name, len(name), ctypes.byref(counts))
            out[plain(name.value.decode())] = i, counts
        return out

    def buffer(self, i: int, address: int) -> tuple[Traffic, Traffic]:
        """Return what kernel number i loaded and stored in the allocation that holds an address."""
        loads, stores = Traffic(), Traffic()
        self.flat.pe_emulated_buffer(i, ctypes.c_uint64(address), ctypes.byref(loads), ctypes.byref(stores))
        return loads, stores
