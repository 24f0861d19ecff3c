"""A conversation's cells compressed: what attention gave to each key is read, a policy says which cells stay, and what goes is merged into them.

Each head of each layer keeps its own tokens, all of them as many, so that all share a table of cells: after a compression cell i of a
conversation holds the i-th token that was kept, another one for each head, and tokens that follow take the cells behind. Keys were rotated
when they were written and keep their tokens' positions. A cell that nothing was merged into keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TYPE_CHECKING

import numpy as np

from pyengine.cache.cells import Conversation
from pyengine.cache.regroup import Grouping
from pyengine.cache.store import Layer, Store
from pyengine.native.blocks import dequantize, quantize

if TYPE_CHECKING:
    from pyengine.cache.compression.base import Compression

WINDOWS = "last", "after"                # rows of a channel that are counted anew after each compression


def columns(policy: Compression, kinds: Sequence[str]) -> list[int] | None:
    """Return which of the sums that a step makes each of a policy's are; None where it does not make them."""
    free, found = list(enumerate(kinds)), []
    for _, kind in policy.channels:
        place = next(((i, k) for i, k in free if k == kind), None)
        if place is None:
            return None
        free.remove(place)
        found.append(place[0])
    return found


def prompt_counts(policy: Compression, kinds: Sequence[str], is_text: np.ndarray) -> np.ndarray:
    """Return how much each row of a prompt counts in each of a step's sums: float32 [n, kinds]."""
    counts = np.zeros((len(is_text), len(kinds)), np.float32)
    counts[:, columns(policy, kinds)] = policy.weights(is_text, len(is_text))
    return counts


def running_counts(policy: Compression, kinds: Sequence[str], is_text: np.ndarray, stop: int, picture: int) -> np.ndarray:
    """Return the same for rows of a conversation that is compressed as it grows, next before row `stop`; picture: where the last one before begins.

    An observation window is then the policy's, before that row. "after" are rows from the last picture on, its own among them: often no
    text follows before the next one.
    """
    counts = np.zeros((len(is_text), len(kinds)), np.float32)
    index = np.arange(len(is_text))
    near = index >= (0 if policy.window is None else stop - policy.window)
    rows = {"all": np.ones(len(is_text)), "text": is_text, "media": ~is_text, "last": near, "after": near & (index >= picture)}
    for place, (which, _) in zip(columns(policy, kinds), policy.channels):
        counts[:, place] = rows[which]
    return counts


def clear(store: Store, s: Conversation) -> None:
    """Set the sums of a conversation's keys to nothing, those to come included."""
    for layer in compressed(store):
        if layer.sums is not None:
            slots = store.cells.groups[layer.group].slots
            cells = np.arange(s.row * slots, (s.row + 1) * slots)
            heads, _, kinds = layer.sums.shape
            layer.sums.scatter(cells, np.zeros((heads, len(cells), 4 * kinds), np.uint8))


def copy_sums(store: Store, s: Conversation, child: Conversation) -> None:
    """Give a conversation that goes on from a beginning of another one the sums of its keys."""
    clear(store, child)
    for layer in compressed(store):
        if layer.sums is not None:
            cells = cells_of_sums(store, child, layer)
            layer.sums.copy(cells_of_sums(store, s, layer)[: len(cells)], cells)


def cells_of_sums(store: Store, s: Conversation, layer: Layer) -> np.ndarray:
    """Return where the sums of a conversation's keys lie in a layer's."""
    return s.row * store.cells.groups[layer.group].slots + np.arange(store.cells.filled(layer.group, s))


def compressed(store: Store) -> list[Layer]:
    """Return the layers whose cells are compressed."""
    return [layer for layer in store.layers if store.cells.groups[layer.group].policy.compressed]


def compress(store: Store, s: Conversation, policy: Compression, budget: int, n_threads: int = 1, free: int = 0) -> None:
    """Leave a conversation `budget` cells of each layer and head, or those that it has if they are fewer. A policy that spends more on some
    layers spends less on others; `free` cells at least are then left to each for tokens that follow.

    If that is interrupted the conversation is dropped. Raises: PlanError without pages for a conversation that shares its cells.
    """
    cells = store.cells
    text = np.array([isinstance(key, int) for key in s.keys])
    layers = [(GroupedContent if layer.parts else Content)(store, s, policy, layer, text) for layer in compressed(store)]
    try:
        kept = {layer.group: min(budget, len(layer.old)) for layer in layers}
        if policy.uneven and budget * len(layers) < sum(len(layer.old) for layer in layers):
            wanted = policy.budgets([layer.statistics for layer in layers], [layer.is_text for layer in layers], layers[0].queries, budget)
            kept = dict(zip(kept, spread(wanted, [layer.most(free) for layer in layers], budget * len(layers))))
        new = {i: cells.compact(i, s, n) for i, n in kept.items()}
        for layer in layers:
            if kept[layer.group] < len(layer.old):
                layer.compress(new[layer.group], n_threads)
            else:
                layer.keep_sums(np.broadcast_to(np.arange(len(layer.old)), layer.tokens.shape))
        cells.shrink(s, kept | {part.group: kept[layer.group] for layer in compressed(store) for part in layer.parts})
    except BaseException:                                    # Ctrl-C: half moved
        if s in cells.conversations:
            cells.conversations.remove(s)
        cells.recount()
        raise


def spread(wanted: Sequence[int], most: Sequence[int], total: int) -> list[int]:
    """Return cells of each layer, of 1 to `most` each and `total` together at most, or as many as are wanted, as near to those as that allows."""
    total = min(total, sum(wanted))
    given = [max(1, min(n, limit)) for n, limit in zip(wanted, most)]
    while sum(given) > total:                                # the largest gives, the smallest takes
        given[max(range(len(given)), key=lambda i: (given[i], -i))] -= 1
    while sum(given) < total and given != list(most):
        given[min((i for i in range(len(given)) if given[i] < most[i]), key=lambda i: (given[i], i))] += 1
    return given


