"""Text to token ids and back, from the metadata of a GGUF file alone.

A GGUF file carries its tokenizer as plain keys (`tokenizer.ggml.*`): the texts, types and scores of the tokens, the
merges, and a few flags. Five kinds exist here, by `tokenizer.ggml.model`:

    llama   pieces joined in order of their score (SentencePiece "BPE")           csrc/bpe.c
    gpt2    byte-level BPE; `tokenizer.ggml.pre` names the splitting expressions  csrc/bpe.c, cut by tokenizers
    gemma4  BPE over characters with U+2581 for a space                          csrc/bpe.c
    t5      the likeliest cut of the text (SentencePiece "unigram")              tokenizers
    bert    longest match from the left of each word (WordPiece)                 below

Tokens and merges stay in the file's bytes, with a hash table over them: no Python object is made for each of them.

The ids are llama.cpp's (`src/llama-vocab.cpp`), for any text and any bytes. Known differences, all on purpose:
- Character classes are those of the Unicode version inside `tokenizers` (17); llama.cpp has 15. Characters that
  are newer than that may be cut elsewhere.
- Bytes that encode a lone surrogate become U+FFFD before BPE; llama.cpp keeps them.
- Nothing "cleans up" spaces before punctuation when ids become text: text, ids, text is exact.
- A gpt2 vocabulary that does not name its BOS and EOS has none, unless token 11 is a control token as in Falcon.
- A llama vocabulary without byte tokens spells what it does not have as unknown tokens, one a byte; llama.cpp aborts.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .errors import InvalidModelError, RequestError, UnsupportedModelError
from .gguf import Metadata
from .native import ffi, lib

SPACE = "\u2581"                                   # SentencePiece's visible space
NO_ID = 0xFFFFFFFF                                 # -1 written as uint32: "there is no such token"
PREFIX = 5    # special tokens are sought by so many characters first: Gemma's 6,242 "<unused0>" ... are not sought singly


class Kind(IntEnum):
    """The values of `tokenizer.ggml.token_type` (gguf-py: TokenType)."""
    UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)


# Texts that mark a token's role when the file does not (llama-vocab.cpp, llama_vocab::impl::load). A token found by one
# of these is treated as a control token, whatever type the file gives it.
EOT_TEXTS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>",
             "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>")
EOM_TEXTS = ("<|eom_id|>",)
EOG_TEXTS = EOT_TEXTS + EOM_TEXTS + ("<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "[EOS]", "<eos>",
                                     "<turn|>", "<|tool_response>", "[e~[")
FIM_TEXTS = {                                      # fill-in-the-middle; the last three also end a generation
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
OLD_FIM_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
HARMONY_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")    # gpt-oss: always shown


# ---------------------------------------------------------------------------------------------------------------------
# Pre-tokenizers of the gpt2 kind: expressions in Oniguruma's syntax. Each cuts the parts that the one before left; a
# match is a part, and so is what lies between matches. Facts: each model's tokenizer.json, and llama-vocab.cpp where
# that differs (it writes classes such as \p{Lu} as "letter, but not a-z").

_SUFFIX = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_SUFFIX = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = rf"{_SUFFIX}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
_LLAMA3 = rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_BLANKS}"
_QWEN2 = rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}|{_SIGNS}|{_BLANKS}"
_HALVED_BLANKS = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"|\s"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_KOREAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff&&[^\\s]]+"    # llama.cpp matches no blanks by their code
_ASCII_SIGN = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+"
_HAN = (r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\x{20000}-\x{2a6df}\x{2a700}-\x{2b73f}\x{2b740}-\x{2b81f}"
        r"\x{2b820}-\x{2ceaf}\x{2ceb0}-\x{2ebef}\x{2f800}-\x{2fa1f}")
# Letters with case, as deepseek-llm's tokenizer.json lists them.
_CASED = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80"
    "-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


def _cased_words(letter: str, suffix: str = "") -> str:
    """Give the expression of words cut where small letters turn into capitals; letters without case count as both."""
    upper, lower, start = rf"[{letter}&&[^a-z]]", rf"[{letter}&&[^A-Z]]", r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}"


_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = _cased_words(r"\p{L}") + rf"|\p{{N}}|{_SLASHES}|{_BLANKS}"
_GPT4O = _cased_words(r"\p{L}", f"(?:{_ANY_SUFFIX})?") + rf"|\p{{N}}{{1,3}}|{_SLASHES}|{_BLANKS}"
_GPT4O_MARKS = _cased_words(r"\p{L}\p{M}", f"(?:{_ANY_SUFFIX})?") + rf"|\p{{N}}{{1,3}}|{_SLASHES}|{_BLANKS}"
_NOT_COMMON_SIGNS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


class Pre(NamedTuple):
    """What a value of `tokenizer.ggml.pre` stands for."""
    patterns: tuple[str, ...]
    ignore_merges: bool = False                    # a part that is a token as a whole is not merged from its bytes
    add_bos: bool = False                          # when the file does not say


def _table(*rows: tuple[str, Pre]) -> dict[str, Pre]:
    return {name: pre for names, pre in rows for name in names.split()}


PRE = _table(
    ("default", Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
     "roberta-bpe mpt olmo jais trillion granite-docling exaone4", Pre((_GPT2,))),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", Pre((r"\p{N}", _GPT2))),
    ("falcon", Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
     Pre((_LLAMA3,), ignore_merges=True, add_bos=True)),
    ("dbrx smaug-bpe chatglm-bpe", Pre((_LLAMA3,))),
    ("glm4 glm5", Pre((_LLAMA3,), ignore_merges=True)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2", Pre((_QWEN2,))),
    ("qwen35", Pre((rf"{_ANY_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}",))),
    ("ufakzeka", Pre((rf"{_WORD}|\p{{N}}|{_SIGNS}|{_BLANKS}",))),
    ("laguna", Pre((r"[^\n]+|\n+", _QWEN2))),
    ("minicpm5", Pre((r"\p{N}{1,3}", rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}+|{_SIGNS}|{_BLANKS}"), ignore_merges=True)),
    ("seed-coder", Pre((rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}",))),
    ("bailingmoe bailingmoe2 llada-moe",
     Pre((rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",))),
    ("exaone-moe", Pre((rf"{_ANY_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",))),
    ("jais-2", Pre((rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|{_HALVED_BLANKS}",))),
    ("tekken", Pre((_TEKKEN,), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", Pre((_GPT4O,))),
    ("granite-embed-multi-97m", Pre((_GPT4O_MARKS,), ignore_merges=True)),
    ("deepseek-llm", Pre((r"[\r\n]", rf"\s?[{_CASED}]+",
                          "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002&&[^\\s]]+", r"\s+\z",
                          _CJK_KOREAN, r"\p{N}+"))),
    ("deepseek-coder", Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_KOREAN, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense hy_v4 joyai-llm", Pre((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3}[\r\n]*|{_BLANKS}"))),
    ("spark2_5", Pre((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"))),
    ("poro-chat bloom gpt3-finnish", Pre((_NOT_COMMON_SIGNS,))),
    ("viking", Pre((_NOT_COMMON_SIGNS, r"\p{N}"))),
    ("chameleon", Pre(("<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}",
                       r"[\p{P}!-/:-@\[-`{-~]", _GPT2), add_bos=True)),
    ("superbpe", Pre((r"\p{N}+", r"(?=(?:[0-9]{3})+(?![0-9]))"))),
    ("kimi-k2", Pre((rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:{_ANY_SUFFIX})?|\p{{N}}{{1,3}}"
                     rf"|{_SIGNS}|{_BLANKS}",))),
)


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

_BYTE_RUNS = re.compile(rb"[\x00-\x7f]+|[\xc0-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf7][\x80-\xbf]{3}|.",
                        re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def _lenient(text: str) -> str:
    """Turn escaped bytes (U+DC80..DCFF) into characters as llama.cpp does: overlong forms count, the rest is U+FFFD."""
    if not _SURROGATE.search(text):
        return text
    out = []
    for run in _BYTE_RUNS.findall(text.encode("utf-8", "surrogateescape")):
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


class _Strings:
    """An array of strings that stays as it lies in the file, and a table that finds them (csrc/bpe.h: pe_strings).

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
    def read(cls, meta: Mapping[str, Any], key: str) -> _Strings:
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
    def pack(cls, key: str, strings: Sequence[bytes]) -> _Strings:
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

    def find(self, raw: bytes) -> int | None:
        found = lib.pe_strings_find(self.table, raw, len(raw))
        return None if found < 0 else found


