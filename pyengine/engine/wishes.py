"""What is asked of a reply beside its text: thinking, a choice among tools, a form of the content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TYPE_CHECKING

import numpy as np

from pyengine.arguments import switch, whole
from pyengine.errors import nearest, RequestError, shown
from pyengine.records import dataclass

if TYPE_CHECKING:
    from pyengine.chat.reply.tools import Tool

EFFORTS = ("low", "medium", "high")
CHOICES = ("auto", "none", "required")


@dataclass(frozen=True)
class Wishes:
    """What a request asks of a reply. Raises: RequestError for what is none of these.

    think                True, False, a budget in tokens, or "low", "medium", "high"; None: as the model's template has it
    tool_choice          "auto" (the model decides), "none", "required" (one call at least), or the name of the tool that must be called
    parallel_tool_calls  whether a reply may hold several calls
    format, regex, grammar   the form of the content: `grammar.shape`
    """

    think: Any = None
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    format: Any = None
    regex: Any = None
    grammar: Any = None

    def __post_init__(self) -> None:
        if self.think is not None and not isinstance(self.think, (bool, np.bool_)) and self.think not in EFFORTS:
            if isinstance(self.think, str):
                raise RequestError(f"think: must be True, False, a number of tokens, or one of {', '.join(EFFORTS)}, got {shown(self.think)}")
            object.__setattr__(self, "think", whole("think", self.think) or False)       # a budget of nothing is none
        elif isinstance(self.think, np.bool_):
            object.__setattr__(self, "think", bool(self.think))
        choice = self.tool_choice
        if isinstance(choice, Mapping):                      # OpenAI's form
            inner = choice.get("function") if isinstance(choice.get("function"), Mapping) else choice
            choice = inner.get("name")
        if choice is None and self.tool_choice is None:
            choice = "auto"
        if not isinstance(choice, str):
            raise RequestError(f"tool_choice: must be one of {', '.join(CHOICES)}, or a tool's name, got {shown(self.tool_choice)}")
        object.__setattr__(self, "tool_choice", choice)
        switch("parallel_tool_calls", self.parallel_tool_calls)

    @property
    def shape(self) -> str | None:
        """The grammar of the content; None if it is free. Raises: RequestError."""
        from pyengine.text.grammar import shape

        return shape(self.format, self.regex, self.grammar)

    @property
    def shaped_by(self) -> str:
        """The name of what gives `shape`: "format", "regex" or "grammar"."""
        return next(name for name in SHAPES if getattr(self, name) is not None)

    def after_calls(self) -> Wishes:
        """Return what is asked when a call has been made: the model decides whether another one is needed."""
        return self if self.tool_choice == "none" else replace(self, tool_choice="auto")

    def check_choice(self, tools: Sequence[Tool]) -> None:
        """Check that the choice can be made. Raises: RequestError."""
        if self.tool_choice in ("auto", "none"):
            return
        if not tools:
            raise RequestError(f"tool_choice: {shown(self.tool_choice)} asks for a call, but there are no tools")
        names = [t.name for t in tools]
        if self.tool_choice != "required" and self.tool_choice not in names:
            raise RequestError(f"tool_choice: there is no tool {shown(self.tool_choice)}{nearest(self.tool_choice, names)}; there are {', '.join(names)}")


WISHES = tuple(f.name for f in fields(Wishes))
SHAPES = ("format", "regex", "grammar")                      # those of them that a prompt without a conversation can have
