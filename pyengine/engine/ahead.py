"""A head that predicts further tokens, as a `Source` (`nn.ahead`): it goes on from the last token's state.

One with caches of its own reads what the layers read in the same steps, so its keys and values are there for every token that is in the
caches, and are shared, kept and cut as theirs are. What it drafts it reads in runs of its own, in cells behind the conversation's last
token, which the next step writes again. One without reads the layers' caches in those runs, and writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyengine.engine.proposing import Asked
from pyengine.engine.request import Job
from pyengine.engine.runner import Runner
from pyengine.engine.writing import Known, Odds, Writer, Writing
from pyengine.memory.layout import ModelLayout
from pyengine.programs.step import Row


@dataclass(eq=False)
class _Place(Known):
    """Where a request's draft has come to: the state [width] before the token that is read next."""

    hidden: np.ndarray | None = None


class Head(Writer[_Place]):
    """See the module's docstring. layout: of the model, whose runner this is."""

    def __init__(self, layout: ModelLayout, runner: Runner):
        c, meta = layout.bound.model.config, layout.bound.files.model.metadata
        weights = [i for i in layout.items if i.purpose in ("weights", "mapped") and i.program == "step"]
        own = sum(i.nbytes for i in weights if i.layer is None or i.layer >= c.n_layers)         # and the output head
        head = layout.bound.ahead
        self.origin, self._tokens, n_vocab = head.origin, head.tokens, min(meta.count("tokenizer.ggml.tokens"), c.vocab_size)
        super().__init__(min(n_vocab, head.n_logits) if head.tokens is None else head.n_logits, own / max(1, sum(i.nbytes for i in weights)))
        self._runner = runner
        self._places: dict[Job, _Place] = {}

    def resident(self) -> int:
        """Return 0: what it has is the model's."""
        return 0

    def leave(self, job: Job) -> None:
        """Let go of a request that has ended."""
        self._places.pop(job, None)

    def reset(self) -> None:
        """Do nothing: conversations are the model's."""

    def _known(self, asked: Asked) -> _Place | None:
        place = self._places.get(asked.job)
        if place is None:
            place = self._places[asked.job] = _Place(Odds(self._odds))
        place.learn(asked.job.report.tokens[place.base :], self._odds)
        place.hidden = self._runner.last(asked.job.conversation)
        return None if place.hidden is None else place

    def _token(self, drawn: int) -> int:
        return drawn if self._tokens is None else int(self._tokens[drawn])

    def _read(self, writing: Sequence[Writing[_Place]]) -> dict[int, Row]:
        """Read the token behind each conversation, which no step has read yet."""
        for w in writing:
            w.reader.base, w.reader.last = len(w.asked.job.report.tokens), []
        return self._run(writing, [w.asked.job.pending for w in writing])

    def _write(self, writing: Sequence[Writing[_Place]]) -> dict[int, Row]:
        return self._run(writing, [w.reader.last[-1][0] for w in writing])

    def _run(self, writing: Sequence[Writing[_Place]], tokens: Sequence[int]) -> dict[int, Row]:
        """Run the head on a token of each, and note what that took."""
        began = time.perf_counter()
        rows, hidden = self._runner.ahead([(w.asked.job.conversation, len(w.reader.last), token, w.reader.hidden) for w, token in zip(writing, tokens)])
        self.pace.note(len(writing), time.perf_counter() - began)
        for w, state in zip(writing, hidden):
            w.reader.hidden = state.copy()
        return {w.number: row for w, row in zip(writing, rows)}