class Content:
    """What a layer holds of a conversation, on the way through a compression.

    text     bool [tokens], of the conversation; old: its cells; statistics: float32 [heads, cells, channels of the policy], of one layer that reads it; is_text: bool [heads, cells]
    queries  heads that share a head of keys
    """

    def __init__(self, store: Store, s: Conversation, policy: Compression, layer: Layer, text: np.ndarray):
        own = store.cells.groups[layer.group]
        self.s, self.policy, self.layer, self.group, self.queries = s, policy, layer, layer.group, layer.queries
        self.old = store.cells.cells_of(layer.group, s, np.arange(store.cells.filled(layer.group, s))).copy()
        self._slots = own.slots
        self._heads, self._places = layer.states[0].shape[0], columns(policy, own.policy.kinds) or []
        self._cells = cells_of_sums(store, s, layer)
        self.tokens = tokens_of(s, layer.number, self._heads, len(self.old))
        self.is_text = text[self.tokens]
        sums = np.zeros((*self.tokens.shape, 0), np.float32)
        if layer.sums is not None:
            sums = np.ascontiguousarray(layer.sums.gather(self._cells)).view(np.float32)
        self._sums, self.statistics = sums, sums[..., self._places]
        if layer.readers > 1:                                # what one of them gives, as in layers with keys of their own
            self.statistics = self.statistics / np.float32(layer.readers)

    def most(self, free: int) -> int:
        """Return how many cells it can keep where so many are to be free."""
        return min(max(1, self._slots - free), len(self.old))

    def compress(self, new: np.ndarray, n_threads: int) -> None:
        """Choose what stays, and write it to the cells `new`. Heads are merged side by side."""
        numbers = self.read()
        counts = self.queries * (len(self.s) - self.tokens)                    # of probabilities in each key's sums
        stay = self.policy.choose(self.statistics, self.is_text, len(new), counts=counts, keys=numbers[0], values=numbers[1])
        merged = None
        if self.policy.merging != "none":
            merged = self.policy.merge(stay, *numbers, sums=self.policy.shares(self.statistics), n_threads=n_threads)
        self.write(new, stay, numbers, merged)
        self.s.kept[self.layer.number] = np.take_along_axis(self.tokens, stay, 1).astype(np.int32)
        self.keep_sums(stay)

    def read(self) -> list[Any]:
        """Return keys and values as float32 [heads, cells, e], of blocks `rope.mixed` elements; None where nobody asks for them."""
        self._data = [state.gather(self.old) for state in self.layer.states]
        reads = self.policy.merging != "none" or self.policy.contents
        return [dequantize(d, state.dtype) if reads else None for d, state in zip(self._data, self.layer.states)]

    def write(self, new: np.ndarray, stay: np.ndarray, numbers: Sequence[Any], merged: Sequence[np.ndarray] | None) -> None:
        """Write what stays, [heads, n] of the cells that were, to the cells `new`."""
        for i, (state, d) in enumerate(zip(self.layer.states, self._data)):
            left = np.take_along_axis(d, stay[..., None], 1)
            if merged is not None:
                changed = (merged[i] != np.take_along_axis(numbers[i], stay[..., None], 1)).any(-1)
                left[changed] = quantize(merged[i][changed].astype(np.float32), state.dtype)
            state.scatter(new, left)

    def keep_sums(self, stay: np.ndarray) -> None:
        """Let sums go with their keys. Those of a window are counted anew."""
        if self.layer.sums is None:
            return
        again = np.zeros_like(self._sums)
        for at, (which, _) in zip(self._places, self.policy.channels):
            if which not in WINDOWS:
                again[:, : stay.shape[1], at] = np.take_along_axis(self._sums[..., at], stay, 1)
        self.layer.sums.scatter(self._cells, again.view(np.uint8))


class GroupedContent(Content):
    """The same of a layer whose tokens are in groups, but for the last and the first ones: what stays is put into groups anew."""

    def __init__(self, store: Store, s: Conversation, policy: Compression, layer: Layer, text: np.ndarray):
        super().__init__(store, s, policy, layer, text)
        self._store, self._was = store, Grouping(store, s, layer, len(self.old))

    def read(self) -> list[Any]:
        """Return keys and values as float32 [heads, cells, e]."""
        return self._was.read()

    def write(self, new: np.ndarray, stay: np.ndarray, numbers: Sequence[Any], merged: Sequence[np.ndarray] | None) -> None:
        """Write what stays to the first cells of the conversation. Values that were in groups, and are, keep their bytes unless something was
        merged into them."""
        left = [np.take_along_axis(x, stay[..., None], 1) for x in numbers]
        keep = self._was.grouped[stay]
        if merged is not None:
            keep &= (merged[1] == left[1]).all(-1)
            left = [x.astype(np.float32) for x in merged]
        codes = np.take_along_axis(self._was.codes(), stay[..., None], 1)
        Grouping(self._store, self.s, self.layer, len(new)).write(*left, codes, keep)


def tokens_of(s: Conversation, layer: int, heads: int, n: int) -> np.ndarray:
    """Return of which tokens the first n cells of a layer are: int32 [heads, n]."""
    kept = s.kept.get(layer, np.empty((heads, 0), np.int32))
    behind = np.arange(len(s) - (n - kept.shape[1]), len(s), dtype=np.int32)
    return np.concatenate([kept, np.broadcast_to(behind, (heads, len(behind)))], axis=1)
