"""Unigram, SentencePiece's algorithm with a character map."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from pyengine.errors import InvalidModelError, UnsupportedModelError
from pyengine.text.specials import Specials
from pyengine.text.vocabulary import BYTE_RUNS, lenient, Kind, SPACE

BLANKS = re.compile("[^\\S\x1c-\x1f]+")           # Unicode's white space
MAX_RULE = 256      # bytes of a rule's text, and of what replaces it; sentencepiece's own are far shorter. It bounds what a letter costs


class Unigram:
    """Cuts the text into the tokens whose scores sum highest (Kudo 2018, arXiv:1804.10959)."""

    def __init__(self, tokens: Sequence[str], scores: np.ndarray, kinds: np.ndarray, unk_id: int | None, before: Normalizer, prefix: bool,
                 merge_spaces: bool):
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
            elif kind in (Kind.NORMAL, Kind.UNUSED, Kind.BYTE):
                vocab.append((text, score))
            else:
                vocab.append((f"\ufdd0{i}", worst))      # no text reaches a control token from here
        # bytes spell what no piece has, where they are tokens
        self._model = Pipeline(models.Unigram(vocab, unk_id, bool((kinds == Kind.BYTE).any())))
        self._before = before
        self._prefix, self._merge_spaces = prefix, merge_spaces
        self._tokens = tokens
        self._fixed = Specials({i: t for i, (t, k) in enumerate(zip(tokens, kinds.tolist())) if k == Kind.USER_DEFINED})

    def encode(self, text: str) -> list[int]:
        text = "".join([self._before.apply(part) if isinstance(part, str) else self._tokens[part] for part in self._fixed.split(text)])
        if self._merge_spaces:
            text = "".join(SPACE + word for word in (BLANKS.split(text) if self._before.words else text.split(" ")) if word)
        elif self._before.one_space:                         # `tokenizers`' Metaspace: a text that begins with a space has its prefix
            text = text.replace(" ", SPACE)
            text = SPACE + text if self._prefix and text[:1] not in ("", SPACE) else text
        else:
            # The one extra space goes before the first word; a text of blanks alone gets none.
            text = (SPACE if self._prefix and text.strip(" ") else "") + text.replace(" ", SPACE)
        return self._model.encode(text, add_special_tokens=False).ids if text else []


class Normalizer:
    """What is done to a text first: a map of characters, and other steps where a file names them, in its order.

    replace A B   every A becomes B
    nfkd, strip_accents, lowercase   as `tokenizers` does them
    one_space     several spaces become one
    words         words end at any white space, where extra spaces are removed
    """

    def __init__(self, charsmap: bytes, steps: Sequence[str] = ("charsmap",)):
        from tokenizers import normalizers

        self.one_space, self.words = "one_space" in steps, "words" in steps
        kinds = {"nfkd": normalizers.NFKD, "strip_accents": normalizers.StripAccents, "lowercase": normalizers.Lowercase}
        self._steps: list[Callable[[str], str]] = []
        for step in steps:
            name, *parts = step.split(" ") if isinstance(step, str) else [""]
            if step == "charsmap":
                self._steps.append(_Charsmap(charsmap).apply)
            elif name == "replace" and len(parts) == 2 and parts[0]:
                self._steps.append(lambda text, old=parts[0], new=parts[1]: text.replace(old, new))
            elif step == "one_space":
                self._steps.append(partial(re.compile(" {2,}").sub, " "))
            elif step == "words":
                pass                                         # once all others are done
            elif step in kinds:
                self._steps.append(lambda text, made=kinds[step](): made.normalize_str(lenient(text)))
            else:
                raise UnsupportedModelError(f"tokenizer.ggml.normalizer.steps: {step!r} is not known")

    def apply(self, text: str) -> str:
        """Return the text that is cut into tokens."""
        for step in self._steps:
            text = step(text)
        return text


class _Charsmap:
    """Rules of SentencePiece's `precompiled_charsmap`: prefixes of the text are replaced by the longest one that fits.

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
            return lenient(text)
        raw, out, i = text.encode("utf-8", "surrogateescape"), [], 0
        while i < len(raw):
            length, value = self._longest(raw, i)
            if length:
                end = self._strings.find(b"\0", value, value + MAX_RULE + 1)
                if end < 0:
                    raise InvalidModelError(f"tokenizer.ggml.precompiled_charsmap: no replacement of at most {MAX_RULE} bytes at {value}")
                out.append(self._strings[value:end])
            else:
                length = 1 if raw[i] < 0x80 else len(BYTE_RUNS.match(raw, i).group())
                out.append(raw[i:i + length] if length > 1 or raw[i] < 0x80 else b"\xef\xbf\xbd")
            i += length
        return b"".join(out).decode("utf-8", "replace")

    def _longest(self, raw: bytes, start: int) -> tuple[int, int]:
        units, best = self._units, (0, 0)
        try:
            node = _offset(units[0])
            for i in range(start, min(len(raw), start + MAX_RULE)):
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
