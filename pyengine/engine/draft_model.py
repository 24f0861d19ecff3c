"""A draft model: a small model of the same tokens goes on with a text, and what it writes is drafted for the large one.

It has caches of its own, which hold the same texts: what was drafted and did not come is cut off when more is drafted, and what came
otherwise is read then. Prompts are read by and by, from the second token of an answer on, so the first one comes as soon as without. Of
pictures it sees nothing: it reads the text around them.

How long it drafts follows from what its steps take, how sure it is of each token, and how often it has been right when it was so sure.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pyengine.cache.cells import Conversation
from pyengine.engine.drafts import Draft, MODEL
from pyengine.engine.pace import Pace
from pyengine.engine.proposing import Asked, Terms
from pyengine.engine.request import Job
from pyengine.engine.runner import Runner
from pyengine.engine.scheduler import BESIDE
from pyengine.memory.layout import ModelLayout
from pyengine.programs.rows import common, token_rows
from pyengine.programs.step import Row, Work
from pyengine.text.sampling import Sampler, SamplingParams

_SURE = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.97)          # probabilities of drafted tokens, that count together up to each
_PRIOR = (0.1, 0.2, 0.35, 0.5, 0.65, 0.75, 0.85, 0.93, 0.98)     # how often such a token comes, before it is known
_USUAL = 0.7                                                 # and any token
_WEIGHT, _KEPT = 4.0, 0.95                                   # of what is thought before, in tokens; of what was counted, with each new token
_WORTH = 1.05                                                # how many times as many tokens a second a draft must promise to be begun
_TRIED = 64                                                  # steps after which a text is tried again for which drafts did not pay


class Odds:
    """How often drafted tokens have come: of any, and of those that the draft model was so sure of; weighted by how late it was."""

    def __init__(self, others: Odds | None = None):
        rates = [*_PRIOR, _USUAL] if others is None else [h / t for h, t in zip(others._hits, others._tries)]
        self._hits, self._tries = [_WEIGHT * q for q in rates], [_WEIGHT] * len(rates)

    def note(self, sure: float, came: bool) -> None:
        """Count a token, all before which had come."""
        for kind in (_kind(sure), -1):
            self._hits[kind] = _KEPT * self._hits[kind] + came
            self._tries[kind] = _KEPT * self._tries[kind] + 1

    def of(self, sure: float) -> float:
        """Return how likely it is that a token comes which the model gives this probability."""
        return self._hits[_kind(sure)] / self._tries[_kind(sure)]

    @property
    def any(self) -> float:
        """How likely that is of a token that nobody has seen yet."""
        return self._hits[-1] / self._tries[-1]


def _kind(sure: float) -> int:
    return next((i for i, most in enumerate(_SURE) if sure <= most), len(_SURE))


@dataclass(eq=False)
class _Reader:
    """A request's text as the draft model reads it.

    text     its tokens, as far as the draft model has them: rows of pictures have none
    n_told   tokens of the answer in it
    known    how many of it the conversation is known to hold
    last     what was drafted behind `base` tokens of it, with the probabilities that the model gave
    waited   steps since it was last tried
    """

    text: list[int]
    odds: Odds
    n_told: int = 0
    known: int = 0
    base: int = 0
    last: list[tuple[int, float]] = field(default_factory=list)
    waited: int = 0
    conversation: Conversation | None = None

    @property
    def lag(self) -> int:
        """Tokens that have to be read before one can be drafted."""
        return len(self.text) - len(self.conversation)


@dataclass(eq=False)
class _Writing:
    """A draft that grows: what it is for, its last logits, and how likely it is that all of it comes."""

    number: int
    asked: Asked
    reader: _Reader
    odds: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def gain(self) -> float:
        """Tokens that one more makes, by what is known before it is drafted."""
        return 0.0 if self.ended or len(self.odds) == self.asked.most else (self.odds[-1] if self.odds else 1.0) * self.reader.odds.any


class DraftModel:
    """See the module's docstring. layout: of the large model, with this one's as the plan counts it."""

    def __init__(self, layout: ModelLayout):
        own = layout.draft
        self.program = own.prepared.load()
        self.runner = Runner(own.step, self.program)
        self._n_ids = own.bound.model.n_ids
        self._n_ctx, self._adapters = own.sizes.n_ctx, tuple(a.scale for a in own.bound.adapters)
        known = [b.files.model.metadata.count("tokenizer.ggml.tokens") for b in (layout.bound, own.bound)]
        self._sampler = Sampler(SamplingParams(temperature=0), min(*known, layout.bound.model.config.vocab_size, own.bound.model.config.vocab_size))
        read = {program: sum(i.nbytes for i in layout.items if i.purpose in ("weights", "mapped") and i.program == program) for program in ("step", "draft")}
        self._share = read["draft"] / max(1, read["step"])   # of what a step takes, before that is measured
        self.pace = Pace()
        self._odds = Odds()
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

    def propose(self, asked: Sequence[Asked], terms: Terms) -> list[Draft]:
        """Return a draft for each, an empty one where none pays: see `Source`."""
        drafts = [Draft([], [], MODEL) for _ in asked]
        writing = [_Writing(i, a, self._reader(a.job)) for i, a in enumerate(asked)]
        begun = self._hopeful([w for w in writing if len(w.reader.text) <= self._n_ctx], terms)
        if not begun:
            return drafts
        given = self._read(begun)
        begun = going = [w for w in begun if w.number in given]
        spent = self._costs(max(1, len(begun)), terms)[-1]   # what is read now and then only, as a prompt, is not for this draft alone
        while going:
            for w in going:
                self._draw(w, given[w.number])
            going = self._going_on(begun, spent, terms)
            if going:
                spent += self._costs(len(going), terms)[-1]
                given = self._write(going)
        for w in begun:
            drafts[w.number] = Draft([token for token, _ in w.reader.last], w.odds, MODEL)
        return drafts

    def _hopeful(self, writing: Sequence[_Writing], terms: Terms) -> list[_Writing]:
        """Return those whose drafts are thought to pay, and those that are to be tried again."""
        hoped = [w for w in writing if _expected(w.reader.odds.any, w.asked.most) > w.asked.beaten]
        chosen = _best([], hoped, self._costs(max(1, len(hoped)), terms), 0.0, terms)
        ever = self._costs(max(1, len(writing)), terms)[-1] < terms.costs[0]                 # tokens that are sure would pay
        for w in writing:
            w.reader.waited = 0 if w in chosen else w.reader.waited + 1
            if w in hoped and w not in chosen and ever and w.reader.waited > _TRIED:
                w.reader.waited = 0
                chosen.append(w)
        return chosen

    def _going_on(self, begun: Sequence[_Writing], spent: float, terms: Terms) -> list[_Writing]:
        """Return the drafts that grow by one more token. spent: on all of them so far."""
        may = [w for w in begun if w.gain and len(w.reader.text) + len(w.odds) <= self._n_ctx]
        return _best(begun, may, self._costs(len(begun), terms), spent, terms)[: self.runner.cells.undrafted]

    def _costs(self, n: int, terms: Terms) -> list[float]:
        """Return what steps of this model of 1 .. n rows take, in the unit of `terms`."""
        if self.pace.known and terms.timed:
            return self.pace.costs(1, n)
        return [self._share * terms.costs[0]] * n

    def _draw(self, w: _Writing, row: Row) -> None:
        """Add the token that the model finds most probable to a draft."""
        drawn = None if row.largest is None else self._sampler.sample_few(*row.largest)
        if drawn is None:
            drawn = self._sampler.sample(row.whole()[: self._sampler.n_vocab])
        sure = math.exp(drawn.logprob)
        w.reader.last.append((drawn.token, sure))
        w.odds.append((w.odds[-1] if w.odds else 1.0) * w.reader.odds.of(sure))
        w.ended = drawn.token in w.asked.ends

    # -- steps --------------------------------------------------------------------------------------------------------

    def _read(self, writing: Sequence[_Writing]) -> dict[int, Row]:
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

    def _write(self, writing: Sequence[_Writing]) -> dict[int, Row]:
        """Go on behind the last token of each draft; return the logits."""
        work = [(w.reader, self._work(w.reader, [w.reader.last[-1][0]], True)) for w in writing]
        return self._run([part._replace(drafted=len(part.conversation) + 1 - reader.known) for reader, part in work], writing)

    def _work(self, reader: _Reader, tokens: Sequence[int], wanted: bool) -> Work:
        """Return the tokens as rows behind a conversation, with the logits behind the last one if they are wanted."""
        s, n = reader.conversation, len(tokens)
        return Work(s, token_rows(tokens, s.next, self.runner.axes), 0, n, np.arange(n - 1, n, dtype=np.int32)[: int(wanted)])

    def _run(self, work: Sequence[Work], wanted: Sequence[_Writing]) -> dict[int, Row]:
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
            reader = self._readers[job] = _Reader([t for t in job.rows.ids.tolist() if 0 <= t < self._n_ids], Odds(self._odds))
        new = [t for t in job.report.tokens[reader.n_told :] if t < self._n_ids]
        reader.n_told = len(job.report.tokens)
        reader.text += new
        for (token, sure), came in zip(reader.last, reader.text[reader.base :]):
            for odds in (reader.odds, self._odds):
                odds.note(sure, token == came)
            if token != came:
                break
        reader.last = []
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


def _expected(any: float, most: int) -> float:
    """Return how many tokens of a draft come, where each does so often."""
    return float(most) if any >= 1 else any * (1 - any ** most) / (1 - any)


def _best(begun: Sequence[_Writing], more: Sequence[_Writing], own: Sequence[float], spent: float, terms: Terms) -> list[_Writing]:
    """Return those of `more` that make more tokens a second with one token more than all that there is so far.

    own: what a step of the draft model takes by its rows; spent: what those so far took.
    """
    n, made = sum(len(w.odds) for w in begun), terms.n + sum(sum(w.odds) for w in begun)
    rate, found = (1.0 if begun else _WORTH) * made / (terms.costs[min(n, len(terms.costs) - 1)] + spent), 0
    ranked = sorted(more, key=lambda w: -w.gain)
    for m, w in enumerate(ranked, 1):
        made += w.gain
        now = made / (terms.costs[min(n + m, len(terms.costs) - 1)] + spent + own[m - 1])
        if now > rate:
            rate, found = now, m
    return ranked[:found]
