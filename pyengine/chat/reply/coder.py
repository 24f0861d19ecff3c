"""Calls whose arguments stand one by one between tags: Qwen3-Coder, Qwen 3.5, Nemotron 3 Nano, Step 3.5.

The form is that of the template of Qwen/Qwen3-Coder-30B-A3B-Instruct: texts stand as they are, everything else as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.chat.reply.calls import alternatives, Calls, joined, Literal, quoted, Spell, Unit
from pyengine.chat.reply.json_text import escaped
from pyengine.chat.reply.schema import arguments_of, is_text, json_value, ordered, text_rules
from pyengine.chat.reply.tape import Malformed, Reading, stops
from pyengine.chat.reply.tools import Tool
from pyengine.text.marks import MARK

_CLOSING = stops("\n</parameter>", "</parameter>")
_NAME = re.compile(rf"[^<>\n{MARK}]*")


class Coder(Calls):
    """`<tool_call>`, `<function=name>`, `<parameter=name>` and a value for each argument, and their closing tags."""

    marks = ("<tool_call>", "</tool_call>")

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        self._open, self._close = map(spell, self.marks)
        self.opening, self.inner = (self._open, "<function="), (self._close,)    # the first is left out by some

    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a unit behind its opening mark. Raises Malformed where it is none."""
        tape = unit.tape
        if opening == self._open:
            yield from tape.skip_blanks()
            yield from tape.expect("<function=")
        tool = unit.call((yield from self._tag(unit)))
        before = "{"
        while True:
            yield from tape.skip_blanks()
            tag = yield from tape.word("<parameter=", "</function>")
            if not tag:
                raise Malformed
            if tag == "</function>":
                break
            name = yield from self._tag(unit)
            unit.argue(f"{before}{json.dumps(name, ensure_ascii=False)}: ")
            yield from self._value(unit, tool.parameters.get("properties", {}).get(name, {}), tool)
            before = ", "
        unit.argue("{}" if before == "{" else "}")
        unit.end()
        yield from tape.skip_blanks()
        yield from tape.word(self._close)

    def _tag(self, unit: Unit) -> Reading[str]:
        """Read a name and its tag's end."""
        name = yield from unit.tape.span(_NAME)
        yield from unit.tape.expect(">")
        return name

    def _value(self, unit: Unit, schema: Any, tool: Tool) -> Reading[None]:
        """Read a value: a text as it comes, anything else when it is whole."""
        tape = unit.tape
        yield from tape.word("\n")
        if is_text(schema):
            unit.argue('"')
            if not (yield from tape.until(_CLOSING, lambda text: unit.argue(escaped(text.replace(MARK, ""))))):
                raise Malformed
            unit.argue('"')
            return
        pieces: list[str] = []
        if not (yield from tape.until(_CLOSING, pieces.append)):
            raise Malformed
        unit.argue(as_json("".join(pieces).replace(MARK, ""), schema))

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls."""
        lines = ["start: " + ("/\\n{0,2}/ " if whole else "") + "unit" + (joined("unit") if whole and several else ""),
                 f'unit: ({literal("<tool_call>")} "\\n")? "<function=" call "</function>\\n" {literal("</tool_call>")}', alternatives("call", len(tools))]
        end = quoted("\n</parameter>\n")
        for i, tool in enumerate(tools):
            properties = arguments_of(tool)
            items = [(f"{quoted(f'<parameter={name}>' + chr(10))} call_{i}_{n}", needed) for n, (name, _, needed) in enumerate(properties)]
            lines += [f"call_{i}: {quoted(tool.name + '>' + chr(10))} call_{i}_o0", *ordered(f"call_{i}_o", items, "")]
            for n, (_, schema, _) in enumerate(properties):
                rule = f"call_{i}_{n}"
                lines += text_rules(rule, schema, "</parameter>", end) if is_text(schema) else [f"{rule}: {json_value(schema, tool)} {end}"]
        return "\n".join(lines) + "\n"

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Write calls as the model does."""
        texts = []
        for name, arguments in calls:
            values = "".join(f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n</parameter>\n"
                             for key, value in arguments.items())
            texts.append(f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>")
        return "\n".join(texts)


def as_json(text: str, schema: Any) -> str:
    """Return a value that is no text by its schema as JSON: what is written as JSON stands, the rest is a text."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    words = {"True": "true", "False": "false", "None": "null"}           # as Python's templates print them
    text = words.get(text.strip(), text)
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return f'"{escaped(text)}"'
    if isinstance(kinds, list) and "string" in kinds and not isinstance(value, str) and _kind(value) not in kinds:
        return f'"{escaped(text)}"'
    return text.strip()


def _refuse(word: str) -> None:
    raise ValueError(word)


def _kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null", str: "string"}
    return kinds[type(value)]
