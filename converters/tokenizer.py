"""Translate a checkpoint's tokenizer into GGUF's `tokenizer.*` keys.

Three kinds are translated. Byte-level BPE (tokenizer.json) becomes model "gpt2", with `pre` naming its pre-tokenizer;
SentencePiece BPE (tokenizer.model, or a tokenizer.json with byte fallback) becomes model "llama", its unigram (tokenizer.json, or
spiece.model) model "t5". Every id comes from the checkpoint. Key names: gguf-py `Keys.Tokenizer`; meanings: llama.cpp's converter and `llama-vocab.cpp`.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from pyengine.errors import InvalidModelError, UnsupportedModelError

SPACE = "\u2581"                               # SentencePiece's visible space
ADDED_SCORE = -1000.0                          # of tokens that no merge makes, as in llama.cpp's converter
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt",
         "spiece.model", "tekken.json", "added_tokens.json", "sentencepiece.bpe.model")
PIECES = ("tokenizer.model", "spiece.model")   # names of a SentencePiece model
FAIRSEQ = "sentencepiece.bpe.model"            # one whose first ids are those of fairseq, not of the file
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask", "eot", "eom")

# One entry: the steps of a tokenizer.json's pre-tokenizer (see `_steps`), `ignore_merges` (None: either), and
# llama.cpp's name for it. A pattern that ends in "…" is compared up to there.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
           r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT_4O = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}|"
           r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
PRE_TOKENIZERS: tuple[tuple[tuple[str, ...], bool | None, str], ...] = (
    (("bytes+regex",), False, "gpt-2"),
    (("digits", "bytes+regex"), False, "smollm"),
    ((f"split {_WORDS}\\p{{N}}{_REST}", "bytes"), False, "qwen2"),
    ((f"split {_MARKED}", "bytes"), False, "qwen35"),
    ((f"split {_WORDS}\\p{{N}}{{1,3}}{_REST}", "bytes"), True, "llama-bpe"),
    ((f"split {_WORDS}\\p{{N}}{{1,3}}{_REST}", "bytes"), False, "dbrx"),     # the same regex, merges kept
    ((f"split {_TEKKEN}", "bytes"), None, "tekken"),
    ((f"split {_GPT_4O}", "bytes"), None, "llama4"),
    (("split [\r\n]", "split \\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf…",
      "split \\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", "split \\s+$",
      f"split {_IDEOGRAPHS}", "digits", "bytes"), False, "deepseek-llm"),
    (("split [\r\n]", r"split \s?\p{L}+", r"split \s?\p{P}+", f"split {_IDEOGRAPHS}", "digits", "bytes"),
     False, "deepseek-coder"),
)


@dataclass
class Vocabulary:
    """What `tokenizer.*` keys say; lists are by token id."""
    model: str
    pre: str | None = None
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: dict[str, int] = field(default_factory=dict)       # by the names in SPECIAL
    add_bos: bool = False
    add_eos: bool = False
    add_sep: bool = False                                       # one more token between the parts of a pair
    add_space_prefix: bool | None = None
    one_space: bool | None = None                               # blanks are one space between words and none around them
    steps: list[str] | None = None                              # of a normalizer that is more than a map of characters, in order
    swallows: dict[str, list[int]] = field(default_factory=dict)        # tokens that take the blanks on their "lstrip" or "rstrip" side
    remove_punctuation: bool | None = None                      # of a text, before all else: SigLIP's
    charsmap: bytes = b""
    lowercase: bool | None = None                               # small letters before all else; of a WordPiece vocabulary, as the next
    strip_accents: bool | None = None
    longest_word: int | None = None                             # letters, beyond which it is unknown
    switches: dict[str, bool] = field(default_factory=dict)     # of its normalizer, that are off
    chat_template: str | list[dict[str, str]] | None = None

    @classmethod
    def none(cls) -> Vocabulary:
        """Return the vocabulary of a file that takes and gives token ids only."""
        return cls(model="none")

    def retype(self, types: Mapping[str, int]) -> None:
        """Set the types of tokens by their texts, of those that there are."""
        for i, text in enumerate(self.tokens):
            self.types[i] = types.get(text, self.types[i])

    def write(self, out: gguf.GGUFWriter, n_rows: int) -> None:
        """Write the keys; `n_rows` rows of the embedding are named, with "[PAD<id>]" where the tokenizer ends."""
        out.add_tokenizer_model(self.model)
        if self.model == "none":
            return
        n_pad = n_rows - len(self.tokens)
        if n_pad < 0:
            raise InvalidModelError(f"the tokenizer has {len(self.tokens)} tokens, the embedding {n_rows} rows")
        out.add_tokenizer_pre(self.pre)
        out.add_token_list(self.tokens + [f"[PAD{i}]" for i in range(len(self.tokens), n_rows)])
        out.add_token_types(self.types + [TokenType.UNUSED] * n_pad)
        if self.scores is not None:
            out.add_token_scores(self.scores + [ADDED_SCORE] * n_pad)
        if self.merges is not None:
            out.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(out, f"add_{name}_token_id")(token)
        out.add_add_bos_token(self.add_bos)
        out.add_add_eos_token(self.add_eos)
        if self.add_sep:
            out.add_add_sep_token(True)
        if self.add_space_prefix is not None:
            out.add_add_space_prefix(self.add_space_prefix)
        if self.one_space is not None:
            out.add_remove_extra_whitespaces(self.one_space)
        if self.steps:
            out.add_array("tokenizer.ggml.normalizer.steps", self.steps)
        for side, ids in self.swallows.items():
            out.add_array(f"tokenizer.ggml.{side}_tokens", ids)
        if self.longest_word is not None:
            out.add_uint32("tokenizer.ggml.max_input_chars_per_word", self.longest_word)
        for name, value in (("lowercase", self.lowercase), ("strip_accents", self.strip_accents), ("remove_punctuation", self.remove_punctuation),
                            *self.switches.items()):
            if value is not None:
                out.add_bool(f"tokenizer.ggml.normalizer.{name}", value)
        if self.charsmap:
            out.add_precompiled_charsmap(self.charsmap)
        if self.chat_template is not None:
            out.add_chat_template(self.chat_template)


    def write_below(self, out: gguf.GGUFWriter, prefix: str, n_rows: int) -> None:
        """Write the keys behind `prefix`: a file's second vocabulary."""
        own = gguf.GGUFWriter(os.devnull, "")
        self.write(own, n_rows)
        for key, value in own.kv_data[0].items():
            if key.startswith("tokenizer."):
                out.add_key_value(f"{prefix}.{key}", value.value, value.type, value.sub_type)


