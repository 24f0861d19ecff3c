"""Calls as JSON: between marks, behind one, or bare.

The forms are those of the templates of NousResearch/Hermes-3-Llama-3.1-8B, Qwen/Qwen2.5-7B-Instruct, ibm-granite/granite-3.3-2b-instruct,
mistralai/Mistral-Nemo-Instruct-2407 and Mistral-Small-3.2-24B-Instruct-2506, meta-llama/Llama-3.1-8B-Instruct, deepseek-ai/DeepSeek-R1 and
DeepSeek-V3.1, and for Gemma 3 of https://ai.google.dev/gemma/docs/capabilities/function-calling.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.chat.reply.calls import (
    bare_rules, call_rules, Calls, dumped, FENCES, joined, KEYS, Literal, one_at_a_time, quoted, read_bare, read_call, read_list, schema_rules, Spell, Unit
)
from pyengine.chat.reply.json_text import escaped, read_value
from pyengine.chat.reply.pythonic import read_arguments, read_word
from pyengine.chat.reply.tape import Malformed, Reading, stops, Tape
from pyengine.chat.reply.tools import Tool
from pyengine.text.grammar import nested
from pyengine.text.marks import MARK

Messages = list[dict[str, Any]]
Written = Sequence[tuple[str, Mapping[str, Any]]]
_BARE = ("{", "[", *FENCES)


class Loose(Calls):
    """A format of JSON objects that may come without their marks: Qwen2.5-Coder, for one, leaves them out."""

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        self.leading = _BARE

    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a unit behind its opening mark. Raises Malformed where it is none."""
        yield from (read_bare(unit, opening, sure=True) if opening in _BARE else self.read_marked(unit))

    def read_marked(self, unit: Unit) -> Reading[None]:
        """Read what stands behind a mark. Raises Malformed where it is no call."""
        yield from read_list(unit)                           # a list is what Granite's smaller models make of Hermes' form
        yield from unit.tape.skip_blanks()
        yield from unit.tape.word(*self.inner)               # left out by some: the call is whole without it

    def bare(self, tools: Sequence[Tool], several: bool) -> str:
        """Give the grammar of a unit without its marks."""
        return bare_rules(tools, several)


