"""Keys in groups of tokens, on the host: what stands in them as numbers, and groups that are made anew of the cells that stay.

A cell whose keys are quantized by channel has no bytes of its own: what stays is read, put side by side, and quantized once more, by
the op that quantizes it in a step. Values have blocks of their own and keep them.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np

from pyengine import ops
from pyengine.backends.base import Program, State
from pyengine.backends.graph import Graph
from pyengine.cache.cells import Cells, Conversation
from pyengine.cache.store import Layer
from pyengine.dtype import BY_CHANNEL, DType, dtype as dtype_of, GROUP
from pyengine.graph.tensor import Dim
from pyengine.native.blocks import dequantize
from pyengine.ops.rope import mixed

STAGED = 16                              # groups that are quantized at once
_lock = threading.Lock()


def numbers_of(raw: np.ndarray, dtype: DType) -> np.ndarray:
    """Return what cells hold, uint8 [heads, n, bytes], as float32 [heads, n, e]: keys and values themselves, no mixed ones.

    Of a format by channel n is a multiple of 32, whole groups.
    """
    if not raw.shape[1]:
        return np.zeros((len(raw), 0, raw.shape[2] // dtype.nbytes * dtype.block), np.float32)
    if dtype.by_channel:
        heads, n, size = raw.shape
        blocks = np.ascontiguousarray(raw).reshape(heads, n // GROUP, -1, dtype.nbytes)        # a block for each channel
        return _blocks(blocks, BY_CHANNEL[dtype.name]).swapaxes(2, 3).reshape(heads, n, -1)
    if dtype.block == 1:
        return dequantize(raw, dtype)
    return mixed(_blocks(np.ascontiguousarray(raw).reshape(*raw.shape[:2], -1, dtype.nbytes), dtype.name).reshape(*raw.shape[:2], -1))


def _blocks(raw: np.ndarray, name: str) -> np.ndarray:
    """Return the 32 elements of each block [.., bytes] as float32 [.., 32]."""
    if name != "Q2_1":
        return dequantize(raw, dtype_of(name))
    scale, least = np.moveaxis(np.ascontiguousarray(raw[..., :4]).view(np.float16).astype(np.float64), -1, 0)[..., None]
    words = np.ascontiguousarray(raw[..., 4:]).view(np.uint32)[..., None]                      # of 16 codes each
    codes = (words >> (2 * np.arange(16, dtype=np.uint32)) & 3).reshape(*raw.shape[:-1], GROUP)
    return (codes * scale + least).astype(np.float32)        # rounded once, as fma does


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


class Grouping:
    """A layer's cells of one conversation in groups and in full, `n` of them: where each of them lies.

    before   cells that are in groups, or the first ones in full: those that the next token reads so
    """

    def __init__(self, cells: Cells, s: Conversation, layer: Layer, n: int):
        recent, first = layer.parts
        self.layer, self.n = layer, n
        self.before = cells.groups[recent.group].policy.first_of(n)
        pinned = min(cells.groups[first.group].slots, self.before)
        places = (first, 0, pinned), (layer, pinned, self.before), (recent, self.before, n)
        self.runs = [(one, slice(a, b), cells.cells_of(one.group, s, np.arange(a, b)).copy()) for one, a, b in places if a < b]

    def read(self) -> list[np.ndarray]:
        """Return keys and values as float32 [heads, n, e]."""
        return [np.concatenate([numbers_of(one.states[i].gather(cells), one.states[i].dtype) for one, _, cells in self.runs], 1) for i in range(2)]

    def codes(self) -> np.ndarray:
        """Return the bytes of values that are in groups, uint8 [heads, n, bytes]; zeros where they are not."""
        state: State = self.layer.states[1]
        out = np.zeros((state.shape[0], self.n, state.dtype.size(state.shape[2])), np.uint8)
        for one, where, cells in self.runs:
            if one is self.layer:
                out[:, where] = state.gather(cells)
        return out

    @property
    def grouped(self) -> np.ndarray:
        """Which cells are in groups, bool [n]."""
        out = np.zeros(self.n, np.bool_)
        for one, where, _ in self.runs:
            out[where] = one is self.layer
        return out

    def write(self, keys: np.ndarray, values: np.ndarray, codes: np.ndarray, keep: np.ndarray) -> None:
        """Write float32 keys and values [heads, n, e]; values that are `keep` [heads, n] have their bytes in `codes`."""
        for one, where, cells in self.runs:
            k, v = one.states
            if one is not self.layer:
                for state, x in zip((k, v), (keys, values)):
                    state.scatter(cells, x[:, where].astype(state.dtype.numpy).view(np.uint8))
                continue
            new_k, new_v = quantized(keys[:, where], values[:, where], k.dtype, v.dtype)
            k.scatter(cells, new_k)
            v.scatter(cells, np.where(keep[:, where, None], codes[:, where], new_v))
