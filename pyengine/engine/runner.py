"""One step of a model with its caches: cells are made, contents copied, inputs filled, the program run, and what it added noted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pyengine.backends.base import Program
from pyengine.cache.cells import Conversation
from pyengine.cache.eviction import copy_sums
from pyengine.cache.policy import TAIL
from pyengine.cache.store import Store
from pyengine.engine.bounds import Bounds
from pyengine.engine.quantizer import quantized
from pyengine.errors import ContextOverflowError, RequestError
from pyengine.programs.rows import common, Rows
from pyengine.programs.step import Logits, Row, Step, StepProgram, Work


class Runner:
    """A step's program with the cells and contents of its caches."""

    def __init__(self, step: Step, program: Program):
        self.step, self.program = step, program
        self.axes, self.n_batch = step.model.position_axes, step.sizes.n_batch
        self.cells = step.cells(program)
        self.store = Store(self.cells, step.caches(program), quantized)
        self.inputs = StepProgram(step, program, self.cells)
        self.bounds = Bounds(step, self.store, getattr(program.prepared, "n_threads", 1))
        self.n_steps = 0

    def run(self, work: Sequence[Work]) -> Logits:
        """Run one step; returns logits of the first n_head rows that give some, valid until the next call.

        A step that fails, or is interrupted, adds nothing to its conversations; those whose cells may be half copied are dropped.
        """
        try:
            work = [self._make_cells(part) for part in work]
            self.inputs.fill(work)
        except BaseException:                                # Ctrl-C too
            for part in work:
                if part.conversation in self.cells.conversations:
                    self.cells.conversations.remove(part.conversation)
            self.cells.recount()
            raise
        logits = self.inputs.run()
        for part in work:
            s = part.conversation
            for i, rows in part.rows.across(part.start, part.stop):
                s.pictures.append((len(s) + i - part.start, s.crossed() + len(rows)))
            s.next = part.rows.position(part.stop)
            s.keys.extend(part.rows.keys[part.start : part.stop])
            if part.counts is not None:
                s.floor, s.partial = len(s), not self.bounds.running(s)
            self.cells.touch(s)
        self.n_steps += 1
        return logits

    def ahead(self, rows: Sequence[tuple[Conversation, int, int, np.ndarray]]) -> tuple[list[Row], np.ndarray]:
        """Run the head that predicts further tokens on a token of each conversation: see `StepProgram.ahead`."""
        for s, between, *_ in rows if self.step.ahead.own else ():
            self.store.copy(self.cells.reserve(s, between + 1))
        return self.inputs.ahead(rows)

    def last(self, s: Conversation) -> np.ndarray | None:
        """Return the state of a conversation's last token, where it was kept for that head."""
        return self.inputs.last(s)

    def take_back(self, s: Conversation, n: int) -> None:
        """Remove the last n tokens, which no token of another conversation has seen; with layers that keep states, such that were `drafted`.

        What is left then stays.
        """
        self.cells.truncate(s, len(s) - n)
        self.cells.settle(s)
        s.next -= n

    def _make_cells(self, part: Work) -> Work:
        """Make cells for a part of a step; returns it with what its rows count in sums of attention."""
        if part.conversation.compression is not None:
            part = self.bounds.counted(part)
        pictures = [rows for _, rows in part.rows.across(part.start, part.stop)]
        end = len(part.conversation) - part.start + len(part.rows) - part.drafted
        if part.counts is not None and not self.bounds.running(part.conversation):
            end += TAIL                                      # compressed there: nothing goes on from before it
        self.store.copy(self.cells.extend(part.conversation, part.stop - part.start, sum(map(len, pictures)), end, drafted=part.drafted))
        self.inputs.cross(part.conversation, pictures)
        return part

    def steps(self, s: Conversation, rows: Rows, start: int, n_batch: int) -> Iterator[tuple[int, int]]:
        """Cut the rows from `start` on into steps of at most n_batch rows, as `Rows.steps` does, and where a conversation's cells are taken."""
        while start < len(rows):
            stop = rows.cut(start, min(n_batch, self.bounds.most(s, rows, start)))
            start, stop = next(rows.steps(start, n_batch)) if stop == start else (start, stop)
            yield start, stop
            start = stop

    def after_prompt(self, s: Conversation) -> None:
        """Let go of cells of a conversation whose prompt has been read to its end, if its policy does that then."""
        self.bounds.after_prompt(s)

    def head(self, done: int) -> Logits:
        """Return logits of the last step's rows that give some, from number `done` on, n_head at most."""
        return self.inputs.head(done)

    @property
    def hidden(self) -> np.ndarray:
        """Last hidden states of all wanted rows of the last step [w, d_model], valid until the next one."""
        return self.inputs.hidden

    def check_across(self, rows: Rows) -> None:
        """Check the number of encoder rows.

        Raises: RequestError for tokens without a prompt that the encoder has read, where there must be one; ContextOverflowError for pictures
        that have more encoder rows than a conversation's caches.
        """
        if self.step.model.source is not None and rows.source is None:
            raise RequestError("these tokens are the decoder's, and nothing says what its encoder reads; use generate(prompt), or logits(ids, source=prompt)")
        n, most = sum(len(s.embedding) for _, s in rows.crossed), self.step.sizes.across
        if n > most:
            what = "tiles" if any(s.alone for _, s in rows.crossed) else "pictures"
            raise ContextOverflowError(f"the prompt's {len(rows.crossed)} {what} have {n} encoder rows, but a conversation holds "
                                       f"{most}; load with images=(width, height, number) for a larger number of pictures, or make "
                                       "them smaller")

    def shift(self, s: Conversation, start: int, stop: int) -> None:
        """Remove tokens from an idle conversation: see `Store.shift`. Raises: RequestError where positions have several axes, or are added to
        embeddings, too."""
        if self.step.model.absolute:
            raise RequestError("tokens cannot be removed from the middle where positions are added to embeddings")
        if self.axes != 1:
            raise RequestError("tokens cannot be removed from the middle where positions have several axes (M-RoPE)")
        self.store.shift(s, start, stop)

    def reach(self, s: Conversation, rows: Rows, most: int) -> int:
        """Return how many of the first rows, `most` at most, a conversation has, and can be gone on from."""
        n, found = min(common(s.keys, rows.keys), most), -1
        while n != found:                                    # neither within a picture that is one step, nor where a cache cannot be cut
            found = self.cells.reach(s, rows.whole(n))
            n = rows.whole(found)
        return n

    def resume(self, rows: Rows) -> tuple[Conversation, int]:
        """Return a conversation that has the longest useful beginning of `rows`, with the same adapters, active, and that beginning's length.

        An idle conversation is continued where it is when most of it is used, or where a fork would cost another one and it is itself the
        one that had to go, or begins with all of the prompt: what is cut off then is an earlier answer to it.
        Raises: PlanError when all rows are active.
        """
        cells, most = self.cells, len(rows) - 1
        best, kept = None, 0
        alike = [s for s in cells.conversations if s.adapters == rows.adapters and s.compression == rows.compression and not s.partial]
        for s in sorted(alike, key=lambda s: s.active):
            n = self.reach(s, rows, most)
            if n > kept:
                best, kept = s, n
        if best is None:
            return cells.new(rows.adapters, rows.compression), 0
        oldest = min((s for s in cells.conversations if not s.active), key=lambda s: s.used, default=None)
        full = oldest is not None and len(cells.conversations) == cells.n_seq
        if not best.active and (2 * kept > len(best) or full and (best is oldest or kept == most)):
            return cells.renew(best, kept), kept
        child, copies = cells.fork(best, kept)
        try:
            self.store.copy(copies)
            copy_sums(self.store, best, child)
        except BaseException:                                # Ctrl-C: its ring may be half copied
            cells.drop(child)
            raise
        return child, kept
