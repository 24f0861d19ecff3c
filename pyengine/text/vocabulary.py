"""A vocabulary: tokens, their kinds, and how bytes are written in them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np

from pyengine.errors import InvalidModelError, ModelWarning, UnsupportedModelError
from pyengine.files.gguf import Metadata
from pyengine.native import ffi, lib

SPACE = "\u2581"                                   # SentencePiece's visible space
NO_ID = 0xFFFFFFFF                                 # -1 written as uint32: "there is no such token"


class Kind(IntEnum):
    """The values of `tokenizer.ggml.token_type` (gguf-py: TokenType)."""
    UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes and characters


def _byte_letters() -> list[str]:
    """Give the letter that stands for each byte in byte-level BPE (GPT-2, encoder.py: bytes_to_unicode)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()
LETTER_BYTES = {letter: bytes([byte]) for byte, letter in enumerate(BYTE_LETTERS)}
BYTE_TOKENS = [b"<0x%02X>" % byte for byte in range(256)]

BYTE_RUNS = re.compile(rb"[\x00-\x7f]+|[\xc0-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf7][\x80-\xbf]{3}|.",
                        re.DOTALL)
SURROGATE = re.compile("[\ud800-\udfff]")


def lenient(text: str) -> str:
    """Turn escaped bytes (U+DC80..DCFF) into characters as llama.cpp does: overlong forms count, the rest is U+FFFD."""
    if not SURROGATE.search(text):
        return text
    out = []
    for run in BYTE_RUNS.findall(text.encode("utf-8", "surrogateescape")):
        if run[0] < 0x80:
            out.append(run.decode("ascii"))
            continue
        code = run[0] & (0xFF >> (len(run) + 1))
        for byte in run[1:]:
            code = code << 6 | byte & 0x3F
        valid = len(run) > 1 and code < 0x110000 and not 0xD800 <= code < 0xE000
        out.append(chr(code) if valid else "\ufffd")
    return "".join(out)


# ---------------------------------------------------------------------------------------------------------------------
# Strings of the file


class Strings:
    """An array of strings that stays as it lies in the file, and a table that finds them (csrc/host/bpe.h: pe_strings).

    `n`; `n_twice`, those that are there before; `n_empty`.
    """

    def __init__(self, key: str, data: memoryview | bytes, n: int):
        self._data, self.n = memoryview(data), n
        self._start = np.empty(n + 1, np.int64)
        self._slots = np.zeros(1 << (2 * n - 1).bit_length() if n else 1, np.uint64)    # at most half of them taken
        self.table = ffi.new("pe_strings *", {
            "data": ffi.from_buffer("uint8_t[]", self._data), "n_bytes": len(self._data), "n": n,
            "start": ffi.from_buffer("int64_t[]", self._start),
            "slots": ffi.from_buffer("uint64_t[]", self._slots), "n_slots": len(self._slots)})
        if lib.pe_strings_index(self.table) != lib.PE_OK:
            raise InvalidModelError(f"tokenizer.ggml.{key}: {n} strings do not fit in {len(self._data)} bytes, or are "
                                    f"made to collide")
        self.n_twice, self.n_empty = self.table.n_twice, self.table.n_empty

    @classmethod
    def read(cls, meta: Mapping[str, Any], key: str) -> Strings:
        """Read a key of `tokenizer.ggml`. Raises: InvalidModelError if it is no list of strings."""
        name = f"tokenizer.ggml.{key}"
        if isinstance(meta, Metadata) and name in meta and meta.type_name(name).startswith("array[string"):
            return cls(key, *meta.strings_region(name))
        value = None if isinstance(meta, Metadata) else meta.get(name)
        if type(value) is list and set(map(type, value)) <= {str}:
            try:
                return cls.pack(key, [text.encode("utf-8", "surrogateescape") for text in value])
            except UnicodeEncodeError as error:
                raise InvalidModelError(f"{name}: {error}") from None
        raise InvalidModelError(f"{name}: must be there, a list of strings")

    @classmethod
    def pack(cls, key: str, strings: Sequence[bytes]) -> Strings:
        return cls(key, b"".join([len(raw).to_bytes(8, "little") + raw for raw in strings]), len(strings))

    def __getitem__(self, i: int) -> bytes:
        return bytes(self._data[self._start[i] + 8:self._start[i + 1]])

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(self.n))

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        """Give the bytes of each."""
        return self._start[ids + 1] - self._start[ids] - 8

    def text(self, i: int) -> str:
        return self[i].decode("utf-8", "surrogateescape")

    def same(self, other: Strings) -> bool:
        """Say whether the others are the same, as far as both have some."""
        n = min(self.n, other.n)
        end = int(self._start[n])
        return bool((self._start[: n + 1] == other._start[: n + 1]).all()) and self._data[:end] == other._data[:end]

    def find(self, raw: bytes) -> int | None:
        found = lib.pe_strings_find(self.table, raw, len(raw))
        return None if found < 0 else found


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and their kinds


