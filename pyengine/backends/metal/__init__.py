"""Metal: kernels of csrc/metal on an Apple GPU (device "metal"), or emulated on any machine ("metal-emulated", for tests)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, TYPE_CHECKING

from pyengine import hardware
from pyengine.backends import base
from pyengine.backends.metal.mac import framework
from pyengine.errors import GraphError
from pyengine.hardware.facts import Device

if TYPE_CHECKING:
    from pyengine.backends.metal import device as interface
    from pyengine.compiler.arena import Turns


@lru_cache(maxsize=2)
def opened(emulated: bool) -> interface.Device:
    """Return the device: one for the whole process. Raises: GraphError where there is none, saying what to install."""
    if emulated:
        from pyengine.backends.metal.emulated import EmulatedDevice

        return EmulatedDevice()
    framework()                                              # machines that are no Macs start sooner
    from pyengine.backends.metal.apple import AppleDevice

    return AppleDevice()


def devices(emulated: bool) -> list[Device]:
    """Return the Mac's GPU, or the emulated one, as a machine lists it. Raises: PyEngineError where there is none."""
    own = opened(emulated)
    total, free = own.memory()
    return [Device("metal-emulated" if emulated else "metal", own.name, 0, total, free, unified=True)]


class Backend(base.Backend):
    """See the module's docstring. emulated: in place of the Mac's GPU."""

    name: ClassVar[str] = "metal"
    widest: ClassVar[int] = 512          # WIDTH_MOST of attention.py
    experts: ClassVar[int] = 4095        # MOST_EXPERTS of routing.py

    def __init__(self, n_threads: int | None = None, index: int = 0, emulated: bool = False, in_place: bool = False):
        if in_place:
            raise GraphError("mmap: weights that are packed are read where the file is mapped by the CPU only")
        if index:
            raise GraphError(f"there is no device metal:{index}: a Mac's GPU is one device")
        self.n_threads, self.device = n_threads or hardware.default_threads(), opened(emulated)      # of the host, which packs weights
        self.name = "metal-emulated" if emulated else "metal"   # type: ignore[misc]  one of the two that this class is
        from pyengine.backends.metal.launch import LAUNCHERS, load_launchers

        load_launchers()
        self.kernels = frozenset(LAUNCHERS)

    def prepare(self, declared: base.Declared, turns: Turns | None = None, passes: Sequence[str] | None = None) -> Any:
        """Fuse, lay out and count without loading."""
        from pyengine.backends.metal.prepared import Prepared

        return Prepared(declared, turns, passes, self.device, self.n_threads, self.name)
