"""What a device can do at most, measured: copies and reads of its memory, products on each kind of unit. csrc/cuda/speed.h does them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pyengine.backends.cuda.library import Library, Memory, Queue
from pyengine.native import ffi

WHAT = ("copy", "read", "s8", "bf16", "f16", "f32")          # in the order of speed.h
REPEAT = 5


@dataclass(frozen=True)
class Speeds:
    """Bytes/s of copy (read and written) and read; operations/s of products, a product and a sum being two. By mma.sync, float32 by fma."""

    copy: float
    read: float
    s8: float
    bf16: float
    f16: float
    f32: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def measure(own: Library, device: int, nbytes: int = 2 << 30, steps: int = 4096, rounds: int = 10) -> Speeds:
    """Measure all limits of a device; the best of some repetitions, since nothing can be faster than a limit.

    nbytes: of memory to move; steps: of products of a launch; rounds: launches of a measurement.
    """
    queue, memory = Queue(own, device), Memory(own, device, nbytes)
    amount, seconds = ffi.new("double *"), ffi.new("double *")
    best = []
    for i, what in enumerate(WHAT):
        found = 0.0
        for _ in range(REPEAT):
            own("speed", queue.handle, i, memory.address, nbytes if what in ("copy", "read") else steps, rounds, amount, seconds)
            found = max(found, amount[0] / max(seconds[0], 1e-9))
        best.append(found)
    return Speeds(*best)