# ---------------------------------------------------------------------------------------------------------------------
# The five kinds: each turns a piece of text between special tokens into ids.


class _Model(Protocol):
    def encode(self, text: str) -> list[int]: ...


class _Joiner:
    """Joins characters into tokens, the best pair first: by the rank of merges, or without them by scores (csrc/bpe.h).

    `spell[byte]` is the token of a byte of a text that is no token, or None to leave it out. `whole` takes a part that
    is a token as it is, whatever the merges say. `byte_level` says that the strings write a letter for each byte.
    """

    def __init__(self, tokens: _Strings, spell: Iterable[int | None], merges: _Strings | None = None,
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


class _Spm:
    """SentencePiece's BPE, as llama.cpp has it: tokens of all types take part."""

    def __init__(self, tokens: _Strings, scores: np.ndarray, unk_id: int | None):
        spell = []
        for byte, name in enumerate(BYTE_TOKENS):
            found = tokens.find(name)
            if found is None and byte < 128:
                found = tokens.find(bytes([byte]))
            spell.append(unk_id if found is None else found)
        self._joiner = _Joiner(tokens, spell, scores=scores)

    def encode(self, text: str) -> list[int]:
        return self._joiner.encode(text.replace(" ", SPACE).encode("utf-8", "surrogateescape"))


class _Bpe:
    """Byte-level BPE: cut by the pre-tokenizer, then merge by rank inside each part."""

    def __init__(self, tokens: _Strings, merges: _Strings, pre: Pre):
        from tokenizers import PreTokenizedString, Regex, pre_tokenizers

        # Of a text that is no token, llama.cpp spells the letters that are ASCII.
        spell = [tokens.find(bytes([byte])) if byte < 128 else None for byte in range(256)]
        self._joiner = _Joiner(tokens, spell, merges, whole=pre.ignore_merges, byte_level=True)
        self._text = PreTokenizedString
        self._cut = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns])

    def encode(self, text: str) -> list[int]:
        text = _lenient(text)
        parts = self._text(text)
        self._cut.pre_tokenize(parts)
        return self._joiner.encode(text.encode(), [end for _, (_, end), _ in parts.get_splits("original", "byte")])


