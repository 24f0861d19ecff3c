"""How a family writes its calls: the contract of formats, and the unit of calls that they tell to."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyengine.chat.reply.json_text import read_text, read_value
from pyengine.chat.reply.tape import Malformed, Reading, Tape
from pyengine.chat.reply.tools import Tool
from pyengine.text.grammar import json_fragment
from pyengine.text.marks import MARK

Literal = Callable[[str], str]            # a mark's text to its fragment of a grammar
Spell = Callable[[str], str]              # a mark's text as a reader meets it: behind U+FDD0 where it is a token


def speller(is_token: Callable[[str], bool]) -> Spell:
    """Return what spells marks for a vocabulary."""
    return lambda mark: MARK + mark if is_token(mark) else mark


class Unit:
    """One unit of calls as it is read. What is told of a call goes out at once, so nothing of it comes back as text."""

    def __init__(self, tape: Tape, tools: Mapping[str, Tool], tell: Callable[[str, str, int], None], index: int, entered: Callable[[], None]):
        self.tape, self.tools, self.index = tape, tools, index
        self.was_told = False                            # of any call
        self._tell, self._entered = tell, entered
        self._open = False
        self._held: list[str] | None = None              # arguments that came before the name
        self._name: str | None = None                    # of a call that is told when its arguments begin
        self._argued = False

    def call(self, name: str) -> Tool:
        """Tell of a call of this function, with the arguments that came already. Raises Malformed where there is no such tool."""
        if name not in self.tools or self._open:
            raise Malformed
        self._open, self.was_told, self._name = True, True, None
        self.tape.past = None
        self._entered()
        self._tell("call", name, self.index)
        held, self._held = self._held, None
        for text in held or ():
            self.argue(text)
        return self.tools[name]

    def hold(self, name: str) -> None:
        """Take a name that is told of when arguments are there too: without them it may be anybody's. Raises Malformed as `call`."""
        if name not in self.tools or self._open:
            raise Malformed
        self._name = name
        if self._held is not None:
            self.call(name)

    def await_arguments(self) -> None:
        """Say that arguments come next: where a name is held they may be none, but this is a call by all that is known."""
        if self._name is not None:
            self._entered()

    def argue(self, text: str) -> None:
        """Tell more of the call's arguments; they wait for its name."""
        if self._name is not None:
            self.call(self._name)
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
    """A family's format of calls. `opening` begins a unit anywhere in a text, `leading` where a text could begin only; `inner` are further
    marks. All are spelled as a reader meets them."""

    marks: tuple[str, ...] = ()           # texts of tokens that the decoder is asked to write
    shows_results = False                 # templates that do not know calls show their results none the less

    def __init__(self, source: str, spell: Spell):
        self.source = source
        self.opening: tuple[str, ...] = ()
        self.leading: tuple[str, ...] = ()
        self.inner: tuple[str, ...] = ()

    @abstractmethod
    def read(self, unit: Unit, opening: str) -> Reading[None]:
        """Read a unit behind its opening mark. Raises Malformed where it is none."""

    @abstractmethod
    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar of one unit, or of a whole reply of calls, in Lark as llguidance reads it, with the rule `start`: of one call,
        or of `several`."""

    def demanded(self, tools: Sequence[Tool], several: bool, literal: Literal) -> str:
        """Give the grammar of a reply that must be calls."""
        return self.grammar(tools, True, several, literal)

    def bare(self, tools: Sequence[Tool], several: bool) -> str:
        """Give the grammar of a unit that a `leading` text begins; "" where those are units like any other."""
        return ""

    @abstractmethod
    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Write calls as the model does: names and arguments."""

    def adapt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give earlier turns as the family's templates take them: by default as they are."""
        return messages


# ---------------------------------------------------------------------------------------------------------------------
# Calls as JSON objects with a name and arguments


KEYS = frozenset({"name", "arguments", "parameters", "type", "id"})


def read_call(unit: Unit, keys: frozenset[str] | None = None, opened: bool = False, sure: bool = False) -> Reading[None]:
    """Read {"name": .., "arguments": {..}}, the keys in any order, `parameters` for `arguments`; others are left out.

    With `keys`, another key than these makes the object none of a call; to be `sure`, one without arguments is none either. Where it is
    `opened`, its brace was read.
    """
    tape = unit.tape
    if not opened:
        yield from tape.skip_blanks()
        yield from tape.expect("{")
    seen: set[str] = set()
    letter = ","
    while letter == ",":
        yield from tape.skip_blanks()
        key = yield from read_text(tape)
        if keys is not None and key not in keys:
            raise Malformed
        yield from tape.skip_blanks()
        yield from tape.expect(":")
        key = "arguments" if key == "parameters" else key
        if key in seen:
            raise Malformed
        if key in ("name", "arguments"):
            seen.add(key)
        if key == "arguments":
            unit.await_arguments()
        yield from _read_field(unit, key, sure)
        letter = yield from tape.skip_blanks()
        if letter not in ("}", ","):
            raise Malformed
        tape.take(tape.at + 1)
    unit.end()


def _read_field(unit: Unit, key: str, sure: bool) -> Reading[None]:
    tape = unit.tape
    letter = yield from tape.skip_blanks()
    if key == "name":
        name = yield from read_text(tape)
        unit.hold(name) if sure else unit.call(name)
    elif key == "arguments" and letter == "{":
        yield from read_value(tape, unit.argue)
    elif key == "arguments":
        yield from tape.expect("null")
        unit.argue("{}")
    else:
        yield from read_value(tape, lambda _: None)


