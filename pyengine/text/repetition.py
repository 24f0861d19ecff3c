"""DRY: the longer a repetition is that a token would go on with, the less its logit.

p-e-w, text-generation-webui pull request 5677: if the sequence ends with n tokens that stood in it before, the token that followed
there loses multiplier * base^(n - allowed_length), from n = allowed_length on; of several places the longest counts. Nothing is counted
through a sequence breaker, and breakers themselves lose nothing.

differs: breakers are texts, found in the bytes of one token or across several; the pull request takes the last token of each text's
tokens. No n is cut at 50.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np

from pyengine import native

_MOST = 1e38                         # of a penalty: a float32 that can be subtracted


class Repetitions:
    """The tokens of a sequence, and what DRY takes from those that may come next.

    last_n: how many of the last tokens are searched, -1 for all. piece: the bytes of a token.
    """

    def __init__(self, multiplier: float, base: float, allowed_length: int, last_n: int, breakers: Sequence[str], piece: Callable[[int], bytes]):
        self.multiplier, self.base, self.allowed_length, self.last_n = multiplier, base, allowed_length, last_n
        self.breakers, self._piece = tuple(b.encode() for b in breakers), piece
        self._longest = max(map(len, self.breakers), default=1)
        self._tokens = array("i")
        self._fresh = 0                                      # tokens since a breaker
        self._tail = b""                                     # bytes of the last tokens, in which a breaker may have begun
        self._breaks = dict[int, bool]()                     # of tokens that have been asked for: whether they hold a breaker

    def accept(self, token: int) -> None:
        """Note a token of the sequence."""
        self._tokens.append(token)
        text = self._tail + self._piece(token)
        broken = any(text.find(b, max(len(self._tail) - len(b) + 1, 0)) >= 0 for b in self.breakers)     # and ends in this token
        self._fresh = 0 if broken else self._fresh + 1
        self._tail = text[max(len(text) - self._longest + 1, 0):]

    def penalties(self) -> list[tuple[int, float]]:
        """Return what the logits of tokens lose, by token."""
        tokens = np.frombuffer(self._tokens, np.int32)
        tokens = tokens if self.last_n < 0 else tokens[max(len(tokens) - self.last_n, 0):]
        least = max(self.allowed_length, 1)
        if min(self._fresh, len(tokens) - 1) < least:
            return []
        runs = np.empty(len(tokens), np.int32)
        native.lib.pe_repeats(native.ffi.from_buffer("int32_t[]", tokens), len(tokens), native.ffi.from_buffer("int32_t[]", runs, require_writable=True))
        ends = np.flatnonzero(runs[:-1] >= least)
        longest = dict[int, int]()
        for token, n in zip(tokens[ends + 1].tolist(), np.minimum(runs[ends], self._fresh).tolist()):
            longest[token] = max(n, longest.get(token, 0))
        return [(token, self._penalty(n - self.allowed_length)) for token, n in longest.items() if not self._is_breaker(token)]

    def _penalty(self, exponent: int) -> float:
        """Return multiplier * base^exponent, by multiplications: the same number on every machine."""
        value = self.multiplier
        for _ in range(exponent if self.base > 1 else 0):
            if value > _MOST:
                break
            value *= self.base
        return min(value, _MOST)

    def _is_breaker(self, token: int) -> bool:
        found = self._breaks.get(token)
        if found is None:
            text = self._piece(token)
            found = self._breaks[token] = any(b in text for b in self.breakers)
        return found