class Hermes(Loose):
    """`<tool_call>`, a JSON object, `</tool_call>`: Hermes 2 Pro and 3, Qwen 2.5 and 3, SmolLM3, Granite 4."""

    marks = ("<tool_call>", "</tool_call>")

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        self.opening, self.inner = (spell("<tool_call>"),), (spell("</tool_call>"),)

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls."""
        start = "start: " + ("/\\n{0,2}/ " if whole else "") + "unit" + (joined("unit") if whole and several else "")
        return f'{start}\nunit: {literal("<tool_call>")} "\\n" call "\\n" {literal("</tool_call>")}\n{call_rules(tools)}'

    def demanded(self, tools: Sequence[Tool], several: bool, literal: Literal) -> str:
        """Give the grammar of a reply that must be calls, also without marks: models that leave them out do worse where they have to write them."""
        marked, bare = nested(self.grammar(tools, True, several, literal)), joined("call") if several else ""
        return f"start: marked | call{bare}\nmarked: {marked}\n{call_rules(tools)}"

    def write(self, calls: Written) -> str:
        """Write calls as the model does."""
        return "\n".join(f"<tool_call>\n{dumped(name, arguments)}\n</tool_call>" for name, arguments in calls)


class Granite(Loose):
    """`<|tool_call|>` or `<tool_call>` and a JSON list: Granite 3. Phi 4 mini's is the same, with a closing mark."""

    marks = ("<|tool_call|>", "<tool_call>", "<|/tool_call|>")
    shows_results = True

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        self.opening, self.inner = (spell("<|tool_call|>"), spell("<tool_call>")), (spell("<|/tool_call|>"),)

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls: the list is both."""
        opening = f'({literal("<|tool_call|>")} | {literal("<tool_call>")})'
        return f'start: {opening} "[" call{_more(several)} "]"\n{call_rules(tools)}'

    def write(self, calls: Written) -> str:
        """Write calls as the model does."""
        return f"<|tool_call|>[{', '.join(dumped(name, arguments) for name, arguments in calls)}]"


class Mistral(Loose):
    """`[TOOL_CALLS]` and a JSON list, or since 2025 for each call `[TOOL_CALLS]`, a name, `[ARGS]` and an object; some with `[CALL_ID]`."""

    marks = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        self.opening, self._args, self._id = (spell("[TOOL_CALLS]"),), spell("[ARGS]"), spell("[CALL_ID]")
        self.inner = (self._args, self._id)
        self._listed = "[ARGS]" not in source
        if not self._listed:
            self.leading = ()

    def read_marked(self, unit: Unit) -> Reading[None]:
        """Read a list, or a name and an object. Raises Malformed where it is neither."""
        tape = unit.tape
        if (yield from tape.skip_blanks()) in ("[", "{") and (yield from self._begins_list(tape)):
            yield from read_list(unit)
            return
        name = yield from read_word(tape)
        yield from tape.skip_blanks()
        mark = yield from tape.word(self._args, self._id)
        if not mark:
            raise Malformed
        unit.call(name)
        if mark == self._id:
            yield from read_word(tape)
            yield from tape.skip_blanks()
            yield from tape.expect(self._args)
        if (yield from tape.skip_blanks()) != "{":
            raise Malformed
        yield from read_value(tape, unit.argue)
        unit.end()

    def _begins_list(self, tape: Tape) -> Reading[bool]:
        """Tell a list from marks that begin with the same letter, where they are no tokens."""
        while len(tape.text) - tape.at < 2 and not tape.ended:
            yield
        return not tape.text.startswith(("[A", "[C"), tape.at)

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls."""
        opening = literal("[TOOL_CALLS]")
        if self._listed:
            number = '(", \\"id\\": \\"" /[a-zA-Z0-9]{9}/ "\\"")?'
            return f'start: {opening} "[" call{_more(several)} "]"\n{call_rules(tools, more=number)}'
        call_id = f'({literal("[CALL_ID]")} /[a-zA-Z0-9]{{9}}/)? ' if "[CALL_ID]" in self.source else ""
        units = " | ".join(f"{quoted(tool.name)} {call_id}{literal('[ARGS]')} args_{i}" for i, tool in enumerate(tools))
        return f"start: unit{'+' if whole and several else ''}\nunit: {opening} ({units})\n{schema_rules(tools)}"

    def write(self, calls: Written) -> str:
        """Write calls as the model does."""
        if self._listed:
            return f"[TOOL_CALLS][{', '.join(dumped(name, arguments) for name, arguments in calls)}]"
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(dict(arguments), ensure_ascii=False)}" for name, arguments in calls)

    def adapt(self, messages: Messages) -> Messages:
        """Give ids of calls that other programs made the form that the templates demand: nine letters and digits."""
        given = []
        for message in messages:
            calls = message.get("tool_calls")
            if isinstance(calls, (list, tuple)):
                message = {**message, "tool_calls": [{**call, "id": short_id(call.get("id"))} if isinstance(call, Mapping) else call
                                                     for call in calls]}
            if isinstance(message.get("tool_call_id"), str):
                message = {**message, "tool_call_id": short_id(message["tool_call_id"])}
            given.append(message)
        return given


class Llama(Calls):
    """A bare JSON object with a name and parameters, or `<|python_tag|>` and one, code or a built-in tool: Llama 3.1, 3.2 and 3.3."""

    marks = ("<|python_tag|>",)

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        self._tag = spell("<|python_tag|>")
        self.leading = (self._tag, "{")

    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a unit behind its opening mark. Raises Malformed where it is none."""
        tape = unit.tape
        if opening == self._tag and (yield from tape.skip_blanks()) != "{":
            yield from self._read_code(unit)
            return
        yield from read_call(unit, KEYS, opened=opening == "{")
        while (yield from tape.skip_blanks()) == ";":        # several, as Meta's models join them
            tape.take(tape.at + 1)
            yield from read_call(unit, KEYS)

    def _read_code(self, unit: Unit) -> Reading[None]:
        """Read `name.call(a="x")`, or Python code where a tool takes some."""
        tape = unit.tape
        name = yield from read_word(tape)
        if name.endswith(".call") and name.removesuffix(".call") in unit.tools and (yield from tape.word("(")):
            unit.call(name.removesuffix(".call"))
            yield from read_arguments(unit)
            return
        tool = next((tool for key in ("python", "ipython", "code_interpreter") if (tool := unit.tools.get(key))), None)
        if tool is None or "code" not in tool.parameters.get("properties", {}):
            raise Malformed
        unit.call(tool.name)
        unit.argue('{"code": "' + escaped(name))
        yield from tape.until(stops(), lambda text: unit.argue(escaped(text.replace(MARK, ""))))
        unit.argue('"}')
        unit.end()

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls: one call, which is all that the templates show."""
        return f'start: {literal("<|python_tag|>")}? call\n{call_rules(tools, "parameters")}'

    def write(self, calls: Written) -> str:
        """Write calls as the model does."""
        return "; ".join(dumped(name, arguments, "parameters") for name, arguments in calls)

    def adapt(self, messages: Messages) -> Messages:
        """Give a turn of several calls as turns of one."""
        return one_at_a_time(messages)