class _Gemma4:
    """BPE over characters, spaces written as U+2581: lines and runs of newlines apart, a known run being one token."""

    def __init__(self, tokens: _Strings, merges: _Strings):
        self._tokens = tokens
        self._joiner = _Joiner(tokens, map(tokens.find, BYTE_TOKENS), merges)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.findall(rb"\n+|[^\n]+", _lenient(text).replace(" ", SPACE).encode()):
            whole = self._tokens.find(part) if part[:1] == b"\n" else None
            ids += self._joiner.encode(part) if whole is None else [whole]
        return ids


class _WordPiece:
    """Cuts each word into the longest tokens from its left; a word that cannot be cut whole is one unknown token.

    The vocabulary is the converter's: a word's first piece begins with U+2581, the others have no "##". Written out
    here because llama.cpp has no longest word and `tokenizers` takes quadratic time without one.
    """

    def __init__(self, tokens: Sequence[str], unk_id: int, lowercase: bool, strip_accents: bool):
        self._ids = {text: i for i, text in enumerate(tokens)}
        self._longest = max(map(len, tokens))
        self._unk_id, self._lowercase, self._strip_accents = unk_id, lowercase, strip_accents

    def encode(self, text: str) -> list[int]:
        return [i for word in self._words(_lenient(text)) for i in self._pieces(SPACE + word)]

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
            for end in range(min(len(word), start + self._longest), start, -1):
                found = self._ids.get(word[start:end])
                if found is not None:
                    break
            else:
                return [self._unk_id]
            ids.append(found)
            start = end
        return ids


def _first_decomposed(char: str) -> str:
    """Give the first character of the canonical decomposition."""
    return unicodedata.normalize("NFD", char)[0]


def _is_chinese(code: int) -> bool:
    """Tell whether BERT puts blanks around the character (its tokenization.py; 0x2B920 is transformers' slip)."""
    return (0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0x20000 <= code <= 0x2A6DF
            or 0x2A700 <= code <= 0x2B73F or 0x2B740 <= code <= 0x2B81F or 0x2B920 <= code <= 0x2CEAF
            or 0xF900 <= code <= 0xFAFF or 0x2F800 <= code <= 0x2FA1F)


