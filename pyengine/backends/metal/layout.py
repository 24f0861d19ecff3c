"""Launches of csrc/metal/layout.metal."""

from __future__ import annotations

from pyengine.backends.metal.launch import elements, Launch, launches, spread, Step, View


def copied(x: View, out: View, start: int = 0) -> list[Launch]:
    """Return the launch that copies x to where `out` begins, `start` bytes further; out's axes may be longer than x's."""
    if x.size == 0:
        return []
    grid, threads = spread(x.size)
    before = [0] * (6 - len(x.shape))
    args = {"n": x.size, "shape": [1] * len(before) + list(x.shape), "x_stride": before + elements(x), "out_stride": before + elements(out)}
    return [Launch("copy_elements", args, {"x": x, "out": out.at(start)}, grid, threads)]


@launches
def contiguous(s: Step) -> list[Launch]:
    """Launch one thread an element."""
    return copied(s.need("x"), s.outputs[0])


@launches
def concat(s: Step) -> list[Launch]:
    """Launch a copy for each part."""
    out, axis, start, found = s.outputs[0], s.params.axis, 0, []
    for part in s.inputs["parts"]:
        found += copied(part, out, start * out.strides[axis])
        start += part.shape[axis]
    return found
