"""One prompt on its way to the answer that a search with beams finds: each of them is a conversation, and all are in the same steps.

Beams are forked where they are: pages of their tokens are shared until they are written, those of what the encoder read always.
"""

from __future__ import annotations

import time

from pyengine.cache.cells import Conversation
from pyengine.engine.request import Request
from pyengine.engine.runner import Runner
from pyengine.programs.step import Row
from pyengine.text.sampling import Sampled
from pyengine.text.search import Beams


class BeamRequest(Request):
    """A request whose tokens nobody has before its end: then the best answer comes as one piece."""

    beams: Beams

    @property
    def seats(self) -> int:
        """Conversations that it may have side by side."""
        return self.rules.search.n_beams

    @property
    def n_held(self) -> int:
        """Conversations that it has."""
        return len(self._held)

    def join(self, runner: Runner) -> None:
        """Begin with the prompt's conversation. Raises: PlanError when all are in use."""
        self.runner = runner
        self.conversation, self.done = runner.resume(self.rows)
        self._held = [self.conversation]                     # of the beams, by their numbers
        room = runner.step.sizes.n_ctx - len(self.rows) + 1
        most = room if self.max_tokens is None else min(room, self.max_tokens)
        self.beams = Beams(self.rules, self.rows.ids.tolist(), most, self.sampler.n_vocab)
        self._seen = 0

    def branches(self) -> list[tuple[Conversation, int]]:
        """Return the conversations that go on, with the tokens that the next step appends."""
        return [(s, beam.tokens[-1]) for s, beam in zip(self._held, self.beams.running)]

    def take(self, given: Row) -> None:
        """Take the logits after one of the beams; after the last one, go on with the best continuations."""
        if not self._seen and self.pending is None:
            self.prompted = time.perf_counter()
            self.report.prompt_seconds = self.prompted - self.started
        if self.max_tokens == 0:
            return self._end("length")
        self.beams.see(self._seen, given.whole())
        self._seen += 1
        if self._seen < len(self.beams.running):
            return
        self._seen = 0
        parents = self.beams.advance()
        if not parents:
            return self._tell_best()
        self._fork(parents)
        self.pending = self.beams.running[0].tokens[-1]

    def _fork(self, parents: list[int]) -> None:
        """Let each next beam have a conversation: that of the one that it continues, or a copy of it."""
        cells, old = self.runner.cells, self._held
        for number, s in enumerate(old):
            if number not in parents:
                cells.drop(s)
        self._held, taken = [], set[int]()
        for parent in parents:
            s = old[parent]
            if parent in taken:
                s, copies = cells.fork(s, len(s))
                self.runner.store.copy(copies)
                s.next = old[parent].next
            taken.add(parent)
            self._held.append(s)
        self.conversation = self.report.conversation = self._held[0]

    def _tell_best(self) -> None:
        """End with the best answer."""
        run, beam, now = self.report, self.beams.best, time.perf_counter()
        tokens, ended = list(beam.tokens), bool(beam.tokens) and beam.tokens[-1] in self.eog
        sampled = [Sampled(t, p, ()) for t, p in zip(tokens, beam.logprobs)]
        if ended:
            run.ended_by, tokens, sampled = sampled[-1], tokens[:-1], sampled[:-1]
        run.tokens, run.sampled, run.times = tokens, sampled, [now] * len(tokens)
        for token in tokens:
            self._show(self.stops.push(self.decoder.push(token)))
        self._end("stop" if ended else "length")

    def fill(self) -> None:
        """End because the context is full, which it is not before the longest answer is there."""
        self._tell_best()

    def leave(self, runner: Runner) -> None:
        """Let go of all beams' conversations."""
        for s in self._held:
            runner.cells.drop(s)
