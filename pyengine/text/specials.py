"""Tokens that are cut out of a text before it is tokenized."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pyengine.text.vocabulary import SURROGATE

PREFIX, FEW = 5, 256                               # tokens are first sought by so many characters, and these are so many at most
_PLAIN = "\ufdd0"                                   # stands for a text in which there is none: no character
_ESCAPED = {0xDC80 + i: 0x10FF00 + i for i in range(128)}     # escaped bytes as characters that nobody uses


class Specials:
    """Special tokens to be found in a text, in one pass whatever their number: of those that overlap, the one that begins first,
    and of
    these the longest, as `tokenizers` has them (added_vocabulary.rs). llama.cpp looks for the longest in the whole text first.

    An expression of the few tokens that a text may have takes a tenth of the time of `tokenizers`, which is there for many.
    """

    def __init__(self, texts: Mapping[int, str]):
        self._ids = {text: i for i, text in texts.items()}
        self._beginnings: dict[str, list[str]] = {}
        for text in sorted(self._ids, key=len, reverse=True):
            self._beginnings.setdefault(text[:PREFIX], []).append(text)

    @cached_property
    def _finder(self) -> Any:
        from tokenizers import AddedToken, models, Tokenizer

        finder = Tokenizer(models.WordLevel({_PLAIN: 0}, unk_token=_PLAIN))
        finder.add_tokens([AddedToken(_readable(text), normalized=False) for text in self._ids])
        return finder

    def split(self, text: str) -> list[str | int]:
        """Give the ids of the tokens in a text, and what lies between them, in order."""
        if len(self._beginnings) > FEW:
            return self._split_by_many(text)
        near = [special for beginning, group in self._beginnings.items() if beginning in text for special in group]
        if sum(map(len, near)) > 16 * FEW:               # an expression may read all of them at each letter
            return self._split_by_many(text)
        near.sort(key=len, reverse=True)                 # an expression takes the first that fits
        parts = re.split(f"({'|'.join(map(re.escape, near))})", text) if near else [text]
        return [self._ids[part] if k % 2 else part for k, part in enumerate(parts) if part]

    def _split_by_many(self, text: str) -> list[str | int]:
        found = self._finder.encode(_readable(text), add_special_tokens=False)
        return [text[start:end] if token == 0 else self._ids[text[start:end]]
                for token, (start, end) in zip(found.ids, found.offsets)]


def _readable(text: str) -> str:
    return text.translate(_ESCAPED) if SURROGATE.search(text) else text
