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
from dataclasses import dataclass, field
from pathlib import Path

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


class Traffic(ctypes.Structure):
    """Requests of warps, bytes that threads asked for, 32-byte sectors (of shared memory: passes), passes beyond the first."""

    _fields_ = [(name, ctypes.c_int64) for name in ("requests", "bytes", "sectors", "conflicts")]
    requests: int
    bytes: int
    sectors: int
    conflicts: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name, _ in self._fields_))

    def __repr__(self) -> str:
        return f"Traffic(requests={self.requests}, bytes={self.bytes}, sectors={self.sectors}, conflicts={self.conflicts})"


NUMBERS = ("launches", "blocks", "barriers", "collectives", "mma", "dp4a", "atomics")
SPACES = ("loads", "stores", "shared_loads", "shared_stores")


class _Flat(ctypes.Structure):
    """pe_emulated_counts of csrc/emulate/count.h."""

    _fields_ = [*((name, ctypes.c_int64) for name in NUMBERS), *((name, Traffic) for name in SPACES)]


@dataclass
class Counts:
    """What a kernel did, over all of its launches: barriers by block, collectives and mma by warp, dp4a and atomics by thread."""

    launches: int = 0
    blocks: int = 0
    barriers: int = 0
    collectives: int = 0
    mma: int = 0
    dp4a: int = 0
    atomics: int = 0
    loads: Traffic = field(default_factory=Traffic)
    stores: Traffic = field(default_factory=Traffic)
    shared_loads: Traffic = field(default_factory=Traffic)
    shared_stores: Traffic = field(default_factory=Traffic)

    @property
    def sectors(self) -> int:
        """All sectors of global memory, read and written."""
        return self.loads.sectors + self.stores.sectors

    @property
    def conflicts(self) -> int:
        """All passes over shared memory that conflicts of banks cost."""
        return self.shared_loads.conflicts + self.shared_stores.conflicts

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in (*NUMBERS, *SPACES)))


class Counted(dict[str, Counts]):
    """Counts by kernel. A name without its template's arguments stands for the sum of all of them."""

    def __init__(self, flat: ctypes.CDLL):
        super().__init__()
        self.flat = flat

    def __missing__(self, name: str) -> Counts:
        found = [counts for known, counts in self.items() if re.sub(r"<.*", "", known) == name]
        if not found:
            raise KeyError(f"no kernel {name!r} was launched, only {sorted(self)}")
        return sum(found, Counts())

    def read(self) -> None:
        """Take over what was counted so far."""
        name, flat = ctypes.create_string_buffer(256), _Flat()
        for i in range(self.flat.pe_emulated_kernels()):
            self.flat.pe_emulated_kernel(i, name, 256, ctypes.byref(flat))
            self[name.value.decode()] = Counts(*(getattr(flat, part) for part in NUMBERS),
                                               *(Traffic.from_buffer_copy(getattr(flat, part)) for part in SPACES))

    def buffer(self, name: str, address: int) -> tuple[Traffic, Traffic]:
        """Return what a kernel (all of its instances) loaded and stored in the allocation that holds this address."""
        loads, stores, text, flat = Traffic(), Traffic(), ctypes.create_string_buffer(256), _Flat()
        for i in range(self.flat.pe_emulated_kernels()):
            self.flat.pe_emulated_kernel(i, text, 256, ctypes.byref(flat))
            if name in (text.value.decode(), re.sub(r"<.*", "", text.value.decode())):
                one, other = Traffic(), Traffic()
                self.flat.pe_emulated_buffer(i, ctypes.c_uint64(address), ctypes.byref(one), ctypes.byref(other))
                loads, stores = loads + one, stores + other
        return loads, stores


@contextmanager
def counted(flat: ctypes.CDLL | None = None) -> Iterator[Counted]:
    """Count what kernels do meanwhile. flat: a library in its checked form; that of device="cuda-emulated" if None.

    Raises: RuntimeError if the library is the plain form, which counts nothing.
    """
    flat = flat or ctypes.CDLL(str(library(True).path))
    if not hasattr(flat, "pe_emulated_reset"):
        raise RuntimeError("kernels are counted in the checked form only: PYENGINE_EMULATE=checked")
    counts = Counted(flat)
    flat.pe_emulated_reset()
    try:
        yield counts
    finally:
        counts.read()
