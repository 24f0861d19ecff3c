"""Many requests on one model: sequences join and leave between steps, and each gets the bits that it would get alone.

`Runner` runs one step on rows of several sequences: it fills the program's inputs and keeps the cells. `Scheduler` decides which
rows: one of every request that generates, and beside them a slice of the longest-waiting prompt, so that a long prompt does not
stall the others. Kernels compute a row with one order of operations whatever else is in the step, so results do not depend on
who else is being served.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from pyengine.engine.proposing import Source
from pyengine.engine.request import Job
from pyengine.engine.runner import Runner
from pyengine.engine.speculation import Speculation
from pyengine.errors import ContextOverflowError, RequestError
from pyengine.programs.rows import token_rows
from pyengine.programs.step import Logits, Row, Work

F = TypeVar("F", bound=Callable[..., Any])
YIELD_SECONDS = 1e-4         # enough for another thread to wake
BESIDE = 128                 # rows of a prompt in a step that also generates: what the others wait for


class Scheduler:
    """A queue of requests, served in the order in which they came, as many at once as there are rows of conversations."""

    def __init__(self, runner: Runner, n_ctx: int, speculate: Any = None, source: Source | None = None):
        self.runner, self.n_ctx = runner, n_ctx
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []
        self.lock = threading.RLock()                        # who works on the model now; other threads wait
        self.asking: set[int] = set()                        # and are in here, so that a loop of steps lets them have it
        self._stepping = False
        self.stats = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "drafted_tokens": 0, "accepted_tokens": 0}
        self.speculation = Speculation(speculate, runner.cells.undrafted, self.stats, source)

    @property
    def has_room(self) -> bool:
        """Whether another request would be worked on at once."""
        return sum(r.seats for r in (*self.active, *self.waiting)) < self.runner.cells.n_seq

    def submit(self, request: Job) -> None:
        """Add a request to the queue. Raises as `check`."""
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Job) -> None:
        """Check that a request can be served. Raises: RequestError for an empty prompt, ContextOverflowError for one that no context, or no cells, hold."""
        if not len(request.rows):
            raise RequestError("the prompt is empty")
        check_room(len(request.rows), self.n_ctx)
        self.runner.bounds.check_prompt(request.rows)
        self.runner.check_across(request.rows)

    def cancel(self, request: Job) -> None:
        """Stop working on a request; what it has computed stays as an idle conversation.

        May come in the middle of a step, when a stream that nobody holds is collected: the step then ends first.
        """
        request.finished = True
        if self.lock.acquire(blocking=False):                # a step of another thread ends first, and sweeps then
            try:
                if not self._stepping:
                    self._sweep()
            finally:
                self.lock.release()

    def check_idle(self, what: str) -> None:
        """Raise RequestError within a step: `lock` lets its own thread in."""
        if self._stepping:
            raise RequestError(f"{what}: a step of the model is being run")

    def close(self, closed: Any) -> None:
        """End all requests with the error that a use of `closed` raises, and let go of the runner: `closed` stands in its place."""
        self.check_idle("close")
        for request in (*self.active, *self.waiting):
            if not request.finished:
                request.error, request.finished = closed.error, True
        self._sweep()
        self.runner, self.speculation.source = closed, None

    def advance(self) -> None:
        """Run one step for those that are served. Raises what the step raises; all requests in it have then ended with that error.

        The caller holds `lock`. Raises: RequestError within a step, as when a callback of one asks for another.
        """
        if self._stepping:
            raise RequestError("a step is being run, and another one was asked for within it")
        self._stepping, served = True, []
        try:
            self._admit()
            work = self._compose()
            served = [r for r, _ in work]
            if work:
                logits = self.speculation.run(self.runner, work)
                self._take(work, logits)
                for r, w in work:
                    if w.rows is r.rows and w.stop == len(r.rows):
                        self.runner.after_prompt(w.conversation)
        except BaseException as error:                       # Ctrl-C too, wherever it comes
            for request in served:
                if not request.finished:
                    request.error, request.finished = error, True
            raise
        finally:
            self._stepping = False
            self._sweep()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold `lock`, and have loops of steps give way to whoever waits for it so."""
        me = threading.get_ident()
        try:
            self.asking.add(me)
            with self.lock:
                self.asking.discard(me)
                yield
        finally:
            self.asking.discard(me)

    def give_way(self) -> None:
        """Let threads that wait for `lock` have it, after a step and before the next one: a lock alone is not fair."""
        if self.asking:
            time.sleep(YIELD_SECONDS)

    def _take(self, work: Sequence[tuple[Job, Work]], logits: Logits) -> None:
        """Hand out what a step gave for wanted rows, in order: hidden states of `hidden` work, logits of the others."""
        row, head, first = 0, 0, 0                           # of all rows, of those with logits, and of these the first one in `logits`
        hidden = self.runner.hidden if any(w.hidden for _, w in work) else _NOTHING
        for request, w in work:
            if request.pending is None:
                request.done = w.stop
            n = len(w.wanted)
            if w.hidden:
                self._hand(request, hidden[row : row + n], None)
            prompt = w.rows is request.rows
            for i, at in enumerate(() if w.hidden else w.wanted.tolist()):
                if i and not prompt and (request.finished or request.pending != w.rows.keys[at]):      # another one than was drafted
                    self.speculation.settle(request, w, i, self.runner)
                    break
                if head + i - first >= len(logits):
                    first, logits = head + i, self.runner.head(head + i)
                scored = prompt and w.start + at + 1 < len(w.rows)
                self._hand(request, logits[head + i - first], w.start + at + 1 if scored else None)
            else:
                if n > 1 and not prompt:
                    self.speculation.settle(request, w, n, self.runner)
            head += 0 if w.hidden else n
            row += n

    def _hand(self, request: Job, given: Row | np.ndarray, scored: int | None) -> None:
        """Give a request what came for it; scored: the row of its prompt that these logits foretell, where it is not the first new one."""
        if request.finished or isinstance(given, np.ndarray) and not len(given):
            return
        before = len(request.report.tokens)
        try:
            if scored is None:
                request.take(given)
            else:
                request.score(scored, given)
        except Exception as error:                           # of the sampler: this request's own
            request.error, request.finished = error, True
        self.stats["generated_tokens"] += len(request.report.tokens) - before

    def _admit(self) -> None:
        """Give free rows to waiting requests; if no request is active, the first one ends with the error that no row is free."""
        cells = self.runner.cells
        while self.waiting and (self._seated() + self.waiting[0].seats <= cells.n_seq or not self.active):
            request = self.waiting.popleft()
            try:
                self._join(request)
            except BaseException as error:                   # no row, or Ctrl-C
                if request.conversation is not None:
                    request.conversation.active = False
                request.error, request.finished = error, True
                if not isinstance(error, Exception):
                    raise

    def _seated(self) -> int:
        """Count the places that are taken: conversations that somebody works on, and those that requests may still begin."""
        cells = self.runner.cells
        return sum(s.active for s in cells.conversations) + sum(r.seats - r.n_held for r in self.active)

    def _join(self, request: Job) -> None:
        request.started = time.perf_counter()
        request.join(self.runner)
        request.conversation.media = request.media
        run = request.report
        run.n_prompt, run.n_cached, run.conversation = request.rows.n_asked, request.done, request.conversation
        self.stats["prompt_tokens"] += run.n_prompt
        self.stats["cached_tokens"] += run.n_cached
        self.active.append(request)

    def _sweep(self) -> None:
        """Let go of requests that have ended."""
        for request in [r for r in self.active if r.finished]:
            request.leave(self.runner)
            self.speculation.leave(request)
        self.active = [r for r in self.active if not r.finished]
        self.waiting = deque(r for r in self.waiting if not r.finished)

    def _compose(self) -> list[tuple[Job, Work]]:
        """Collect the rows of the next step."""
        work: list[tuple[Job, Work]] = []
        for r in [r for r in self.active if r.pending is not None]:
            if len(r.conversation) == self.runner.bounds.room(r.conversation.compression):
                r.fill()
                continue
            for s, token in r.branches():
                work.append((r, Work(s, token_rows([token], s.next, self.runner.axes, s.sees), 0, 1, _FIRST)))
        left = self.runner.n_batch - len(work)
        limit, first = min(left, BESIDE) if work else left, True
        for r, share in self._shares(limit):
            part = self._slice(r, min(share, limit), left if first else limit)
            if part is None:
                if first:                                    # a picture with no space beside the others has a step of its own
                    return [(r, self._slice(r, 0, self.runner.n_batch))]
                break
            work.append((r, part))
            limit, first = limit - (part.stop - part.start), False
            if limit <= 0:
                break
        self.speculation.add(work, self.runner)
        return work

    def _shares(self, limit: int) -> list[tuple[Job, int]]:
        """Divide the rows of a step among the prompts: the one that waits longest has half of them at least, the shortest one the rest.

        So a short prompt is not kept waiting by a long one that came before it, and the long one goes on.
        """
        prompts = [r for r in self.active if r.pending is None and not r.finished]
        if len(prompts) < 2:
            return [(r, limit) for r in prompts]
        oldest, *others = prompts
        others.sort(key=lambda r: len(r.rows) - r.done)
        left = sum(len(r.rows) - r.done for r in others)
        return [(oldest, limit - min(limit // 2, left)), *((r, limit) for r in others)]

    def _slice(self, r: Job, limit: int, most: int) -> Work | None:
        """Take the next rows of a prompt: at most `limit`, or one atomic picture of at most `most`; None if it does not fit."""
        start = r.done
        stop = r.rows.cut(start, min(limit, self.runner.bounds.most(r.conversation, r.rows, start)))
        if stop == start:
            stop = r.rows.cut(start, r.rows.atom(start))
            if stop - start > most:
                return None
        return Work(r.conversation, r.rows, start, stop, r.wanted(start, stop), r.hidden)


_FIRST, _NOTHING = np.zeros(1, np.int32), np.empty(0, np.float32)


def check_room(n: int, n_ctx: int) -> None:
    """Check a prompt's length. Raises: ContextOverflowError for a prompt that exceeds the context."""
    if n > n_ctx:
        raise ContextOverflowError(f"the prompt has {n} tokens, but the context holds {n_ctx}; load with a larger n_ctx")


def alone(method: F) -> F:
    """Let a method of a model run when no other thread works on the model."""
    @wraps(method)
    def waits(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._scheduler.turn():
            return method(self, *args, **kwargs)

    return waits                                             # type: ignore[return-value]
