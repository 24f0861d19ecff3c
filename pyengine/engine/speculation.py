"""Speculation: drafted tokens are computed in the same step as the next one, and kept as far as they come true.

A step of a few rows takes little longer than a step of one, and a row has the same bits in both. So the sampler sees, row by row, what it
would have seen one step at a time: it draws the same tokens, and where it draws another than was drafted, the rows behind are taken back
(Leviathan, Kalman and Matias 2023, arXiv:2211.17192, with drafts that are certain or wrong: then nothing has to be corrected).

    Pace         what a step takes by its number of rows, as measured
    Speculation  which drafts are computed in a step: as many as make the most tokens a second
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from heapq import merge
from typing import Any

import numpy as np

from pyengine.engine.drafts import Draft, Drafts
from pyengine.engine.request import Job, Request
from pyengine.engine.runner import Runner
from pyengine.errors import RequestError
from pyengine.programs.rows import token_rows
from pyengine.programs.step import Logits, Work
from pyengine.text.lookup import DRAFTED, most_drafted


_ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)        # at which steps are measured; others count to the next of these
_SLOPE = 0.04                # what a row is thought to add to a step of one, before it is known: little, so that it is tried
_PRIOR = 0.3                 # weight of that, in steps
_MOST, _KEPT = 20.0, 0.98    # weight of what was measured, at most, and what is left of it with each step of other rows: so it is tried again
_LONGEST = 3.0               # a step that takes so many times what was thought counts as no longer: something else happened in it


class Pace:
    """Seconds of a step by the number of its rows, as measured of late."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}                 # by the number of the place in _ROWS
        self._weights: dict[int, float] = {}

    def note(self, rows: int, seconds: float) -> None:
        """Count a step."""
        kind = bisect_left(_ROWS, rows)
        if self._seconds:
            seconds = min(seconds, _LONGEST * self._thought(kind))
        seconds = max(seconds, 1e-9)                         # a clock may stand still
        for other in self._weights:
            self._weights[other] *= _KEPT
        n = self._weights.get(kind, 0.0)
        self._seconds[kind] = (n * self._seconds.get(kind, 0.0) + seconds) / (n + 1)
        self._weights[kind] = min(n + 1, _MOST)

    def _thought(self, kind: int) -> float:
        """Return what a step takes: as measured, and the less of that the longer ago, between those of fewer and more rows, or by _SLOPE."""
        known = [k for k, n in self._weights.items() if n > _PRIOR and k != kind] or [next(iter(self._weights))]
        below, above = max((k for k in known if k < kind), default=None), min((k for k in known if k > kind), default=None)
        near = above if below is None else below
        if below is not None and above is not None:
            share = (_rows(kind) - _rows(below)) / (_rows(above) - _rows(below))
            prior = (1 - share) * self._seconds[below] + share * self._seconds[above]
        elif near is not None:
            prior = self._seconds[near] * _shape(_rows(kind)) / _shape(_rows(near))
        else:                                                # nothing else is known
            prior = self._seconds[kind]
        n = self._weights.get(kind, 0.0)
        return (n * self._seconds.get(kind, 0.0) + _PRIOR * prior) / (n + _PRIOR)

    def costs(self, first: int, last: int) -> list[float]:
        """Return what steps of first .. last rows take, in any unit."""
        if not self._seconds:
            return [_shape(rows) for rows in range(first, last + 1)]
        kinds = range(max(0, bisect_left(_ROWS, first) - 1), bisect_left(_ROWS, last) + 1)
        return np.interp(np.arange(first, last + 1), [_rows(k) for k in kinds], [self._thought(k) for k in kinds]).tolist()


def _rows(kind: int) -> int:
    return _ROWS[kind] if kind < len(_ROWS) else 2 * _ROWS[-1]


def _shape(rows: float) -> float:
    return 1 + _SLOPE * (rows - 1)


BESIDE_A_PROMPT = 0.5        # how likely a drafted token is at least in a step that also reads a prompt, which it takes rows from


