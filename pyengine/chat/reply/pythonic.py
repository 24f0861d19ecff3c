"""Calls as Python writes them: `[f(a=1), g(b="x")]`, as Llama 3.2's and 4's templates and LFM2's ask for.

The form: https://www.llama.com/docs/model-cards-and-prompt-formats/llama4/ ("Zero shot function calling"), and the template of
LiquidAI/LFM2-1.2B for its marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.chat.reply.calls import alternatives, Calls, Literal, one_at_a_time, quoted, Spell, Unit
from pyengine.chat.reply.json_text import escaped, Out, read_nested, read_number
from pyengine.chat.reply.schema import arguments_of, json_value, ordered
from pyengine.chat.reply.tape import Malformed, Reading, Tape
from pyengine.chat.reply.tools import Tool
from pyengine.text.marks import MARK

_PLAIN = {quote: re.compile(rf"[^{quote}\\\n{MARK}]*") for quote in "\"'"}
_WORD = re.compile(r"[A-Za-z0-9_.-]*")
WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\\": "\\", "'": "'", '"': '"', "/": "/", "\n": ""}
_CODES = {"x": 2, "u": 4, "U": 8}


class Pythonic(Calls):
    """A list of calls, at a reply's beginning."""

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        self.leading = ("[",)

    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a unit behind its opening mark. Raises Malformed where it is none."""
        tape = unit.tape
        if opening != "[":
            yield from tape.skip_blanks()
            yield from tape.expect("[")
        letter = ","
        while letter == ",":
            yield from tape.skip_blanks()
            name = yield from read_word(tape)
            yield from tape.expect("(")
            unit.call(name)
            yield from read_arguments(unit)
            letter = yield from tape.skip_blanks()
            if letter not in ("]", ","):
                raise Malformed
            tape.take(tape.at + 1)

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls: the list is both."""
        return f'start: {self._list(several)}\n{self._rules(tools)}'

    def _list(self, several: bool) -> str:
        return '"[" call (", " call)* "]"' if several else '"[" call "]"'

    def _rules(self, tools: Sequence[Tool]) -> str:
        lines = [alternatives("call", len(tools))]
        for i, tool in enumerate(tools):
            properties = arguments_of(tool)
            items = [(f"{quoted(name + '=')} call_{i}_{n}", needed) for n, (name, _, needed) in enumerate(properties)]
            lines += [f'call_{i}: {quoted(tool.name + "(")} call_{i}_o0 ")"', *ordered(f"call_{i}_o", items, ", ")]
            lines += [f"call_{i}_{n}: {_value(schema, tool)}" for n, (_, schema, _) in enumerate(properties)]
        return "\n".join(lines) + "\n"

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Write calls as the model does."""
        return f"[{', '.join(_written(name, arguments) for name, arguments in calls)}]"

    def adapt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give a turn of several calls as turns of one, where the template takes no more."""
        return one_at_a_time(messages) if "single tool-calls" in self.source else messages


