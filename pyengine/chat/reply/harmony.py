"""Replies in channels: gpt-oss. Analysis is thinking, what goes to a function is a call, the rest is text.

The form: https://cookbook.openai.com/articles/openai-harmony and the template of openai/gpt-oss-120b.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.chat.reply.calls import Calls, Literal, one_at_a_time, quoted, schema_rules, Spell, Unit
from pyengine.chat.reply.json_text import read_value
from pyengine.chat.reply.pythonic import read_word
from pyengine.chat.reply.reading import BLANKS, TapeReader
from pyengine.chat.reply.schema import text_rules
from pyengine.chat.reply.tape import Malformed, Reading, stops
from pyengine.chat.reply.tools import Tool
from pyengine.text.marks import MARK

MARKS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")


class Harmony(Calls):
    """`<|channel|>commentary to=functions.name <|constrain|>json<|message|>` and a JSON object; one call a reply."""

    marks = MARKS

    def __init__(self, source: str, spell: Spell):
        super().__init__(source, spell)
        self.spelled = tuple(map(spell, MARKS))

    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a call's arguments behind `<|message|>`, the call being told. Raises Malformed where they are no object."""
        if (yield from unit.tape.skip_blanks()) != "{":
            raise Malformed
        yield from read_value(unit.tape, unit.argue)
        unit.end()

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one call from its channel or recipient on, or of a reply that may think before its call."""
        _, _, message, channel, constrain = map(literal, MARKS[:5])
        calls = " | ".join(f"call_{i}" for i in range(len(tools)))
        lines = _begun(calls, literal) if whole else [f"start: {calls}"]
        for i, tool in enumerate(tools):
            to = quoted(f" to=functions.{tool.name}")
            lines.append(f'call_{i}: ({channel} "commentary" {to} | {to} {channel} "commentary") (" " {constrain}? "json")? {message} args_{i}')
        return "\n".join(lines) + "\n" + schema_rules(tools)

    def around(self, content: str, calls: str | None, literal: Literal) -> str:
        """Give the grammar of a reply that may think before its content, or before a call."""
        _, _, message, channel, constrain = map(literal, MARKS[:5])
        lines = _begun("final | calls" if calls else "final", literal)
        lines += [f'final: {channel} "final" (" " {constrain}? "json")? {message} content', f"content: {content}", *([f"calls: {calls}"] if calls else [])]
        return "\n".join(lines) + "\n"

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Write calls as the model does."""
        return "<|start|>assistant".join(f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
                                         f"{json.dumps(dict(arguments), ensure_ascii=False)}<|call|>" for name, arguments in calls)

    def adapt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give turns of several calls as turns of one, and what was said before a call as part of its thinking: the template takes no more."""
        given = []
        for message in one_at_a_time(messages):
            thought = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if message.get(key)), None)
            if message.get("tool_calls") and thought and message.get("content"):
                said = message["content"] if isinstance(message["content"], str) else _texts(message["content"])
                kept = {key: value for key, value in message.items() if key not in ("reasoning_content", "thinking", "reasoning")}
                message = {**kept, "reasoning_content": f"{thought}\n\n{said}", "content": ""}
            given.append(message)
        return given


def _begun(rest: str, literal: Literal) -> list[str]:
    """Return rules of a reply that may think first."""
    start, end, message, channel = map(literal, MARKS[:4])
    return [f'start: thinking? ({start} "assistant")? ({rest})', f'thinking: {channel} "analysis" {message} thought', *text_rules("thought", {}, MARKS[1], end)]


def _texts(parts: Any) -> str:
    return "\n".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))


class HarmonyReader(TapeReader):
    """A reader of channels. Blanks around thinking are dropped; messages of one kind are told a blank line apart."""

    def __init__(self, calls: Harmony, tools: Sequence[Tool] | None, opened: bool):
        self._calls = calls
        self._tools: Mapping[str, Tool] = {tool.name: tool for tool in tools or ()}
        self._start, self._end, self._message, self._channel, self._constrain, self._return, self._call = calls.spelled
        self._stops = stops(*calls.spelled, MARK)
        self._opened, self._count = opened, 0
        self._unit: Unit | None = None                       # of a call that was told
        self._blanks: list[str] = []
        self._bare = False                                   # the reply has no headers
        self._last = ""                                      # kind of the last message that said something
        self._fresh = True                                   # nothing of this message was told
        super().__init__()

    def _read(self) -> Reading[None]:
        mark = (yield from self._body("thinking")) if self._opened else ""
        while True:
            kind = yield from self._header(mark)
            if not kind:
                return
            mark = yield from (self._read_call() if kind == "call" else self._body(kind))

    # -- headers ---------------------------------------------------------------------------------------------------------

    def _header(self, mark: str) -> Reading[str]:
        """Read a message's header, of which one mark may be read already. Gives its kind; "" at the end."""
        tape, started, channel, begun, stray = self._tape, False, "", 0, 0
        while True:
            if not mark:
                words = ["to="] if channel else [" to=", *(["assistant"] if started else [])]
                mark = yield from tape.word(*self._calls.spelled, MARK, *words)
            if not mark:
                if (yield from tape.peek()) == "":
                    return ""
                if not (started or channel or self._unit):
                    self._bare = tape.offset == stray
                    return "text"                            # no header at all
                tape.take(tape.at + 1)                       # json, or whatever a model puts there
            elif mark == self._message:
                return "call" if self._unit else "thinking" if channel == "analysis" else "text"
            elif mark in (self._start, self._end, self._return, self._call):
                started, channel = mark == self._start, ""
                self._leave()
            elif mark == self._channel or mark.endswith("to="):
                begun = begun if channel or self._unit else tape.offset - len(mark)
                word = yield from read_word(tape)
                if mark == self._channel:
                    channel = word
                else:
                    self._send(word, begun)
            elif mark == MARK:
                stray += 1
            mark = ""

    def _send(self, recipient: str, begun: int) -> None:
        """Tell of a call, where the message goes to a function that is there."""
        name = recipient.removeprefix("functions.")
        if self._unit is None and recipient.startswith("functions.") and name in self._tools:
            self.state, self.begun = "call", begun
            self._unit = Unit(self._tape, self._tools, self._tell, self._count, lambda: None)
            self._unit.call(name)

    def _leave(self) -> None:
        """Leave a call, if one was told."""
        if self._unit:
            self._unit, self._count, self.state, self._last = None, self._count + 1, "text", ""
            self._tape.past = None

    # -- bodies ----------------------------------------------------------------------------------------------------------

    def _body(self, kind: str) -> Reading[str]:
        """Read a message up to the mark that ends it, which is given."""
        self._blanks, self._fresh = [], True
        self.state = self.state if self._bare else kind
        while True:
            mark = yield from self._tape.until(self._stops, lambda text: self._hold(kind, text))
            if mark not in (MARK, self._message, self._constrain):
                break
            if not mark.startswith(MARK):
                self._hold(kind, mark)
        if kind == "text" or not mark:
            self._tell(kind, "".join(self._blanks))
        self._blanks = []
        if kind == "thinking" and mark:
            self.state = "start"                             # a header comes, and what it says
        return mark

    def _hold(self, kind: str, text: str) -> None:
        """Tell a text but for blanks at its end, and those at its beginning where it is thinking."""
        if self._fresh:
            text = text if self._bare else text.lstrip(BLANKS)
            if not text:
                return
            self.state, self._fresh = kind, False
            text = "\n\n" + text if self._last == kind else text
            self._last = kind
        solid = text.rstrip(BLANKS)
        if solid:
            self._tell(kind, "".join(self._blanks) + solid)
            self._blanks = []
        if len(solid) < len(text):
            self._blanks.append(text[len(solid) :])

    def _read_call(self) -> Reading[str]:
        """Read the call that was told; what follows its arguments is text."""
        assert self._unit
        with contextlib.suppress(Malformed):
            yield from self._calls.read(self._unit, "")
        self._leave()
        return (yield from self._body("text"))
