"""Gemma 4's calls: `<|tool_call>call:name{key:<|"|>text<|"|>,n:1}<tool_call|>`.

The form is that of the template of google/gemma-4-31B-it: texts between marks, keys bare, the rest as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.chat.reply.calls import alternatives, Calls, Literal, quoted, Spell, Unit
from pyengine.chat.reply.json_text import escaped, Out, read_nested, read_number
from pyengine.chat.reply.pythonic import read_word, WORDS
from pyengine.chat.reply.schema import Notation
from pyengine.chat.reply.tape import Malformed, Reading, stops, Tape
from pyengine.chat.reply.tools import Tool
from pyengine.text.marks import MARK

QUOTE = '<|"|>'
_KEY = re.compile(f"[^:{{}}\\[\\],<\\n{MARK}]*")


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
        name = yield from read_word(tape)
        if (yield from tape.skip_blanks()) != "{":
            raise Malformed
        unit.call(name)
        yield from read_nested(tape, unit.argue, self._scalar, self._key, None)
        unit.end()
        yield from tape.skip_blanks()
        yield from tape.word(self.inner[0])

    def _scalar(self, tape: Tape, letter: str, out: Out) -> Reading[None]:
        if (yield from tape.word(self._quote)):
            yield from self._text(tape, out)
        elif letter.isalpha():
            word = yield from read_word(tape)
            if word not in WORDS:                                            # Python's too: a template prints null as None
                raise Malformed
            out(WORDS[word])
        else:
            yield from read_number(tape, out)

    def _text(self, tape: Tape, out: Out) -> Reading[None]:
        out('"')
        if not (yield from tape.until(self._stops, lambda text: out(escaped(text.replace(MARK, ""))))):
            raise Malformed
        out('"')

    def _key(self, tape: Tape, out: Out) -> Reading[None]:
        if (yield from tape.word(self._quote)):
            yield from self._text(tape, out)
            yield from tape.skip_blanks()
            yield from tape.expect(":")
            out(": ")
            return
        key = yield from tape.span(_KEY)
        yield from tape.expect(":")
        out(f"{json.dumps(key.strip(), ensure_ascii=False)}: ")

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls."""
        begin, end, quote = map(literal, self.marks)
        lines = [f"start: unit{'+' if whole and several else ''}", f"unit: {begin} call {end}", alternatives("call", len(tools))]
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


def _written(value: Any) -> str:
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value)
