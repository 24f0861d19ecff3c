"""Text to token ids and back, from the metadata of a GGUF file alone.

A GGUF file carries its tokenizer as plain keys (`tokenizer.ggml.*`): the texts, types and scores of the tokens, the
merges, and a few flags. Six kinds exist here, by `tokenizer.ggml.model`:

    llama   pieces joined in order of their score (SentencePiece "BPE")           csrc/host/bpe.c
    gpt2    byte-level BPE; `tokenizer.ggml.pre` names the splitting expressions  csrc/host/bpe.c, cut by tokenizers
    gemma4  BPE over characters with U+2581 for a space                          csrc/host/bpe.c
    t5      the likeliest cut of the text (SentencePiece "unigram")              tokenizers
    bert    longest match from the left of each word (WordPiece)                 below
    clip    BPE of small letters, whose words end in a mark                      tokenizers; files name it so here, or have no name

Tokens and merges stay in the file's bytes, with a hash table over them: no Python object is made for each of them.

The ids are llama.cpp's (`src/llama-vocab.cpp`), for any text and any bytes. Known differences, all on purpose:
- Character classes are those of the Unicode version inside `tokenizers` (17); llama.cpp has 15. Characters that
  are newer than that may be cut elsewhere.
- Bytes that encode a lone surrogate become U+FFFD before BPE; llama.cpp keeps them.
- Nothing "cleans up" spaces before punctuation when ids become text: text, ids, text is exact, but where SPM's prefix
  stands behind a special token within the text, which comes back as a space (in llama.cpp too).
- A gpt2 vocabulary that does not name its BOS and EOS has none, unless token 11 is a control token as in Falcon.
- Words of some models are cut as their authors do, which llama.cpp does not (pretokenizers); of bert, where the file says how long a word is.
- Of special tokens that overlap in a text the first is taken (specials).
- A file that does not say how words are cut, or that Ollama wrote, is cut as its vocabulary's other files are.
- A llama vocabulary without byte tokens spells what it does not have as unknown tokens, one a byte; llama.cpp aborts.
"""

from __future__ import annotations

import codecs
import re
import string
import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pyengine.arguments import iterates, switch, takes
from pyengine.errors import InvalidModelError, ModelWarning, RequestError, shown, UnsupportedModelError
from pyengine.native import lib
from pyengine.text.bpe import Bpe, Gemma4Bpe, Spm
from pyengine.text.marks import GUARD, MARK
from pyengine.text.pretokenizers import known_pre, PRE, Pre
from pyengine.text.roles import find_roles, HARMONY_TEXTS
from pyengine.text.specials import Specials
from pyengine.text.unigram import Normalizer, Unigram
from pyengine.text.vocabulary import byte_token, Kind, LETTER_BYTES, read_key, SPACE, Strings, SURROGATE, Vocabulary
from pyengine.text.wordpiece import AuthorsWordPiece, WordPiece
from pyengine.text.words import END, WordBpe


_BLANKS = " \t\n\v\f\r"
KINDS = "llama", "gpt2", "gemma4", "bert", "t5", "clip"


# ---------------------------------------------------------------------------------------------------------------------
# The six kinds: each turns a piece of text between special tokens into ids.


