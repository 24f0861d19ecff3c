"""Groups of tokens quantized outside of a step, by the op that does it in one (`ops.cache_groups`): for groups that are made anew."""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np

from pyengine import ops
from pyengine.backends.base import Program
from pyengine.backends.graph import Graph
from pyengine.dtype import DType, dtype as dtype_of, GROUP
from pyengine.graph.tensor import Dim

STAGED = 16                              # groups that are quantized at once
_lock = threading.Lock()


@lru_cache(maxsize=8)
def _quantizer(heads: int, e: int, f: int, k: DType, v: DType) -> Program:
    """Return a program that quantizes groups 0 .. z - 1 of keys [heads, n, e] and values [heads, n, f] in full."""
    g, n = Graph(), STAGED * GROUP
    states = [g.state(name, (heads, n, size), dtype) for name, size, dtype in
              (("k", e, k), ("v", f, v), ("k_full", e, dtype_of("F32")), ("v_full", f, dtype_of("F32")))]
    which = g.input("which", (Dim("z", STAGED),), "I32")
    return g.compile(list(ops.cache_groups(*states, which, which)), n_threads=1)


def quantized(keys: np.ndarray, values: np.ndarray, k: DType, v: DType) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 keys [heads, n, e] and values [heads, n, f], n a multiple of 32, as a layer's groups hold them: uint8 [heads, n, bytes]."""
    (heads, n, e), f, out = keys.shape, values.shape[2], []
    with _lock:                                              # its states are shared
        program = _quantizer(heads, e, f, k, v)
        full, made = ([program.states[name] for name in names] for names in (("k_full", "v_full"), ("k", "v")))
        for start in range(0, n, STAGED * GROUP):
            cells = np.arange(min(STAGED * GROUP, n - start))
            for state, x in zip(full, (keys, values)):
                state.scatter(cells, np.ascontiguousarray(x[:, start : start + len(cells)], np.float32).view(np.uint8))
            program.inputs["which"][: len(cells) // GROUP] = cells[::GROUP]
            program.execute(z=len(cells) // GROUP)
            out.append([state.gather(cells) for state in made])
    return tuple(np.concatenate(parts, 1) for parts in zip(*out))            # type: ignore[return-value]
