"""Cells against a plain dictionary: whatever sequences do, each token that is seen later reads back what was written for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyengine.cache.cells import Cells, Conversation, Group, group
from pyengine.errors import PlanError, RequestError
from pyengine.cache import policy
from pyengine.cache.policy import Chunked, Cross, Full, Recurrent, Sliding, SNAPSHOTS, snapshots_in, thinned

PAGE, N_BATCH = 4, 5
INTERVAL, TAIL = policy.INTERVAL, policy.TAIL
MIXES = {
    "full": (Full(),),
    "gemma": (Sliding(6), Full()),
    "llama 4": (Chunked(8), Full()),
    "rings": (Sliding(1), Chunked(3), Sliding(7)),
    "across": (Full(), Cross(50)),
    "across and a window": (Cross(50), Sliding(6)),
    "recurrent": (Recurrent(((1, 4),)), Full()),
    "recurrent with drafts": (Recurrent(((1, 4),), 3), Full()),
    "recurrent of two kinds": (Recurrent(((1, 4),)), Recurrent(((2, 2),))),
    "recurrent and a window": (Sliding(6), Recurrent(((1, 4),))),
}


def brought(value: int) -> list[int]:
    """Encoder rows that a token brings: every fourth one is a picture of 1 to 5."""
    return [-1000 * value - j for j in range(1, 2 + value % 5)] if value % 4 == 3 else []


class Store:
    """Cells, and an array for each group that holds in each cell the value written there last. A state is the last token's value: it stands
    for all before it, because values are unique.
    """

    def __init__(self, policies: tuple[Any, ...], n_ctx: int, n_seq: int, spare: int | None = None):
        groups = [group(p, n_ctx, N_BATCH, n_seq, PAGE) for p in policies]
        if spare is not None and n_seq > 1:                  # fewer pages than all sequences could fill
            groups = [Group(g.policy, g.slots, g.slots + spare * PAGE) if g.policy.paged else g for g in groups]
        self.cells = Cells(groups, [None if g.policy.recurrent else np.full((n_seq, g.slots), -1, np.int32) for g in groups], PAGE)
        self.data = [np.full(g.n_cells, -1, np.int64) for g in groups]
        self.serial = 0

    def copy(self, copies: Any) -> None:
        for number, source, target in copies:
            self.data[number][target] = self.data[number][source]

    def write(self, s: Conversation, n: int, drafted: int = 0) -> list[int]:
        """Append n tokens in steps, as the engine does; returns their values, which are unique. drafted: may be taken back."""
        values, end = list(range(self.serial, self.serial + n)), len(s) + n
        self.serial += n
        for i in range(0, n, N_BATCH):
            part = values[i : i + N_BATCH]
            rows = [r for v in part for r in brought(v)]
            self.copy(self.cells.extend(s, len(part), len(rows), end, drafted=drafted))
            for number, array in enumerate(self.data):
                if self.cells.groups[number].policy.recurrent:
                    self.leave(number, s, part)
                    continue
                own, first = rows if self.across(number) else part, self.cells.filled(number, s)
                array[self.cells.cells_of(number, s, np.arange(first, first + len(own)))] = own
            for j, value in enumerate(part):
                if brought(value):
                    s.pictures.append((len(s) + j, s.crossed() + len(brought(value))))
            s.keys += part
            self.cells.touch(s)
        return values

    def leave(self, number: int, s: Conversation, values: list[int]) -> None:
        """Write the states behind new tokens, as a step does; the one before them is that of the last token."""
        before, after = self.cells.states_of(s, len(values))
        assert (before[1:] == -2).all() and after[-1] >= 0 and (before[0] < 0 or before[0] not in after)
        assert before[0] == -1 if not s.keys else self.data[number][before[0]] == s.keys[-1]
        self.data[number][after[after >= 0]] = np.array(values)[after >= 0]

    def read(self, number: int, s: Conversation, tokens: np.ndarray) -> list[int]:
        return self.data[number][self.cells.cells_of(number, s, tokens)].tolist()

    def across(self, number: int) -> bool:
        return isinstance(self.cells.groups[number].policy, Cross)

    def values(self, number: int, tokens: list[int]) -> list[int]:
        """What a group holds of these tokens."""
        return [r for t in tokens for r in brought(t)] if self.across(number) else tokens

    def check(self, model: dict[Conversation, list[int]]) -> None:
        cells = self.cells
        for s in cells.conversations:
            assert s.keys == model[s]
        for i, g in enumerate(cells.groups):
            for s in cells.conversations:
                live, values = cells.live(i, s), self.values(i, model[s])
                first = 0 if self.across(i) else g.policy.visible(np.array([len(s)]))[0][0]
                assert live.tolist() == list(range(first, len(values)))
                assert self.read(i, s, live) == [values[j] for j in live]
            for s in cells.conversations if g.policy.recurrent else ():
                marks = [m for m in s.marks if m.n <= len(s)]
                assert [self.data[i][m.cell] for m in marks] == [model[s][m.n - 1] for m in marks]
                assert len(s.marks) <= g.slots and sum(m.stays for m in s.marks) <= SNAPSHOTS
            held = Counter(p for s in cells.conversations for p in s.pages.get(i, ()))
            if g.policy.paged:
                assert {p: int(n) for p, n in enumerate(cells._refs[i]) if n} == held
                assert sorted([*cells._free[i], *held]) == list(range(len(cells._refs[i])))
            owners: dict[int, tuple[int, int]] = {}          # cell -> (number of its token, value): the same for all who hold it
            for s in cells.conversations:
                for j in cells.live(i, s):
                    cell = int(np.ravel(cells.cells_of(i, s, j))[0])
                    assert 0 <= cell < g.n_cells
                    value = self.values(i, model[s])[j]
                    assert owners.setdefault(cell, (int(j), value)) == (int(j), value)
                    assert not g.policy.ring or cell // g.slots == s.row


def some(machine: Machine) -> bool:
    """Whether there are sequences."""
    return hasattr(machine, "cells") and bool(machine.cells.conversations)


ROW, BACK = st.integers(0, 3), st.integers(0, 9)             # one of the sequences; how far from its end


class Machine(RuleBasedStateMachine):
    """`model` is the plain dictionary: the values of each sequence's tokens."""

    @initialize(mix=st.sampled_from(sorted(MIXES)), n_ctx=st.integers(3, 40), n_seq=st.sampled_from([3, 4, 2, 1]),
                spare=st.none() | st.integers(0, 4), lengths=st.lists(st.integers(1, 30), max_size=3))
    def begin(self, mix: str, n_ctx: int, n_seq: int, spare: int | None, lengths: list[int]) -> None:
        self.store, self.n_ctx, self.model = Store(MIXES[mix], n_ctx, n_seq, spare), n_ctx, {}
        policy.INTERVAL, policy.TAIL = 5, 2
        self.files: list[tuple[list[tuple[np.ndarray, list[int]]], list[int], list[tuple[int, int]]]] = []
        self.cells = self.store.cells
        for row, n in enumerate(lengths[:n_seq]):
            self.new()
            self.extend(row, n, N_BATCH)

    def teardown(self) -> None:
        policy.INTERVAL, policy.TAIL = INTERVAL, TAIL

    def pick(self, row: int) -> Conversation:
        return self.cells.conversations[row % len(self.cells.conversations)]

    def refused(self, action: Any, but: Conversation | None = None) -> Any:
        """What `action` returns; or None after a PlanError, which may only come when nothing idle is left."""
        try:
            return action()
        except PlanError:
            assert not [s for s in self.cells.conversations if not s.active and s is not but]
            return None

    def kept(self, s: Conversation, back: int) -> int:
        assert self.cells.reach(s, len(s)) == len(s)
        return self.cells.reach(s, max(0, len(s) - back))

    @precondition(lambda self: not some(self) or len(self.cells.conversations) < self.cells.n_seq or not self.cells.conversations[0].active)
    @rule()
    def new(self) -> None:
        full, idle = len(self.cells.conversations) == self.cells.n_seq, [s for s in self.cells.conversations if not s.active]
        oldest = min(idle, key=lambda s: s.used, default=None)
        s = self.refused(self.cells.new)
        assert (s is None) == (full and not idle)
        assert oldest is None or (oldest in self.cells.conversations) == (not full)
        if s is not None:
            self.model[s] = []

    @precondition(some)
    @rule(row=ROW, n=st.integers(1, 30), step=st.integers(1, N_BATCH))
    def extend(self, row: int, n: int, step: int) -> None:
        s = self.pick(row)
        for _ in range(n):
            values = self.refused(lambda: self.store.write(s, min(step, self.n_ctx - len(s))), s)
            if not values:
                return
            self.model[s] += values

    @precondition(some)
    @rule(row=ROW, n=st.integers(1, N_BATCH), drafted=st.integers(1, N_BATCH), back=BACK)
    def drafted_step(self, row: int, n: int, drafted: int, back: int) -> None:
        """Of the tokens of a step some of the last are taken back, as many as may be."""
        s = self.pick(row)
        n, states = min(n, self.n_ctx - len(s)), self.cells.undrafted
        drafted = min(drafted, n - 1) if states is None else min(drafted, n - 1, states)
        if drafted < 1 or any(g.policy.across for g in self.cells.groups):
            return
        values = self.refused(lambda: self.store.write(s, n, drafted), s)
        if values:
            back = min(back, drafted)
            self.cells.truncate(s, len(s) - back)
            self.cells.settle(s)
            self.model[s] += values[: n - back]
            assert self.cells.undrafted in (None, *(g.policy.drafted for g in self.cells.groups if g.policy.recurrent))

    @precondition(some)
    @rule(row=ROW, n=st.integers(1, N_BATCH))
    def interrupted_step(self, row: int, n: int) -> None:
        """Cells are made and written, but the tokens never become part of the sequence."""
        s = self.pick(row)
        n = min(n, self.n_ctx - len(s))
        copies = self.refused(lambda: self.cells.extend(s, n, n), s)
        if copies is not None:
            self.store.copy(copies)
            for i, array in enumerate(self.store.data):
                if self.cells.groups[i].policy.recurrent:
                    after = self.cells.states_of(s, n)[1]
                    array[after[after >= 0]] = -7
                    continue
                first = self.cells.filled(i, s)
                array[self.cells.cells_of(i, s, np.arange(first, first + n))] = -7

    @precondition(some)
    @rule(row=ROW, back=BACK)
    def fork(self, row: int, back: int) -> None:
        s = self.pick(row)
        n = self.kept(s, back)
        found = self.refused(lambda: self.cells.fork(s, n), s) if n else None
        if found:
            self.store.copy(found[1])
            self.model[found[0]] = self.model[s][:n]

    @precondition(some)
    @rule(row=ROW, back=BACK)
    def truncate(self, row: int, back: int) -> None:
        s = self.pick(row)
        n = self.kept(s, back)
        self.cells.truncate(s, n)
        del self.model[s][n:]

    @precondition(some)
    @rule(row=ROW, back=BACK)
    def renew(self, row: int, back: int) -> None:
        s = self.pick(row)
        n = self.kept(s, back)
        heir = self.cells.renew(s, n)
        assert s not in self.cells.conversations and heir.row == s.row and heir.active
        self.model[heir] = self.model[s][:n]

    @precondition(some)
    @rule(row=ROW, active=st.booleans())
    def rest_or_wake(self, row: int, active: bool) -> None:
        s = self.pick(row)
        s.active = active
        self.cells.touch(s)

    @precondition(lambda self: some(self) and len(self.cells.conversations) > 1)
    @rule(row=ROW)
    def drop(self, row: int) -> None:
        self.cells.drop(self.pick(row))

    @precondition(some)
    @rule(row=ROW, start=st.integers(0, 39), n=st.integers(1, 39))
    def shift(self, row: int, start: int, n: int) -> None:
        s = self.pick(row)
        start = min(start, len(s))
        stop = min(start + n, len(s))
        if not all(g.policy.paged for g in self.cells.groups):
            with pytest.raises(RequestError, match="bounded past"):
                self.cells.shift(s, start, stop)
            return
        if any(token >= start for token, _ in s.pictures):               # the runner refuses it
            return
        moves = self.refused(lambda: self.cells.shift(s, start, stop), s)
        if moves is not None:
            held = [self.store.data[i][source] for i, source, _ in moves]        # all is read before anything is written
            for (i, _, target), values in zip(moves, held):
                self.store.data[i][target] = values
            del self.model[s][start:stop]

    @precondition(some)
    @rule(row=ROW)
    def save(self, row: int) -> None:
        s = self.pick(row)
        live = [self.cells.live(i, s) for i in range(len(self.cells.groups))]
        self.files.append(([(at, self.store.read(i, s, at)) for i, at in enumerate(live)], list(self.model[s]), list(s.pictures)))

    @precondition(lambda self: getattr(self, "files", None))
    @rule(number=st.integers(0, 9))
    def restore(self, number: int) -> None:
        live, values, pictures = self.files[number % len(self.files)]
        s = self.refused(lambda: self.cells.restore(values, pictures))
        if s is not None:
            for i, (at, held) in enumerate(live):
                self.store.data[i][self.cells.cells_of(i, s, at)] = held
            self.model[s] = list(values)

    @rule()
    def recount(self) -> None:
        def counted() -> tuple[Any, ...]:
            return [sorted(f) for f in self.cells._free], [r.tolist() for r in self.cells._refs], self.cells._states.tolist()

        before = counted()
        self.cells.recount()
        assert before == counted()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "store"):
            self.store.check(self.model)


