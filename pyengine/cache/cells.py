"""Which cells of the caches hold which tokens of which conversation. Bookkeeping only: data is copied by whoever holds it.

Layers that see everything (`Full`) take pages of PAGE cells from one pool; conversations with a common prefix share its pages, and a
shared page is copied before it is written. So do those that see an encoder's rows (`Cross`), which have numbers of their own.
Layers that see a bounded past (`Sliding`, `Chunked`) have a ring of cells for each conversation, which a fork copies. Recurrent
layers have a pool of states: a step reads the one behind a conversation's last token and leaves others, in other cells, behind its
own, so a step that fails has changed nothing; a conversation is cut where a state is, and forks share states, which nobody changes.
Behind tokens that may be taken back each has its own, until it is settled which of them stay. Nothing is ever moved to make space,
so there is nothing to defragment. Where cells are compressed (`Compressed`), a conversation has fewer of them than tokens: numbers
of its keys count those that stayed, each head's and layer's own, and then the tokens that followed.

    table[row, j % slots] = cell of token (or encoder row) j of the conversation in that row      (the tensor that attention reads)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from heapq import heapify, heappop, heappush

import numpy as np

from pyengine.cache.policy import Policy, seen_across, snapshots_in, tail_of, thinned
from pyengine.errors import ContextOverflowError, PlanError, RequestError
from pyengine.ops.recurrent import BEGIN, FOLLOWS
from pyengine.records import dataclass, NamedTuple

PAGE = 64                    # tiles of attention hold 64 keys at most, so a tile never spans more than two pages


class Group(NamedTuple):
    """Layers with the same policy: they share a table.

    slots   tokens, or encoder rows, of one conversation that the table can name
    n_cells cells of each layer's cache, for all conversations
    pool    number of the first of the groups that take their pages from one pool, whose layers have one cache of n_cells together; None: its own
    share   of those cells, what is counted for each layer
    """

    policy: Policy
    slots: int
    n_cells: int
    pool: int | None = None
    share: int = 0


def group(policy: Policy, n_ctx: int, n_batch: int, n_seq: int, page: int = PAGE) -> Group:
    """Return the cells that `n_seq` conversations of at most `n_ctx` tokens need; a lone conversation needs no whole pages."""
    slots = policy.slots(n_ctx, n_batch)
    if policy.paged and n_seq > 1:
        slots = -(-slots // page) * page
    return Group(policy, slots, slots * n_seq + policy.drafted, share=slots * n_seq)


def groups_of(policies: Sequence[Policy], n_ctx: int, n_batch: int, n_seq: int, page: int = PAGE) -> list[Group]:
    """Return the cells of layers of these policies. Those that share a pool (`Compressed.layer`) have as many together as they would have alone,
    and for each one more page, of which a part may be unused."""
    made = [group(p, n_ctx, n_batch, n_seq, page) for p in policies]
    alike = [i for i, p in enumerate(policies) if p.pooled]
    for i in alike:
        share = n_seq * (policies[i].cells(n_ctx) + page)
        slots = -(-policies[i].slots(n_ctx, n_batch) // page) * page
        made[i] = Group(policies[i], slots, share * len(alike), alike[0], share)
    return made


class Mark(NamedTuple):
    """A state that recurrent layers left behind a conversation's first n tokens. stays: as a snapshot, when others follow."""

    n: int
    cell: int
    stays: bool = False


