"""WordPiece, BERT's algorithm."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

from pyengine.text.vocabulary import lenient, SPACE


_WORDS, _LONG = 1 << 16, 64                         # how many words are remembered, and of how many letters at most
_NO_BLANKS = re.compile("[\0-\x08\x0e-\x1f\x7f]+")   # control characters that part no words
_ASCII_WORD = re.compile(r"[!-/:-@\[-`{-~]|[A-Za-z0-9]+")


class WordPiece:
    """Cuts each word into the longest tokens from its left; a word that cannot be cut whole is one unknown token.

    The vocabulary is the converter's: a word's first piece begins with U+2581, the others have no "##". Written out
    here because llama.cpp has no longest word and `tokenizers` takes quadratic time without one. A letter costs no more
    than one look for each length that a token has.
    """

    def __init__(self, tokens: Sequence[str], unk_id: int, lowercase: bool, strip_accents: bool):
        self._ids = {text: i for i, text in enumerate(tokens)}
        self._lengths = sorted(set(map(len, tokens)), reverse=True)
        self._unk_id, self._lowercase, self._strip_accents = unk_id, lowercase, strip_accents
        self._plain = True                                   # control characters are left out
        self._known: dict[str, list[int]] = {}               # words that were cut before

    def encode(self, text: str) -> list[int]:
        if self._plain and text.isascii():
            text = _NO_BLANKS.sub("", text)
            words = _ASCII_WORD.findall(text.lower() if self._lowercase else text)
        else:
            words = self._words(lenient(text))
        known, ids = self._known, []
        for word in words:
            found = known.get(word)
            if found is None:
                found = self._pieces(SPACE + word)
                if len(known) < _WORDS and len(word) <= _LONG:
                    known[word] = found
            ids += found
        return ids

    def _words(self, text: str) -> list[str]:
        """Split at blanks and around signs and Chinese characters (BERT's BasicTokenizer, as llama.cpp has it)."""
        out = []
        for char in text:
            if self._strip_accents:
                char = _first_decomposed(char)
            category = unicodedata.category(char)
            if char.isspace() and char not in "\x1c\x1d\x1e\x1f":
                out.append(" ")
            elif char in "\0\ufffd" or category in ("Cc", "Cf", "Co") or category[0] == "M" and self._strip_accents:
                continue
            else:
                lower = char.lower() if self._lowercase else char
                lower = lower if len(lower) == 1 else lower[0]
                alone = category[0] == "P" or category[0] == "S" and char < "\x7f" or _is_chinese(ord(char))
                out.append(f" {lower} " if alone else lower)
        return "".join(out).split(" ")

    def _pieces(self, word: str) -> list[int]:
        if word == SPACE:
            return []
        ids: list[int] = []
        start = 0
        while start < len(word):
            for length in self._lengths:
                found = self._ids.get(word[start:start + length]) if start + length <= len(word) else None
                if found is not None:
                    break
            else:
                return [self._unk_id]
            ids.append(found)
            start += length
        return ids


class AuthorsWordPiece(WordPiece):
    """WordPiece with words as the authors' code makes them, which llama.cpp does not for scripts with marks and for long words.

    longest   letters of a word, beyond which it is unknown; switches: further arguments of `tokenizers`' BertNormalizer
    """

    def __init__(self, tokens: Sequence[str], unk_id: int, lowercase: bool, strip_accents: bool, longest: int, switches: Mapping[str, bool]):
        from tokenizers import normalizers, pre_tokenizers

        super().__init__(tokens, unk_id, lowercase, strip_accents)
        self._longest, self._plain = longest, switches.get("clean_text", True)
        self._normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents, **switches)
        self._cut = pre_tokenizers.BertPreTokenizer()

    def _words(self, text: str) -> list[str]:
        return [word for word, _ in self._cut.pre_tokenize_str(self._normalizer.normalize_str(text))]

    def _pieces(self, word: str) -> list[int]:
        return [self._unk_id] if len(word) > self._longest + len(SPACE) else super()._pieces(word)


def _first_decomposed(char: str) -> str:
    """Give the first character of the canonical decomposition."""
    return unicodedata.normalize("NFD", char)[0]


def _is_chinese(code: int) -> bool:
    """Tell whether BERT puts blanks around the character (its tokenization.py; 0x2B920 is transformers' slip)."""
    return (0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0x20000 <= code <= 0x2A6DF
            or 0x2A700 <= code <= 0x2B73F or 0x2B740 <= code <= 0x2B81F or 0x2B920 <= code <= 0x2CEAF
            or 0xF900 <= code <= 0xFAFF or 0x2F800 <= code <= 0x2FA1F)