class Vocabulary:
    """The tokens of a file: `tokens`, `scores`, and `kinds`, of which some are set to others than the file's, `file_kinds`.

    Raises: InvalidModelError where there are none, two are equal, or a list is of another length.
    """

    def __init__(self, meta: Mapping[str, Any]):
        tokens = Strings.read(meta, "tokens")
        if not tokens.n:
            raise InvalidModelError("tokenizer.ggml.tokens: must be a list of at least one string")
        if tokens.n_empty:                               # as llama.cpp names them
            tokens = Strings.pack("tokens", [raw or b"[EMPTY_%d]" % i for i, raw in enumerate(tokens)])
        if tokens.n_twice:
            raise InvalidModelError(f"tokenizer.ggml.tokens: {tokens.n_twice} tokens appear twice")
        self.meta, self.tokens = meta, tokens
        self.scores = read_numbers(meta, "scores", tokens.n, np.float32, 0)
        self.kinds = self.file_kinds = read_numbers(meta, "token_type", tokens.n, np.int32, Kind.NORMAL)
        if not np.isfinite(self.scores).all():
            raise InvalidModelError("tokenizer.ggml.scores: not all are finite")

    def __len__(self) -> int:
        return self.tokens.n

    def id_of(self, text: str) -> int | None:
        """Give the id of the token that the file spells this way, or None."""
        try:
            return self.tokens.find(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:                       # a lone surrogate is in no file
            return None

    def need(self, text: str) -> int:
        """Give the id of the token that the file spells this way.

        Raises: UnsupportedModelError if there is none.
        """
        found = self.id_of(text)
        if found is None:
            raise UnsupportedModelError(f"the vocabulary has no token {text!r}, which this model needs")
        return found

    def first_other(self, other: Vocabulary) -> int | None:
        """Give the first id at which another vocabulary has another token; None without one. Names of tokens that stand for no text do not
        count, nor do ids beyond those of the shorter one."""
        if self.tokens.same(other.tokens):
            return None
        silent = (Kind.UNKNOWN, Kind.CONTROL, Kind.UNUSED)
        return next((i for i in range(min(len(self), len(other))) if self.tokens[i] != other.tokens[i]
                     and not (self.file_kinds[i] in silent and other.file_kinds[i] in silent)), None)

    def set_kind(self, i: int, kind: Kind) -> None:
        if self.kinds[i] != kind:
            if self.kinds is self.file_kinds:
                self.kinds = self.kinds.copy()
            self.kinds[i] = kind

    def id_at(self, key: str) -> int | None:
        """Give the id that a key of `tokenizer.ggml` names; None without the key, for -1, and, with a warning, for an id that no
        token has: converters have written such, and the role's default is then right (llama-vocab.cpp: "bad special token").
        """
        value = read_key(self.meta, key, int)
        if value is None or value == NO_ID:
            return None
        return value if self.has(key, value) else None

    def has(self, key: str, i: int) -> bool:
        """Tell whether a token has an id; warn of the key where none has."""
        if not 0 <= i < len(self):
            if i != -1:
                warnings.warn(f"tokenizer.ggml.{key}: {i} is ignored: the vocabulary has {len(self)} tokens, from 0 on", ModelWarning)
            return False
        return True


def byte_token(raw: bytes) -> bytes:
    if re.fullmatch(b"<0x[0-9A-Fa-f]{2}>", raw):
        return bytes([int(raw[3:5], 16)])
    raise InvalidModelError(f"tokenizer.ggml.tokens: the byte token {raw!r} is not of the form <0x0A>")


def read_key(meta: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Give a key of `tokenizer.ggml`, or the default where it is missing.

    Raises: InvalidModelError if its value is of another type.
    """
    value = meta.get(f"tokenizer.ggml.{key}")
    if value is None:
        return default
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is not kind:
        raise InvalidModelError(f"tokenizer.ggml.{key}: must be {kind.__name__}, is {type(value).__name__}")
    return value


def read_numbers(meta: Mapping[str, Any], key: str, count: int, dtype: type, default: float) -> np.ndarray:
    """Give a numeric array of `tokenizer.ggml` with one entry a token.

    Raises: InvalidModelError if it is not numeric, or its length is another.
    """
    value = meta.get(f"tokenizer.ggml.{key}")
    if value is None:
        return np.broadcast_to(np.asarray(default, dtype), count)
    array = np.asarray(value)
    if array.shape != (count,) or array.dtype.kind not in "iuf":
        raise InvalidModelError(f"tokenizer.ggml.{key}: must be {count} numbers, is {array.dtype} {array.shape}")
    return array.astype(dtype, copy=False)
