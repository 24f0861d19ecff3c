"""The CUDA backend: kernels of csrc/cuda on a card, `device="cuda:1"`, or in the emulator of csrc/emulate, `device="cuda-emulated"`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TYPE_CHECKING

from pyengine import hardware
from pyengine.backends import base
from pyengine.backends.cuda.library import Library, library
from pyengine.errors import GraphError
from pyengine.hardware.facts import Device

if TYPE_CHECKING:
    from pyengine.compiler.arena import Turns

_KERNELS: dict[str, frozenset[str]] = {}                     # by the path of a library


def kernels_of(own: Library) -> frozenset[str]:
    """Return the ops that a library has kernels of."""
    if str(own.path) not in _KERNELS:
        _KERNELS[str(own.path)] = own.kernels()
    return _KERNELS[str(own.path)]


def devices(emulated: bool) -> list[Device]:
    """Return the cards, or the emulated ones, as a machine lists them. Raises: PyEngineError where there is no library or no driver."""
    own = library(emulated)
    found = [own.facts(i) for i in range(own.count())]
    return [Device("cuda-emulated" if emulated else "cuda", f.name, i, f.total, f.free, compute=f"{f.capability // 10}.{f.capability % 10}")
            for i, f in enumerate(found)]


class Backend(base.Backend):
    """See the module's docstring. index: the number of the card; emulated: in place of cards."""

    name: ClassVar[str] = "cuda"
    apart: ClassVar[bool] = True
    widest: ClassVar[int] = 512          # MOST_COLUMNS of csrc/cuda/attention.cu
    experts: ClassVar[int] = 6144        # MOST_SHARED of csrc/cuda/routing.cu, 8 bytes each

    def __init__(self, n_threads: int | None = None, index: int = 0, emulated: bool = False, in_place: bool = False):
        if in_place:
            raise GraphError("mmap: weights are read where the file is mapped by the CPU only")
        self.n_threads, self.index = n_threads or hardware.default_threads(), index       # of the host, which packs weights
        self.own = library(emulated)
        self.kernels = kernels_of(self.own)
        self.name = "cuda-emulated" if emulated else "cuda"   # type: ignore[misc]  one of the two that this class is
        n = self.own.count()
        if not 0 <= index < n:
            raise GraphError(f"there is no device {self.name}:{index}; there are {n}, numbered from 0")

    def prepare(self, declared: base.Declared, turns: Turns | None = None, passes: Sequence[str] | None = None) -> Any:
        """Fuse, lay out and count without loading."""
        from pyengine.backends.cuda.prepared import Prepared                     # machines without cards start sooner

        return Prepared(declared, turns, passes, self)