@dataclass(eq=False)
class Conversation:
    """One conversation's tokens in the caches.

    keys     what each row is: a token id, or (digest, row) of a picture
    pictures (number of its token, encoder rows up to its end) of each picture that is seen across
    next     position of the row that follows
    media    digests of its pictures
    adapters the scale of each adapter that its tokens are computed with; () is none of them
    active   a request works on it; else it is kept for its prefix until space is needed
    last     number of a token, and last hidden states of it and those behind it, float32 [n, d_model]: for a head that goes on with them
    ahead    the first token that this head has read: never one that has none before it
    marks    states of recurrent layers, by n; those beyond its tokens are of a step that is being run, or has failed
    compression  by which policy its cells are compressed; None: they are not. By group number, `gone`: tokens without a cell; by layer,
             `kept`: int32 [heads, n], of which tokens its first cells are
    floor    it cannot be cut to fewer tokens: what was chosen, or summed, knows of these
    partial  of a prompt that is compressed when it was read, the sums of a part are there
    """

    row: int
    keys: list[Hashable] = field(default_factory=list)
    pictures: list[tuple[int, int]] = field(default_factory=list)
    next: int = 0
    media: frozenset[bytes] = frozenset()
    adapters: tuple[float, ...] = ()
    active: bool = True
    used: int = 0                                            # when it was last used
    high: int = 0                                            # most tokens it ever had: rings remember the last of those
    low: dict[int, int] = field(default_factory=dict)        # by group number: no token before it was copied into its ring
    pages: dict[int, list[int]] = field(default_factory=dict)    # by group number
    compression: Hashable | None = None
    gone: dict[int, int] = field(default_factory=dict)
    kept: dict[int, np.ndarray] = field(default_factory=dict)
    floor: int = 0
    partial: bool = False
    marks: list[Mark] = field(default_factory=list)
    turn: int = 0                                            # behind which of them the last prompt's snapshot is
    last: tuple[int, np.ndarray] | None = None
    ahead: int = 1

    def __len__(self) -> int:
        return len(self.keys)

    def crossed(self, n: int | None = None) -> int:
        """Return the number of encoder rows that it has, or that its first n tokens brought."""
        return next((rows for token, rows in reversed(self.pictures) if n is None or token < n), 0)

    @property
    def sees(self) -> tuple[int, int]:
        """Encoder rows that its next token sees."""
        return seen_across(self.pictures)


Copy = tuple[int, np.ndarray, np.ndarray]                    # group number, cells from, cells to