def read_vocabulary(folder: Path, config: dict[str, Any]) -> Vocabulary:
    """Read the tokenizer beside a checkpoint.

    Without any file of one it is `Vocabulary.none()`. Raises InvalidModelError where it is malformed or lacks its main
    file, UnsupportedModelError for a kind without a name.
    """
    if not any((folder / name).exists() for name in FILES):
        return Vocabulary.none()
    fast = _json(folder / "tokenizer.json")
    piece_file = next((file for name in PIECES if (file := folder / name).exists()), None)
    settings = _json(folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") == "SiglipTokenizer" and piece_file is not None:
        fast = {}                                               # which reads this file only
    if not fast and piece_file is None and (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        fast = _of_words(folder)
    if not fast and piece_file is None and (folder / FAIRSEQ).exists():
        fast = _of_fairseq(folder / FAIRSEQ, str(settings.get("tokenizer_class", "")), config, settings)
    model = fast.get("model", {})
    if fast and model.get("type") not in ("BPE", "Unigram", "WordPiece"):
        raise UnsupportedModelError(f"{folder / 'tokenizer.json'}: a {model.get('type')!r} tokenizer; BPE, Unigram and WordPiece are converted")
    if model.get("type") == "WordPiece" or not fast and (folder / "vocab.txt").exists():
        vocabulary = _word_piece(fast, settings, folder)
    elif model.get("type") == "Unigram":
        vocabulary = _unigram(fast, folder / "tokenizer.json")
    elif model.get("end_of_word_suffix"):
        vocabulary = _words(fast, folder / "tokenizer.json")
    elif fast and not model.get("byte_fallback"):
        vocabulary = _byte_level(fast, folder / "tokenizer.json")
    elif piece_file is not None:
        vocabulary = _sentencepiece(piece_file)
        _add_sentinels(vocabulary, settings)
    elif fast:
        vocabulary = _sentencepiece_from_merges(fast, folder / "tokenizer.json")
    else:
        raise InvalidModelError(f"{folder}: neither tokenizer.json nor {' nor '.join(PIECES)}; convert with --no-tokenizer")
    _add_tokens(vocabulary, _added_tokens(folder, fast, settings), folder)
    _mark_special(vocabulary, folder, settings, config)
    for side in ("lstrip", "rstrip"):
        if ids := [t["id"] for t in fast.get("added_tokens", []) if t.get(side)]:
            vocabulary.swallows[side] = ids
    vocabulary.add_bos, vocabulary.add_eos = _adds(vocabulary, fast, settings, folder)
    vocabulary.chat_template = _chat_template(folder, settings)
    _check(vocabulary, folder)
    return vocabulary


def _check(vocabulary: Vocabulary, folder: Path) -> None:
    """Raise InvalidModelError where a list holds what its GGUF key cannot."""
    templates = vocabulary.chat_template
    named = templates if isinstance(templates, list) else [{"template": templates or ""}]
    for what, kind, values in (("tokens", str, vocabulary.tokens), ("merges", str, vocabulary.merges or ()),
                               ("special tokens", int, vocabulary.special.values()),
                               ("chat templates", str, [t.get(key, "") if isinstance(t, dict) else t for t in named for key in ("name", "template")]),
                               ("chat templates", dict, named)):
        if wrong := [v for v in values if type(v) is not kind]:
            raise InvalidModelError(f"{folder}: {what} hold {wrong[0]!r:.100}, which is no {kind.__name__}")
    if any(not 0 <= i < len(vocabulary.tokens) for i in vocabulary.special.values()):
        raise InvalidModelError(f"{folder}: a special token is outside the vocabulary of {len(vocabulary.tokens)}")


def _json(file: Path) -> Any:
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise InvalidModelError(f"{file}: not JSON: {e}") from None


# --- byte-level BPE ---------------------------------------------------------------------------------------------------

def _byte_level(fast: dict[str, Any], file: Path) -> Vocabulary:
    normalizer = (fast.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):     # Qwen's NFC has no key: llama.cpp takes text as it comes
        raise UnsupportedModelError(f"{file}: byte-level BPE with normalizer '{normalizer}' has no name in GGUF")
    model = fast["model"]
    tokens = _by_id(model["vocab"], file)
    return Vocabulary("gpt2", pre_tokenizer_name(fast, file), tokens,
                      [TokenType.NORMAL if t is not None else TokenType.UNUSED for t in tokens],
                      merges=[m if isinstance(m, str) else " ".join(m) for m in model["merges"]])


def pre_tokenizer_name(fast: dict[str, Any], file: Path) -> str:
    """Return llama.cpp's name for a tokenizer.json's pre-tokenizer. Raises UnsupportedModelError with its steps."""
    steps = _steps(fast.get("pre_tokenizer"), file)
    ignore_merges = bool(fast["model"].get("ignore_merges"))
    for known, ignores, name in PRE_TOKENIZERS:
        if ignores in (None, ignore_merges) and len(known) == len(steps) and all(map(_same_step, known, steps)):
            return name
    raise UnsupportedModelError(f"{file}: no known pre-tokenizer has the steps {steps} with ignore_merges "
                                f"{ignore_merges}; known: {', '.join(name for _, _, name in PRE_TOKENIZERS)}")


def _same_step(known: str, step: str) -> bool:
    return step.startswith(known[:-1]) if known.endswith("…") else step == known


def _steps(pre: dict[str, Any] | None, file: Path) -> list[str]:
    """Write a pre-tokenizer as one string a step; options that change the cuts and have no name are refused."""
    match pre:
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return [step for part in parts for step in _steps(part, file)]
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return [f"split {regex}"]
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True}:
            return [f"split {regex}"]       # keeps what matches: the same cut where the regex matches everything
        case {"type": "Digits", "individual_digits": True}:
            return ["digits"]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return ["bytes+regex" if pre.get("use_regex", True) else "bytes"]
    raise UnsupportedModelError(f"{file}: pre-tokenizer {json.dumps(pre, ensure_ascii=False)} has no name in GGUF")


# --- SentencePiece BPE ------------------------------------------------------------------------------------------------

def _sentencepiece(file: Path) -> Vocabulary:
    """Read a SentencePiece model; its piece types have the numbers of GGUF's token types."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2 as pb
    except ImportError:
        raise UnsupportedModelError(f"{file}: reading it needs the package 'protobuf'") from None
    proto = pb.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as e:
        raise InvalidModelError(f"{file}: not a SentencePiece model: {e}") from None
    model_type, normalizer = proto.trainer_spec.model_type, proto.normalizer_spec
    if model_type not in (pb.TrainerSpec.BPE, pb.TrainerSpec.UNIGRAM):
        kind = pb.TrainerSpec.ModelType.Name(model_type)
        raise UnsupportedModelError(f"{file}: a {kind} SentencePiece model; BPE and UNIGRAM are converted")
    types = [int(p.type) for p in proto.pieces]
    made = Vocabulary("llama", "default",
                      [_plain(p.piece, t) for p, t in zip(proto.pieces, types)], types,
                      scores=[p.score for p in proto.pieces],
                      add_space_prefix=normalizer.add_dummy_prefix)
    if model_type == pb.TrainerSpec.UNIGRAM:
        made.model, made.charsmap = "t5", bytes(normalizer.precompiled_charsmap)
        made.one_space = normalizer.remove_extra_whitespaces
    return made


def _add_sentinels(vocabulary: Vocabulary, settings: dict[str, Any]) -> None:
    """Add the tokens that stand for gaps, the last one first, which T5's tokenizer has behind its model's pieces."""
    n = settings.get("extra_ids", 100) if str(settings.get("tokenizer_class")).startswith("T5Tokenizer") else 0
    for i in reversed(range(n)):
        vocabulary.tokens.append(f"<extra_id_{i}>")
        vocabulary.types.append(TokenType.CONTROL)
        vocabulary.scores.append(0.0)


def _sentencepiece_from_merges(fast: dict[str, Any], file: Path) -> Vocabulary:
    """Rebuild a SentencePiece BPE vocabulary from merges: the earlier a merge, the higher its token's score."""
    model = fast["model"]
    tokens = _by_id(model["vocab"], file)
    rank: dict[str, int] = {}
    for i, merge in enumerate(model["merges"]):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), i)
    types = [TokenType.UNUSED if t is None else TokenType.BYTE if BYTE.fullmatch(t) else
             TokenType.UNKNOWN if t == model.get("unk_token") else TokenType.NORMAL for t in tokens]
    small = any(step.get("type") == "Lowercase" for step in _flat(fast.get("normalizer"), "normalizers"))
    return Vocabulary("llama", "default", tokens, types,
                      scores=[-float(rank.get(t, len(rank))) for t in tokens],
                      add_space_prefix=_space_prefix(fast, file), lowercase=small or None)


