"""Keys in groups of tokens: what stands in them as numbers, and groups that are made anew of the cells that stay.

A cell whose keys are quantized by channel has no bytes of its own: what stays is read, put side by side, and quantized once more, as a
step quantizes it (`Store.quantized`). Values have blocks of their own and keep them.
"""

from __future__ import annotations

import numpy as np

from pyengine.backends.base import State
from pyengine.cache.cells import Conversation
from pyengine.cache.store import Layer, Store
from pyengine.dtype import BY_CHANNEL, DType, dtype as dtype_of, GROUP
from pyengine.native.blocks import dequantize
from pyengine.ops.rope import mixed


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


class Grouping:
    """A layer's cells of one conversation in groups and in full, `n` of them: where each of them lies.

    before   cells that are in groups, or the first ones in full: those that the next token reads so
    """

    def __init__(self, store: Store, s: Conversation, layer: Layer, n: int):
        (recent, first), cells = layer.parts, store.cells
        self.store, self.layer, self.n = store, layer, n
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
            new_k, new_v = self.store.quantized(keys[:, where], values[:, where], k.dtype, v.dtype)
            k.scatter(cells, new_k)
            v.scatter(cells, np.where(keep[:, where, None], codes[:, where], new_v))
