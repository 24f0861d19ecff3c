"""Drafts that are written token by token: what a small model, or a head of the model itself, finds most probable.

How long one gets follows from what its steps take, how sure it is of each token, and how often it has been right when it was so sure.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pyengine.engine.drafts import Draft
from pyengine.engine.pace import Pace
from pyengine.engine.proposing import Asked, Terms
from pyengine.programs.step import Row
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
class Known:
    """What is known of a request's text as drafts of it are written.

    last     what was drafted behind `base` tokens of it, with the probabilities that were given
    waited   steps since it was last tried
    """

    odds: Odds
    base: int = 0
    last: list[tuple[int, float]] = field(default_factory=list)
    waited: int = 0

    def learn(self, came: Sequence[int], others: Odds) -> None:
        """Count which of the drafted tokens are those that came, for this text and for `others`."""
        for (token, sure), new in zip(self.last, came):
            for odds in (self.odds, others):
                odds.note(sure, token == new)
            if token != new:
                break
        self.last = []


K = TypeVar("K", bound=Known)


@dataclass(eq=False)
class Writing(Generic[K]):
    """A draft that grows: what it is for, and how likely it is that all of it comes."""

    number: int
    asked: Asked
    reader: K
    odds: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def gain(self) -> float:
        """Tokens that one more makes, by what is known before it is drafted."""
        return 0.0 if self.ended or len(self.odds) == self.asked.most else (self.odds[-1] if self.odds else 1.0) * self.reader.odds.any


class Writer(ABC, Generic[K]):
    """See the module's docstring. n_vocab: of tokens that may be drafted; share: of what a step of the model takes, before that is measured."""

    origin: str

    def __init__(self, n_vocab: int, share: float):
        self._sampler = Sampler(SamplingParams(temperature=0), n_vocab)
        self._share = share
        self.pace = Pace()
        self._odds = Odds()

    @abstractmethod
    def _known(self, asked: Asked) -> K | None:
        """Return what is known of a request's text, with all that came since; None where nothing can be drafted for it."""

    @abstractmethod
    def _read(self, writing: Sequence[Writing[K]]) -> dict[int, Row]:
        """Read what there is before the drafts, or a part of it; return the logits behind those texts that are read, by number."""

    @abstractmethod
    def _write(self, writing: Sequence[Writing[K]]) -> dict[int, Row]:
        """Go on behind the last token of each draft; return the logits, by number."""

    def _may(self, writing: Sequence[Writing[K]]) -> list[Writing[K]]:
        """Return those that can go on."""
        return [w for w in writing if w.gain]

    @property
    def _room(self) -> int | None:
        """How many drafts can go on at once; None: all."""
        return None

    def propose(self, asked: Sequence[Asked], terms: Terms) -> list[Draft]:
        """Return a draft for each, an empty one where none pays: see `Source`."""
        drafts = [Draft([], [], self.origin) for _ in asked]
        begun = self._hopeful([Writing(i, a, known) for i, a in enumerate(asked) if (known := self._known(a)) is not None], terms)
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
            drafts[w.number] = Draft([token for token, _ in w.reader.last], w.odds, self.origin)
        return drafts

    def _hopeful(self, writing: Sequence[Writing[K]], terms: Terms) -> list[Writing[K]]:
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

    def _going_on(self, begun: Sequence[Writing[K]], spent: float, terms: Terms) -> list[Writing[K]]:
        """Return the drafts that grow by one more token. spent: on all of them so far."""
        return _best(begun, self._may(begun), self._costs(len(begun), terms), spent, terms)[: self._room]

    def _costs(self, n: int, terms: Terms) -> list[float]:
        """Return what steps of this model of 1 .. n rows take, in the unit of `terms`."""
        if self.pace.known and terms.timed:
            return self.pace.costs(1, n)
        return [self._share * terms.costs[0]] * n

    def _draw(self, w: Writing[K], row: Row) -> None:
        """Add the token that the model finds most probable to a draft."""
        drawn = None if row.largest is None else self._sampler.sample_few(*row.largest)
        if drawn is None:
            drawn = self._sampler.sample(row.whole()[: self._sampler.n_vocab])
        token, sure = self._token(drawn.token), math.exp(drawn.logprob)
        w.reader.last.append((token, sure))
        w.odds.append((w.odds[-1] if w.odds else 1.0) * w.reader.odds.of(sure))
        w.ended = token in w.asked.ends

    def _token(self, drawn: int) -> int:
        """Return the token that a number of the logits stands for."""
        return drawn


def _expected(any: float, most: int) -> float:
    """Return how many tokens of a draft come, where each does so often."""
    return float(most) if any >= 1 else any * (1 - any ** most) / (1 - any)


def _best(begun: Sequence[Writing[K]], more: Sequence[Writing[K]], own: Sequence[float], spent: float, terms: Terms) -> list[Writing[K]]:
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