class _Unigram:
    """Cuts the text into the tokens whose scores sum highest (Kudo 2018, arXiv:1804.10959)."""

    def __init__(self, tokens: Sequence[str], scores: np.ndarray, kinds: np.ndarray, unk_id: int | None,
                 charsmap: bytes, prefix: bool, merge_spaces: bool):
        from tokenizers import Tokenizer as Pipeline
        from tokenizers import models

        if unk_id is None:
            raise InvalidModelError("tokenizer.ggml.unknown_token_id: a t5 vocabulary needs an unknown token")
        normal = scores[kinds == Kind.NORMAL]
        worst = float(normal.min()) if normal.size else 0.0
        vocab = []
        for i, (text, score, kind) in enumerate(zip(tokens, scores.tolist(), kinds.tolist())):
            if kind == Kind.USER_DEFINED:
                vocab.append((text, 0.0))
            elif kind in (Kind.NORMAL, Kind.UNUSED):
                vocab.append((text, score))
            else:
                vocab.append((f"\ufdd0{i}", worst))      # no text reaches a control token from here
        self._model = Pipeline(models.Unigram(vocab, unk_id, False))
        self._charsmap = _Charsmap(charsmap)
        self._prefix, self._merge_spaces = prefix, merge_spaces
        fixed = sorted((t for t, k in zip(tokens, kinds.tolist()) if k == Kind.USER_DEFINED), key=len, reverse=True)
        self._fixed = re.compile("|".join(map(re.escape, fixed))) if fixed else None

    def encode(self, text: str) -> list[int]:
        parts, start = [], 0
        for match in self._fixed.finditer(text) if self._fixed else ():
            parts += [self._charsmap.apply(text[start:match.start()]), match.group()]
            start = match.end()
        text = "".join([*parts, self._charsmap.apply(text[start:])])
        if self._merge_spaces:
            words = [word for word in text.split(" ") if word]
            text = "".join(SPACE + word for word in words)
        else:
            # The one extra space goes before the first word; a text of blanks alone gets none.
            text = (SPACE if self._prefix and text.strip(" ") else "") + text.replace(" ", SPACE)
        return self._model.encode(text, add_special_tokens=False).ids if text else []


