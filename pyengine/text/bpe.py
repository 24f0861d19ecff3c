"""Byte-pair encoding, over bytes and over SentencePiece's scores."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from pyengine.errors import RequestError
from pyengine.native import ffi, lib
from pyengine.text.pretokenizers import Pre
from pyengine.text.vocabulary import lenient, Strings, BYTE_TOKENS, SPACE


class Joiner:
    """What joins characters into tokens, the best pair first: by the rank of merges, or without them by scores (csrc/host/bpe.h).

    `spell[byte]` is the token of a byte of a text that is no token, or None to leave it out. `whole` takes a part that
    is a token as it is, whatever the merges say. `byte_level` says that the strings write a letter for each byte.
    """

    def __init__(self, tokens: Strings, spell: Iterable[int | None], merges: Strings | None = None,
                 scores: np.ndarray | None = None, whole: bool = False, byte_level: bool = False):
        scores = None if scores is None else np.ascontiguousarray(scores)
        self._alive = tokens, merges, scores             # the struct below points into them
        self._room = 1 + byte_level                      # ids, for each byte
        self._bpe = ffi.new("pe_bpe *", {
            "tokens": tokens.table, "merges": ffi.NULL if merges is None else merges.table,
            "scores": ffi.NULL if scores is None else ffi.from_buffer("float[]", scores),
            "spell": [-1 if i is None else i for i in spell], "whole": whole, "byte_level": byte_level})

    def encode(self, text: bytes, ends: Sequence[int] | None = None) -> list[int]:
        """Give the ids of a text, or of its parts that end at `ends` in bytes and are not joined with each other.

        Raises: RequestError for a part of 1 GiB.
        """
        ends = (len(text),) if ends is None else ends
        ids, n_ids = ffi.new("int32_t[]", len(text) * self._room), ffi.new("int64_t *")
        status = lib.pe_bpe_encode(self._bpe, text, len(text), ffi.new("int64_t[]", ends), len(ends), ids, n_ids)
        if status == lib.PE_NO_MEMORY:
            raise MemoryError(f"tokenize: a text of {len(text)} bytes needs up to 130 times as many")
        if status != lib.PE_OK:
            raise RequestError(f"tokenize: a part of a text of {len(text)} bytes is longer than 2**30 - 1")
        return ffi.unpack(ids, n_ids[0])


class Spm:
    """SentencePiece's BPE, as llama.cpp has it: tokens of all types take part."""

    def __init__(self, tokens: Strings, scores: np.ndarray, unk_id: int | None):
        spell = []
        for byte, name in enumerate(BYTE_TOKENS):
            found = tokens.find(name)
            if found is None and byte < 128:
                found = tokens.find(bytes([byte]))
            spell.append(unk_id if found is None else found)
        self._joiner = Joiner(tokens, spell, scores=scores)

    def encode(self, text: str) -> list[int]:
        return self._joiner.encode(text.replace(" ", SPACE).encode("utf-8", "surrogateescape"))


class Bpe:
    """Byte-level BPE: cut by the pre-tokenizer, then merge by rank inside each part."""

    def __init__(self, tokens: Strings, merges: Strings, pre: Pre):
        from tokenizers import PreTokenizedString, Regex, pre_tokenizers

        # Of a text that is no token, llama.cpp spells the letters that are ASCII.
        spell = [tokens.find(bytes([byte])) if byte < 128 else None for byte in range(256)]
        self._joiner = Joiner(tokens, spell, merges, whole=pre.ignore_merges, byte_level=True)
        self._text = PreTokenizedString
        self._cut = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns])

    def encode(self, text: str) -> list[int]:
        text = lenient(text)
        parts = self._text(text)
        self._cut.pre_tokenize(parts)
        return self._joiner.encode(text.encode(), [end for _, (_, end), _ in parts.get_splits("original", "byte")])


class Gemma4Bpe:
    """BPE over characters, spaces written as U+2581: lines and runs of newlines apart, a known run being one token."""

    def __init__(self, tokens: Strings, merges: Strings):
        self._tokens = tokens
        self._joiner = Joiner(tokens, map(tokens.find, BYTE_TOKENS), merges)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.findall(rb"\n+|[^\n]+", lenient(text).replace(" ", SPACE).encode()):
            whole = self._tokens.find(part) if part[:1] == b"\n" else None
            ids += self._joiner.encode(part) if whole is None else [whole]
        return ids
