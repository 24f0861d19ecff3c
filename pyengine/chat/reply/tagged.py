"""Calls as JSON between marks."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.chat.reply.calls import call_rules, Calls, Literal, read_call, Spell, Unit
from pyengine.chat.reply.tape import Reading
from pyengine.chat.reply.tools import Tool


class Hermes(Calls):
    """`<tool_call>`, a JSON object, `</tool_call>`: Hermes 2 Pro, Qwen 2.5 and 3, SmolLM3."""

    marks = ("<tool_call>", "</tool_call>")

    def __init__(self, spell: Spell):
        super().__init__(spell)
        self.opening, self.inner = (spell("<tool_call>"),), (spell("</tool_call>"),)

    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a unit behind its opening mark. Raises Malformed where it is none."""
        yield from read_call(unit)
        yield from unit.tape.skip_blanks()
        yield from unit.tape.word(*self.inner)               # left out by some: the call is whole without it

    def grammar(self, tools: Sequence[Tool], many: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls."""
        start = 'start: /\\n{0,2}/ unit ("\\n" unit)*' if many else "start: unit"
        return f'{start}\nunit: {literal("<tool_call>")} "\\n" call "\\n" {literal("</tool_call>")}\n{call_rules(tools)}'