class Cells:
    """The cells of one model's caches.

    tables: int32 [n_seq, slots] of each group; they are written here and read by attention. Recurrent groups have none.
    """

    def __init__(self, groups: Sequence[Group], tables: Sequence[np.ndarray | None], page: int = PAGE):
        self.groups, self.tables, self.page = list(groups), list(tables), page
        self.n_seq = next((len(t) for t in self.tables if t is not None), (self.groups[0].n_cells - self.groups[0].policy.drafted) // self.groups[0].slots)
        self.n_states = max((g.n_cells for g in self.groups if g.policy.recurrent), default=0)
        self.conversations: list[Conversation] = []
        self._clock = 0
        for g, table in zip(self.groups, self.tables):
            if table is None:
                continue
            rows = np.arange(self.n_seq, dtype=np.int32)[:, None] * g.slots + np.arange(g.slots, dtype=np.int32)
            table[:] = 0 if g.policy.paged else rows
        self.recount()

    def recount(self) -> None:
        """Derive free pages and the number of their holders from what conversations hold, whatever an interruption has cut short."""
        self._refs: list[np.ndarray] = []
        for i, g in enumerate(self.groups):                  # those of a pool have one count of holders, and one list of free pages
            own = g.pool is None or g.pool == i
            self._refs.append(np.zeros(-(-g.n_cells // self.page) if g.policy.paged else 0, np.int32) if own else self._refs[g.pool])
        for s in self.conversations:
            for i, pages in s.pages.items():
                np.add.at(self._refs[i], pages, 1)
        # The lowest free page is taken first: the last page of a lone conversation may be a part of one, and must be its last block.
        free = {id(refs): np.flatnonzero(refs == 0).tolist() for refs in self._refs}
        self._free = [free[id(refs)] for refs in self._refs]
        for pages in self._free:
            heapify(pages)
        self._pools = [[i for i, refs in enumerate(self._refs) if id(refs) == one] for one in free if self._refs]
        self._states = self._holders([m for s in self.conversations for m in s.marks])

    # -- conversations ----------------------------------------------------------------------------------------------------

    def new(self, adapters: tuple[float, ...] = (), compression: Hashable | None = None) -> Conversation:
        """Begin an empty conversation with these adapters, in a free row or in that of the idle conversation used longest ago.

        Raises: PlanError when all rows are active.
        """
        if len(self.conversations) == self.n_seq:
            self._evict(f"all {self.n_seq} conversations are in use; load with a larger n_seq")
        row = min(set(range(self.n_seq)) - {s.row for s in self.conversations})
        s = Conversation(row, adapters=adapters, compression=compression, pages={i: [] for i, g in enumerate(self.groups) if g.policy.paged})
        self.conversations.append(s)
        self.touch(s)
        return s

    def touch(self, s: Conversation) -> None:
        """Note that a conversation is used now."""
        self._clock += 1
        s.used = self._clock

    def drop(self, s: Conversation) -> None:
        """Forget a conversation, if it is not forgotten yet; its pages are free unless others share them."""
        if s in self.conversations:
            self.truncate(s, 0)
            self.conversations.remove(s)

    def reach(self, s: Conversation, n: int) -> int:
        """Return how many of the first n tokens of a conversation another can go on from.

        n; where layers are recurrent, as many as a state was left behind; 0 where a ring has lost them, or a compression knows of more.
        """
        n = min(n, len(s))
        if self.n_states:
            n = max((m.n for m in s.marks if m.n <= n), default=0)
        if n < s.floor:
            return 0
        for i, g in enumerate(self.groups):
            gone = s.gone.get(i, 0)
            if g.policy.ring and g.policy.first_of(n - gone) < max(0 if g.policy.stays else s.high - gone - g.slots, s.low.get(i, 0)):
                return 0
        return n

    def renew(self, s: Conversation, n: int) -> Conversation:
        """Turn the first n = reach(s, n) tokens of an idle conversation into an active one in its place; `s` itself is gone."""
        self.truncate(s, n)
        heir = replace(s, active=True)
        self.conversations[self.conversations.index(s)] = heir
        return heir

    def fork(self, s: Conversation, n: int) -> tuple[Conversation, list[Copy]]:
        """Begin a new conversation with the first n = reach(s, n) tokens of `s`: pages and states are shared, rings are to be copied."""
        was, s.active = s.active, True                       # it must outlive the search for a row
        try:
            child = self.new(s.adapters, s.compression)
        finally:
            s.active = was
        copies: list[Copy] = []
        for i, g in enumerate(self.groups):
            if g.policy.paged:
                child.pages[i] = s.pages[i][: -(-self.filled(i, s, n) // self.page)]
                self._refs[i][child.pages[i]] += 1
                self.tables[i][child.row] = self.tables[i][s.row]
            elif g.policy.ring:
                child.low[i] = g.policy.first_of(self.filled(i, s, n))
                tokens = self.seen(i, self.filled(i, s, n)) % g.slots
                copies.append((i, self.tables[i][s.row, tokens], self.tables[i][child.row, tokens]))
        child.gone, child.kept, child.floor = dict(s.gone), dict(s.kept), s.floor
        child.keys, child.high, child.media = s.keys[:n], n, s.media
        self._mark(child, [m for m in s.marks if m.n <= n])
        child.pictures, child.ahead = [p for p in s.pictures if p[0] < n], max(1, min(s.ahead, n))
        return child, copies

    def truncate(self, s: Conversation, n: int) -> None:
        """Keep the first n tokens; the caller has asked `reach`, or keeps none."""
        for i, pages in s.pages.items():
            kept = -(-self.filled(i, s, n) // self.page)
            for page in pages[kept:]:
                self._release(i, page)
            del pages[kept:]
        del s.keys[n:]
        s.pictures, s.ahead = [p for p in s.pictures if p[0] < n], max(1, min(s.ahead, n))
        self._mark(s, [m for m in s.marks if m.n <= n])
        if n == 0:
            s.high = s.next = s.floor = 0
            s.partial = False
            for by_number in (s.low, s.gone, s.kept):
                by_number.clear()

    # -- cells --------------------------------------------------------------------------------------------------------

    def filled(self, number: int, s: Conversation, n: int | None = None) -> int:
        """Return the number of tokens, or encoder rows, that a conversation has in a group; with n, those of its first n tokens.

        Of tokens without a cell none is counted: this is the number in the group of the token that follows.
        """
        if self.groups[number].policy.across:
            return s.crossed(n)
        return max(0, (len(s) if n is None else n) - s.gone.get(number, 0))

    def extend(self, s: Conversation, n: int, crossed: int = 0, end: int | None = None, gone: Mapping[int, int] = {},
               drafted: int = 0) -> list[Copy]:
        """Make cells for n more tokens, which the caller then adds to `keys`, and for the encoder rows that they bring, which it
        adds to `pictures`. Returns what must be copied before they are written.

        end: tokens at the end of the prompt that they are of, for snapshots of recurrent layers; None: none are made. gone: by group, how
        many of them get no cell. drafted: of the tokens that it has then, how many of the last may be taken back.

        Raises: PlanError when there are not enough pages although idle conversations were dropped; ContextOverflowError for more tokens
        than the cells of one conversation. `s` is then as it was.
        """
        more = [crossed if g.policy.across else n - gone.get(i, 0) for i, g in enumerate(self.groups)]
        for i, g in enumerate(self.groups):
            if g.policy.compressed and (cells := self.filled(i, s) + more[i]) > g.slots:
                raise ContextOverflowError(f"{cells} cells are needed, and a conversation has {g.slots}: ask with a policy of compression, or for less")
        copies = self._pages(s, more)
        s.high = max(s.high, len(s) + n)
        if self.n_states and n:
            self._leave(s, len(s) + n, end, drafted)
        return copies

    def _pages(self, s: Conversation, more: Sequence[int]) -> list[Copy]:
        """Make cells for so many more tokens, or encoder rows, of each group that has pages. Returns what must be copied before they are written."""
        copies: list[Copy] = []
        for pool in (pool for pool in self._pools if self.groups[pool[0]].policy.paged):
            while sum(len(self._lacking(i, s, more[i])) for i in pool) > len(self._free[pool[0]]):
                self._evict(f"no page is left of {len(self._refs[pool[0]])}; fewer or shorter conversations fit", but=s)
        for i, g in enumerate(self.groups):
            first = self.filled(i, s)
            for block in self._lacking(i, s, more[i]) if g.policy.paged else ():
                pages, start = s.pages[i], block * self.page
                page = self._take(i)
                cells = np.arange(page * self.page, (page + 1) * self.page, dtype=np.int32)[: g.slots - start]
                if block < len(pages):                       # shared: this conversation gets a copy of what it has there
                    copies.append((i, self.tables[i][s.row, start : first].copy(), cells[: first - start]))
                    self._release(i, pages[block])
                    pages[block] = page
                else:
                    pages.append(page)
                self.tables[i][s.row, start : start + len(cells)] = cells
        return copies

    def reserve(self, s: Conversation, n: int) -> list[Copy]:
        """Make cells for n more tokens of which only a head reads and writes some, in groups with pages. Raises: PlanError as `extend`."""
        return self._pages(s, [0 if g.policy.across else n for g in self.groups])

    def _leave(self, s: Conversation, last: int, end: int | None, drafted: int) -> None:
        """Choose behind which tokens the next step leaves states, the last one among them, and let go of what is not needed then."""
        first, held = len(s), [m for m in s.marks if m.n <= len(s)]
        new = [] if end is None else snapshots_in(first, last, end)
        if end is not None and tail_of(end) in new:
            s.turn = tail_of(end)
        stays = thinned([m.n for m in held if m.stays] + new, last, s.turn)
        back = last - drafted                                # to which it may be cut
        self._mark(s, [m._replace(stays=m.n in stays) for m in held if m.n in stays or m.n == first or m.n >= back])
        for n in sorted({*(n for n in stays if n > first), *range(max(first + 1, back), last), last}):
            self._mark(s, [*s.marks, Mark(n, int(np.flatnonzero(self._states == 0)[0]), n in stays)])

    def settle(self, s: Conversation) -> None:
        """Let go of states behind tokens that might have been taken back: none is now."""
        self._mark(s, [m for m in s.marks if m.stays or m.n == len(s)])

    @property
    def undrafted(self) -> int | None:
        """How many more tokens may be such that can be taken back, of all conversations together; None: any number."""
        own = next((g for g in self.groups if g.policy.recurrent), None)
        return None if own is None else max(0, own.policy.drafted - sum(max(0, len(s.marks) - own.slots) for s in self.conversations))

    def _mark(self, s: Conversation, marks: list[Mark]) -> None:
        """Give a conversation these states in place of those that it has."""
        self._states += self._holders(marks) - self._holders(s.marks)
        s.marks = marks

    def _holders(self, marks: list[Mark]) -> np.ndarray:
        """Return how many of these are in each cell of recurrent layers."""
        return np.bincount(np.array([m.cell for m in marks], np.int64), minlength=self.n_states)

    def states_of(self, s: Conversation, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cells of the states before and after each of n more tokens, for which there are cells: int32 [n] each."""
        before, after = np.full(n, FOLLOWS, np.int32), np.full(n, -1, np.int32)
        before[:1] = next(m.cell for m in s.marks if m.n == len(s)) if len(s) else BEGIN
        for m in s.marks:
            if m.n > len(s):
                after[m.n - len(s) - 1] = m.cell
        return before, after

    def compact(self, number: int, s: Conversation, n: int) -> np.ndarray:
        """Make the first n cells of a conversation in a group its own, and return them: what stays is written there, then `shrink`.

        Raises: PlanError when there are not enough pages although idle conversations were dropped.
        """
        for block, page in enumerate(s.pages[number][: -(-n // self.page)]):
            if self._refs[number][page] > 1:
                while not self._free[number]:
                    self._evict("no page is left for a conversation that shares its cells with others", but=s)
                own, start = self._take(number), block * self.page
                self._release(number, page)
                s.pages[number][block] = own
                cells = np.arange(own * self.page, (own + 1) * self.page, dtype=np.int32)[: self.groups[number].slots - start]
                self.tables[number][s.row, start : start + len(cells)] = cells
        return self.cells_of(number, s, np.arange(n)).copy()

    def shrink(self, s: Conversation, kept: Mapping[int, int]) -> None:
        """Note that a conversation has kept so many cells of each of these groups; the pages of others are free, and rings hold what is seen next."""
        for number, n in kept.items():
            pages = s.pages.get(number, [])
            for page in pages[-(-n // self.page) :]:
                self._release(number, page)
            del pages[-(-n // self.page) :]
            s.gone[number] = len(s) - n
            if self.groups[number].policy.ring:
                s.low[number] = self.groups[number].policy.first_of(n)
        s.floor, s.partial = len(s), False

    def shift(self, s: Conversation, start: int, stop: int) -> list[Copy]:
        """Remove tokens [start, stop) of a conversation whose groups are all paged; later ones, no pictures, take their numbers.

        Returns the cells that these had and have: both lists are of one length, and may overlap. Keys are cut, nothing is copied.
        Raises: RequestError where a group is a ring; PlanError without pages, and `s` is then as it was.
        """
        if not all(g.policy.paged for g in self.groups):
            raise RequestError("tokens cannot be removed from the middle where layers remember a bounded past only")
        if s.floor:
            raise RequestError("tokens cannot be removed from the middle of a conversation whose cells are compressed")
        n = len(s) - stop
        own = [i for i, g in enumerate(self.groups) if not g.policy.across]
        old = [(i, self.cells_of(i, s, np.arange(stop, len(s))).copy()) for i in own]
        kept = range(start // self.page, -(-(start + n) // self.page))
        for i, refs in ((i, self._refs[i]) for i in own):    # the new pages that it needs, and those that it gives back
            while (sum(refs[p] > 1 for p in s.pages[i][: kept.stop][kept.start :])
                   > len(self._free[i]) + sum(refs[p] == 1 for p in s.pages[i][kept.stop :])):
                self._evict(f"no page is left of {len(refs)}; fewer or shorter conversations fit", but=s)
        head, tail = s.keys[:start], s.keys[stop:]
        self.truncate(s, start)
        copies = self.extend(s, n)
        s.keys, s.high = head + tail, start + n
        return copies + [(i, cells, self.cells_of(i, s, np.arange(start, start + n)).copy()) for i, cells in old]

    def restore(self, keys: Sequence[Hashable], pictures: Sequence[tuple[int, int]] = (), adapters: tuple[float, ...] = (),
                compression: Hashable | None = None, gone: Mapping[int, int] = {}) -> Conversation:
        """Restore a conversation of keys and pictures, of which some have no cells; the caller fills `live` ones.

        Raises: PlanError without a row or pages, ContextOverflowError.
        """
        s = self.new(adapters, compression)
        try:
            self.extend(s, len(keys), pictures[-1][1] if pictures else 0, gone=gone)
        except (PlanError, ContextOverflowError):
            self.drop(s)
            raise
        s.keys, s.pictures, s.gone, s.ahead = list(keys), list(pictures), dict(gone), max(1, len(keys))
        s.low = {i: g.policy.first_of(self.filled(i, s)) for i, g in enumerate(self.groups) if g.policy.ring}
        return s

    def cells_of(self, number: int, s: Conversation, index: np.ndarray) -> np.ndarray:
        """Return the cells of numbers `index` of a conversation in one group (tokens, encoder rows, or cells that were kept); of the states
        behind these tokens."""
        if self.groups[number].policy.recurrent:
            return np.array([m.cell for m in s.marks if np.isin(m.n - 1, index)], np.int64)
        return self.tables[number][s.row, index % self.groups[number].slots]

    def live(self, number: int, s: Conversation) -> np.ndarray:
        """Return the numbers of a conversation's tokens, or encoder rows, that a group's cells hold and later tokens may see."""
        return self.seen(number, self.filled(number, s))

    def seen(self, number: int, n: int) -> np.ndarray:
        """Return the numbers of those of n tokens, or encoder rows, that later tokens may see in a group."""
        return self.groups[number].policy.seen(n)

    def _lacking(self, i: int, s: Conversation, n: int) -> list[int]:
        """Return the blocks for which a conversation needs a page of its own before n more tokens, or encoder rows, are written."""
        pages, refs, first = s.pages[i], self._refs[i], self.filled(i, s)
        blocks = range(first // self.page, -(-(first + n) // self.page)) if n else ()
        return [b for b in blocks if b >= len(pages) or refs[pages[b]] > 1]

    def _evict(self, refusal: str, but: Conversation | None = None) -> None:
        """Drop the idle conversation used longest ago. Raises: PlanError with `refusal` when none is idle."""
        idle = [s for s in self.conversations if not s.active and s is not but]
        if not idle:
            raise PlanError(refusal)
        self.drop(min(idle, key=lambda s: s.used))

    def _take(self, i: int) -> int:
        page = heappop(self._free[i])
        self._refs[i][page] = 1
        return page

    def _release(self, i: int, page: int) -> None:
        self._refs[i][page] -= 1
        if not self._refs[i][page]:
            heappush(self._free[i], page)

    def media(self) -> frozenset[bytes]:
        """Return the digests of the pictures that conversations hold."""
        return frozenset().union(*(s.media for s in self.conversations))

    def shared(self) -> Iterator[tuple[int, int]]:
        """Yield (group number, number of pages that more than one conversation holds)."""
        for i, refs in enumerate(self._refs):
            yield i, int((refs > 1).sum())