TestCells = Machine.TestCase
TestCells.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_lone_sequence_keeps_within_a_pool_that_is_no_whole_number_of_pages() -> None:
    store = Store((Full(),), n_ctx=10, n_seq=1)
    assert store.cells.groups[0].n_cells == 10
    for _ in range(3):
        s = store.cells.new()
        store.check({s: store.write(s, 10)})
        store.cells.drop(s)


def test_a_fork_remembers_only_what_was_copied() -> None:
    """A ring holds more than a window; a fork gets the window, so it cannot go back as far as its parent."""
    store = Store((Sliding(4),), n_ctx=100, n_seq=2)
    s = store.cells.new()
    store.write(s, 20)
    assert store.cells.reach(s, 18) == 18
    child, copies = store.cells.fork(s, 20)
    store.copy(copies)
    assert store.cells.reach(child, 20) == 20 and store.cells.reach(child, 18) == 0
    store.write(child, 3)
    assert store.cells.reach(child, 22) == 22


def test_a_fork_shares_pages_until_one_writes() -> None:
    store = Store((Full(),), n_ctx=40, n_seq=3)
    cells = store.cells
    s = cells.new()
    store.write(s, 10)                                       # 3 pages, the last one half full
    free = len(cells._free[0])
    child, copies = cells.fork(s, 10)
    assert copies == [] and len(cells._free[0]) == free and dict(cells.shared()) == {0: 3}
    store.write(child, 1)
    assert len(cells._free[0]) == free - 1 and dict(cells.shared()) == {0: 2}
    store.write(s, 1)                                        # the half-full page is its own again
    assert len(cells._free[0]) == free - 1