def _unigram(fast: dict[str, Any], file: Path) -> Vocabulary:
    """Read the pieces and scores of a unigram, its map of characters, and what else is done to a text first."""
    model = fast["model"]
    tokens, scores = [str(piece) for piece, _ in model["vocab"]], [float(score) for _, score in model["vocab"]]
    unknown, bytes_too = model.get("unk_id"), bool(model.get("byte_fallback"))
    types = [TokenType.UNKNOWN if i == unknown else TokenType.BYTE if bytes_too and BYTE.fullmatch(t) else TokenType.NORMAL
             for i, t in enumerate(tokens)]
    made = Vocabulary("t5", "default", tokens, types, scores=scores, special={} if unknown is None else {"unk": unknown})
    before, left = [], []
    for step in _flat(fast.get("normalizer"), "normalizers"):
        if step.get("type") == "Precompiled":
            made.charsmap = base64.b64decode(step["precompiled_charsmap"] or "")
        named = _step(step)
        before += [named] if named else []
        left += [] if named else [step]
    cuts = _flat(fast.get("pre_tokenizer"), "pretokenizers")
    words = {"type": "WhitespaceSplit"} in cuts
    made.add_space_prefix = _space_prefix({**fast, "normalizer": {"normalizers": left},
                                           "pre_tokenizer": {"pretokenizers": [c for c in cuts if c != {"type": "WhitespaceSplit"}]}}, file)
    before += ["words"] if words else []
    made.steps = before if before not in ([], ["charsmap"]) else None
    made.one_space = words or None
    return made


