"""Launches of csrc/metal/recurrent.metal."""

from __future__ import annotations

from pyengine.backends.metal.launch import ceil_div, elements, Launch, launches, NoKernel, Step
from pyengine.errors import GraphError

THREADS, COLUMNS, ROWS, PARTS = 128, 32, 8, 4          # of delta_rows
MOST_ELEMENTS = 256                                    # of a key: 64 for each thread


@launches
def causal_conv(s: Step) -> list[Launch]:
    """Launch one thread a channel of a row."""
    x, state = s.need("x"), s.need("state")
    (rows, width), strides = x.shape, elements(state)
    if x.size == 0:
        return []
    threads = min(256, ceil_div(width, 32) * 32)
    args = dict(rows=rows, width=width, taps=s.need("weight").shape[0], cells=state.shape[1], head=strides[0], cell=strides[1])
    buffers = {"x": x, "weight": s.need("weight"), "state": state, "before": s.need("before"), "after": s.need("after"), "out": s.outputs[0]}
    return [Launch("conv_rows", args, buffers, (ceil_div(width, threads), rows, 1), (threads, 1, 1))]


@launches
def gated_delta_rule(s: Step) -> list[Launch]:
    """Launch a threadgroup for each 32 columns of a head. Raises: GraphError, NoKernel."""
    k, v, state = s.need("k"), s.need("v"), s.need("state")
    (rows, heads, width), (_, keys, e), strides = v.shape, k.shape, elements(state)
    if keys == 0 or heads % keys:
        raise GraphError(f"{s.name}: {heads} heads share {keys} keys")
    if e > MOST_ELEMENTS:
        raise NoKernel(f"{s.name}: keys of {e} elements; at most {MOST_ELEMENTS} are possible")
    if v.size == 0:
        return []
    per = next(n for n in (8, 16, 32, 64) if PARTS * n >= e)
    args = dict(rows=rows, heads=heads, width=width, keys=keys, e=e, cells=state.shape[1], tiled=int(s.params.tiled), head=strides[0], cell=strides[1])
    buffers = {name: s.need(name) for name in ("q", "k", "v", "log_decay", "beta", "state", "before", "after")}
    return [Launch("delta_rows", args, {**buffers, "out": s.outputs[0]}, (ceil_div(width, COLUMNS), heads, 1), (THREADS, 1, 1),
                   4 * ROWS * (2 * PARTS * per + COLUMNS + 2), {"PER": per})]