def read_list(unit: Unit) -> Reading[None]:
    """Read a list of such objects, or one without a list."""
    tape = unit.tape
    if (yield from tape.skip_blanks()) != "[":
        yield from read_call(unit)
        return
    letter = ","
    tape.take(tape.at + 1)
    while letter == ",":
        yield from read_call(unit)
        letter = yield from tape.skip_blanks()
        if letter not in ("]", ","):
            raise Malformed
        tape.take(tape.at + 1)


FENCES = ("```json", "```tool_code", "```tool_call", "```")


def read_bare(unit: Unit, opening: str, sure: bool) -> Reading[None]:
    """Read objects without marks of their own, which `opening` begins: a brace, a list's bracket, or a fence of code around them."""
    tape, opened, listed = unit.tape, opening == "{", opening == "["
    if opening in FENCES:
        listed = (yield from tape.skip_blanks()) == "["
        tape.take(tape.at + listed)
    while True:
        yield from read_call(unit, KEYS, opened, sure)
        opened = False
        letter = yield from tape.skip_blanks()
        if letter in (",", ";"):
            tape.take(tape.at + 1)
        elif letter != "{":
            break
    if listed and (yield from tape.word("]")):
        yield from tape.skip_blanks()
    if opening in FENCES:
        yield from tape.word("```")


def one_at_a_time(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give a turn of several calls as turns of one call each, with its result: some templates take no more."""
    given: list[dict[str, Any]] = []
    i = 0
    while i < len(messages):
        message = messages[i]
        i += 1
        calls = message.get("tool_calls")
        if not isinstance(calls, (list, tuple)) or len(calls) < 2:
            given.append(message)
            continue
        results: list[dict[str, Any]] = []
        while i < len(messages) and messages[i].get("role") == "tool":
            results.append(messages[i])
            i += 1
        for n, call in enumerate(calls):
            head = message if n == 0 else {key: value for key, value in message.items() if key in ("role",)} | {"content": ""}
            given.append({**head, "tool_calls": [call]})
            name = call.get("id") if isinstance(call, Mapping) else None
            mine = next((r for r in results if name is not None and r.get("tool_call_id") == name), None) or next(iter(results), None)
            if mine is not None:
                results = [r for r in results if r is not mine]
                given.append(mine)
        given += results
    return given


# ---------------------------------------------------------------------------------------------------------------------
# Grammars


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return a grammar's fragment for values of a JSON schema, spaced as templates space them."""
    return json_fragment(schema, {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "})


def alternatives(rule: str, count: int) -> str:
    """Return the line of a rule that is one of `rule_0`, `rule_1` and so on."""
    return f"{rule}: {' | '.join(f'{rule}_{i}' for i in range(count))}"


def joined(rule: str) -> str:
    """Return the part of a rule behind the first of several that stand in lines.

    The answer may end behind a line's end too: there it is that models choose between one more and the end, and one that was held to the form
    has often not learnt another place.
    """
    return f' ("\\n" {rule})* "\\n"?'


def quoted(text: str) -> str:
    """Return a text as a literal of a grammar."""
    return json.dumps(text, ensure_ascii=False)


def schema_rules(tools: Sequence[Tool]) -> str:
    """Return rules `args_0`, `args_1` and so on: the arguments of each tool as a JSON object."""
    return "".join(f"args_{i}: {json_rule(_closed(tool.parameters))}\n" for i, tool in enumerate(tools))


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema of arguments that takes only those it names, where it leaves that open: nobody waits for others."""
    open_ended = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if", "unevaluatedProperties"} & schema.keys()
    return schema if open_ended else {**schema, "additionalProperties": False}


def call_rules(tools: Sequence[Tool], arguments: str = "arguments", more: str = "") -> str:
    """Return rules of a grammar: `call`, one of the tools as a JSON object with a name and arguments, and `more` of its fields."""
    lines = [alternatives("call", len(tools))]
    for i, tool in enumerate(tools):
        head = quoted(f'{{"name": {json.dumps(tool.name)}, "{arguments}": ')
        lines.append(f'call_{i}: {head} args_{i} {more} "}}"')
    return "\n".join(lines) + "\n" + schema_rules(tools)


_BLANKS = r"[ \t\r\n]{1,40}"                # as models indent; without a bound small ones go on with them


def bare_rules(tools: Sequence[Tool], several: bool) -> str:
    """Return a grammar of what `read_bare` reads, spaced in any way."""
    lines = [f'start: body{" ws" if several else ""} | "```" ("json" | "tool_code" | "tool_call")? ws body ws "```"',
             'body: call (ws ("," | ";")? ws call)* | "[" ws call (ws "," ws call)* ws "]"' if several else 'body: call | "[" ws call ws "]"',
             f"ws: /{_BLANKS}/?", alternatives("call", len(tools))]
    for i, tool in enumerate(tools):
        words = ['"{"', quoted('"name"'), '":"', quoted(json.dumps(tool.name)), '","', '("\\"arguments\\"" | "\\"parameters\\"")', '":"', f"args_{i}", '"}"']
        lines += [f"call_{i}: {' ws '.join(words)}", f"args_{i}: {json_fragment(_closed(tool.parameters), {'whitespace_pattern': _BLANKS})}"]
    return "\n".join(lines) + "\n"


def dumped(name: str, arguments: Mapping[str, Any], key: str = "arguments") -> str:
    """Write a call as a JSON object."""
    return json.dumps({"name": name, key: dict(arguments)}, ensure_ascii=False)