class _Charsmap:
    """Replaces prefixes of the text by the longest rule that fits, as SentencePiece's `precompiled_charsmap` says.

    Layout: u32 size of the trie in bytes, the trie, then NUL-ended replacements. The trie is a double array of u32:
    bits 10..30 offset (shifted by 8 more if bit 9), bits 0..7 the label, bit 8 "a rule ends here", whose value (an
    index into the replacements) is the node at the offset (Darts-clone, as sentencepiece embeds it).
    """

    def __init__(self, blob: bytes):
        size = int.from_bytes(blob[:4], "little") if len(blob) >= 4 else 0
        if blob and (len(blob) < 4 or size % 4 or 4 + size >= len(blob)):
            raise InvalidModelError(f"tokenizer.ggml.precompiled_charsmap: a trie of {size} bytes does not fit in "
                                    f"{len(blob)} bytes")
        self._units = np.frombuffer(blob, "<u4", size // 4, 4).tolist() if size else []
        self._strings = blob[4 + size:]

    def apply(self, text: str) -> str:
        """Give the text as the rules have it; no rule applies to escaped bytes, which become U+FFFD."""
        if not self._units:
            return _lenient(text)
        raw, out, i = text.encode("utf-8", "surrogateescape"), [], 0
        while i < len(raw):
            length, value = self._longest(raw, i)
            if length:
                end = self._strings.find(b"\0", value)
                if end < 0:
                    raise InvalidModelError(f"tokenizer.ggml.precompiled_charsmap: no replacement at {value}")
                out.append(self._strings[value:end])
            else:
                length = 1 if raw[i] < 0x80 else len(_BYTE_RUNS.match(raw, i).group())
                out.append(raw[i:i + length] if length > 1 or raw[i] < 0x80 else b"\xef\xbf\xbd")
            i += length
        return b"".join(out).decode("utf-8", "replace")

    def _longest(self, raw: bytes, start: int) -> tuple[int, int]:
        units, best = self._units, (0, 0)
        try:
            node = _offset(units[0])
            for i in range(start, len(raw)):
                byte = raw[i]
                node ^= byte
                unit = units[node]
                if not byte or unit & 0x800000FF != byte:
                    break
                node ^= _offset(unit)
                if unit >> 8 & 1:
                    best = (i - start + 1, units[node] & 0x7FFFFFFF)
        except IndexError:
            raise InvalidModelError("tokenizer.ggml.precompiled_charsmap: the trie points outside of itself") from None
        return best


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """Turns text into the token ids of one model, and ids into text.

    Made from metadata by `from_metadata`; the expressions that cut texts, and the models of bert and t5, wait for the
    first text. Uses the file's bytes, also after the file is closed.
    """

    def __init__(self, meta: Mapping[str, Any]):
        self._meta = meta
        self.model = _read(meta, "model", str)
        if self.model is None:
            raise InvalidModelError("tokenizer.ggml.model: missing; the file has no tokenizer")
        if self.model not in ("llama", "gpt2", "gemma4", "bert", "t5"):
            raise UnsupportedModelError(f"tokenizer.ggml.model: {self.model!r}; known: llama, gpt2, gemma4, bert, t5")
        self.pre = _read(meta, "pre", str) or "default" if self.model == "gpt2" else None
        gemma4 = self.model == "gemma4" or self.pre in ("gemma4", "granite-embed-multi-311m")
        self._family = "gemma4" if gemma4 else self.model
        if self._family == "gpt2" and self.pre not in PRE:
            raise UnsupportedModelError(f"tokenizer.ggml.pre: {self.pre!r}; known: {', '.join(sorted(PRE))}, gemma4")
        self._load_tokens()
        self._load_roles()
        self._load_flags()

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any]) -> Tokenizer:
        """Make a tokenizer from the metadata of a GGUF file.

        Raises: InvalidModelError for malformed keys, UnsupportedModelError for kinds that are not known.
        """
        return cls(meta)

    # -- loading ---------------------------------------------------------------------------------------------------

    def _load_tokens(self) -> None:
        tokens = _Strings.read(self._meta, "tokens")
        if not tokens.n:
            raise InvalidModelError("tokenizer.ggml.tokens: must be a list of at least one string")
        if tokens.n_empty:                               # as llama.cpp names them
            tokens = _Strings.pack("tokens", [raw or b"[EMPTY_%d]" % i for i, raw in enumerate(tokens)])
        if tokens.n_twice:
            raise InvalidModelError(f"tokenizer.ggml.tokens: {tokens.n_twice} tokens appear twice")
        self._tokens = tokens
        self._scores = _numbers(self._meta, "scores", tokens.n, np.float32, 0)
        self._kinds = self._file_kinds = _numbers(self._meta, "token_type", tokens.n, np.int32, Kind.NORMAL)
        if not np.isfinite(self._scores).all():
            raise InvalidModelError("tokenizer.ggml.scores: not all are finite")
        if self._family in ("gpt2", "gemma4"):
            self._merges = _Strings.read(self._meta, "merges")
            wrong = lib.pe_strings_not_pair(self._merges.table)
            if wrong >= 0:
                raise InvalidModelError(f"tokenizer.ggml.merges: {self._merges.text(wrong)!r} is not two texts with a "
                                        f"space between")

    def _load_roles(self) -> None:
        """Find the tokens with a role: by their keys, by llama.cpp's defaults, by their texts; then what ends text."""
        default = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "t5": {"eos": 1, "unk": 2, "pad": 0},
                   "bert": {"bos": 101, "sep": 102, "unk": 100, "pad": 0, "mask": 103},
                   "gpt2": {"bos": 11, "eos": 11} if self._is_control(11) else {}, "gemma4": {}}[self._family]
        if self.pre in ("chatglm-bpe", "glm4", "glm5"):
            default.pop("bos", None)

        default = {name: i for name, i in default.items() if i < self.vocab_size}

        def role(name: str, key: str) -> int | None:
            found = self._token_key(key)
            return default.get(name) if found is None else found

        self.bos_id = role("bos", "bos_token_id")
        self.eos_id = role("eos", "eos_token_id")
        self.unk_id = role("unk", "unknown_token_id")
        self.pad_id = role("pad", "padding_token_id")
        self.sep_id = role("sep", "seperator_token_id")           # the format's spelling
        self.mask_id = role("mask", "mask_token_id")
        self.eot_id = self._role_by_text("eot_token_id", EOT_TEXTS)
        self.eom_id = self._role_by_text("eom_token_id", EOM_TEXTS)
        fim = {name: self._role_by_text(f"{name}_token_id", texts) for name, texts in FIM_TEXTS.items()}

        ends = {self.id_of(text) for text in EOG_TEXTS} - {None}
        for i in ends:
            self._override(i, Kind.CONTROL)
        more = self._meta.get("tokenizer.ggml.eos_token_ids")                  # Ollama's files
        ends |= {int(i) for i in more if 0 <= i < self.vocab_size} if isinstance(more, np.ndarray) and more.dtype.kind in "iu" else set()
        ends |= {fim["fim_pad"], fim["fim_rep"], fim["fim_sep"], self.eos_id, self.eot_id, self.eom_id} - {None}
        for i in {self.id_of(text) for text in HARMONY_TEXTS} - {None}:
            self._override(i, Kind.USER_DEFINED)
        # "<|end|>" closes a message, not the answer, where the vocabulary has calls and returns (gpt-oss, Solar Open);
        # "</s>" is plain text where it has "<|tool_response>" (Gemma 4).
        has = {self._tokens.text(i): i for i in ends}
        if "<|end|>" in has and (has.keys() >= {"<|return|>", "<|call|>"} or has.keys() >= {"<|return|>", "<|calls|>"}
                                 or "<|flush|>" in has and has.keys() & {"<|call|>", "<|calls|>"}):
            ends.discard(has["<|end|>"])
            self._override(has["<|end|>"], Kind.USER_DEFINED)
        if has.keys() >= {"</s>", "<|tool_response>"}:
            ends.discard(has["</s>"])
            self._override(has["</s>"], Kind.NORMAL)
        self.eog_ids = frozenset(ends)

    def _load_flags(self) -> None:
        meta = self._meta
        pre = PRE.get(self.pre, Pre(())) if self._family == "gpt2" else Pre(())
        self.add_bos = _read(meta, "add_bos_token", bool, self._family in ("llama", "bert", "gemma4") or pre.add_bos)
        self.add_eos = _read(meta, "add_eos_token", bool, self._family == "t5")
        if self._family == "gemma4":
            self.add_bos = True                          # whatever the file says: early conversions had it wrong
        if self._family == "bert":
            self.add_bos, self.add_eos = True, False     # [CLS] and [SEP] always
            if self.sep_id is None:
                raise InvalidModelError("tokenizer.ggml.seperator_token_id: a bert vocabulary needs it")
        for flag, token, name in ((self.add_bos, self.bos_id, "bos"), (self.add_eos, self.eos_id, "eos")):
            if flag and token is None:
                raise InvalidModelError(f"tokenizer.ggml.{name}_token_id: missing, but add_{name}_token is set")
        # Ollama's Gemma files lack the key; no Gemma was trained with the prefix (transformers GemmaTokenizer).
        plain = str(meta.get("general.architecture", "")).startswith("gemma")
        prefix = _read(meta, "add_space_prefix", bool, self._family == "llama" and not plain)
        self.add_space_prefix = prefix and self._family in ("llama", "t5")
        self.remove_extra_whitespaces = _read(meta, "remove_extra_whitespaces", bool, False)
        self._load_specials(str(meta.get("general.name", "")).lower(), str(meta.get("general.architecture", "")))

    def _load_specials(self, name: str, architecture: str) -> None:
        """List what is cut out of a text before it is tokenized, the longest first, grouped by how it begins."""
        control = (self._kinds == Kind.CONTROL) | (self._kinds == Kind.UNKNOWN)
        ids = np.flatnonzero(control | (self._kinds == Kind.USER_DEFINED))
        ids = ids[np.argsort(-self._tokens.sizes(ids), kind="stable")].tolist()
        self._special_texts = {i: self._tokens.text(i) for i in ids}
        self._order = {i: rank for rank, i in enumerate(ids)}
        self._by_prefix: dict[str, list[int]] = {}
        for i, text in self._special_texts.items():
            self._by_prefix.setdefault(text[:PREFIX], []).append(i)
        self.special_ids = frozenset(np.flatnonzero(control).tolist())
        # Blanks that a special token swallows. GGUF does not carry this; llama.cpp knows it by name, and so must we.
        self._rstrip: frozenset[int | None] = frozenset()
        self._lstrip: frozenset[int | None] = frozenset()
        pre = self.pre or ""
        if any(kind in pre for kind in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or \
                any(kind in architecture for kind in ("nomic-bert-moe", "jina-bert-v3")):
            self._lstrip = frozenset({self.id_of("<mask>")})
        elif "phi-3" in name or "phi3" in name:
            keep = {self.id_of(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
            self._rstrip = frozenset({*ids, self.id_of("</s>")} - keep)
        elif "modern-bert" in name:
            self._lstrip = frozenset({self.id_of("[MASK]")})

    def _token_key(self, key: str) -> int | None:
        value = _read(self._meta, key, int)
        if value is None or value == NO_ID:
            return None
        if not 0 <= value < self.vocab_size:
            raise InvalidModelError(f"tokenizer.ggml.{key}: {value} is not below the {self.vocab_size} tokens")
        return value

    def _role_by_text(self, key: str, texts: Iterable[str]) -> int | None:
        found = self._token_key(key)
        if found is None and key.split("_token_id")[0] in OLD_FIM_KEYS:
            found = self._token_key(OLD_FIM_KEYS[key.split("_token_id")[0]] + "_token_id")
        if found is None:
            found = next((i for i in map(self.id_of, texts) if i is not None), None)
            if found is not None:
                self._override(found, Kind.CONTROL)
        return found

    def _override(self, i: int, kind: Kind) -> None:
        if self._kinds[i] != kind:
            if self._kinds is self._file_kinds:
                self._kinds = self._kinds.copy()
            self._kinds[i] = kind

    def _is_control(self, i: int) -> bool:
        return i < self.vocab_size and self._kinds[i] == Kind.CONTROL

    @cached_property
    def _encoder(self) -> _Model:
        if self._family == "llama":
            return _Spm(self._tokens, self._scores, self.unk_id)
        if self._family == "gpt2":
            return _Bpe(self._tokens, self._merges, PRE[self.pre])
        if self._family == "gemma4":
            return _Gemma4(self._tokens, self._merges)
        tokens = list(map(self._tokens.text, range(self.vocab_size)))
        if _SURROGATE.search("".join(tokens)):           # tokens that are not UTF-8 match no text
            tokens = [f"\ufdd0{i}" if _SURROGATE.search(text) else text for i, text in enumerate(tokens)]
        meta = self._meta
        if self._family == "bert":
            lowercase = _read(meta, "normalizer.lowercase", bool, True)
            if self.unk_id is None:
                raise InvalidModelError("tokenizer.ggml.unknown_token_id: a bert vocabulary needs it")
            return _WordPiece(tokens, self.unk_id, lowercase, _read(meta, "normalizer.strip_accents", bool, lowercase))
        charsmap = meta.get("tokenizer.ggml.precompiled_charsmap", b"")
        blob = charsmap if isinstance(charsmap, bytes) else np.asarray(charsmap).astype(np.uint8).tobytes()
        return _Unigram(tokens, self._scores, self._file_kinds, self.unk_id, blob, self.add_space_prefix,
                        self.remove_extra_whitespaces)

    # -- text to ids -----------------------------------------------------------------------------------------------

    def tokenize(self, text: str | bytes, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Give the ids of a text.

        `add_special` puts BOS, EOS or whatever the model's file asks for around them. `parse_special` reads the texts
        of control tokens ("<|im_start|>") as those tokens; without it they are plain text, and only user-defined
        tokens are still read as themselves. Bytes need not be UTF-8.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        elif isinstance(text, str):
            text = _SURROGATE.sub("\ufffd", text)
        else:
            raise RequestError(f"tokenize: text must be str or bytes, not {type(text).__name__}")
        ids: list[int] = []
        if add_special and self.add_bos:
            ids.append(self.bos_id)
        after_special = True
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                prefix = " " if self._family == "llama" and self.add_space_prefix and after_special else ""
                ids += self._encoder.encode(prefix + part)
            after_special = isinstance(part, int)
        if add_special and self._family == "bert":
            ids.append(self.sep_id)
        elif add_special and self.add_eos:
            ids.append(self.eos_id)
        return ids

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut special tokens out of a text: all of the longest first, then the next in what is left."""
        found = [i for prefix, ids in self._by_prefix.items() if prefix in text
                 for i in ids if self._special_texts[i] in text]
        found.sort(key=self._order.__getitem__)
        parts: list[str | int] = [text] if text else []
        for i in found:
            if not parse_special and i in self.special_ids:
                continue
            special, cut = self._special_texts[i], []
            for part in parts:
                if isinstance(part, int) or special not in part:
                    cut.append(part)
                    continue
                pieces = part.split(special)
                for k, piece in enumerate(pieces):
                    if k and i in self._rstrip:
                        piece = piece.lstrip(" \t\n\v\f\r")
                    if k < len(pieces) - 1 and i in self._lstrip:
                        piece = piece.rstrip(" \t\n\v\f\r")
                    cut += [i] * (k > 0) + [piece] * (piece != "")
            parts = cut
        return parts

    # -- ids to text -----------------------------------------------------------------------------------------------

    def piece(self, token: int) -> bytes:
        """Give the bytes of one token; they need not be whole characters. Special tokens give their own text.

        Raises: RequestError for an id that the vocabulary does not have.
        """
        if not 0 <= token < self.vocab_size:
            raise RequestError(f"token {token} is not in the vocabulary of {self.vocab_size}")
        raw, kind = self._tokens[token], int(self._kinds[token])
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED):
            return raw
        if kind == Kind.BYTE:
            return _byte_token(raw)
        if kind != Kind.NORMAL:
            return b""                                   # unused and undefined ones have no text
        if self._family != "gpt2":
            return raw.replace(SPACE.encode(), b" ")
        return b"".join([LETTER_BYTES.get(letter) or letter.encode("utf-8", "surrogateescape")
                         for letter in raw.decode("utf-8", "surrogateescape")])

    def detokenize(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Give the text of ids. Bytes that are not UTF-8 become U+FFFD; the space that `tokenize` puts first is taken
        away again (after a leading BOS as well). `skip_special` leaves control and unknown tokens out.

        Raises: RequestError for an id that the vocabulary does not have.
        """
        decoder = self.decoder(skip_special)
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def decoder(self, skip_special: bool = True, at_start: bool = True) -> StreamDecoder:
        """Give a decoder for ids that come one at a time.

        `at_start` says that they begin a text or an answer, so that SentencePiece's leading space is not part of it;
        give False where they continue a text in mid-sentence.
        """
        return StreamDecoder(self, skip_special, at_start)

    # -- vocabulary ------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the file; the model's output may be wider."""
        return self._tokens.n

    def id_of(self, text: str) -> int | None:
        """Give the id of the token that the file spells this way, or None."""
        try:
            return self._tokens.find(text.encode("utf-8", "surrogateescape"))
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

    def __repr__(self) -> str:
        kind = self.model if self.pre is None else f"{self.model}, {self.pre}"
        return f"Tokenizer({kind}, {self.vocab_size} tokens)"


class StreamDecoder:
    """Turns ids that come one at a time into text; holds bytes back until they make whole characters."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, at_start: bool = True):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._strip = at_start and (tokenizer.add_space_prefix or tokenizer.model == "bert")
        self._first = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Give the text that this token completes; it may be empty.

        Raises: RequestError for an id that the vocabulary does not have.
        """
        raw = self._tokenizer.piece(token)
        if self._strip and token not in self._tokenizer.special_ids:
            self._strip = False
            raw = raw[1:] if raw[:1] == b" " else raw
        elif not (self._first and token == self._tokenizer.bos_id):
            self._strip = False
        self._first = False
        return "" if token in self._skip else self._utf8.decode(raw)

    def flush(self) -> str:
        """Give what is held back: the start of a character that never came whole is U+FFFD."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a GGUF file; one that holds nothing but a vocabulary will do.

    Raises: InvalidModelError, UnsupportedModelError.
    """
    from .gguf import GGUFFile

    return Tokenizer.from_metadata(GGUFFile(path).metadata)


def _byte_token(raw: bytes) -> bytes:
    if re.fullmatch(b"<0x[0-9A-Fa-f]{2}>", raw):
        return bytes([int(raw[3:5], 16)])
    raise InvalidModelError(f"tokenizer.ggml.tokens: the byte token {raw!r} is not of the form <0x0A>")


def _read(meta: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
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


def _numbers(meta: Mapping[str, Any], key: str, count: int, dtype: type, default: float) -> np.ndarray:
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