class DeepSeek(Calls):
    """`<｜tool▁calls▁begin｜>`, then each call between marks: R1 and V3 with a kind and fenced JSON, V3.1 with a name and JSON."""

    marks = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        begin, self._begin, self._sep, self._end, self._ends = map(spell, self.marks)
        self.opening, self.inner = (begin,), (self._begin, self._sep, self._end, self._ends)
        self._fenced = "```json" in source

    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a unit behind its opening mark. Raises Malformed where it is none."""
        tape = unit.tape
        while True:
            yield from tape.skip_blanks()
            if not (yield from tape.word(self._begin)):
                if not unit.was_told:
                    raise Malformed
                yield from tape.word(self._ends)
                return
            name = yield from read_word(tape)
            yield from tape.expect(self._sep)
            if self._fenced:                                 # what came first was the kind: "function"
                name = yield from read_word(tape)
            unit.call(name)
            yield from tape.skip_blanks()
            if self._fenced:
                yield from tape.expect("```json")
            if (yield from tape.skip_blanks()) != "{":
                raise Malformed
            yield from read_value(tape, unit.argue)
            unit.end()
            yield from tape.skip_blanks()
            yield from tape.word("```")
            yield from tape.skip_blanks()
            yield from tape.word(self._end)

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls: the section is both."""
        begins, begin, sep, end, ends = map(literal, self.marks)
        head, tail = ('"\\n```json\\n"', '"\\n```"') if self._fenced else ("", "")
        kind = f'"function" {sep} ' if self._fenced else ""
        between = "" if self._fenced else f" {sep}"
        calls = " | ".join(f"{kind}{quoted(tool.name)}{between} {head} args_{i} {tail}" for i, tool in enumerate(tools))
        start = "/\\n{0,2}/ " if whole else ""
        joint = "" if not several else '("\\n" call)*' if self._fenced else "call*"
        return f"start: {start}{begins} call {joint} {ends}\ncall: {begin} ({calls}) {end}\n{schema_rules(tools)}"

    def write(self, calls: Written) -> str:
        """Write calls as the model does."""
        begins, begin, sep, end, ends = self.marks
        texts = [(name, json.dumps(dict(arguments), ensure_ascii=False)) for name, arguments in calls]
        if self._fenced:
            return begins + "\n".join(f"{begin}function{sep}{name}\n```json\n{text}\n```{end}" for name, text in texts) + ends
        return begins + "".join(f"{begin}{name}{sep}{text}{end}" for name, text in texts) + ends

    def adapt(self, messages: Messages) -> Messages:
        """Give turns that call without a text: R1's template shows their calls only where the content is none."""
        return [{**message, "content": None} if message.get("tool_calls") and not message.get("content") else message for message in messages]


class Prompted(Calls):
    """A bare JSON object with a name and parameters, because a system text asks for it: Gemma 3, and any template without tools.

    Several stand in lines or in a list; some models fence them as code.
    """

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        self.leading = _BARE

    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a unit behind its opening mark. Raises Malformed where it is none."""
        yield from read_bare(unit, opening, sure=False)

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls, which is spaced as the model was told."""
        if not whole:
            return bare_rules(tools, several)
        more = joined("call") if several else ""
        return f"start: call{more}\n{call_rules(tools, 'parameters')}"

    def write(self, calls: Written) -> str:
        """Write calls as the model does."""
        return "\n".join(dumped(name, arguments, "parameters") for name, arguments in calls)


def _more(several: bool) -> str:
    """Return the part of a list's rule behind its first call."""
    return ' (", " call)*' if several else ""


def short_id(name: Any) -> str:
    """Return nine letters and digits for the id of a call: itself where it is such, else always the same."""
    if isinstance(name, str) and re.fullmatch(r"[a-zA-Z0-9]{9}", name):
        return name
    letters = string.digits + string.ascii_letters
    return "".join(letters[byte % len(letters)] for byte in hashlib.sha256(str(name).encode()).digest()[:9])
