"""Launches of csrc/metal/top.metal."""

from __future__ import annotations

from pyengine.backends.metal.launch import ceil_div, Launch, launches, Step

KEYS_BYTES = 8 * 256 * 8                 # eight runs
CHUNK = 4096                             # logits whose weights are summed together


@launches
def top_k(s: Step) -> list[Launch]:
    """Launch a threadgroup a row, then one for each 4096 of it."""
    x, (values, ids, sums) = s.need("x"), s.outputs
    rows, width = x.shape
    if rows == 0:
        return []
    args = dict(n=s.params.n, k=s.params.k, width=width, sums=sums.shape[1])
    return [Launch("pick_largest", args, {"x": x, "values": values, "ids": ids}, (rows, 1, 1), shared_bytes=KEYS_BYTES),
            Launch("weigh_rows", args, {"x": x, "values": values, "sums": sums}, (ceil_div(s.params.n, CHUNK), rows, 1), shared_bytes=4 * CHUNK)]
