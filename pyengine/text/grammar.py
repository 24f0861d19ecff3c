"""What a text may look like: JSON schemas, regular expressions and grammars, compiled to masks over a vocabulary by llguidance.

`shape` turns what a user asks for into one text in llguidance's dialect of Lark (the page "syntax" of its documentation); `Grammars` compiles such texts
for one tokenizer; a `Matcher` follows one answer: which tokens may come next, and whether it may end.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, TYPE_CHECKING

import numpy as np

from pyengine.errors import place_of, PyEngineError, RequestError, shown

if TYPE_CHECKING:
    from pyengine.text.tokenizer import Tokenizer

# Blanks within JSON: one, or a line break with its indentation. Without a bound small models fill their answer with blanks.
_BLANKS = r"( |\n {0,40})"
MOST_SCHEMA, MOST_GRAMMAR, MOST_GBNF, MOST_IN_ALL = 128 << 10, 64 << 10, 16 << 10, 1 << 20      # characters
_STACK = 256 << 20                                   # bytes: the compiler recurses for rules and references that follow each other
_FORMATS = frozenset("date date-time time duration uuid email uri ipv4 ipv6 hostname unknown".split())       # that are enforced
_KEPT = 64                                           # compiled grammars, for the next requests with the same
_OF_ONE = ("format", "regex", "grammar")             # of these a request has one at most


def shape(format: Any = None, regex: Any = None, grammar: Any = None) -> str | None:
    """Return the grammar that a request asks for, in Lark; None if it asks for none.

    format   "json" (any JSON object), or a JSON schema (Draft 2020-12), as a mapping; a class of pydantic's is its schema
    regex    a regular expression of the whole text (Rust's syntax, without look-around)
    grammar  a grammar in Lark (llguidance's dialect) or in llama.cpp's GBNF, which has "::="
    Raises: RequestError, for a schema with the path of its fault.
    """
    given = [name for name, value in zip(_OF_ONE, (format, regex, grammar)) if value is not None]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)}: give one of them")
    if format is not None:
        return f"start: {json_rule(_schema(format), 'format')}\n"
    if regex is not None:
        if not _text("regex", regex) or len(regex) > MOST_GRAMMAR:
            _wrong("regex", f"has {len(regex)} characters, and {MOST_GRAMMAR} are taken at most" if regex else "is empty")
        return f"start: /{_slashed(regex)}/\n"
    return None if grammar is None else _lark(_text("grammar", grammar))


def nested(grammar: str) -> str:
    """Return a grammar as a part of a rule of another one: its rules' names are its own."""
    return f"%lark {{\n{grammar}\n}}"


def json_rule(schema: Mapping[str, Any] | bool, name: str) -> str:
    """Return a JSON schema as a part of a Lark rule. Raises: RequestError with the path of a fault, which begins with `name`."""
    check_schema(schema, name)
    return json_fragment({} if schema is True else schema if isinstance(schema, Mapping) else _wrong(name, "allows nothing"),
                         {"whitespace_pattern": _BLANKS})


def json_fragment(schema: Mapping[str, Any], style: Mapping[str, Any]) -> str:
    """Return a schema that was checked as a part of a Lark rule; style: llguidance's options for blanks."""
    return "%json " + json.dumps({**_meant(schema), "x-guidance": style}, ensure_ascii=False)


def check_schema(schema: Any, name: str) -> None:
    """Check that something is a JSON schema (Draft 2020-12), of a size that is taken. Raises: RequestError with the path of the fault."""
    if not isinstance(schema, (Mapping, bool)):
        _wrong(name, f"must be a JSON schema, an object, got {shown(schema)}")
    try:
        text = json.dumps(schema, allow_nan=False)
    except RecursionError:
        _wrong(name, "the schema is nested too deeply")
    except (TypeError, ValueError) as error:
        _wrong(name, f"is no JSON: {str(error)[:200]}")
    if len(text) > MOST_SCHEMA:
        _wrong(name, f"the schema has {len(text)} characters, and {MOST_SCHEMA} are taken at most")
    at, fault = _fault(text)
    if fault:
        _wrong(name + at, fault)


@lru_cache(_KEPT)
def _fault(text: str) -> tuple[str, str]:
    """Return where a schema is none, and why; two empty texts for one that is. The same ones come with request after request."""
    from jsonschema import Draft202012Validator, exceptions

    try:
        Draft202012Validator.check_schema(json.loads(text))
    except exceptions.SchemaError as fault:
        return place_of(fault), fault.message[:300]
    except RecursionError:
        return "", "the schema is nested too deeply"
    return "", ""


_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")      # keys with schemas by name below them
_VALUES = ("enum", "const", "default", "examples", "example")                                      # and with values, which are no schemas


def _meant(schema: Any, named: bool = False) -> Any:
    """Return a schema without formats that are not enforced, which say something to people only (Draft 2020-12, validation, 7.2)."""
    if isinstance(schema, Mapping):
        if named:
            return {key: _meant(value) for key, value in schema.items()}
        return {key: value if key in _VALUES else _meant(value, key in _OF_SCHEMAS) for key, value in schema.items()
                if key != "format" or not isinstance(value, str) or value in _FORMATS}
    return [_meant(value) for value in schema] if isinstance(schema, (list, tuple)) else schema


def _schema(format: Any) -> Any:
    if isinstance(format, str):
        return {"type": "object"} if format == "json" else _wrong("format", f'must be "json" or a JSON schema, got {shown(format)}')
    of_class = getattr(format, "model_json_schema", None)
    return of_class() if isinstance(format, type) and callable(of_class) else format


def _slashed(regex: str) -> str:
    """Return a regular expression as it stands between slashes."""
    return re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", regex, flags=re.S)


def _lark(text: str) -> str:
    if len(text) > MOST_GRAMMAR:
        _wrong("grammar", f"has {len(text)} characters, and {MOST_GRAMMAR} are taken at most")
    if "::=" not in text:
        return text
    if len(text) > MOST_GBNF:
        _wrong("grammar", f"has {len(text)} characters, and {MOST_GBNF} of GBNF are taken at most; write it in Lark")
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:                               # of the converter, whatever it meets
        return _wrong("grammar", f"is no GBNF: {str(error)[:300]}")


def _text(name: str, value: Any) -> str:
    return value if isinstance(value, str) else _wrong(name, f"must be a text, got {shown(value)}")


def _wrong(name: str, what: str) -> Any:
    raise RequestError(f"{name}: {what}")


class Grammars:
    """A compiler of grammars for one tokenizer; its tree of tokens is built when the first one comes (a second for 262,144 tokens).

    marks: tokens that stand for themselves, beside control tokens: the same letters in a grammar's texts do not mean them.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self._apart = tokenizer.special_ids | tokenizer.eog_ids | frozenset(marks)
        self._lock = threading.Lock()
        self._tree: Any = None
        self._made: OrderedDict[str, Any] = OrderedDict()    # by their texts, the newest last

    @property
    def tree(self) -> Any:
        """llguidance's form of the vocabulary: control tokens apart, and all that end an answer."""
        with self._lock:
            if self._tree is None:
                from llguidance import LLTokenizer, TokenizerWrapper

                words = TokenizerWrapper(_Vocabulary(self.tokenizer, self._apart))
                bare = LLTokenizer(words, eos_token=sorted(self.tokenizer.eog_ids) or None, slices=[])
                self._tree = bare.with_slices(LLTokenizer.general_slices())    # apart from it: both hold the interpreter, from other threads too
            return self._tree

    def literal(self, text: str) -> str:
        """Return a text as a part of a Lark rule: a control token or mark by its id, anything else letter by letter."""
        token = self.tokenizer.id_of(text)
        return f"<[{token}]>" if token in self._apart else json.dumps(text, ensure_ascii=False)

    def matcher(self, grammar: str) -> Matcher:
        """Compile a grammar for one answer. Raises: RequestError saying what is wrong with it, and where."""
        with self._lock:
            made = self._made.pop(grammar, None)
        if made is None:
            made = self._compiled(grammar)
        with self._lock:
            self._made[grammar] = made
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
            return Matcher(made.deep_copy(), self.tokenizer.vocab_size)

    def _compiled(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        if len(grammar) > MOST_IN_ALL:
            raise RequestError(f"the grammar of the answer has {len(grammar)} characters with those of all tools, and {MOST_IN_ALL} are taken at most")
        tree = self.tree
        made = _deep(lambda: LLMatcher(tree, LLMatcher.grammar_from_lark(grammar), log_level=0))
        if made.is_error():
            raise RequestError(_explained(made.get_error(), grammar))
        first = made.deep_copy()
        first.compute_bitmask()
        if first.is_error():
            raise RequestError("the grammar is refused: nothing can be written that follows it")
        return made

    @cached_property
    def going_on(self) -> np.ndarray:
        """The mask of all tokens but those that end an answer."""
        mask = np.full((self.tokenizer.vocab_size + 31) // 32, 0xFFFFFFFF, np.uint32)
        for token in self.tokenizer.eog_ids:
            mask[token // 32] &= ~np.uint32(1 << token % 32)
        return mask


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer, apart: Collection[int]):
        self.tokens = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(apart)
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, next(iter(sorted(tokenizer.eog_ids)), 0)
        self._tokenizer, self._apart = tokenizer, frozenset(apart)

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of a text within an answer: without the blank that some tokenizers put before every text, and of nothing else."""
        for before in (b"", b"\n"):                          # behind a line's end there is a blank too, but apart from the text
            ids = self._tokenizer.tokenize(before + text, add_special=False, parse_special=False)
            for n in range(min(3, len(ids))):
                if not self._spelled(ids[:n]).strip() and self._spelled(ids[n:]) == text and self._apart.isdisjoint(ids[n:]):
                    return ids[n:]
        return self._longest(text)

    def _spelled(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[i] for i in ids)

    def _longest(self, text: bytes) -> list[int]:
        """Return tokens of a text, the longest that there is each time, as far as there is one."""
        ids, at = [], 0
        while at < len(text):
            piece = next((text[at : at + n] for n in range(self._most, 0, -1) if text[at : at + n] in self._ids), b"")
            if not piece:
                break
            ids.append(self._ids[piece])
            at += len(piece)
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """The first token of each piece that is a text."""
        return {piece: i for i, piece in reversed(list(enumerate(self.tokens))) if piece and i not in self._apart}

    @cached_property
    def _most(self) -> int:
        return max(map(len, self._ids), default=0)


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, made: Any, n_vocab: int):
        self._made = made
        self._mask = np.empty((n_vocab + 31) // 32, np.uint32)

    def mask(self) -> np.ndarray:
        """Return the tokens that may come next, uint32 [ceil(n_vocab / 32)], as `Sampler.sample` takes it; valid until the next call."""
        self._made.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._made.is_error():
            raise RequestError(f"the grammar cannot be followed any further: {_first_line(self._made.get_error())}")
        return self._mask

    def accept(self, token: int) -> bool:
        """Go on with a token; False if the grammar does not have it there, and nothing has changed."""
        return bool(self._made.try_consume_tokens([token]) == 1)

    def allows(self, token: int) -> bool:
        """Say whether a token may come next."""
        return bool(self._made.validate_tokens([token]) == 1)

    def n_allowed(self, tokens: Sequence[int]) -> int:
        """Return how many of these tokens may come next, one after the other."""
        return max(0, int(self._made.validate_tokens(list(tokens))))

    def forced(self) -> list[int]:
        """Return the tokens of the text that must come next, as the tokenizer would cut it."""
        return list(self._made.compute_ff_tokens())

    @property
    def ended(self) -> bool:
        """Whether the text is whole, and nothing can follow."""
        return bool(self._made.is_stopped())


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")[:300]


_deep_lock = threading.Lock()


def _deep(call: Callable[[], Any]) -> Any:
    """Call a function where its recursion has room: with the usual stack, a chain of some thousand references would end the process."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((call(), None))
        except BaseException as error:
            found.append((None, error))

    with _deep_lock:
        usual = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=run, name="pyengine grammar", daemon=True)
            thread.start()
        except RuntimeError as error:
            raise PyEngineError(f"there is no memory for compiling a grammar: {error}") from error
        finally:
            threading.stack_size(usual)
    thread.join()
    value, error = found[0]
    if error is not None:
        raise error
    return value


_KEYS = re.compile(r'Unimplemented keys: \["([^"]+)"')
_PLACE = re.compile(r"^(at )?\d+\(\d+\): ")
_IN_WORDS = {"coerce_one_of": "alternatives of oneOf that are not told apart by a type or a constant; write anyOf",
             "recursion limit exceeded": "schemas in schemas, more deeply than is taken", "panic": "it has too many rules"}


def _explained(error: str, grammar: str) -> str:
    """Say what llguidance refuses, for a key of a schema with its path."""
    first = _first_line(error)
    found = _KEYS.search(error)
    if found is not None:
        paths = [path for part in grammar.split("%json ")[1:] for path in _paths(json.JSONDecoder().raw_decode(part)[0], found[1], "")]
        return f"the schema asks for what cannot be enforced: {found[1]!r} at {paths[0]}" if paths else first
    said = next((text for part, text in _IN_WORDS.items() if part in error), "")
    if "%json" in grammar and (said or "JSON schema: " in first):
        return f"the schema asks for what cannot be enforced: {said or first.partition('JSON schema: ')[2]}"
    detail = next((line.partition("error: ")[2] for line in error.splitlines() if line.strip().startswith("error: ")), "")
    place = "" if grammar.startswith("start: /") else (_PLACE.match(first) or [""])[0]
    return f"the grammar is refused: {place}{detail or said or _PLACE.sub('', first)}"


def _paths(value: Any, key: str, at: str) -> list[str]:
    """Return where a key stands in a schema."""
    if isinstance(value, dict):
        here = [at + "." + key if at else key] if key in value else []
        return here + [p for k, v in value.items() for p in _paths(v, key, f"{at}.{k}" if at else k)]
    return [p for i, v in enumerate(value) for p in _paths(v, key, f"{at}[{i}]")] if isinstance(value, list) else []
