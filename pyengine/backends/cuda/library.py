"""The libraries of CUDA kernels, opened: that for cards, and that for the emulator. Their flat functions are those of csrc/cuda/runtime.h."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.errors import GraphError, PlanError, PyEngineError
from pyengine.native import ffi
from pyengine.records import NamedTuple

BUILT = Path(__file__).resolve().parents[2] / "_cuda.so"                       # by `build`, for cards
NO_MEMORY = 4                                                                  # pe_status


class Facts(NamedTuple):
    """What a device says of itself. Sizes are bytes."""

    name: str
    capability: int
    multiprocessors: int
    total: int
    free: int


class Library:
    """Flat functions of one of the libraries; those that fail raise."""

    def __init__(self, path: Path, emulated: bool):
        self.path, self.emulated = path, emulated
        self.flat: Any = ffi.dlopen(str(path))
        layout = 0
        for struct in ("facts", "tensor", "node", "transfer", "outcome"):
            layout = 1000 * layout + ffi.sizeof(f"pe_card_{struct}")
        try:
            found = int(self.flat.pe_card_layout())
        except ffi.error:                                    # no such function
            found = 0
        if layout != found:
            raise GraphError(f"{path.name} and pyengine/_abi.py were made from different sources: build both again (`pip install -e .`, `make cuda`)")

    def __call__(self, name: str, *args: Any) -> None:
        """Call a function that returns a status. Raises: PlanError where memory is missing, PyEngineError for what the driver says."""
        status = getattr(self.flat, f"pe_card_{name}")(*args)
        if status:
            raise self.error(status)

    def error(self, status: int) -> PyEngineError:
        """Return the error for a status, with the words of the library."""
        text = ffi.string(self.flat.pe_card_error()).decode("utf-8", "replace")
        return PlanError(f"cuda: the device's memory is full: {text}") if status == NO_MEMORY else PyEngineError(f"cuda: {text}")

    def kernels(self) -> frozenset[str]:
        """Return the names of the ops that have kernels."""
        found: list[str] = []
        while (name := self.flat.pe_card_kernel(len(found))) != ffi.NULL:
            found.append(ffi.string(name).decode())
        return frozenset(found)

    def versions(self) -> tuple[int, int]:
        """Return (what the driver can do, what this was built with), as 1000 * major + 10 * minor; a driver of 0 is none."""
        driver, runtime = ffi.new("int32_t *"), ffi.new("int32_t *")
        self("versions", driver, runtime)
        return driver[0], runtime[0]

    def count(self) -> int:
        """Return how many devices there are. Raises: PyEngineError without a driver, or with one that is too old."""
        driver, runtime = self.versions()
        if driver == 0:
            raise PyEngineError("cuda: there is no NVIDIA driver on this machine (nvidia-smi would show one)")
        if driver // 1000 < runtime // 1000:
            raise PyEngineError(f"cuda: the driver can do CUDA {_version(driver)}, and {self.path.name} was built with {_version(runtime)}: "
                                "install a newer driver, or build with an older toolkit (`make cuda`)")
        n = ffi.new("int32_t *")
        self("count", n)
        return int(n[0])

    def facts(self, device: int) -> Facts:
        """Return what a device says of itself."""
        f = ffi.new("pe_card_facts *")
        self("facts_of", device, f)
        return Facts(ffi.string(f.name).decode("utf-8", "replace"), f.capability, f.multiprocessors, f.total, f.free)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@lru_cache(maxsize=4)
def _opened(path: Path, emulated: bool) -> Library:
    return Library(path, emulated)


def library(emulated: bool) -> Library:
    """Return the library for cards, or for the emulator, which is compiled where that has not been done.

    $PYENGINE_EMULATE=checked: the emulator that checks every access to memory, some ten times slower.
    Raises: GraphError where there is none.
    """
    if emulated:
        from pyengine.backends.cuda import build             # others compile nothing

        return _opened(build.emulated(os.environ.get("PYENGINE_EMULATE") == "checked"), True)
    if not BUILT.exists():
        raise GraphError(f"there is no {BUILT.name}: `make cuda` builds it, which needs NVIDIA's CUDA toolkit (nvcc) and no card")
    return _opened(BUILT, False)


class Memory:
    """Memory of a device, or memory of the host that devices copy from and to (`pinned`): zeroed, freed with the object."""

    def __init__(self, own: Library, device: int, nbytes: int, pinned: bool = False):
        self.own, self.device, self.nbytes, self.pinned, self.address = own, device, nbytes, pinned, 0
        if nbytes:
            out = ffi.new("uint64_t *")
            own(*(("host_new", nbytes, out) if pinned else ("new", device, nbytes, out)))
            self.address = int(out[0])

    def array(self) -> np.ndarray:
        """Return the bytes of pinned memory; the array keeps it."""
        if not self.nbytes:
            return np.empty(0, np.uint8)
        return np.asarray(_Shown(self))

    def __del__(self) -> None:
        address, self.address = getattr(self, "address", 0), 0
        if address:
            flat = self.own.flat
            flat.pe_card_host_free(address) if self.pinned else flat.pe_card_free(self.device, address)


class _Shown:
    """Pinned memory as NumPy reads it."""

    def __init__(self, memory: Memory):
        self.memory = memory                                 # kept by the array that is made of this
        self.__array_interface__ = {"shape": (memory.nbytes,), "typestr": "|u1", "data": (memory.address, False), "version": 3}


class Queue:
    """Work of one device, done in the order in which it is put in."""

    def __init__(self, own: Library, device: int):
        self.own, self.device = own, device
        out = ffi.new("pe_card_queue **")
        own("queue_new", device, out)
        self.handle = out[0]

    def copy(self, to: int, source: int, nbytes: int, rows: int = 1, to_stride: int = 0, from_stride: int = 0) -> None:
        """Put a copy in: rows of so many bytes, so many bytes apart."""
        self.own("copy", self.handle, to, to_stride, source, from_stride, nbytes, rows)

    def wait(self) -> None:
        """Wait for everything that was put in."""
        self.own("wait", self.handle)

    def __del__(self) -> None:
        handle, self.handle = getattr(self, "handle", None), None
        if handle is not None:
            self.own.flat.pe_card_queue_free(handle)


def numbers(values: Sequence[int]) -> Any:
    """Return a C array of 32-bit numbers."""
    return ffi.new("int32_t[]", list(values))
