"""Gemma 4's calls: `<|tool_call>call:name{key:<|"|>text<|"|>,n:1}<tool_call|>`.

The form is that of the template of google/gemma-4-31B-it: texts between marks, keys bare, the rest as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.chat.reply.calls import alternatives, Calls, Literal, quoted, Spell, Unit
from pyengine.chat.reply.deltas import MARKED
from pyengine.chat.reply.json_text import escaped, Out, read_nested, read_number
from pyengine.chat.reply.schema import Notation
from pyengine.chat.reply.tape import Malformed, Reading, stops, Tape
from pyengine.chat.reply.tools import Tool

QUOTE = '<|"|>'
_COLON = stops(":")
_LETTERS = re.compile(r"[a-z]*")


class Gemma4(Calls):
    """A name and arguments between `<|tool_call>` and `<tool_call|>`."""

    marks = ("<|tool_call>", "<tool_call|>", QUOTE)

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        opening, closing, self._quote = map(spell, self.marks)
        self.opening, self.inner = (opening,), (closing, self._quote)
        self._stops = stops(self._quote)
        self._answers = "OpenAI Chat Completions" not in source              # results stand in the turn of their calls

    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a unit behind its opening mark. Raises Malformed where it is none."""
        tape = unit.tape
        yield from tape.skip_blanks()
        yield from tape.expect("call:")
        name: list[str] = []
        if not (yield from tape.until(stops("{"), lambda text: _keep(name, text))):
            raise Malformed
        unit.call("".join(name).strip())
        # The bracket is read already: the nested reader gets it back.
        tape.at -= 1
        yield from read_nested(tape, unit.argue, self._scalar, self._key, None)
        unit.end()
        yield from tape.skip_blanks()
        yield from tape.word(self.inner[0])

    def _scalar(self, tape: Tape, letter: str, out: Out) -> Reading[None]:
        if (yield from tape.word(self._quote)):
            yield from self._text(tape, out)
        elif letter in ("t", "f", "n"):
            word = yield from _letters(tape)
            if word not in ("true", "false", "null"):
                raise Malformed
            out(word)
        else:
            yield from read_number(tape, out)

    def _text(self, tape: Tape, out: Out) -> Reading[None]:
        out('"')
        if not (yield from tape.until(self._stops, lambda text: out(escaped(text.replace(MARKED, ""))))):
            raise Malformed
        out('"')

    def _key(self, tape: Tape, out: Out) -> Reading[None]:
        if (yield from tape.word(self._quote)):
            yield from self._text(tape, out)
            yield from tape.skip_blanks()
            yield from tape.expect(":")
            out(": ")
            return
        key: list[str] = []
        if not (yield from tape.until(_COLON, lambda text: _keep(key, text))):
            raise Malformed
        out(f"{json.dumps(''.join(key).strip(), ensure_ascii=False)}: ")

    def grammar(self, tools: Sequence[Tool], many: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls."""
        begin, end, quote = map(literal, self.marks)
        lines = [f"start: unit{'+' if many else ''}", f"unit: {begin} call {end}", alternatives("call", len(tools))]
        for i, tool in enumerate(tools):
            notation = Notation(tool, f"call_{i}_", quote, QUOTE)
            lines += [f"call_{i}: {quoted(f'call:{tool.name}')} {notation.rule(tool.parameters, f'tools: {tool.name}.parameters')}", *notation.lines]
        return "\n".join(lines) + "\n"

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Write calls as the model does."""
        return "".join(f"<|tool_call>call:{name}{_written(arguments)}<tool_call|>" for name, arguments in calls)

    def adapt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give results as part of the turn that called, where the template wants them there."""
        if not self._answers:
            return messages
        given: list[dict[str, Any]] = []
        for message in messages:
            caller = given[-1] if given else {}
            if message.get("role") != "tool" or not caller.get("tool_calls"):
                given.append(message)
                continue
            answers = caller.get("tool_responses", [])
            calls = [call for call in caller["tool_calls"] if isinstance(call, Mapping)]
            mine = next((call for call in calls if call.get("id") is not None and call.get("id") == message.get("tool_call_id")), None)
            mine = mine or (calls[len(answers)] if len(answers) < len(calls) else {})
            name = message.get("name") or mine.get("function", {}).get("name", "unknown")
            given[-1] = {**caller, "tool_responses": [*answers, {"name": name, "response": message.get("content")}]}
        return given


def _keep(pieces: list[str], text: str) -> None:
    """Keep a name's text. Raises Malformed where it is no name's any more."""
    pieces.append(text)
    if MARKED in text or "\n" in text or sum(map(len, pieces)) > 1000:
        raise Malformed


def _letters(tape: Tape) -> Reading[str]:
    word = ""
    while True:
        word += tape.take(_LETTERS.match(tape.text, tape.at).end())          # type: ignore[union-attr]
        if tape.at < len(tape.text) or tape.ended or len(word) > 5:
            return word
        yield


def _written(value: Any) -> str:
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value)