def _step(step: dict[str, Any]) -> str:
    """Name a step of a unigram's normalizer; "" for one without a name here."""
    match step:
        case {"type": "Precompiled"}:
            return "charsmap"
        case {"type": "Replace", "pattern": {"String": "``" | "''" as old}, "content": '"'}:
            return f"replace {old} \""
        case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}:
            return "one_space"
        case {"type": "NFKD" | "StripAccents" | "Lowercase" as kind}:
            return {"NFKD": "nfkd", "StripAccents": "strip_accents", "Lowercase": "lowercase"}[kind]
    return ""


def _word_piece(fast: dict[str, Any], settings: dict[str, Any], folder: Path) -> Vocabulary:
    """Read the pieces of a WordPiece vocabulary: those that begin a word are written with a space before them, the others without "##".

    Raises: UnsupportedModelError for a normalizer without keys.
    """
    if fast:
        tokens = _by_id(fast["model"]["vocab"], folder / "tokenizer.json")
        prefix = fast["model"].get("continuing_subword_prefix", "##")
        normalizer = fast.get("normalizer") or {}
        if normalizer.get("type") not in (None, "BertNormalizer"):
            raise UnsupportedModelError(f"{folder / 'tokenizer.json'}: WordPiece with normalizer {normalizer.get('type')!r} has no name in GGUF")
        lowercase, accents = bool(normalizer.get("lowercase", True)), normalizer.get("strip_accents")
        longest, switches = fast["model"].get("max_input_chars_per_word", 100), {name: normalizer.get(name, True) for name in ("clean_text", "handle_chinese_chars")}
    else:
        usual = {name: f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}       # transformers' BertTokenizer
        for name, text in usual.items():
            settings.setdefault(f"{name}_token", text)
        tokens = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        prefix, lowercase, accents = "##", settings.get("do_lower_case", True), settings.get("strip_accents")
        longest, switches = 100, {"handle_chinese_chars": settings.get("tokenize_chinese_chars", True)}
    marked = [t if t is None or re.fullmatch(r"\[.*\]", t) else t.removeprefix(prefix) if t.startswith(prefix) else SPACE + t for t in tokens]
    special = set() if fast else {_text_of(settings.get(f"{name}_token")) for name in (*SPECIAL, "cls")}
    types = [TokenType.UNUSED if t is None else TokenType.CONTROL if t in special else TokenType.NORMAL for t in tokens]
    made = Vocabulary("bert", "default", [t if kind == TokenType.CONTROL else m for t, m, kind in zip(tokens, marked, types)], types)
    made.longest_word, made.switches = longest, {name: on for name, on in switches.items() if not on}
    made.lowercase, made.strip_accents = bool(lowercase), bool(lowercase if accents is None else accents)
    return made


