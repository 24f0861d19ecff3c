"""Answers that are searched for: what a request may ask of beams, and which tokens may not come next.

Beam search keeps the `n_beams` beginnings of answers whose tokens are the most probable together. Sums of logarithms are divided by
length ** length_penalty when an answer has ended. Follows transformers' `GenerationMixin._beam_search` and `NoRepeatNGramLogitsProcessor`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from pyengine.arguments import number, takes, whole
from pyengine.errors import ModelWarning, PyEngineError, RequestError, shown
from pyengine.records import dataclass, NamedTuple

BEAMS = 4                            # that there is room for, unless a model's authors want more
MOST_BEAMS = 64
KEYS = "general.search"              # of files, by the fields below


@dataclass(frozen=True)
class Search:
    """How an answer is searched for; a value that leaves it out is given in brackets.

    n_beams          beginnings that are kept                                                     [1]
    length_penalty   exponent of the length that an ended answer's sum is divided by              [0]
    early_stopping   True: as soon as n_beams answers have ended; False: when none that is likely beats those; "never": when none can
    no_repeat_ngram  tokens of a run that may not come twice                                      [0]
    min_tokens       tokens before an answer may end                                              [0]

    A model's file may have other defaults than these. Raises RequestError with the offending value.
    """

    n_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    no_repeat_ngram: int = 0
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("n_beams", 1, MOST_BEAMS), ("no_repeat_ngram", 0, None), ("min_tokens", 0, None)):
            object.__setattr__(self, name, whole(name, getattr(self, name), low, high))
        object.__setattr__(self, "length_penalty", number("length_penalty", self.length_penalty))
        if not isinstance(self.early_stopping, (bool, np.bool_)) and self.early_stopping != "never":
            raise RequestError(f'early_stopping must be True, False or "never", got {shown(self.early_stopping)}')


Search.__init__ = takes()(Search.__init__)                   # type: ignore[method-assign]
SEARCH = tuple(f.name for f in fields(Search))


def search_defaults(meta: Mapping[str, Any]) -> Search:
    """Return what a model's authors recommend, the file's keys `general.search.*`. Warns of values out of range."""
    said = {name: meta[f"{KEYS}.{name}"] for name in SEARCH if f"{KEYS}.{name}" in meta}
    usable: dict[str, Any] = {}
    for name, value in said.items():
        value = float(str(np.float32(value))) if isinstance(value, (float, np.floating)) else value
        try:
            Search(**{name: value})
        except RequestError as error:
            warnings.warn(f"{KEYS}: {name} is ignored: {error}", ModelWarning)
        else:
            usable[name] = value
    return Search(**usable)


class Rules:
    """Which tokens may come next in an answer, whatever their probability.

    forced   ids that an answer begins with
    ends     ids that end one
    """

    def __init__(self, search: Search, forced: Sequence[int], ends: Collection[int]):
        self.search, self.forced, self.ends = search, tuple(forced), sorted(ends)

    @property
    def idle(self) -> bool:
        """Whether they never forbid anything."""
        return not (self.forced or self.search.no_repeat_ngram or self.search.min_tokens)

    def forbidden(self, start: Sequence[int], tokens: Sequence[int], n_vocab: int) -> np.ndarray | None:
        """Return which tokens may not come after `tokens` of an answer, bool [n_vocab]; None if all may.

        start   what the decoder has read before them
        """
        n, banned = len(tokens), np.zeros(n_vocab, bool)
        if n < len(self.forced):
            banned[:] = True
            banned[self.forced[n]] = False
            return banned
        if n < self.search.min_tokens:
            banned[[i for i in self.ends if i < n_vocab]] = True
        banned[_repeating([*start, *tokens], self.search.no_repeat_ngram)] = True
        return banned if banned.any() else None

    def allowed(self, start: Sequence[int], tokens: Sequence[int], n_vocab: int) -> np.ndarray | None:
        """Return the same as bits of those that may, as `Sampler.sample` takes them."""
        banned = self.forbidden(start, tokens, n_vocab)
        if banned is None:
            return None
        bits = np.zeros(-(-n_vocab // 32) * 32, bool)
        bits[:n_vocab] = ~banned
        return np.packbits(bits, bitorder="little").view(np.uint32)


def _repeating(tokens: Sequence[int], n: int) -> list[int]:
    """Return the tokens that would make a run of n tokens come twice."""
    if n == 0 or len(tokens) < n:
        return []
    tail = tuple(tokens[len(tokens) - n + 1 :])
    return sorted({tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tuple(tokens[i : i + n - 1]) == tail})


class Beam(NamedTuple):
    """A beginning of an answer, or a whole one: its tokens, their log-probabilities, and what it is compared by."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0