class Speculation:
    """See the module's docstring.

    speculate: what holds for requests that say nothing. recurrent: layers keep states, of which a step leaves none behind a drafted token,
    so nothing can be taken back, and nothing is drafted. stats: tokens that were drafted, and accepted, are counted there.
    """

    def __init__(self, speculate: Any, recurrent: bool, stats: dict[str, int]) -> None:
        self._usual, self._recurrent = most_drafted(speculate, 0 if recurrent else DRAFTED), recurrent
        self.pace = Pace()
        self.stats = stats

    def drafts(self, request: Request, speculate: Any) -> Drafts | None:
        """Return the drafts of a request, None for one that has none. Raises: RequestError where it asks for some that cannot be."""
        most = most_drafted(speculate, self._usual)
        alone = request.seats == 1                           # not one conversation for each beam
        if speculate and most and (self._recurrent or not alone):
            raise RequestError("speculate: " + ("layers of this model keep states that cannot be taken back" if self._recurrent else
                                                "an answer that is searched for with beams has no drafts"))
        return Drafts(most, request.rows.ids, request.max_tokens, request.eog, request.guide) if most and alone else None

    def run(self, runner: Runner, work: Sequence[tuple[Job, Work]]) -> Logits:
        """Run a step, and note what it took if it only generates."""
        began = time.perf_counter()
        logits = runner.run([w for _, w in work])
        if all(r.pending is not None for r, _ in work):
            self.pace.note(sum(w.stop - w.start for _, w in work), time.perf_counter() - began)
        return logits

    def add(self, work: list[tuple[Job, Work]], runner: Runner) -> None:
        """Put drafts into a step where they pay, as far as it has rows left. A conversation that is compressed as it grows has none: each row
        adds to the sums by which its cells are chosen."""
        used = sum(w.stop - w.start for _, w in work)
        room, found = runner.n_batch - used, dict[int, Draft]()
        for i, (r, w) in enumerate(work):
            if room and r.drafts is not None and r.pending is not None and not runner.bounds.running(w.conversation):
                draft = r.drafts.next(r.report.tokens, min(room, runner.bounds.room(w.conversation.compression) - len(w.conversation) - 1))
                if draft.tokens:
                    found[i] = draft
        if not found:
            return
        reads = any(r.pending is None for r, _ in work)
        best = merge(*([(-q, i) for q in draft.odds] for i, draft in found.items()))
        likely = [(-q, i) for q, i in best][:room]
        n = self._paying([q for q, _ in likely], len(work), used, reads)
        for i, draft in found.items():
            k = sum(j == i for _, j in likely[:n])
            if k:
                r, w = work[i]
                s, rows = w.conversation, [r.pending, *draft.tokens[:k]]
                work[i] = r, Work(s, token_rows(rows, s.next, runner.axes, s.sees), 0, k + 1, np.arange(k + 1, dtype=np.int32))

    def _paying(self, odds: Sequence[float], n: int, used: int, reads: bool) -> int:
        """Return how many of the likeliest drafted tokens make the most tokens a second of a step that makes n for certain."""
        if reads:
            return sum(q >= BESIDE_A_PROMPT for q in odds)
        costs = self.pace.costs(used, used + len(odds))
        made, found, rate = float(n), 0, n / costs[0]
        for k, q in enumerate(odds, 1):
            made += q
            if made / costs[k] > rate:
                found, rate = k, made / costs[k]
        return found

    def settle(self, request: Job, work: Work, n_taken: int, runner: Runner) -> None:
        """Take the rows of a draft back whose tokens have not come: all but the first n_taken of its step."""
        n = work.stop - work.start
        if n_taken < n:
            runner.take_back(work.conversation, n - n_taken)
        request.report.n_drafted += n - 1
        request.report.n_accepted += n_taken - 1
        self.stats["drafted_tokens"] += n - 1
        self.stats["accepted_tokens"] += n_taken - 1