def _words(fast: dict[str, Any], file: Path) -> Vocabulary:
    """Read a BPE whose words end in a mark, CLIP's: transformers' class makes the rest of its steps anew. Raises: UnsupportedModelError for others."""
    model, steps = fast["model"], [step.get("type") for step in _flat(fast.get("normalizer"), "normalizers")]
    if model["end_of_word_suffix"] != "</w>" or not set(steps) <= {"NFC", "Replace", "Lowercase"}:
        raise UnsupportedModelError(f"{file}: words that end in {model['end_of_word_suffix']!r}, behind the steps {steps}, have no name in GGUF")
    tokens = _by_id(model["vocab"], file)
    return Vocabulary("clip", "default", tokens, [TokenType.NORMAL if t is not None else TokenType.UNUSED for t in tokens],
                      merges=[m if isinstance(m, str) else " ".join(m) for m in model["merges"]])


def _of_words(folder: Path) -> dict[str, Any]:
    """Read vocab.json and merges.txt as a tokenizer.json: words end in a mark, or are bytes, which RoBERTa's class puts between two tokens."""
    vocab = _json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    made = {"model": {"type": "BPE", "vocab": vocab, "merges": [line for line in lines if line and not line.startswith("#version")]}}
    if any(token.endswith("</w>") for token in vocab):
        made["model"]["end_of_word_suffix"] = "</w>"
        return made
    made["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False}
    special = [(text, False) for text in ("<s>", "<pad>", "</s>", "<unk>")] + [("<mask>", True)]       # transformers' RobertaTokenizer
    if all(text in vocab for text, _ in special):
        made["added_tokens"] = [{"id": vocab[text], "content": text, "special": True, "lstrip": strips} for text, strips in special]
        made["post_processor"] = {"type": "RobertaProcessing", "cls": ["<s>", vocab["<s>"]], "sep": ["</s>", vocab["</s>"]]}
    return made


def _of_fairseq(file: Path, kind: str, config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Read XLM-R's SentencePiece model as a tokenizer.json: four tokens of fairseq's in the place of the file's first three, and the mask at the end.
    Settings get the names of these tokens where they say nothing.

    Raises: UnsupportedModelError for a model whose tokens are in another order.
    """
    if kind not in ("", "XLMRobertaTokenizer", "XLMRobertaTokenizerFast") or not str(config.get("model_type", "")).startswith("xlm-roberta"):
        raise UnsupportedModelError(f"{file}: the order of its tokens is known of XLM-R only, not of {kind or config.get('model_type')}; save tokenizer.json beside it")
    read = _sentencepiece(file)
    if read.model != "t5" or read.scores is None:
        raise UnsupportedModelError(f"{file}: a BPE SentencePiece model; XLM-R has UNIGRAM")
    first = ("<s>", "<pad>", "</s>", "<unk>")
    pieces = [*((text, 0.0) for text in first), *list(zip(read.tokens, read.scores))[3:], ("<mask>", 0.0)]
    for name, text in {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}.items():
        settings.setdefault(f"{name}_token", text)                   # transformers' XLMRobertaTokenizer
    added = [*enumerate(first), (len(pieces) - 1, "<mask>")]
    return {"model": {"type": "Unigram", "vocab": pieces, "unk_id": 3},
            "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(read.charsmap).decode()},
            "pre_tokenizer": {"pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": SPACE}]},
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {}}, {"SpecialToken": {"id": "</s>"}}]},
            "added_tokens": [{"id": i, "content": text, "special": True, "lstrip": text == "<mask>"} for i, text in added]}


def _flat(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """List the steps of a normalizer or pre-tokenizer."""
    return [] if step is None else [p for s in step[parts] for p in _flat(s, parts)] if parts in step else [step]


def _space_prefix(fast: dict[str, Any], file: Path) -> bool:
    """Find out whether text gets a leading space. Raises UnsupportedModelError for steps that SentencePiece has not."""
    prefix = escaped = False
    for step in _flat(fast.get("normalizer"), "normalizers") + _flat(fast.get("pre_tokenizer"), "pretokenizers"):
        match step:
            case {"type": "Lowercase"} if fast["model"].get("type") == "BPE":
                pass                # has a key
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                escaped = True
            case {"type": "Metaspace", "replacement": "\u2581"}:
                escaped = True
                prefix = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
            case {"type": "Split", "pattern": {"String": " "}}:
                pass                # Gemma: no space is left to split at after the replacement
            case _:
                raise UnsupportedModelError(f"{file}: step {json.dumps(step, ensure_ascii=False)} of a tokenizer with "
                                            "byte fallback has no key in GGUF")
    if not escaped:
        raise UnsupportedModelError(f"{file}: a tokenizer with byte fallback that does not turn spaces into '{SPACE}'")
    return prefix


# --- what both kinds share --------------------------------------------------------------------------------------------

def _text_of(token: Any) -> Any:
    """Return a token's text, which settings give as such or among what is done with it."""
    return token.get("content") if isinstance(token, dict) else token


def _plain(text: str, kind: int) -> str:
    """Return a token's text in the file: user-defined tokens are matched against text with ordinary spaces."""
    return text.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else text


def _by_id(ids: dict[str, int], file: Path) -> list[Any]:
    """Return tokens by id, None where added tokens leave a hole."""
    n = max(ids.values(), default=-1) + 1
    # every id is a row of the embedding: a number far beyond the count of tokens is a broken file, not a hole
    if n > 2 * len(ids) + 65536 or min(ids.values(), default=0) < 0:
        raise InvalidModelError(f"{file}: token ids reach {n - 1} with {len(ids)} tokens")
    tokens: list[Any] = [None] * n
    for token, i in ids.items():
        tokens[i] = token
    return tokens


def _added_tokens(folder: Path, fast: dict[str, Any], settings: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Return id -> (text, is special) of the tokens that are matched before BPE; tokenizer.json counts most."""
    added = {i: (text, False) for text, i in _json(folder / "added_tokens.json").items()}
    added |= {int(i): (t["content"], bool(t.get("special"))) for i, t in
              settings.get("added_tokens_decoder", {}).items()}
    added |= {t["id"]: (t["content"], bool(t.get("special"))) for t in fast.get("added_tokens", [])}
    return added


def special_ids(folder: Path, texts: Sequence[str]) -> list[int]:
    """Return the ids of added tokens by their texts. Raises InvalidModelError for one that the tokenizer's files do not have."""
    added = _added_tokens(folder, _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json"))
    ids = {text: i for i, (text, _) in added.items()}
    for text in texts:
        if text not in ids:
            raise InvalidModelError(f"{folder}: no token {text!r} in tokenizer.json or tokenizer_config.json")
    return [ids[text] for text in texts]


def _add_tokens(vocabulary: Vocabulary, added: dict[int, tuple[str, bool]], folder: Path) -> None:
    tokens, types, scores = vocabulary.tokens, vocabulary.types, vocabulary.scores
    n = max(added, default=-1) + 1
    if n > len(tokens) + 65536 or min(added, default=0) < 0:
        raise InvalidModelError(f"{folder}: added token ids reach {n - 1} with {len(tokens)} tokens before them")
    while len(tokens) < n:
        tokens.append(None)
        types.append(TokenType.UNUSED)
        if scores is not None:
            scores.append(ADDED_SCORE)
    for i, (text, special) in added.items():
        if types[i] != TokenType.UNKNOWN:
            types[i] = TokenType.CONTROL if special else TokenType.USER_DEFINED
        tokens[i] = _plain(text, types[i])
        if scores is not None:
            scores[i] = ADDED_SCORE
    vocabulary.tokens = [f"[PAD{i}]" if t is None else t for i, t in enumerate(tokens)]


def _mark_special(vocabulary: Vocabulary, folder: Path, settings: dict[str, Any], config: dict[str, Any]) -> None:
    """Find the ids of bos, eos and so on: by text where the tokenizer names a token, else from config.json.

    Further end tokens of generation_config.json (or config.json) become eot and eom, in their order.
    """
    ids = {t: i for i, t in enumerate(vocabulary.tokens)}
    texts = {**_json(folder / "special_tokens_map.json"), **settings}
    for name in SPECIAL:
        text = _text_of(texts.get(f"{name}_token"))
        if text is not None:
            if text not in ids:
                raise InvalidModelError(f"{folder}: {name}_token {text!r} is not in the vocabulary")
            vocabulary.special[name] = ids[text]
            continue
        number = config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < len(vocabulary.tokens):
            vocabulary.special[name] = number
    if vocabulary.model == "bert":                              # whose [CLS] files keep as the token that begins a text
        cls = _text_of(texts.get("cls_token", "[CLS]"))
        if cls not in ids or "sep" not in vocabulary.special:
            raise InvalidModelError(f"{folder}: the vocabulary has no {cls!r}, or no token that separates texts")
        vocabulary.special["bos"] = ids[cls]
    ends = _json(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    known = vocabulary.special
    more = [i for i in ends if i not in known.values()] if isinstance(ends, list) else []
    free = [name for name in ("eot", "eom") if name not in known]
    if len(more) > len(free):
        raise UnsupportedModelError(f"{folder}: {len(more)} end tokens beside eos; GGUF has keys for {len(free)}")
    known.update(zip(free, more))


def _adds(vocabulary: Vocabulary, fast: dict[str, Any], settings: dict[str, Any], folder: Path) -> tuple[bool, bool]:
    """Return whether encoding adds bos and eos: the settings' word, else the post-processor's template.

    Where neither says anything (a SentencePiece model alone) BPE models of these families add bos only, unigrams eos only.
    Raises UnsupportedModelError for a template that adds anything else.
    """
    if vocabulary.model == "clip":
        return True, True                                       # RobertaProcessing, whatever the settings say
    found = {"bos": vocabulary.model == "bert" or not fast and vocabulary.model == "llama", "eos": not fast and vocabulary.model == "t5"}
    post = fast.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") in ("TemplateProcessing", "RobertaProcessing", "BertProcessing"):
            if step["type"] == "TemplateProcessing":
                parts = [part.get("SpecialToken", {}).get("id") for part in step["single"]]     # None is the text itself
            else:
                parts = [step["cls"][0], None, step["sep"][0]]
            text_of = {name: vocabulary.tokens[i] for name, i in vocabulary.special.items()}
            if parts[-1] not in (None, text_of.get("eos"), text_of.get("sep")):             # another than what ends a turn (Qwen3-Embedding's)
                _end_with(vocabulary, parts[-1])
                text_of["eos"] = parts[-1]
            if vocabulary.model == "bert" and parts == [text_of["bos"], None, text_of["sep"]]:
                return True, False                              # both, always
            found = {"bos": parts[0] is not None, "eos": parts[-1] is not None}
            if parts != [text_of.get("bos")] * found["bos"] + [None] + [text_of.get("eos")] * found["eos"]:
                raise UnsupportedModelError(f"{folder}: the tokenizer's template adds {parts} (None: the text); "
                                            "GGUF has flags for bos before and eos after")
    for name in found:
        if settings.get(f"add_{name}_token") is not None:
            found[name] = bool(settings[f"add_{name}_token"])
    return found["bos"], found["eos"]


def _end_with(vocabulary: Vocabulary, text: str) -> None:
    """Make a token the one that ends a text; what was it before ends a turn."""
    if text in vocabulary.tokens and "eos" in vocabulary.special:
        vocabulary.special.setdefault("eot", vocabulary.special["eos"])
        vocabulary.special["eos"] = vocabulary.tokens.index(text)


def token_numbers(folder: Path, texts: Sequence[str]) -> list[int]:
    """Return the ids of tokens of a tokenizer.json's vocabulary. Raises: InvalidModelError for one that it has not."""
    vocab = _json(folder / "tokenizer.json").get("model", {}).get("vocab", {})
    if missing := [text for text in texts if not isinstance(vocab, dict) or text not in vocab]:
        raise InvalidModelError(f"{folder}: no token {missing[0]!r} in tokenizer.json")
    return [vocab[text] for text in texts]


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """Return the chat template, or a list of named ones: the newer file first, then tokenizer_config.json."""
    file, more = folder / "chat_template.jinja", folder / "additional_chat_templates"
    if file.exists():
        named = [{"name": p.stem, "template": p.read_text(encoding="utf-8")} for p in sorted(more.glob("*.jinja"))]
        text = file.read_text(encoding="utf-8")
        return [{"name": "default", "template": text}, *named] if named else text
    return settings.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
