"""Launches of csrc/metal/matmul.metal."""

from __future__ import annotations

import math

from pyengine.backends.metal.launch import ceil_div, elements, Launch, launches, NoKernel, Step

TILE, PITCH, THREADS = 32, 36, 128


@launches
def matmul(s: Step) -> list[Launch]:
    """Launch one threadgroup a tile of the result. Raises: NoKernel for more than four leading axes."""
    x, y, out = s.need("x"), s.need("y"), s.outputs[0]
    *batch, m, k = x.shape
    n = y.shape[-2]
    if len(batch) > 4:
        raise NoKernel(f"{s.name}: {len(batch)} leading axes; at most 4 are possible")
    if out.size == 0:
        return []
    before, xs, ys = 4 - len(batch), elements(x), elements(y)
    args = dict(m=m, n=n, k=k, batch=[1] * before + batch, x_batch=[0] * before + xs[:-2], y_batch=[0] * before + ys[:-2], x_row=xs[-2],
                x_column=xs[-1], y_row=ys[-2], y_column=ys[-1])
    return [Launch("multiply_rows", args, {"x": x, "y": y, "out": out}, (ceil_div(n, TILE), ceil_div(m, TILE), math.prod(batch)),
                   (THREADS, 1, 1), 2 * TILE * PITCH * 4)]
