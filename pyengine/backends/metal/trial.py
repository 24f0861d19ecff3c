"""Run a few launches on the device and compare: `python -m pyengine.backends.metal.trial` says by its status whether replay works."""

from __future__ import annotations

import sys

import numpy as np

from pyengine.backends.metal import opened
from pyengine.backends.metal.device import bind, Device
from pyengine.backends.metal.launch import Launch, View
from pyengine.dtype import F32


def worked(device: Device) -> bool:
    """Add 1 to a thousand numbers three times, each launch in need of the one before, and run that twice."""
    n = 1000
    memory = device.allocate(4 * n)
    view = View(0, 0, F32, (n,), (4,), 4 * n)
    one = Launch("scale_elements", dict(n=n, factor=1.0, offset=1.0), {"x": view, "out": view}, (1, 1, 1), (256, 1, 1))
    recording = device.record([bind(one, [memory], {})] * 3)
    recording.run()
    recording.run()
    return bool((memory.array.view(np.float32) == 6).all())


if __name__ == "__main__":
    sys.exit(0 if worked(opened("--emulated" in sys.argv)) else "replay gave wrong numbers")
