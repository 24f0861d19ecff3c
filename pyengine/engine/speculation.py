"""Speculation: drafted tokens are computed in the same step as the next one, and kept as far as they come true.

A step of a few rows takes little longer than a step of one, and a row has the same bits in both. So the sampler sees, row by row, what it
would have seen one step at a time: it draws the same tokens, and where it draws another than was drafted, the rows behind are taken back
(Leviathan, Kalman and Matias 2023, arXiv:2211.17192, with drafts that are certain or wrong: then nothing has to be corrected).

Drafts come from the text itself (`engine.drafts`) and, where there is one, from a `Source`. Which of them are computed in a step: as many as
make the most tokens a second (`engine.pace`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from heapq import merge
from typing import Any

import numpy as np

from pyengine.engine.drafts import Draft, Drafts
from pyengine.engine.pace import Pace
from pyengine.engine.proposing import Asked, Source, Terms
from pyengine.engine.request import Drafted, Job, Request
from pyengine.engine.runner import Runner
from pyengine.errors import RequestError
from pyengine.programs.rows import token_rows
from pyengine.programs.step import Logits, Work
from pyengine.text.lookup import DRAFTED, most_drafted

BESIDE_A_PROMPT = 0.5        # how likely a drafted token is at least in a step that also reads a prompt, which it takes rows from


class Speculation:
    """See the module's docstring.

    speculate: what holds for requests that say nothing. states: where layers keep some, how many there are for drafted tokens, behind each
    of which a step leaves one; None: no layer does. stats: tokens that were drafted, and accepted, are counted there. source: what drafts
    beside the text itself.
    """

    def __init__(self, speculate: Any, states: int | None, stats: dict[str, int], source: Source | None = None) -> None:
        self._usual, self._none = most_drafted(speculate, DRAFTED) if states != 0 else 0, states == 0
        self.pace = Pace()
        self.stats, self.source = stats, source

    def drafts(self, request: Request, speculate: Any) -> Drafts | None:
        """Return the drafts of a request, None for one that has none. Raises: RequestError where it asks for some that cannot be."""
        most = most_drafted(speculate, self._usual)
        alone = request.seats == 1                           # not one conversation for each beam
        if speculate and most and (self._none or not alone):
            raise RequestError("speculate: " + ("layers of this model keep states, and it was loaded with none for drafts (speculate=False)" if self._none else
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
        room, states = runner.n_batch - used, runner.cells.undrafted
        room = room if states is None else min(room, states)
        may = [(i, r, min(room, runner.bounds.room(w.conversation.compression) - len(w.conversation) - 1)) for i, (r, w) in enumerate(work)
               if r.drafts is not None and r.pending is not None and not runner.bounds.running(w.conversation)] if room else []
        found = self._drafted(may, len(work), used)
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
                r.drafts.origin = draft.origin
                work[i] = r, Work(s, token_rows(rows, s.next, runner.axes, s.sees), 0, k + 1, np.arange(k + 1, dtype=np.int32), drafted=k)

    def _drafted(self, may: Sequence[tuple[int, Job, int]], n: int, used: int) -> dict[int, Draft]:
        """Return the draft of each request that has one, by its place: from its text, or from the source where that makes more tokens.

        may: (place, request, most tokens); n: rows of a step that makes a token for each of them, used: all its rows.
        """
        found = {i: draft for i, r, most in may if (draft := r.drafts.next(r.report.tokens, most)).tokens}
        if self.source is None:
            return found
        beside = {i: Asked(r, most, r.drafts.ends, sum(found[i].odds) if i in found else 0.0) for i, r, room in may
                  if (most := r.drafts.most_after(len(r.report.tokens), room)) > 0}
        if not beside:
            return found
        most = max(asked.most for asked in beside.values()) * len(beside)
        terms = Terms(n, self.pace.costs(used, used + most), self.pace.known)
        for (i, asked), draft in zip(beside.items(), self.source.propose(list(beside.values()), terms)):
            draft = asked.job.drafts.allowed(draft)
            if sum(draft.odds) > asked.beaten:
                found[i] = draft
        return found

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
        runner.take_back(work.conversation, n - n_taken)
        by = request.report.drafts
        before = by.get(request.drafts.origin, Drafted())
        by[request.drafts.origin] = Drafted(before.n_drafted + n - 1, before.n_accepted + n_taken - 1)
        self.stats["drafted_tokens"] += n - 1
        self.stats["accepted_tokens"] += n_taken - 1

    def leave(self, request: Job) -> None:
        """Let go of what the source keeps for a request that has ended."""
        if self.source is not None:
            self.source.leave(request)

    def reset(self) -> None:
        """Forget what the source keeps for requests that may come."""
        if self.source is not None:
            self.source.reset()
