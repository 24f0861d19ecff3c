"""Launches of csrc/metal/mean.metal."""

from __future__ import annotations

from pyengine.backends.metal.launch import Launch, launches, spread, Step


@launches
def mean_rows(s: Step) -> list[Launch]:
    """Launch a thread an element."""
    x, lo, hi = s.singles()
    n, width = x.shape
    m = lo.shape[0]
    if m == 0 or width == 0:
        return []
    grid, threads = spread(width)
    return [Launch("mean_of_rows", dict(n=n, width=width), dict(x=x, lo=lo, hi=hi, out=s.outputs[0]), (grid[0], m, 1), threads)]
