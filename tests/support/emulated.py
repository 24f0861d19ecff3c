"""Kernels on emulated devices, for tests: small libraries of their own, and what kernels asked of memory.

    with counted() as counts:                                # $PYENGINE_EMULATE=checked
        program.run(...)
    assert counts["rms_norm"].loads.sectors <= 1.03 * nbytes / 32
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import Structure
from pathlib import Path

from bench.gpu.counts import Counter, Counts, Traffic
from pyengine.backends import building
from pyengine.backends.building import Job
from pyengine.backends.cuda import build
from pyengine.backends.cuda.library import library


def compiled(name: str, sources: Sequence[Path], checked: bool) -> ctypes.CDLL:
    """Return a library of .cu files and the emulator, made as those of the backend are."""
    common = ("g++", *build.EMULATED_FLAGS)
    kernels = (*common, *(build.CHECKED_FLAGS if checked else ()), "-include", str(building.CSRC / "emulate" / "cuda.h"), "-x", "c++")
    engine = (*common, *(("-DPE_CHECKED",) if checked else ()))
    jobs = [*(Job(source, kernels) for source in sources), *(Job(path, engine) for path in sorted((building.CSRC / "emulate").glob("*.cpp")))]
    return ctypes.CDLL(str(building.library(f"{name}-{'checked' if checked else 'plain'}", jobs, ["g++", "-shared", "-pthread"], building.ROOT / "build" / "emulated")))


class KernelCounts(Counts):
    """What a kernel did, over all of its launches: barriers by block, collectives and mma by warp, dp4a and atomics by thread."""

    @property
    def sectors(self) -> int:
        """All sectors of global memory, read and written."""
        return self.loads.sectors + self.stores.sectors

    @property
    def conflicts(self) -> int:
        """All passes over shared memory that conflicts of banks cost."""
        return self.shared_loads.conflicts + self.shared_stores.conflicts


def total(parts: Sequence[Structure], into: Structure) -> Structure:
    """Add counts up, field by field; threads and shared_bytes are the largest."""
    for name, kind in into._fields_:
        values = [getattr(part, name) for part in parts]
        if issubclass(kind, Structure):
            total(values, getattr(into, name))
        else:
            setattr(into, name, max(values, default=0) if name in ("threads", "shared_bytes") else sum(values))
    return into


class Counted:
    """Counts by kernel. A name without its template's arguments stands for all of them together."""

    def __init__(self, counter: Counter):
        self.counter, self.kernels = counter, dict[str, tuple[int, Counts]]()

    def _named(self, name: str) -> list[tuple[int, Counts]]:
        found = [kernel for known, kernel in self.kernels.items() if name in (known, re.sub(r"<.*", "", known))]
        if not found:
            raise KeyError(f"no kernel {name!r} was launched, only {sorted(self.kernels)}")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.kernels))

    def __getitem__(self, name: str) -> KernelCounts:
        return total([counts for _, counts in self._named(name)], KernelCounts())

    def buffer(self, name: str, address: int) -> tuple[Traffic, Traffic]:
        """Return what a kernel loaded and stored in the allocation that holds this address."""
        both = [self.counter.buffer(i, address) for i, _ in self._named(name)]
        return total([loads for loads, _ in both], Traffic()), total([stores for _, stores in both], Traffic())


@contextmanager
def counted(flat: ctypes.CDLL | None = None) -> Iterator[Counted]:
    """Count what kernels do meanwhile. flat: a library in its checked form; that of device="cuda-emulated" if None.

    Raises: RuntimeError if the library is the plain form, which counts nothing.
    """
    counter = Counter(flat._name if flat else str(library(True).path))
    if not hasattr(counter.flat, "pe_emulated_reset"):
        raise RuntimeError("kernels are counted in the checked form only: PYENGINE_EMULATE=checked")
    counts = Counted(counter)
    counter.reset()
    try:
        yield counts
    finally:
        counts.kernels = counter.kernels()