class Liquid(Pythonic):
    """The list between `<|tool_call_start|>` and `<|tool_call_end|>`: LFM2."""

    marks = ("<|tool_call_start|>", "<|tool_call_end|>")
    shows_results = True

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        self.opening, self.leading, self.inner = (spell("<|tool_call_start|>"),), (), (spell("<|tool_call_end|>"),)

    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a unit behind its opening mark. Raises Malformed where it is none."""
        yield from super().read(unit, opening)
        yield from unit.tape.skip_blanks()
        yield from unit.tape.word(*self.inner)

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls."""
        begin, end = map(literal, self.marks)
        return f'start: {begin} {self._list(several)} {end}\n{self._rules(tools)}'

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Write calls as the model does."""
        return f"{self.marks[0]}{super().write(calls)}{self.marks[1]}"


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and values


def read_arguments(unit: Unit) -> Reading[None]:
    """Read `a=1, b="x")` behind the bracket of a call that was told, as an object."""
    tape, before = unit.tape, "{"
    while (letter := (yield from tape.skip_blanks())) != ")":
        name = yield from read_word(tape)
        if not name:
            raise Malformed
        yield from tape.skip_blanks()
        yield from tape.expect("=")
        unit.argue(f"{before}{json.dumps(name)}: ")
        yield from read_nested(tape, unit.argue, _read_scalar, _read_key, None)
        before = ", "
        letter = yield from tape.skip_blanks()
        if letter not in (",", ")"):
            raise Malformed
        if letter == ",":
            tape.take(tape.at + 1)
    tape.take(tape.at + 1)
    unit.argue("{}" if before == "{" else "}")
    unit.end()


def read_word(tape: Tape) -> Reading[str]:
    """Read a name, or nothing where none is there."""
    return (yield from tape.span(_WORD))


def _read_scalar(tape: Tape, letter: str, out: Out) -> Reading[None]:
    if letter in _PLAIN:
        yield from _read_string(tape, letter, out)
    elif letter.isalpha():
        word = yield from read_word(tape)
        if word not in WORDS:
            raise Malformed
        out(WORDS[word])
    else:
        yield from read_number(tape, out)


def _read_key(tape: Tape, out: Out) -> Reading[None]:
    letter = yield from tape.peek()
    if letter not in _PLAIN:
        raise Malformed
    yield from _read_string(tape, letter, out)
    yield from tape.skip_blanks()
    yield from tape.expect(":")
    out(": ")


def _read_string(tape: Tape, quote: str, out: Out) -> Reading[None]:
    """Read a string of Python, as JSON."""
    tape.take(tape.at + 1)
    out('"')
    while True:
        end = _PLAIN[quote].match(tape.text, tape.at).end()              # type: ignore[union-attr]
        if end > tape.at:
            out(escaped(tape.take(end)))
        letter = yield from tape.peek()
        if not letter:
            raise Malformed
        tape.take(tape.at + 1)
        if letter == quote:
            out('"')
            return
        if letter == "\\":
            out((yield from _read_escape(tape)))
        elif letter != MARK:                                             # a line's end, which Python would not take
            out(escaped(letter))


def _read_escape(tape: Tape) -> Reading[str]:
    """Read what follows a backslash; what is no escape keeps it, as in Python."""
    while (letter := (yield from tape.peek())) == MARK:
        tape.take(tape.at + 1)
    if letter not in _CODES:
        if letter:
            tape.take(tape.at + 1)
        return escaped(_ESCAPES.get(letter, "\\" + letter))
    tape.take(tape.at + 1)
    digits = ""
    for _ in range(_CODES[letter]):
        digit = yield from tape.peek()
        if not digit or digit not in "0123456789abcdefABCDEF":
            raise Malformed
        digits += tape.take(tape.at + 1)
    code = int(digits, 16)
    if code > 0x10FFFF:
        raise Malformed
    return f"\\u{code:04x}" if code < 0x10000 else escaped(chr(code))    # halves of a pair stay such, and JSON joins them


def _written(name: str, arguments: Mapping[str, Any]) -> str:
    words = {True: "True", False: "False", None: "None"}
    values = {key: words[value] if value is None or isinstance(value, bool) else json.dumps(value, ensure_ascii=False) for key, value in arguments.items()}
    return f"{name}({', '.join(f'{key}={text}' for key, text in values.items())})"


def _value(schema: Any, tool: Tool) -> str:
    """Return a grammar's fragment for a value: as JSON, but for True, False and None."""
    if not isinstance(schema, Mapping) or {"enum", "const", "$ref", "allOf", "oneOf"} & schema.keys():
        return json_value(schema, tool)
    branches = [schema, *(part for part in schema.get("anyOf", ()) if isinstance(part, Mapping) and not {"enum", "const"} & part.keys())]
    kinds = {kind for part in branches for kind in (part.get("type") if isinstance(part.get("type"), list) else [part.get("type")])}
    words = [*(['"True"', '"False"'] if "boolean" in kinds else []), *(['"None"'] if "null" in kinds else [])]
    return " | ".join([*([json_value(schema, tool)] if kinds - {"boolean", "null"} else []), *words])
