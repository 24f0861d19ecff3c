"""Styles of replies: how a family of models thinks and calls, found from its chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyengine.chat.reply.calls import Calls, Literal, quoted, Spell, speller
from pyengine.chat.reply.coder import Coder
from pyengine.chat.reply.deltas import Reader
from pyengine.chat.reply.gemma import Gemma4
from pyengine.chat.reply.harmony import Harmony, HarmonyReader
from pyengine.chat.reply.pythonic import Liquid, Pythonic
from pyengine.chat.reply.reading import TaggedReader, Thinking
from pyengine.chat.reply.tagged import DeepSeek, Granite, Hermes, Llama, Mistral, Prompted
from pyengine.chat.reply.schema import regex
from pyengine.chat.reply.told import told_tools, told_turns
from pyengine.chat.reply.tools import Tool
from pyengine.errors import RequestError, shown
from pyengine.records import dataclass

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


_THINK = ("<think>", "</think>")
_PHRASES = ("Here is my thought process:", "Here's my thought process:"), ("Here is my response:", "Here's my response:")

# How thinking is marked: the first row that knows a template.
THINKING = (
    Thoughts("channel", _has("<|channel>thought"), ("<|channel>thought",), ("<channel|>",), "\n<channel|>", "<|channel>thought\n<channel|>",
             ("<|channel>", "<channel|>")),
    Thoughts("brackets", _has("[THINK]"), ("[THINK]",), ("[/THINK]",), "\n[/THINK]\n", "[THINK]\n[/THINK]\n", ("[THINK]", "[/THINK]")),
    Thoughts("phrases", _has(_PHRASES[0][0]), *_PHRASES, "\n\nHere is my response:\n", "Here is my response:\n"),
    Thoughts("response", _has("<think></think>", "<response></response>"), ("<think>",), ("</think>",), "\n</think>\n<response>", "<response>",
             frame=("<response>", "</response>")),
    Thoughts("think", _has("</think>"), ("<think>",), ("</think>",), "\n</think>\n\n", "<think>\n\n</think>\n\n", _THINK),
)

# How calls are written: the first row that knows a template. A template that knows no tools, or writes calls in a form that is not here, is
# served by the last: the model is told in words, and earlier calls are shown as texts.
CALLS: tuple[tuple[Callable[[str], bool], type[Calls]], ...] = (
    (_has("<|channel|>", "<|message|>"), Harmony),
    (_has("<|tool_call>call:"), Gemma4),
    (_has("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"), DeepSeek),
    (_has("<tool_call>", "<function=", "<parameter="), Coder),
    (lambda s: "<tool_call>" in s and re.search(r"arguments\\?[\"']", s) is not None and not re.search("<arg_key>|<tool_calls>", s), Hermes),
    (_has("<|tool_call|>"), Granite),
    (_has("[TOOL_CALLS]"), Mistral),
    (lambda s: "<|tool_call_start|>" in s or "<|tool_list_start|>" in s, Liquid),
    (lambda s: re.search(r"\[func_name1?\(|tool_call\.name \+ '\('", s) is not None, Pythonic),
    (lambda s: "ipython" in s and re.search(r"\"parameters\\?\": ", s) is not None, Llama),
    (lambda _: True, Prompted),
)


class Style:
    """How one model writes its replies. Made once for a model; readers are made for each reply.

    framed: whether content stands behind a header of its own, so that a reply does not begin with it.
    """

    framed = False
    end_of_analysis = ""                     # closes thinking where a call follows, in formats that are framed

    def __init__(self, thoughts: Thoughts | None, calls: Calls, source: str, is_token: Is):
        spell = speller(is_token)
        self._thoughts, self._calls, self._source, self._names = thoughts, calls, source, variables_of(source)
        self._thinking = None if thoughts is None else Thinking(*(tuple(_spelled(w, thoughts.marks, spell) for w in words)
                                                                  for words in (thoughts.opening, thoughts.closing, thoughts.frame)))
        self.thinks = thoughts is not None
        self.name = "+".join([type(calls).__name__.lower(), *([thoughts.name] if thoughts else [])])
        self.marks = tuple(dict.fromkeys((*(thoughts.marks if thoughts else ()), *calls.marks)))
        self._spelled = tuple(spell(mark) for mark in self.marks)
        self._asked = [name for name in ("enable_thinking", "thinking") if name in self._names]
        self._effort = "reasoning_effort" in self._names
        self.switches = frozenset([*(("on", "off", "budget") if thoughts else ()), *(("effort",) if thoughts and self._effort else ())])
        self.end_of_thinking = thoughts.end if thoughts else ""
        self.closes_by_token = thoughts is not None and all(is_token(mark) for mark in thoughts.closing)

    def variables(self, think: bool | int | str | None) -> dict[str, Any]:
        """Give the template's variables for what is asked of thinking. Raises RequestError where this format cannot do it."""
        if think is None:
            return {}
        needed = _switch(think)
        if not self.thinks and needed == "off":
            return {}
        if not self.thinks:
            raise RequestError("think: this model's format has no thinking; leave it out or give false")
        if needed not in self.switches:
            raise RequestError(f"think: {shown(think)} is not possible with this model; it takes {_can(self.switches)}")
        given: dict[str, Any] = {name: think is not False for name in self._asked}
        return {**given, "reasoning_effort": think} if needed == "effort" else given

    @property
    def shows_tools(self) -> bool:
        """Whether the template itself shows tools to the model; others are told of them in words."""
        return not isinstance(self._calls, Prompted) and bool(self._names & {"tools", "available_tools"})

    @property
    def gap(self) -> str:
        """What stands between thinking and content."""
        return self._thoughts.end.partition(self._thoughts.closing[0])[2] if self._thoughts else ""

    def opens(self, literal: Literal) -> str:
        """Give a grammar's fragment of what opens thinking."""
        assert self._thoughts
        return "(" + " | ".join(_fragment(text, self._thoughts.marks, literal) for text in self._thoughts.opening) + ")"

    def thought(self) -> str:
        """Give the rule `thought` of thinking up to what closes it, which is spelled by letters, and blanks behind it."""
        assert self._thoughts
        words = [regex(text) for text in self._thoughts.closing]
        closing = " | ".join(quoted(text) for text in self._thoughts.closing)
        return f"thought: THOUGHT /[ \\n]{{0,3}}/\nTHOUGHT: (/(?s:.*)/ & ~/(?s:.*)({'|'.join(words)})(?s:.*)/) ({closing})\n"

    def opened(self, prompt: str) -> bool:
        """Say whether the rendered prompt ends inside of thinking that it opened."""
        return self._thoughts is not None and prompt.rstrip().endswith(self._thoughts.opening)

    def unthought(self, prompt: str) -> str:
        """Give what is appended to the rendered prompt so that the model does not think."""
        if self._thoughts is None or prompt.rstrip().endswith((*self._thoughts.closing, self._thoughts.none.strip())):
            return ""
        if self.opened(prompt):
            return self._thoughts.end.removeprefix("\n") if prompt.endswith("\n") else self._thoughts.end
        return "" if self._asked and self._thoughts.name in ("response", "phrases") else self._thoughts.none

    def around(self, content: str, calls: str | None, literal: Literal) -> str:
        """Give the grammar of a whole reply from that of its content, in formats that are framed."""
        raise NotImplementedError

    def reader(self, tools: Sequence[Tool] | None, opened: bool) -> Reader:
        """Make the reader of one reply; without tools, nothing in it is a call."""
        return TaggedReader(self._thinking, self._calls, tools, self._spelled, opened and self.thinks)

    def grammar(self, tools: Sequence[Tool], whole: bool, several: bool, literal: Literal) -> str:
        """Give the grammar (Lark, as llguidance reads it) of one unit of calls, or of a `whole` reply of calls; of one call, or of `several`."""
        if not tools:
            raise RequestError("tools: there are none to call")
        return self._calls.grammar(tools, whole, several, literal)

    def demanded(self, tools: Sequence[Tool], several: bool, literal: Literal) -> str:
        """Give the grammar of a reply that must be calls."""
        return self._calls.demanded(tools, several, literal)

    def bare(self, tools: Sequence[Tool], several: bool) -> str:
        """Give the grammar of calls that lack their marks; "" where that is how they are written."""
        return self._calls.bare(tools, several)

    def prepare(self, messages: Sequence[Mapping[str, Any]],
                tools: Sequence[Tool] | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Give messages and tools as the template is rendered with them: told in words where the template does not show them."""
        given = [dict(message) for message in messages]
        shows = not isinstance(self._calls, Prompted)
        given = self._calls.adapt(given) if shows and "tool_calls" in self._source else told_turns(given, self._calls)
        if not tools:
            return given, None
        if self.shows_tools:
            return given, [tool.as_dict() for tool in tools]
        return told_tools(given, tools, self._calls, self._source), None


class HarmonyStyle(Style):
    """Channels: thinking is one of them, which no template can leave out."""

    _calls: Harmony
    framed = True

    def __init__(self, calls: Harmony, source: str, is_token: Is):
        super().__init__(None, calls, source, is_token)
        self.name, self.thinks = "harmony", True
        self.switches = frozenset({"on", "budget", *(("effort",) if self._effort else ())})
        self.end_of_thinking, self.end_of_analysis = "<|end|><|start|>assistant<|channel|>final<|message|>", "<|end|>"

    def opened(self, prompt: str) -> bool:
        """Say whether the rendered prompt ends inside of thinking that it opened."""
        return prompt.endswith("<|channel|>analysis<|message|>")

    def unthought(self, prompt: str) -> str:
        """Refuse: such models always think."""
        raise RequestError("think: this model always thinks; give an effort, such as 'low', or a budget in tokens")

    def around(self, content: str, calls: str | None, literal: Literal) -> str:
        """Give the grammar of a whole reply, of which `content` is the fragment of what it says in the end, or `calls` that of calls instead."""
        return self._calls.around(content, calls, literal)

    def reader(self, tools: Sequence[Tool] | None, opened: bool) -> Reader:
        """Make the reader of one reply; without tools, nothing in it is a call."""
        return HarmonyReader(self._calls, tools, opened)


def find(source: str, is_token: Is) -> Style:
    """Find how a model writes its replies from its chat template's source; `is_token` says which texts are single tokens of its vocabulary."""
    made = next(made for known, made in CALLS if known(source))(source, speller(is_token))
    if isinstance(made, Harmony):
        return HarmonyStyle(made, source, is_token)
    return Style(next((row for row in THINKING if row.known(source)), None), made, source, is_token)


def _switch(think: Any) -> str:
    """Return which switch is asked for. Raises RequestError where it is none."""
    if isinstance(think, bool):
        return "on" if think else "off"
    if isinstance(think, str) and think in EFFORTS:
        return "effort"
    if not isinstance(think, int) or think < 0:
        raise RequestError(f"think: true, false, a budget in tokens, or one of {', '.join(EFFORTS)}, not {shown(think)}")
    return "budget"


def _can(switches: frozenset[str]) -> str:
    words = {"on": "true", "off": "false", "budget": "a budget in tokens", "effort": "one of " + ", ".join(EFFORTS)}
    return ", ".join(text for key, text in words.items() if key in switches)


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


def _fragment(text: str, marks: Sequence[str], literal: Literal) -> str:
    """Return a grammar's fragment of a text that begins with one of the marks, or has none."""
    mark = next((mark for mark in marks if text.startswith(mark)), "")
    return " ".join([*([literal(mark)] if mark else []), *([quoted(text[len(mark):])] if text != mark else [])])


def _spelled(words: str, marks: Sequence[str], spell: Spell) -> str:
    """Return a text with the mark in it as a reader meets it."""
    mark = next((mark for mark in marks if mark in words), None)
    return words if mark is None else words.replace(mark, spell(mark))
