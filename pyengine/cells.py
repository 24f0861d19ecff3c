"""Which cells of the caches hold which tokens of which sequence. Bookkeeping only: data is copied by whoever holds it.

Layers that see everything (`Full`) take pages of PAGE cells from one pool; sequences with a common prefix share its pages, and a
shared page is copied before it is written. Layers that see a bounded past (`Sliding`, `Chunked`) have a ring of cells for each
sequence, which a fork copies. Nothing is ever moved to make room, so there is nothing to defragment.

    table[row, j % slots] = cell of token j of the sequence in that row      (the tensor that attention reads)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence as Many
from dataclasses import dataclass, field

import numpy as np

from pyengine.errors import PlanError
from pyengine.kvcache import Chunked, Full, Policy, Sliding

PAGE = 64                    # tiles of attention hold 64 keys at most, so a tile never spans more than two pages


@dataclass(frozen=True)
class Group:
    """Layers with the same policy: they share a table.

    slots   tokens of one sequence that the table can name
    n_cells cells of each layer's cache, for all sequences
    """

    policy: Policy
    slots: int
    n_cells: int

    @property
    def paged(self) -> bool:
        """Whether cells come from a pool of pages; else each sequence has a ring."""
        return isinstance(self.policy, Full)


def group(policy: Policy, n_ctx: int, n_batch: int, n_seq: int) -> Group:
    """The cells that `n_seq` sequences of at most `n_ctx` tokens need; a lone sequence needs no whole pages."""
    slots = policy.slots(n_ctx, n_batch)
    if isinstance(policy, Full) and n_seq > 1:
        slots = -(-slots // PAGE) * PAGE
    return Group(policy, slots, slots * n_seq)


@dataclass(eq=False)
class Sequence:
    """One conversation's tokens in the caches.

    keys     what each row is: a token id, or (digest, row) of a picture
    next     position of the row that follows
    media    digests of its pictures
    active   a request works on it; else it is kept for its prefix until room is needed
    """

    row: int
    keys: list[Hashable] = field(default_factory=list)
    next: int = 0
    media: frozenset[bytes] = frozenset()
    active: bool = True
    used: int = 0                                            # when it was last used
    high: int = 0                                            # most tokens it ever had: rings remember the last of those
    pages: dict[int, list[int]] = field(default_factory=dict)    # by group number

    def __len__(self) -> int:
        return len(self.keys)


Copy = tuple[int, np.ndarray, np.ndarray]                    # group number, cells from, cells to


class Cells:
    """The cells of one model's caches.

    tables: int32 [n_seq, slots] of each group; they are written here and read by attention.
    """

    def __init__(self, groups: Many[Group], tables: Many[np.ndarray]):
        self.groups, self.tables = list(groups), list(tables)
        self.n_seq = len(tables[0])
        self.sequences: list[Sequence] = []
        self._clock = 0
        self._free = [list(range(-(-g.n_cells // PAGE)))[::-1] if g.paged else [] for g in self.groups]
        self._refs = [np.zeros(len(f), np.int32) for f in self._free]
        for g, table in zip(self.groups, self.tables):
            rows = np.arange(self.n_seq, dtype=np.int32)[:, None] * g.slots + np.arange(g.slots, dtype=np.int32)
            table[:] = 0 if g.paged else rows

    # -- sequences ----------------------------------------------------------------------------------------------------

    def new(self) -> Sequence:
        """An empty sequence, in a free row or that of the idle sequence used longest ago.

        Raises: PlanError when all rows are active.
        """
        taken = {s.row for s in self.sequences}
        if len(taken) == self.n_seq:
            idle = [s for s in self.sequences if not s.active]
            if not idle:
                raise PlanError(f"all {self.n_seq} sequences are in use; load with a larger n_seq")
            self.drop(min(idle, key=lambda s: s.used))
            return self.new()
        s = Sequence(min(set(range(self.n_seq)) - taken), pages={i: [] for i, g in enumerate(self.groups) if g.paged})
        self.sequences.append(s)
        self.touch(s)
        return s

    def touch(self, s: Sequence) -> None:
        """Note that a sequence is used now."""
        self._clock += 1
        s.used = self._clock

    def drop(self, s: Sequence) -> None:
        """Forget a sequence; its pages are free unless others share them."""
        self.truncate(s, 0)
        self.sequences.remove(s)

    def reach(self, s: Sequence, n: int) -> int:
        """How many of the first n tokens of a sequence another one can go on from: n, or 0 where a ring has lost them."""
        n = min(n, len(s))
        for g in self.groups:
            if not g.paged and first_seen(g.policy, n) < s.high - g.slots:
                return 0
        return n

    def fork(self, s: Sequence, n: int) -> tuple[Sequence, list[Copy]]:
        """A new sequence of the first n = reach(s, n) tokens of `s`: pages are shared, rings are to be copied."""
        was, s.active = s.active, True                       # it must outlive the search for a row
        try:
            child = self.new()
        finally:
            s.active = was
        copies: list[Copy] = []
        for i, g in enumerate(self.groups):
            if g.paged:
                child.pages[i] = s.pages[i][: -(-n // PAGE)]
                self._refs[i][child.pages[i]] += 1
                self.tables[i][child.row] = self.tables[i][s.row]
            else:
                tokens = np.arange(first_seen(g.policy, n), n) % g.slots
                copies.append((i, self.tables[i][s.row, tokens], self.tables[i][child.row, tokens]))
        child.keys, child.high, child.media = s.keys[:n], n, s.media
        return child, copies

    def truncate(self, s: Sequence, n: int) -> None:
        """Keep the first n tokens; the caller has asked `reach`, or keeps none."""
        for i, pages in s.pages.items():
            for page in pages[-(-n // PAGE):]:
                self._release(i, page)
            del pages[-(-n // PAGE):]
        del s.keys[n:]
        if n == 0:
            s.high = s.next = 0

    # -- cells --------------------------------------------------------------------------------------------------------

    def extend(self, s: Sequence, n: int) -> list[Copy]:
        """Make cells for n more tokens, which the caller then adds to `keys`. Returns what must be copied before they are written.

        Raises: PlanError when no page is left although idle sequences were dropped.
        """
        first, copies = len(s), []
        for i, g in enumerate(self.groups):
            if not g.paged:
                continue
            pages = s.pages[i]
            for block in range(first // PAGE, -(-(first + n) // PAGE)):
                if block < len(pages) and self._refs[i][pages[block]] == 1:
                    continue
                page = self._take(i, s)
                start = block * PAGE
                cells = np.arange(page * PAGE, page * PAGE + PAGE, dtype=np.int32)[: g.slots - start]
                if block < len(pages):                       # shared: this sequence gets a copy of what it has there
                    kept = first - start
                    copies.append((i, self.tables[i][s.row, start : first].copy(), cells[:kept]))
                    self._release(i, pages[block])
                    pages[block] = page
                else:
                    pages.append(page)
                self.tables[i][s.row, start : start + len(cells)] = cells
        s.high = max(s.high, first + n)
        return copies

    def cells_of(self, number: int, s: Sequence, index: np.ndarray) -> np.ndarray:
        """Cells of tokens `index` of a sequence in one group."""
        return self.tables[number][s.row, index % self.groups[number].slots]

    def live(self, number: int, s: Sequence) -> np.ndarray:
        """Numbers of the tokens of a sequence that a group's cells hold and later tokens may see."""
        return np.arange(first_seen(self.groups[number].policy, len(s)), len(s))

    def _take(self, i: int, s: Sequence) -> int:
        while not self._free[i]:
            idle = [o for o in self.sequences if not o.active and o is not s]
            if not idle:
                raise PlanError(f"no page is left of {len(self._refs[i])}; fewer or shorter conversations fit")
            self.drop(min(idle, key=lambda o: o.used))
        page = self._free[i].pop()
        self._refs[i][page] = 1
        return page

    def _release(self, i: int, page: int) -> None:
        self._refs[i][page] -= 1
        if not self._refs[i][page]:
            self._free[i].append(page)

    def shared(self) -> Iterator[tuple[int, int]]:
        """(group number, number of pages that more than one sequence holds)."""
        for i, refs in enumerate(self._refs):
            yield i, int((refs > 1).sum())


def first_seen(policy: Policy, n: int) -> int:
    """The first token that token n, the next one, sees."""
    match policy:
        case Sliding(window):
            return max(0, n - window + 1)
        case Chunked(size):
            return n // size * size
    return 0
