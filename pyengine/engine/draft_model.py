"""A draft model: a small model of the same tokens goes on with a text, and what it writes is drafted for the large one.

It has caches of its own, which hold the same texts: what was drafted and did not come is cut off when more is drafted, and what came
otherwise is read then. Prompts are read by and by, from the second token of an answer on, so the first one comes as soon as without. Of
pictures it sees nothing: it reads the text around them.

How long it drafts: `engine.writing`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pyengine.cache.cells import Conversation
from pyengine.engine.drafts import MODEL
from pyengine.engine.proposing import Asked
from pyengine.engine.request import Job
from pyengine.engine.runner import Runner
from pyengine.engine.scheduler import BESIDE
from pyengine.engine.writing import Known, Odds, Writer, Writing
from pyengine.memory.layout import ModelLayout
from pyengine.programs.rows import common, token_rows
from pyengine.programs.step import Row, Work


@dataclass(eq=False)
class _Reader(Known):
    """A request's text as the draft model reads it.

    text     its tokens, as far as the draft model has them: rows of pictures have none
    n_told   tokens of the answer in it
    known    how many of it the conversation is known to hold
    """

    text: list[int] = field(default_factory=list)
    n_told: int = 0
    known: int = 0
    conversation: Conversation | None = None

    @property
    def lag(self) -> int:
        """Tokens that have to be read before one can be drafted."""
        return len(self.text) - len(self.conversation)


class DraftModel(Writer[_Reader]):
    """See the module's docstring. layout: of the large model, with this one's as the plan counts it."""

    origin = MODEL

    def __init__(self, layout: ModelLayout):
        own = layout.draft
        self.program = own.prepared.load()
        self.runner = Runner(own.step, self.program)
        self._n_ids = own.bound.model.n_ids
        self._n_ctx, self._adapters = own.sizes.n_ctx, tuple(a.scale for a in own.bound.adapters)
        known = [b.files.model.metadata.count("tokenizer.ggml.tokens") for b in (layout.bound, own.bound)]
        n_vocab = min(*known, layout.bound.model.config.vocab_size, own.bound.model.config.vocab_size)
        read = {program: sum(i.nbytes for i in layout.items if i.purpose in ("weights", "mapped") and i.program == program) for program in ("step", "draft")}
        super().__init__(n_vocab, read["draft"] / max(1, read["step"]))
        self._readers: dict[Job, _Reader] = {}

    def resident(self) -> int:
        """Return how many bytes of its program are in main memory."""
        return self.program.resident()

    def leave(self, job: Job) -> None:
        """Keep the conversation of a request that has ended for those that begin as it does."""
        reader = self._readers.pop(job, None)
        if reader is not None and reader.conversation is not None:
            reader.conversation.active = False

    def reset(self) -> None:
        """Forget conversations of requests that have ended."""
        for s in [s for s in self.runner.cells.conversations if not s.active]:
            self.runner.cells.drop(s)

    # -- drafting -----------------------------------------------------------------------------------------------------

    def _known(self, asked: Asked) -> _Reader | None:
        reader = self._reader(asked.job)
        return reader if len(reader.text) <= self._n_ctx else None

    def _may(self, writing: Sequence[Writing[_Reader]]) -> list[Writing[_Reader]]:
        return [w for w in super()._may(writing) if len(w.reader.text) + len(w.odds) <= self._n_ctx]

    @property
    def _room(self) -> int | None:
        return self.runner.cells.undrafted

    # -- steps --------------------------------------------------------------------------------------------------------

    def _read(self, writing: Sequence[Writing[_Reader]]) -> dict[int, Row]:
        """Read what texts have beyond what is cached, in one step, a part of long ones; return the logits behind those that are read."""
        left = self.runner.n_batch if len(writing) == 1 else min(self.runner.n_batch, max(BESIDE, len(writing)))
        work, whole = [], []
        for w in sorted(writing, key=lambda w: w.reader.lag):
            reader, n = w.reader, min(w.reader.lag, left)
            if n == 0:
                break
            first, done = len(reader.conversation), n == reader.lag
            work.append(self._work(reader, reader.text[first : first + n], done))
            left -= n
            whole += [w] if done else []
        found = self._run(work, whole)
        for w in writing:
            w.reader.known, w.reader.base, w.reader.last = len(w.reader.conversation), len(w.reader.text), []
        return found

    def _write(self, writing: Sequence[Writing[_Reader]]) -> dict[int, Row]:
        """Go on behind the last token of each draft; return the logits."""
        work = [(w.reader, self._work(w.reader, [w.reader.last[-1][0]], True)) for w in writing]
        return self._run([part._replace(drafted=len(part.conversation) + 1 - reader.known) for reader, part in work], writing)

    def _work(self, reader: _Reader, tokens: Sequence[int], wanted: bool) -> Work:
        """Return the tokens as rows behind a conversation, with the logits behind the last one if they are wanted."""
        s, n = reader.conversation, len(tokens)
        return Work(s, token_rows(tokens, s.next, self.runner.axes), 0, n, np.arange(n - 1, n, dtype=np.int32)[: int(wanted)])

    def _run(self, work: Sequence[Work], wanted: Sequence[Writing[_Reader]]) -> dict[int, Row]:
        """Run a step, note what it took unless it reads a part of a text, and return the logits that it gives for these."""
        began = time.perf_counter()
        logits = self.runner.run(work)
        if len(wanted) == len(work):
            self.pace.note(sum(w.stop - w.start for w in work), time.perf_counter() - began)
        return {w.number: logits[i] for i, w in enumerate(wanted)}

    # -- texts --------------------------------------------------------------------------------------------------------

    def _reader(self, job: Job) -> _Reader:
        """Return a request's text with all that came since, and its conversation with what it shares with that."""
        reader = self._readers.get(job)
        if reader is None:
            reader = self._readers[job] = _Reader(Odds(self._odds), text=[t for t in job.rows.ids.tolist() if 0 <= t < self._n_ids])
        new = [t for t in job.report.tokens[reader.n_told :] if t < self._n_ids]
        reader.n_told = len(job.report.tokens)
        reader.text += new
        reader.learn(reader.text[reader.base :], self._odds)
        if len(reader.text) <= self._n_ctx:
            self._join(reader)
        return reader

    def _join(self, reader: _Reader) -> None:
        """Cut off what the conversation has that did not come; begin with the longest beginning that another one has."""
        s, cells = reader.conversation, self.runner.cells
        if s is not None and s in cells.conversations:
            n = reader.known + common(s.keys[reader.known :], reader.text[reader.known : -1])
            if cells.reach(s, n) == n:
                if len(s) > n:
                    self.runner.take_back(s, len(s) - n)
                reader.known = n
                return
            cells.drop(s)                                    # a ring has lost what is needed
        held = [r.conversation for r in self._readers.values()]
        for s in cells.conversations:                        # an interruption may have left one that nobody has
            s.active = s in held
        rows = token_rows(reader.text, 0, self.runner.axes)
        rows.adapters = self._adapters
        reader.conversation, reader.known = self.runner.resume(rows)