class Beams:
    """One search. `running` are beginnings whose next logits `see` takes, one after the other; `advance` then chooses the next ones.

    start   what the decoder has read before the answer
    most    tokens of an answer
    """

    def __init__(self, rules: Rules, start: Sequence[int], most: int, n_vocab: int):
        self.rules, self.start, self.most, self.n_vocab = rules, tuple(start), most, n_vocab
        self.search, self.running, self.ended = rules.search, [Beam()], list[Beam]()
        self._next: list[tuple[float, int, int, float]] = []           # score, number of the beginning, token, its log-probability

    def see(self, number: int, logits: np.ndarray) -> None:
        """Take the logits [n_vocab or more] after one of the beginnings. Raises: PyEngineError for numbers that are none."""
        beam, x = self.running[number], logits[: self.n_vocab].astype(np.float64)
        if not np.isfinite(x).all():
            raise PyEngineError(f"the logit of token {int(np.flatnonzero(~np.isfinite(x))[0])} is NaN or infinite: the model's weights are damaged, "
                                "or a kernel is wrong")
        top = x.max()
        logprobs = x - (top + np.log(np.exp(x - top).sum()))
        banned = self.rules.forbidden(self.start, beam.tokens, self.n_vocab)
        if len(beam.tokens) < len(self.rules.forced):                  # it is not the model's choice, and costs nothing
            token = self.rules.forced[len(beam.tokens)]
            self._next.append((beam.score, number, token, float(logprobs[token])))
            return
        scores = logprobs if banned is None else np.where(banned, -np.inf, logprobs)
        keep = min(self.n_vocab, (1 + max(1, len(self.rules.ends))) * self.search.n_beams)
        for token in np.argpartition(-scores, keep - 1)[:keep].tolist():
            if scores[token] > -np.inf:
                self._next.append((beam.score + float(scores[token]), number, token, float(logprobs[token])))

    def advance(self) -> list[int]:
        """Choose the next beginnings; returns for each the number of the one that it continues, [] at the end of the search."""
        n, s = len(self.running[0].tokens) + 1, self.search
        best = sorted(self._next, key=lambda c: (-c[0], c[1], c[2]))
        self._next = []
        going, parents = list[Beam](), list[int]()
        for place, (score, parent, token, logprob) in enumerate(best):
            before = self.running[parent]
            beam = Beam((*before.tokens, token), (*before.logprobs, logprob), score)
            if token not in self.rules.ends and n < self.most:
                if len(going) < s.n_beams:
                    going.append(beam)
                    parents.append(parent)
            elif place < s.n_beams:
                self.ended.append(beam._replace(score=score / n**s.length_penalty))
        self.ended = sorted(self.ended, key=lambda b: -b.score)[: s.n_beams]
        self.running = going
        return parents if going and self._goes_on(n) else []

    def _goes_on(self, n: int) -> bool:
        """Say whether beginnings of n tokens are worth to go on with."""
        s = self.search
        if len(self.ended) < s.n_beams:
            return True
        length = self.most if s.early_stopping == "never" and s.length_penalty > 0 else n
        return s.early_stopping is not True and self.running[0].score / length**s.length_penalty > self.ended[-1].score

    @property
    def best(self) -> Beam:
        """The answer: the best one that has ended."""
        return self.ended[0] if self.ended else self.running[0]
