"""Tokens that are cut out of a text before it is tokenized."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pyengine.text.vocabulary import SURROGATE

_PLAIN = "\ufdd0"                                   # stands for a text in which there is none: no character
_ESCAPED = {0xDC80 + i: 0x10FF00 + i for i in range(128)}     # escaped bytes as characters that nobody uses


class Specials:
    """Finds tokens in a text, in one pass whatever their number: of those that overlap, the one that begins first, and of
    these the longest, as `tokenizers` has them (added_vocabulary.rs). llama.cpp looks for the longest in the whole text first.
    """

    def __init__(self, texts: Mapping[int, str]):
        self._ids = {text: i for i, text in texts.items()}
        first = "".join(map(re.escape, sorted({text[0] for text in self._ids})))
        self._first = re.compile(f"[{first}]") if first else None

    @cached_property
    def _finder(self) -> Any:
        from tokenizers import AddedToken, models, Tokenizer

        finder = Tokenizer(models.WordLevel({_PLAIN: 0}, unk_token=_PLAIN))
        finder.add_tokens([AddedToken(_readable(text), normalized=False) for text in self._ids])
        return finder

    def split(self, text: str) -> list[str | int]:
        """Give the ids of the tokens in a text, and what lies between them, in order."""
        start = self._first.search(text) if self._first else None
        if start is None:                                # most texts: the finder takes 0.1 s for each MB
            return [text] if text else []
        found = self._finder.encode(_readable(text), add_special_tokens=False)
        return [text[start:end] if token == 0 else self._ids[text[start:end]]
                for token, (start, end) in zip(found.ids, found.offsets)]


def _readable(text: str) -> str:
    return text.translate(_ESCAPED) if SURROGATE.search(text) else text
