"""How a family writes its calls: the contract of formats, and the unit of calls that they tell to."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyengine.chat.reply.deltas import MARKED
from pyengine.chat.reply.json_text import read_text, read_value
from pyengine.chat.reply.tape import Malformed, Reading, Tape
from pyengine.chat.reply.tools import Tool

Literal = Callable[[str], str]            # a mark's text to its fragment of a grammar
Spell = Callable[[str], str]              # a mark's text as a reader meets it: behind U+FDD0 where it is a token


def speller(is_token: Callable[[str], bool]) -> Spell:
    """Return what spells marks for a vocabulary."""
    return lambda mark: MARKED + mark if is_token(mark) else mark


class Unit:
    """One unit of calls as it is read. What is told of a call goes out at once, so nothing of it comes back as text."""

    def __init__(self, tape: Tape, tools: Mapping[str, Tool], tell: Callable[[str, str, int], None], index: int, entered: Callable[[], None]):
        self.tape, self.tools, self.index = tape, tools, index
        self.was_told = False                            # of any call
        self._tell, self._entered = tell, entered
        self._open = False
        self._held: list[str] | None = None              # arguments that came before the name
        self._argued = False

    def call(self, name: str) -> Tool:
        """Tell of a call of this function, with the arguments that came already. Raises Malformed where there is no such tool."""
        if name not in self.tools or self._open:
            raise Malformed
        self._open = self.was_told = True
        self.tape.past = None
        self._entered()
        self._tell("call", name, self.index)
        held, self._held = self._held, None
        for text in held or ():
            self.argue(text)
        return self.tools[name]

    def argue(self, text: str) -> None:
        """Tell more of the call's arguments; they wait for its name."""
        if self._open:
            self._argued = True
            self._tell("arguments", text, self.index)
        elif self._held is None:
            self._held = [text]
        else:
            self._held.append(text)

    def end(self) -> None:
        """End the call; one without arguments gets an empty object. Raises Malformed where none was told."""
        if not self._open:
            raise Malformed
        if not self._argued:
            self.argue("{}")
        self.index += 1
        self._open = self._argued = False
        self.tape.past = []


class Calls(ABC):
    """A family's format of calls. `opening` begins a unit, anywhere in a text, or where `bare` at its beginning only; `inner` are its
    further marks. All are spelled as a reader meets them."""

    marks: tuple[str, ...] = ()           # texts of tokens that the decoder is asked to write
    bare = False

    def __init__(self, spell: Spell):
        self.opening: tuple[str, ...] = ()
        self.inner: tuple[str, ...] = ()

    @abstractmethod
    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a unit behind its opening mark. Raises Malformed where it is none."""

    @abstractmethod
    def grammar(self, tools: Sequence[Tool], many: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls, in Lark as llguidance reads it, with the rule `start`."""

    def prepare(self, messages: list[dict[str, Any]], tools: Sequence[Tool]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Give what the template is rendered with: by default it knows tools itself."""
        return messages, [tool.as_dict() for tool in tools]


# ---------------------------------------------------------------------------------------------------------------------
# Calls as JSON objects with a name and arguments


def read_call(unit: Unit) -> Reading[None]:
    """Read {"name": .., "arguments": {..}}, the keys in any order, `parameters` for `arguments`, others left out."""
    tape = unit.tape
    yield from tape.skip_blanks()
    yield from tape.expect("{")
    seen: set[str] = set()
    letter = yield from tape.skip_blanks()
    while True:
        key = yield from read_text(tape)
        yield from tape.skip_blanks()
        yield from tape.expect(":")
        letter = yield from tape.skip_blanks()
        key = "arguments" if key == "parameters" else key
        if key in seen:
            raise Malformed
        if key == "name":
            unit.call((yield from read_text(tape)))
        elif key == "arguments" and letter == "{":
            yield from read_value(tape, unit.argue)
        else:
            pieces: list[str] = []
            yield from read_value(tape, pieces.append)
            if key == "arguments" and "".join(pieces) != "null":
                raise Malformed
        if key in ("name", "arguments"):
            seen.add(key)
        letter = yield from tape.skip_blanks()
        if letter not in ("}", ","):
            raise Malformed
        tape.take(tape.at + 1)
        if letter == "}":
            unit.end()
            return
        yield from tape.skip_blanks()


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return a grammar's fragment for values of a JSON schema, spaced as templates space them."""
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return f"%json {json.dumps({**schema, 'x-guidance': style}, ensure_ascii=False)}"


def call_rules(tools: Sequence[Tool], arguments: str = "arguments") -> str:
    """Return rules of a grammar: `call`, one of the tools as a JSON object with a name and arguments."""
    lines = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "{arguments}": ')
        lines += [f'call_{i}: {head} args_{i} "}}"', f"args_{i}: {json_rule(tool.parameters)}"]
    return "\n".join(lines) + "\n"
