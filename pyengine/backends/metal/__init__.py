"""Metal: kernels of csrc/metal on an Apple GPU (device "metal"), or emulated on any machine ("metal-emulated", for tests)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

from pyengine import hardware
from pyengine.backends import base
from pyengine.backends.metal.device import Device
from pyengine.backends.metal.launch import LAUNCHERS, load_launchers
from pyengine.backends.metal.prepared import Prepared
from pyengine.compiler.arena import Turns


@lru_cache(maxsize=2)
def device(emulated: bool) -> Device:
    """Return the device: one for the whole process. Raises: GraphError where there is none, saying what to install."""
    if emulated:
        from pyengine.backends.metal.emulated import EmulatedDevice

        return EmulatedDevice()
    from pyengine.backends.metal.apple import AppleDevice

    return AppleDevice()


class Backend(base.Backend):
    """See the module's docstring."""

    name: ClassVar[str] = "metal"

    def __init__(self, n_threads: int | None = None, emulated: bool = False):
        self.n_threads, self.emulated = n_threads or hardware.default_threads(), emulated
        load_launchers()
        self.kernels = frozenset(LAUNCHERS)

    def prepare(self, declared: base.Declared, turns: Turns | None = None, passes: Sequence[str] | None = None) -> Any:
        """Fuse, lay out and count without loading."""
        return Prepared(declared, turns, passes, device(self.emulated), self.n_threads)
