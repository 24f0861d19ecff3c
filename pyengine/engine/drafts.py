"""Drafts: tokens that are likely to follow in an answer, found without the model.

Answers repeat their prompt and themselves: code that is edited, a text that is asked about, names, forms. `Drafter` looks up what followed
where the text was as it is now (`text.lookup`), and learns how often that comes true. `Drafts` are those of one request: what its grammar
forces goes first, and nothing that it does not allow. What is made of them: `engine.speculation`; who else drafts: `engine.proposing`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyengine.records import NamedTuple
from pyengine.text.lookup import Lookup

if TYPE_CHECKING:
    from pyengine.engine.guide import Guide

LOOKUP, GRAMMAR, MODEL = "lookup", "grammar", "model"       # where drafts come from; those of heads: `nn.ahead.Ahead.origin`


class Draft(NamedTuple):
    """Tokens that may follow, and for each how likely it is that it and all before it do; origin: where they come from."""

    tokens: list[int]
    odds: list[float]
    origin: str = LOOKUP


_LENGTHS = (1, 2, 3, 4, 6, 9, 14, 22)                        # of matches, that count together up to each
_PRIOR = (0.3, 0.4, 0.55, 0.6, 0.7, 0.8, 0.88, 0.93, 0.96)   # how often a match of such a length goes on
_WEIGHT, _KEPT = 4.0, 0.97                                   # of the prior, in tokens; of what was counted, with each new token


class Drafter:
    """Drafts of one text that grows."""

    def __init__(self, tokens: Iterable[int]):
        self.lookup = Lookup(tokens)
        self._hits = [_WEIGHT * p for p in _PRIOR]
        self._tries = [_WEIGHT] * len(_PRIOR)
        self._last: tuple[int, list[int]] = 0, []            # the match and tokens of the last draft

    def __len__(self) -> int:
        return len(self.lookup)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens, and learn from whether the last draft had them."""
        length, drafted = self._last
        for new, old in zip(tokens, drafted):
            kind = bisect_left(_LENGTHS, length)
            self._hits[kind] = _KEPT * self._hits[kind] + (new == old)
            self._tries[kind] = _KEPT * self._tries[kind] + 1
            if new != old:
                break
            length += 1
        self._last = 0, []
        self.lookup.extend(tokens)

    def draft(self, most: int) -> Draft:
        """Return what is likely to follow, `most` tokens at most."""
        match = self.lookup.longest()
        if match is None:
            return Draft([], [])
        tokens = self.lookup.after(match.at, most)
        self._last = match.length, tokens
        odds, likely = [], 1.0
        for i in range(len(tokens)):
            kind = bisect_left(_LENGTHS, match.length + i)
            likely *= self._hits[kind] / self._tries[kind]
            odds.append(likely)
        return Draft(tokens, odds)


_FORCED = 0.95                                               # how likely it is that a token comes which a grammar foresees


class Drafts:
    """The drafts of one request, of `most` tokens each at most. prompt: its ids; ends: tokens that end the answer."""

    def __init__(self, most: int, prompt: np.ndarray, max_tokens: int | None, ends: Collection[int], guide: Guide | None):
        self.most, self._prompt, self._max_tokens, self.ends, self._guide = most, prompt, max_tokens, ends, guide
        self.origin = LOOKUP                                 # of what the step that is run has drafted
        self._drafter: Drafter | None = None                 # made when the first draft is wanted: a prompt may be long

    def next(self, tokens: Sequence[int], most: int) -> Draft:
        """Return what may follow the answer's tokens so far, `most` at most."""
        if self._drafter is None:
            self._drafter = Drafter(self._prompt.tolist())
        drafter = self._drafter
        drafter.extend(tokens[len(drafter) - len(self._prompt) :])
        most = self.most_after(len(tokens), most)
        if most < 1:
            return Draft([], [])
        draft = drafter.draft(most)
        return self.allowed(draft if self._guide is None else _with_forced(draft, self._guide.forced(most)))

    def most_after(self, n: int, most: int) -> int:
        """Return how many tokens may be drafted behind the answer's first n, `most` at most: nobody wants what follows the last one."""
        return min(most, self.most, *(() if self._max_tokens is None else (self._max_tokens - n - 1,)))

    def allowed(self, draft: Draft) -> Draft:
        """Return the beginning of a draft that may come: nothing follows what ends the answer, and nothing is what its grammar has not."""
        n = next((i for i, token in enumerate(draft.tokens) if token in self.ends), len(draft.tokens))
        if self._guide is not None:
            n = self._guide.n_allowed(draft.tokens[:n])
        return draft._replace(tokens=draft.tokens[:n], odds=draft.odds[:n])


def _with_forced(draft: Draft, forced: list[int]) -> Draft:
    """Return a draft that begins with what a grammar forces: what was drafted goes on behind it only where it has all of that."""
    n = len(forced)
    if not n or draft.tokens[:n] != forced:
        return Draft(forced, [_FORCED] * n, GRAMMAR) if n else draft
    return Draft(draft.tokens, [_FORCED] * n + [_FORCED * q / draft.odds[n - 1] for q in draft.odds[n:]])
