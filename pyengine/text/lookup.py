"""Prompt lookup: what followed the last time that a text ended as it does now, found in the text itself.

Answers repeat their prompt and themselves: code that is edited, a text that is asked about, names, lists. `Lookup` keeps for each place the
one before it that ends with the same two tokens, so the places that a text may be going on from are a chain, the latest first (as in
LZ77, Ziv and Lempel 1977, doi:10.1109/TIT.1977.1055714). Used for drafts of speculative decoding (Saxena 2023, "prompt lookup decoding").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pyengine.arguments import whole
from pyengine.errors import RequestError, shown
from pyengine.records import NamedTuple

DRAFTED = 32                 # tokens of a draft, unless told otherwise
MOST_DRAFTED = 1024          # that can be asked for
MOST = 32                    # tokens of a match that are compared: a longer one is as good
CHAIN = 16                   # places that are compared


class Match(NamedTuple):
    """A place whose last `length` tokens are those at the end; `at` is the number of the token that followed there."""

    at: int
    length: int


class Lookup:
    """An index over a text's tokens, which grows with it. A negative token, as a picture's rows have it, is equal to no other."""

    def __init__(self, tokens: Iterable[int] = ()):
        self.tokens: list[int] = []
        self._last: dict[tuple[int, int], int] = {}          # the latest place behind each two tokens
        self._single: dict[int, int] = {}                    # and behind each token
        self._other = -1                                     # the latest place before the end that is behind the token there; -1: none
        self._before: list[int] = []                         # for each place the one before it behind the same two; -1: none
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens at the end."""
        own, last, before, single = self.tokens, self._last, self._before, self._single
        previous = own[-1] if own else -1
        for token in tokens:
            own.append(token)
            if previous < 0 or token < 0:
                before.append(-1)
            else:
                pair = (previous, token)
                before.append(last.get(pair, -1))
                last[pair] = len(own)
            self._other = single.get(token, -1) if token >= 0 else -1
            single[token] = len(own)
            previous = token

    def longest(self) -> Match | None:
        """Return the longest match among the CHAIN latest places behind the same two tokens, of several the latest.

        Without such a place it is the latest one behind the last token, or None.
        """
        best, at = None, self._before[-1] if self.tokens else -1
        if at < 0 <= self._other:
            return Match(self._other, 1)
        for _ in range(CHAIN):
            if at < 0:
                break
            n = self.agrees(at)
            if best is None or n > best.length:
                best = Match(at, n)
                if n == MOST:
                    break
            at = self._before[at - 1]
        return best

    def agrees(self, at: int) -> int:
        """Return how many tokens before `at` are those at the end, MOST at most."""
        own = self.tokens
        end, n, most = len(own), 0, min(at, MOST)
        while n < most and own[at - 1 - n] == own[end - 1 - n] >= 0:
            n += 1
        return n

    def after(self, at: int, n: int) -> list[int]:
        """Return the n tokens from `at` on, fewer before one that is negative; where they reach the end, they go on from `at` again."""
        found = self.tokens[at : at + n]
        while found and len(found) < n:
            found += found[: n - len(found)]
        return found[: next((i for i, token in enumerate(found) if token < 0), n)]


def most_drafted(speculate: Any, usual: int) -> int:
    """Return how many tokens a draft has at most, by what was given for `speculate`: None is `usual`. Raises: RequestError."""
    if speculate is None or isinstance(speculate, (bool, np.bool_)):
        return usual if speculate is None else DRAFTED if speculate else 0
    if not isinstance(speculate, (int, np.integer)):
        raise RequestError(f"speculate must be True, False or a number of tokens, got {shown(speculate)}")
    return whole("speculate", speculate, 0, MOST_DRAFTED)