def test_refused_pages_leave_everything_as_it_was() -> None:
    store = Store((Full(),), n_ctx=16, n_seq=2, spare=0)
    cells = store.cells
    a = cells.new()
    values = store.write(a, 6)
    b, _ = cells.fork(a, 6)
    model = {a: values, b: list(values)}
    with pytest.raises(PlanError, match="no page is left of 4"):
        cells.extend(b, 10)                                  # a copy of one page and two more, of the two that are free
    store.check(model)
    a.active = False
    model[b] = values + store.write(b, 5) + store.write(b, 5)
    assert a not in cells.conversations
    store.check(model)


def test_where_snapshots_are_made() -> None:
    assert snapshots_in(0, 600, 600) == [256, 512, 592]
    assert snapshots_in(256, 512, 600) == [512]                                  # a step of a longer prompt
    assert snapshots_in(592, 600, 600) == [] and snapshots_in(591, 600, 600) == [592]
    assert snapshots_in(0, 8, 8) == [] and snapshots_in(700, 769, 701) == [768]  # of an answer that goes on


def test_snapshots_are_spread_over_a_conversation() -> None:
    places = list(range(256, 2560, 256))
    assert thinned(places[:SNAPSHOTS], 5000, 0) == places[:SNAPSHOTS]
    assert thinned([100, 900, 1000, 1900, 2000], 2000, 0) == [100, 900, 1000, 1900]
    assert thinned([100, 900, 1000, 1900, 2000], 2000, 2000) == [900, 1000, 1900, 2000]      # that of the last prompt stays
    left: list[int] = []
    for n in range(256, 16_385, 256):                                            # one after the other, as a long prompt comes
        left = thinned([*left, n], n, 0)
    gaps = np.diff([0, *left, 16_384])
    assert len(left) == SNAPSHOTS and gaps.max() <= 6144, left


def test_first_seen_is_the_mask_s_lower_bound() -> None:
    for policy in (Full(), Sliding(1), Sliding(5), Chunked(3)):
        lo, _ = policy.visible(np.arange(20))
        assert [policy.first_of(n) for n in range(20)] == lo.tolist()
