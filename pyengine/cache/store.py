"""Contents of the caches: copied, gathered, written, and keys rotated to other positions. The three verbs of states are all it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from pyengine.backends.base import State
from pyengine.cache.cells import Cells, Conversation, Copy
from pyengine.dtype import DType
from pyengine.errors import RequestError
from pyengine.ops.rope import rotate
from pyengine.records import NamedTuple


class Rotation(NamedTuple):
    """How a layer's keys are rotated: `inv_freq` float32 [n_rot / 2], and whether pairs are neighbours."""

    inv_freq: np.ndarray
    interleaved: bool


class Layer(NamedTuple):
    """The caches of one layer, and the number of the group whose cells they have.

    states    keys and values; those of a recurrent layer, whose `rotation` is None
    sums      of attention, by conversation and number of the key, where cells are compressed by them (`ops.key_sums`)
    queries   heads of one layer that share one of its heads of keys; readers: layers that attend to its keys
    parts     where tokens are in groups: those of the same layer with the last and the first ones in full
    ahead     it is a head that predicts further tokens, not one of the model's: it is not saved
    """

    number: int
    group: int
    states: tuple[State, ...]
    rotation: Rotation | None
    sums: State | None = None
    queries: int = 1
    readers: int = 1
    parts: tuple[Layer, ...] = ()
    ahead: bool = False


Quantizer = Callable[[np.ndarray, np.ndarray, DType, DType], tuple[np.ndarray, np.ndarray]]


class Store:
    """The contents of one model's caches, beside the cells that say what they are.

    quantized  makes whole groups of tokens of float32 keys and values [heads, n, e], as a step does: uint8 [heads, n, bytes] of each; for
               layers with `parts` that are compressed
    """

    def __init__(self, cells: Cells, layers: Sequence[Layer], quantized: Quantizer):
        self.cells, self.layers, self.quantized = cells, list(layers), quantized

    @property
    def formats(self) -> tuple[DType, DType]:
        """The formats in which keys and values are stored, in groups where tokens are; of a model that has none, those of its states."""
        states = max(self.layers, key=lambda layer: (len(layer.parts), layer.rotation is not None)).states
        return states[0].dtype, states[-1].dtype

    def copy(self, copies: Iterable[Copy]) -> None:
        """Copy cells in all layers of a group."""
        for number, source, target in copies:
            for layer in self.layers:
                if layer.group == number:
                    for state in layer.states:
                        state.copy(source, target)

    @property
    def lasting(self) -> list[Layer]:
        """The layers that are saved."""
        return [layer for layer in self.layers if not layer.ahead]

    def live(self, s: Conversation) -> Iterator[tuple[State, np.ndarray]]:
        """Yield each cache that is saved, layer by layer, keys before values, and its cells that later tokens of a conversation may see."""
        for layer in self.lasting:
            cells = self.cells.cells_of(layer.group, s, self.cells.live(layer.group, s))
            for state in layer.states:
                yield state, cells

    def shift(self, s: Conversation, start: int, stop: int) -> None:
        """Remove tokens [start, stop) of an idle conversation; later ones move down, with keys rotated back by as many positions.

        What moves is still the outcome of all that was read, so it is not what a prompt without those tokens would give: such a
        prompt goes on from the tokens before `start` only. Rotation is in float32, rounded once to the cache's format.
        Raises: RequestError where the cache's format or the conversation does not allow it; PlanError.
        """
        if not 0 <= start < stop <= len(s) or s.active or s not in self.cells.conversations:
            raise RequestError(f"tokens {start} to {stop} cannot be removed: an idle conversation that has them is needed, this "
                               f"one has {len(s)}")
        if self.formats[0].name not in ("F32", "F16", "BF16"):
            raise RequestError(f"tokens cannot be removed from the middle of a {self.formats[0]} cache: keys are rotated in f32, f16 "
                               "and bf16 only")
        if any(isinstance(k, tuple) and isinstance(k[0], bytes) for k in s.keys[start:]):
            raise RequestError("tokens cannot be removed before or within a picture")
        moves = self.cells.shift(s, start, stop)
        try:
            for layer in self.layers:
                if not self.cells.groups[layer.group].policy.across:
                    self._move(layer, [(source, target) for i, source, target in moves if i == layer.group], start - stop)
        except BaseException:                                # Ctrl-C: half moved
            self.cells.drop(s)
            raise
        s.keys[start:] = [(object(), k) for k in s.keys[start:]]                 # equal to no key of a prompt
        s.next = len(s)

    @staticmethod
    def _move(layer: Layer, moves: list[tuple[np.ndarray, np.ndarray]], by: int) -> None:
        """Move cells of one layer; the last ones' keys are rotated by `by` positions."""
        keys, values = layer.states
        held = [(keys.gather(source), values.gather(source)) for source, _ in moves]         # read before anything is written
        *_, (k, v) = held
        held[-1] = rotate_keys(k, keys.dtype, layer.rotation, by), v
        for (_, target), (k, v) in zip(moves, held):
            keys.scatter(target, k)
            values.scatter(target, v)


def rotate_keys(cells: np.ndarray, dtype: DType, rotation: Rotation, by: int) -> np.ndarray:
    """Rotate keys, uint8 [heads, n, bytes], forward by a number of positions."""
    bits = np.ascontiguousarray(cells).view(dtype.numpy)
    x = (bits.astype(np.uint32) << 16).view(np.float32) if dtype.name == "BF16" else bits.astype(np.float32)
    angle = np.float32(by) * rotation.inv_freq.astype(np.float64)
    table = np.broadcast_to(np.concatenate([np.cos(angle), np.sin(angle)]).astype(np.float32), (len(x), 2 * len(angle)))
    y = rotate(x, table, rotation.interleaved)
    if dtype.name == "BF16":                                 # round to nearest, ties to even
        u = y.view(np.uint32)
        return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)
    return y.astype(dtype.numpy).view(np.uint8)


class Cached(NamedTuple):
    """What a conversation takes of the caches: its tokens, cells of each layer that sees everything (the mean of all), bytes of keys and values."""

    n_tokens: int
    n_cells: int
    nbytes: int


def cached(store: Store) -> Cached | None:
    """Measure the conversation used last; None if there is none."""
    s = max(store.cells.conversations, key=lambda s: s.used, default=None)
    if s is None:
        return None
    whole = [store.cells.filled(i, s) for i, g in enumerate(store.cells.groups) if g.policy.whole]
    held = sum(len(cells) * state.shape[0] * state.dtype.size(state.shape[2]) for state, cells in store.live(s))
    return Cached(len(s), sum(whole) // max(1, len(whole)), held)