class _Model(Protocol):
    def encode(self, text: str) -> list[int]: ...


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """Turns text into the token ids of one model, and ids into text.

    Made from metadata by `from_metadata`; the expressions that cut texts, and the models of bert and t5, wait for the
    first text. Uses the file's bytes, also after the file is closed.
    """

    def __init__(self, meta: Mapping[str, Any]):
        self._meta = meta
        self.model = read_key(meta, "model", str)
        if self.model is None:
            raise InvalidModelError("tokenizer.ggml.model: missing; the file has no tokenizer")
        if self.model not in KINDS:
            raise UnsupportedModelError(f"tokenizer.ggml.model: {self.model!r}; known: {', '.join(KINDS)}")
        self.vocabulary = Vocabulary(meta)
        self._tokens = self.vocabulary.tokens
        self.pre = self._find_pre() if self.model == "gpt2" else None
        gemma4 = self.model == "gemma4" or self.pre in ("gemma4", "granite-embed-multi-311m")
        self._family = "gemma4" if gemma4 else self.model
        if self._family == "gpt2" and self.pre not in PRE:
            raise UnsupportedModelError(f"tokenizer.ggml.pre: {self.pre!r}; known: {', '.join(sorted(PRE))}, gemma4")
        if self._family in ("gpt2", "gemma4") or self._family == "clip" and "tokenizer.ggml.merges" in meta:
            self._merges = Strings.read(meta, "merges")
            wrong = lib.pe_strings_not_pair(self._merges.table)
            if wrong >= 0:
                raise InvalidModelError(f"tokenizer.ggml.merges: {self._merges.text(wrong)!r} is not two texts with a "
                                        f"space between")
        (self.bos_id, self.eos_id, self.unk_id, self.pad_id, self.sep_id, self.mask_id, self.eot_id, self.eom_id,
         self.eog_ids, self.fim) = find_roles(self.vocabulary, self._family, self.pre)
        self._load_flags()
        self._load_specials(str(meta.get("general.name", "")).lower(), str(meta.get("general.architecture", "")))

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any]) -> Tokenizer:
        """Make a tokenizer from the metadata of a GGUF file.

        Raises: InvalidModelError for malformed keys, UnsupportedModelError for kinds that are not known.
        """
        return cls(meta)

    # -- loading ---------------------------------------------------------------------------------------------------

    def _find_pre(self) -> str:
        """Name the expressions that cut a text: the file's word, or the vocabulary's own where the file has none."""
        said = read_key(self._meta, "pre", str)
        if said not in (None, "", "default"):
            return said
        pre = known_pre(str(self._meta.get("general.architecture", "")), self.vocabulary.id_of)
        if pre is None:
            warnings.warn(f"tokenizer.ggml.pre: {'missing' if not said else repr(said)}, so nobody knows how this model's texts are "
                          "cut into words; llama.cpp's default is taken, and answers may be worse. Get a newer file, or convert the "
                          "model anew", ModelWarning)
        return pre or "default"

    def _load_flags(self) -> None:
        meta = self._meta
        pre = PRE.get(self.pre, Pre(())) if self._family == "gpt2" else Pre(())
        self.add_bos = read_key(meta, "add_bos_token", bool, self._family in ("llama", "bert", "gemma4", "clip") or pre.add_bos)
        self.add_eos = read_key(meta, "add_eos_token", bool, self._family in ("t5", "clip"))
        if self._family == "gemma4":
            self.add_bos = True                          # whatever the file says: early conversions had it wrong
        if self._family == "bert":
            self.add_bos, self.add_eos = True, False     # [CLS] and [SEP] always
            if self.sep_id is None:
                raise InvalidModelError("tokenizer.ggml.seperator_token_id: a bert vocabulary needs it")
        for name, token in (("bos", self.bos_id), ("eos", self.eos_id)):
            if getattr(self, f"add_{name}") and token is None:
                warnings.warn(f"tokenizer.ggml.add_{name}_token: set, but {name}_token_id names no token: none is added", ModelWarning)
                setattr(self, f"add_{name}", False)
        # Ollama's Gemma files lack the key; no Gemma was trained with the prefix (transformers GemmaTokenizer).
        plain = str(meta.get("general.architecture", "")).startswith("gemma")
        prefix = read_key(meta, "add_space_prefix", bool, self._family == "llama" and not plain)
        self.add_space_prefix = prefix and self._family in ("llama", "t5")
        self._lowercase = self._family in ("llama", "gemma4", "t5") and read_key(meta, "normalizer.lowercase", bool, False)
        removed = self._family == "t5" and read_key(meta, "normalizer.remove_punctuation", bool, False)
        self._punctuation = str.maketrans("", "", string.punctuation) if removed else None
        self.remove_extra_whitespaces = read_key(meta, "remove_extra_whitespaces", bool, False)

    def _load_specials(self, name: str, architecture: str) -> None:
        """List what is cut out of a text before it is tokenized, and the blanks that go with it."""
        meta = self._meta
        kinds = self.vocabulary.kinds
        self.special_ids = frozenset(np.flatnonzero((kinds == Kind.CONTROL) | (kinds == Kind.UNKNOWN)).tolist())
        self._fixed_ids = np.flatnonzero(kinds == Kind.USER_DEFINED).tolist()
        # Blanks that a special token swallows. GGUF does not carry this; llama.cpp knows it by name, and so must we.
        self._rstrip: frozenset[int | None] = frozenset()
        self._lstrip: frozenset[int | None] = frozenset()
        pre = self.pre or ""
        if any(kind in pre for kind in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or \
                any(kind in architecture for kind in ("nomic-bert-moe", "jina-bert-v3")):
            self._lstrip = frozenset({self.id_of("<mask>")})
        elif "phi-3" in name or "phi3" in name:
            keep = {self.id_of(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
            self._rstrip = frozenset({*self.special_ids, *self._fixed_ids, self.id_of("</s>")} - keep)
        elif "modern-bert" in name:
            self._lstrip = frozenset({self.id_of("[MASK]")})
        if any(f"tokenizer.ggml.{side}_tokens" in meta for side in ("lstrip", "rstrip")):       # our converter's
            self._lstrip, self._rstrip = (frozenset(np.asarray(meta.get(f"tokenizer.ggml.{side}_tokens", [])).tolist()) for side in ("lstrip", "rstrip"))

    @cached_property
    def _fixed(self) -> Specials:
        """User-defined tokens, which stand for themselves in any text."""
        return Specials({i: self._tokens.text(i) for i in self._fixed_ids})

    @cached_property
    def _specials(self) -> Specials:
        """Those, and control and unknown tokens."""
        return Specials({i: self._tokens.text(i) for i in (*self._fixed_ids, *self.special_ids)})

    @cached_property
    def _control(self) -> Specials:
        """What no user can write: control and unknown tokens, and those that frame gpt-oss's messages."""
        return Specials({i: self._tokens.text(i) for i in (*self.special_ids, *self._fixed_ids)
                         if i in self.special_ids or self._tokens.text(i) in (*HARMONY_TEXTS, "<|end|>")})

    @cached_property
    def _encoder(self) -> _Model:
        if self._family == "llama":
            return Spm(self._tokens, self.vocabulary.scores, self.unk_id)
        if self._family == "gpt2":
            return Bpe(self._tokens, self._merges, PRE[self.pre])
        if self._family == "gemma4":
            return Gemma4Bpe(self._tokens, self._merges)
        tokens = list(map(self._tokens.text, range(self.vocab_size)))
        if SURROGATE.search("".join(tokens)):           # tokens that are not UTF-8 match no text
            tokens = [f"\ufdd0{i}" if SURROGATE.search(text) else text for i, text in enumerate(tokens)]
        meta = self._meta
        if self._family == "bert":
            lowercase = read_key(meta, "normalizer.lowercase", bool, True)
            if self.unk_id is None:
                raise InvalidModelError("tokenizer.ggml.unknown_token_id: a bert vocabulary needs it")
            accents, longest = read_key(meta, "normalizer.strip_accents", bool, lowercase), read_key(meta, "max_input_chars_per_word", int)
            if longest is None:
                return WordPiece(tokens, self.unk_id, lowercase, accents)
            switches = {name: read_key(meta, f"normalizer.{name}", bool, True) for name in ("clean_text", "handle_chinese_chars")}
            return AuthorsWordPiece(tokens, self.unk_id, lowercase, accents, longest, switches)
        if self._family == "clip":
            merges = list(map(self._merges.text, range(self._merges.n))) if "tokenizer.ggml.merges" in meta else None
            if self.unk_id is None:
                raise InvalidModelError("tokenizer.ggml.unknown_token_id: a clip vocabulary needs it, or a token <|endoftext|>")
            return WordBpe(tokens, merges, tokens[self.unk_id])
        charsmap = meta.get("tokenizer.ggml.precompiled_charsmap", b"")
        blob = charsmap if isinstance(charsmap, bytes) else np.asarray(charsmap).astype(np.uint8).tobytes()
        before = Normalizer(blob, read_key(meta, "normalizer.steps", list, ["charsmap"]))
        return Unigram(tokens, self.vocabulary.scores, self.vocabulary.file_kinds, self.unk_id, before, self.add_space_prefix,
                       self.remove_extra_whitespaces)

    # -- text to ids -----------------------------------------------------------------------------------------------

    def tokenize(self, text: str | bytes, add_special: bool = True, parse_special: bool = True, mend: bool = False) -> list[int]:
        """Give the ids of a text; `mend` takes out what `guarded` put in.

        `add_special` puts BOS, EOS or whatever the model's file asks for around them. `parse_special` reads the texts
        of control tokens ("<|im_start|>") as those tokens; without it they are plain text, and only user-defined
        tokens are still read as themselves. Bytes need not be UTF-8.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        elif isinstance(text, str):
            text = SURROGATE.sub("\ufffd", text)
        else:
            raise RequestError(f"tokenize: text must be str or bytes, not {type(text).__name__}")
        ids: list[int] = []
        add_special, parse_special = switch("add_special", add_special), switch("parse_special", parse_special)
        if add_special and self.add_bos:
            ids.append(self.bos_id)
        after_special = True
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                prefix = " " if self._family == "llama" and self.add_space_prefix and after_special else ""
                part = self._normalized(part.replace(GUARD, "") if mend else part)
                ids += self._encoder.encode(prefix + part)
            after_special = isinstance(part, int)
        if add_special and self._family == "bert":
            ids.append(self.sep_id)
        elif add_special and self.add_eos:
            ids.append(self.eos_id)
        return ids

    def _normalized(self, text: str) -> str:
        """Give a text as a file's keys "normalizer.*" have it, of those vocabularies that know no more of it."""
        if self._punctuation is not None:                # transformers `tokenization_siglip.py`, canonicalize_text
            text = (text.lower() if self._lowercase else text).translate(self._punctuation)
            return re.sub(r"\s+", " ", text).strip()
        return "".join(map(str.lower, text)) if self._lowercase else text

    def guarded(self, text: str) -> str:
        """Return a text with the texts of control tokens in it broken up, so that what a user wrote stays text within a prompt that
        has such tokens: to be tokenized with `mend`."""
        return "".join(part if isinstance(part, str) else (said := self._tokens.text(part))[:1] + GUARD + said[1:]
                       for part in self._control.split(text.replace(GUARD, "\ufffd")))

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut special tokens out of a text, with the blanks that they swallow."""
        parts = (self._specials if parse_special else self._fixed).split(text)
        if self._rstrip or self._lstrip:
            for k, part in enumerate(parts):
                if isinstance(part, str):
                    part = part.lstrip(_BLANKS) if k and parts[k - 1] in self._rstrip else part
                    parts[k] = part.rstrip(_BLANKS) if k + 1 < len(parts) and parts[k + 1] in self._lstrip else part
        return [part for part in parts if part != ""]

    # -- ids to text -----------------------------------------------------------------------------------------------

    def piece(self, token: int) -> bytes:
        """Give the bytes of one token; they need not be whole characters. Special tokens give their own text.

        Raises: RequestError for an id that the vocabulary does not have.
        """
        if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
            raise RequestError(f"a token must be an int, not {type(token).__name__}")
        if not 0 <= token < self.vocab_size:
            raise RequestError(f"token {shown(token)} is not in the vocabulary of {self.vocab_size}")
        raw, kind = self._tokens[token], int(self.vocabulary.kinds[token])
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED):
            return raw
        if kind == Kind.BYTE:
            return byte_token(raw)
        if kind != Kind.NORMAL:
            return b""                                   # unused and undefined ones have no text
        if self._family not in ("gpt2", "clip"):
            return raw.replace(SPACE.encode(), b" ")
        if self._family == "clip" and raw.endswith(END.encode()):
            return self._bytes(raw[: -len(END)]) + b" "
        return self._bytes(raw)

    @staticmethod
    def _bytes(raw: bytes) -> bytes:
        """Give the bytes that a token's letters stand for."""
        return b"".join([LETTER_BYTES.get(letter) or letter.encode("utf-8", "surrogateescape")
                         for letter in raw.decode("utf-8", "surrogateescape")])

    def detokenize(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Give the text of ids. Bytes that are not UTF-8 become U+FFFD; the space that `tokenize` puts first is taken
        away again (after a leading BOS as well). `skip_special` leaves control and unknown tokens out.

        Raises: RequestError for an id that the vocabulary does not have.
        """
        if not iterates(ids):
            raise RequestError(f"detokenize: ids must be a list of ints, not {type(ids).__name__}")
        decoder = self.decoder(skip_special)
        text = "".join([*map(decoder.push, ids), decoder.flush()])
        return text.strip(" ") if self._family == "clip" else text

    def decoder(self, skip_special: bool = True, at_start: bool = True, marks: Collection[int] = ()) -> StreamDecoder:
        """Give a decoder for ids that come one at a time.

        `at_start` says that they begin a text or an answer, so that SentencePiece's leading space is not part of it;
        give False where they continue a text in mid-sentence. `marks` are ids whose texts come behind `MARK`, which no other text
        holds: what reads them need not guess whether the same letters were meant.
        """
        return StreamDecoder(self, skip_special, at_start, marks)

    # -- vocabulary ------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the file; the model's output may be wider."""
        return self._tokens.n

    def id_of(self, text: str) -> int | None:
        """Give the id of the token that the file spells this way, or None."""
        return self.vocabulary.id_of(text)

    def need(self, text: str) -> int:
        """Give the id of the token that the file spells this way.

        Raises: UnsupportedModelError if there is none.
        """
        return self.vocabulary.need(text)

    def __repr__(self) -> str:
        kind = self.model if self.pre is None else f"{self.model}, {self.pre}"
        return f"Tokenizer({kind}, {self.vocab_size} tokens)"


class StreamDecoder:
    """Turns ids that come one at a time into text; holds bytes back until they make whole characters."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, at_start: bool = True, marks: Collection[int] = ()):
        self._tokenizer, self._marks = tokenizer, frozenset(marks)
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._strip = at_start and (tokenizer.add_space_prefix or tokenizer.model == "bert")
        self._first = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Give the text that this token completes; it may be empty.

        Raises: RequestError for an id that the vocabulary does not have.
        """
        raw = self._tokenizer.piece(token)
        if token in self._marks:
            self._strip = self._first = False
            return self.flush() + MARK + raw.decode("utf-8", "replace")
        if self._strip and token not in self._tokenizer.special_ids:
            self._strip = False
            raw = raw[1:] if raw[:1] == b" " else raw
        elif not (self._first and token == self._tokenizer.bos_id):
            self._strip = False
        self._first = False
        if token in self._skip:
            return ""
        text = self._utf8.decode(raw)
        return text.replace(MARK, "\ufffd") if self._marks and MARK in text else text

    def flush(self) -> str:
        """Give what is held back: the start of a character that never came whole is U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


@takes()
def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a GGUF file; one that holds nothing but a vocabulary will do.

    Raises: InvalidModelError, UnsupportedModelError.
    """
    from pyengine.files.dialects import translate
    from pyengine.files.gguf import GGUFFile

    return Tokenizer.from_metadata(translate(GGUFFile(path)).metadata)
