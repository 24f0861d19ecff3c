"""Styles of replies: how a family of models thinks and calls, found from its chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyengine.chat.reply.calls import Calls, Literal, Spell, speller
from pyengine.chat.reply.deltas import Reader
from pyengine.chat.reply.reading import TaggedReader, Thinking
from pyengine.chat.reply.tagged import Hermes
from pyengine.chat.reply.tools import Tool
from pyengine.errors import RequestError, shown

Is = Callable[[str], bool]
EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True)
class Thoughts:
    """A row of the table: a way to mark thinking, and how a template that uses it is recognised. Texts are written as models write them."""

    name: str
    known: Callable[[str], bool]
    opening: tuple[str, ...]              # the first is what a template writes
    closing: tuple[str, ...]
    end: str                              # closes thinking that is spent
    none: str                             # thinking of nothing, as a template writes it
    marks: tuple[str, ...] = ()
    frame: tuple[str, ...] = ()


def _has(*words: str) -> Callable[[str], bool]:
    return lambda source: all(word in source for word in words)


THINKING = (
    Thoughts("think", _has("</think>"), ("<think>",), ("</think>",), "\n</think>\n\n", "<think>\n\n</think>\n\n", ("<think>", "</think>")),
)
CALLS: tuple[tuple[Callable[[str], bool], type[Calls]], ...] = (
    (_has("<tool_call>"), Hermes),
)


class Style:
    """How one model writes its replies. Made once for a model; readers are made for each reply."""

    def __init__(self, thoughts: Thoughts | None, calls: Calls | None, variables: frozenset[str], is_token: Is):
        spell = speller(is_token)
        self._thoughts, self._calls, self._names = thoughts, calls, variables
        self._thinking = None if thoughts is None else Thinking(*(tuple(_spelled(w, thoughts.marks, spell) for w in words)
                                                                  for words in (thoughts.opening, thoughts.closing, thoughts.frame)))
        self.thinks = thoughts is not None
        self.name = "+".join([*([type(calls).__name__.lower()] if calls else []), *([thoughts.name] if thoughts else [])]) or "plain"
        self.marks = (*(thoughts.marks if thoughts else ()), *(calls.marks if calls else ()))
        self._spelled = tuple(spell(mark) for mark in self.marks)
        self.switches = frozenset({"on", "off", "budget"}) if thoughts else frozenset()
        self.end_of_thinking = thoughts.end if thoughts else ""

    def variables(self, think: bool | int | str | None) -> dict[str, Any]:
        """Give the template's variables for what is asked of thinking. Raises RequestError where this format cannot do it."""
        if think is None:
            return {}
        if isinstance(think, str):
            if think not in EFFORTS:
                raise RequestError(f"think: true, false, a budget in tokens, or one of {', '.join(EFFORTS)}, not {shown(think)}")
            if "effort" not in self.switches:
                raise RequestError(f"think: this model has no efforts of thinking such as {think!r}; give true, false or a budget in tokens")
            return {"reasoning_effort": think}
        if not isinstance(think, int) or think < 0:
            raise RequestError(f"think: true, false, a budget in tokens, or one of {', '.join(EFFORTS)}, not {shown(think)}")
        if not self.thinks:
            if think is not False:
                raise RequestError("think: this model's format has no thinking; leave it out or give false")
            return {}
        needed = "off" if think is False else "on" if think is True else "budget"
        if needed not in self.switches:
            raise RequestError(f"think: {shown(think)} is not possible with this model, only {', '.join(sorted(self.switches))}")
        return {name: think is not False for name in ("enable_thinking", "thinking") if name in self._names}

    def opened(self, prompt: str) -> bool:
        """Say whether the rendered prompt ends inside of thinking that it opened."""
        return self._thoughts is not None and prompt.rstrip().endswith(self._thoughts.opening)

    def unthought(self, prompt: str) -> str:
        """Give what is appended to the rendered prompt so that the model does not think."""
        if self._thoughts is None or prompt.rstrip().endswith(self._thoughts.closing):
            return ""
        if self.opened(prompt):
            return self._thoughts.end.removeprefix("\n") if prompt.endswith("\n") else self._thoughts.end
        return self._thoughts.none

    def reader(self, tools: Sequence[Tool] | None, opened: bool) -> Reader:
        """Make the reader of one reply; without tools, nothing in it is a call."""
        return TaggedReader(self._thinking, self._calls, tools, self._spelled, opened and self.thinks)

    def grammar(self, tools: Sequence[Tool], many: bool, literal: Literal) -> str:
        """Give the grammar (Lark, as llguidance reads it) of one unit of calls, or with `many` of a whole reply of calls."""
        if self._calls is None:
            raise RequestError("tools: this model's format has no calls")
        return self._calls.grammar(tools, many, literal)

    def prepare(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Give messages and tools as the template is rendered with them."""
        plain = [dict(message) for message in messages]
        return self._calls.prepare(plain, tools) if self._calls and tools else (plain, None)


def find(source: str, is_token: Is) -> Style:
    """Find how a model writes its replies from its chat template's source; `is_token` says which texts are single tokens of its vocabulary."""
    spell = speller(is_token)
    thoughts = next((row for row in THINKING if row.known(source)), None)
    calls = next((made(spell) for known, made in CALLS if known(source)), None)
    return Style(thoughts, calls, frozenset(variables_of(source)), is_token)


def variables_of(source: str) -> set[str]:
    """Find names that a template's code uses: neither in its texts and strings, nor behind a dot."""
    found: set[str] = set()
    at = 0
    while (at := source.find("{", at)) >= 0:
        end = {"{%": "%}", "{{": "}}", "{#": "#}"}.get(source[at : at + 2])
        if end is None:
            at += 1
            continue
        close = source.find(end, at + 2)
        if close < 0:
            return found
        if end != "#}":
            code = re.sub(r"'[^'\\]*(?:\\.[^'\\]*)*'|\"[^\"\\]*(?:\\.[^\"\\]*)*\"", " ", source[at:close])
            found.update(re.findall(r"(?<![\w.])[A-Za-z_]\w*", code))
        at = close + 2
    return found


def _spelled(words: str, marks: Sequence[str], spell: Spell) -> str:
    """Return a text with the mark in it as a reader meets it."""
    mark = next((mark for mark in marks if mark in words), None)
    return words if mark is None else words.replace(mark, spell(mark))
