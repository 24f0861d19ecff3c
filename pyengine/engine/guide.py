"""How what is asked of a reply holds while it is generated.

A `Guide` follows one answer: it splits what comes into content, thinking and calls of tools, and says before each token which ones may
come. Grammars begin where content or a call begins, never within thinking.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TYPE_CHECKING

import numpy as np

from pyengine.chat.reply.deltas import Delta, Reader
from pyengine.engine.wishes import CHOICES, Wishes
from pyengine.errors import RequestError
from pyengine.records import NamedTuple
from pyengine.text.grammar import Grammars, Matcher, nested

if TYPE_CHECKING:
    from pyengine.chat.reply.style import Style
    from pyengine.chat.reply.tools import Tool
    from pyengine.engine.language import Language
    from pyengine.engine.prompts import Prompt


class Thoughts(NamedTuple):
    """How thinking goes together with a grammar of the content, and how it ends.

    first     the grammar of the answer's beginning, which may open thinking; None: that of the content
    within    whether the content's grammar has the thinking too
    budget    after so many tokens `closing` are forced
    gap       tokens between thinking and content
    """

    first: str | None = None
    within: bool = False
    budget: int | None = None
    closing: Sequence[int] = ()
    gap: Sequence[int] = ()


class Units(NamedTuple):
    """Grammars of calls, from their opening mark on, and of those that lack it; None: what is written is not held to one. single: whether
    the answer ends after one call."""

    marked: str | None = None
    bare: str | None = None
    single: bool = False


class Guide:
    """One answer's way: `allowed` before each token, `push` after it, `flush` at its end.

    reader    splits the text; None: all of it is content
    content   the grammar of the content, and of calls in its place; None: free
    """

    def __init__(self, reader: Reader | None, grammars: Grammars, content: str | None = None, units: Units = Units(),
                 thoughts: Thoughts = Thoughts()):
        self.reader, self._grammars, self._units, self._thoughts = reader, grammars, units, thoughts
        self._content = None if content is None else grammars.matcher(content)
        for unit in (units.marked, units.bare):
            if unit:
                grammars.matcher(unit)                       # what is wrong with it is told at once
        self._matcher: Matcher | None = None
        self._in_unit = False                                # whether it follows a call in a content that is free
        self._forced: deque[int] = deque()
        self._pushed: list[tuple[int, int, str]] = []        # where each token's text begins, the token, the text
        self._length = 0
        self.n_thinking = 0                                  # tokens so far
        self.ended = False                                   # the content is whole, and nothing can follow
        if reader is not None:
            reader.push("")                                  # it may begin within thinking
        if thoughts.within or self.state in ("start", "text"):
            self._matcher = self._content if thoughts.first is None else grammars.matcher(thoughts.first)

    @property
    def state(self) -> str:
        """Where the answer is: "start", "thinking", "text" or "call"."""
        return "text" if self.reader is None else self.reader.state

    def allowed(self) -> np.ndarray | None:
        """Return the tokens that may come next, uint32 [ceil(n_vocab / 32)]; None if all may. Valid until the next call."""
        if self._forced:
            mask = np.zeros((self._grammars.tokenizer.vocab_size + 31) // 32, np.uint32)
            mask[self._forced[0] // 32] = np.uint32(1 << self._forced[0] % 32)
            return mask
        if self._matcher is not None:
            return self._matcher.mask()
        if self._content is not None and self.state in ("start", "thinking"):
            return self._grammars.going_on                   # the content is still to come
        return None

    def forced(self, most: int) -> list[int]:
        """Return tokens, `most` at most, that come next unless a grammar's text is cut into others; none where there is a choice."""
        if self._forced:
            return list(self._forced)[:most]
        return [] if self._matcher is None else self._matcher.forced()[:most]

    def n_allowed(self, tokens: Sequence[int]) -> int:
        """Return how many of these tokens may come next, as far as a grammar holds."""
        if self._forced:
            return next((i for i, pair in enumerate(zip(tokens, self._forced)) if pair[0] != pair[1]), min(len(tokens), len(self._forced)))
        return len(tokens) if self._matcher is None else self._matcher.n_allowed(tokens)

    def push(self, token: int, text: str) -> list[Delta]:
        """Take a token and the text that it completes; return what that means."""
        forced = bool(self._forced)
        if forced:
            self._forced.popleft()
        if self._matcher is not None and (not forced or self._thoughts.within):
            self._follow(token)
        before = self.state
        if self.reader is None:
            return [Delta("text", text)] if text else []
        self._pushed.append((self._length, token, text))
        self._length += len(text)
        deltas = self.reader.push(text)
        self._turn(before, self.state)
        return deltas

    def flush(self, tail: str = "") -> list[Delta]:
        """Take the end of the answer's text; return what was held back."""
        if self.reader is None:
            return [Delta("text", tail)] if tail else []
        return [*self.reader.push(tail), *self.reader.flush()]

    def _follow(self, token: int) -> None:
        if not self._matcher.accept(token):
            raise RequestError(f"token {token} does not go on as the grammar says")
        if self._matcher.ended:
            self.ended, self._matcher, self._in_unit = self._units.single or not self._in_unit, None, False

    def _turn(self, before: str, now: str) -> None:
        """Begin and end what holds for a part of the answer."""
        thoughts = self._thoughts
        if now == "thinking" or before == "thinking":
            self.n_thinking += 1
            if now == "thinking" and thoughts.budget is not None and self.n_thinking >= thoughts.budget and not self._forced:
                if not thoughts.within or self._matcher is None or self._matcher.allows(thoughts.closing[0]):       # within a letter it waits
                    self._forced.extend(thoughts.closing)
            if not thoughts.within and self._content is not None:
                self._matcher = None if now == "thinking" else self._content
                if now != "thinking" and not self._forced:
                    self._forced.extend(thoughts.gap)
        if now == "call" and before != "call" and self._matcher is None:
            self._begin_call()
        if before == "call" and now != "call" and self._units.single and self._matcher is None:
            self.ended = True

    def _begin_call(self) -> None:
        """Let the grammar of a call hold from its opening mark on, of which tokens are there already."""
        unit = self._units.bare if self.reader.bare and self._units.bare else self._units.marked
        if unit is None:
            return
        begun = self.reader.begun
        first = next(i for i in reversed(range(len(self._pushed))) if self._pushed[i][0] <= begun)
        start, _, text = self._pushed[first]
        lead = text[: begun - start]
        rule = unit if not lead else f"start: {self._grammars.literal(lead)} unit\nunit: {nested(unit)}\n"
        matcher = self._grammars.matcher(rule)
        if all(matcher.accept(token) for _, token, _ in self._pushed[first:]) and not matcher.ended:
            self._matcher, self._in_unit = matcher, True


# ---------------------------------------------------------------------------------------------------------------------
# From what is asked to a guide


def guide_of(language: Language, prompt: Prompt, wishes: Wishes, content: str | None) -> tuple[Guide | None, list[int]]:
    """Make the guide of an answer to a prompt, and the ids of the tokens that are marks in it; None where all is content, and free.

    content: the grammar of `Wishes.shape`. Raises: RequestError for what cannot be enforced.
    """
    if content is not None:                                  # what is wrong with it is told by itself, by its name
        with _named(wishes.shaped_by):
            language.grammars.matcher(content)
    if prompt.tools is None:                                 # a plain text goes on
        return Guide(None, language.grammars, content), []
    style, grammars, tools = language.style, language.grammars, list(prompt.tools)
    if not style.thinks and not tools:
        return (Guide(None, grammars, content) if content else None), []
    called = [t for t in tools if wishes.tool_choice in ("auto", "required", t.name)]
    demanded = bool(called) and wishes.tool_choice != "auto"
    units = Units()
    if called:
        several = wishes.parallel_tool_calls and wishes.tool_choice in CHOICES
        held = called if demanded else _holdable(style, called, grammars)
        if held or content is not None:
            units = Units(style.grammar(held or called, False, several, grammars.literal), style.bare(held or called, several), not several)
            if demanded:
                content = style.demanded(called, several, grammars.literal)
                with _named("tools"):
                    grammars.matcher(content)
            elif content is not None and style.framed:
                content = style.around(nested(content), nested(style.grammar(held or called, False, several, grammars.literal)), grammars.literal)
            elif content is not None:
                whole = style.grammar(held or called, True, several, grammars.literal)
                content = f"start: calls | content\ncalls: {nested(whole)}\ncontent: {nested(content)}\n"
        else:
            units = Units(single=not several)
    elif content is not None and style.framed:
        content = style.around(nested(content), None, grammars.literal)
    thoughts, content = _thoughts(language, prompt, wishes, content, bool(called))
    return Guide(style.reader(tools or None, prompt.opened), grammars, content, units, thoughts), language.marks


def _thoughts(language: Language, prompt: Prompt, wishes: Wishes, content: str | None, calls: bool) -> tuple[Thoughts, str | None]:
    """Return how the answer may think, and its content's grammar, with the thinking in it where no token tells its end."""
    style, ids = language.style, partial(language.tokenizer.tokenize, add_special=False)
    budget = wishes.think if type(wishes.think) is int else None
    if style.framed:
        end = style.end_of_analysis if calls and content is not None else style.end_of_thinking
        return Thoughts(None, content is not None, budget, ids(end)), content
    thoughts = Thoughts(None, False, budget, ids(style.end_of_thinking), ids(style.gap))
    may_open = style.thinks and not prompt.opened and wishes.think is not False
    if content is None or not (may_open or prompt.opened):
        return thoughts, content
    literal = language.grammars.literal
    if style.closes_by_token:
        first = f"start: opens | content\nopens: {style.opens(literal)} /(?s:.*)/\ncontent: {nested(content)}\n"
        return thoughts._replace(first=first if may_open else None), content
    opens = f"{style.opens(literal)} " if may_open else ""
    start = "start: opens content" + (" | content\n" if may_open else "\n")
    return thoughts._replace(within=True), f"{start}opens: {opens}thought\n{style.thought()}content: {nested(content)}\n"


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Begin an error with the name of the argument that it is about."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{field}: {error}") from None


def _holdable(style: Style, tools: Sequence[Tool], grammars: Grammars) -> list[Tool]:
    """Return tools whose calls can be held to a grammar: as they are, or else to the names and types of their arguments; none where some
    cannot at all. Raises: RequestError for one that is to be strict."""
    def fault(*some: Tool) -> RequestError | None:
        try:
            grammars.matcher(style.grammar(some, False, False, grammars.literal))
        except RequestError as error:
            return error
        return None

    held: list[Tool] = []
    if fault(*tools) is None:
        return list(tools)
    for tool in tools:
        found = fault(tool)
        if found is not None and tool.strict:
            with _named("tools"):
                raise found
        if found is not None:
            tool = replace(tool, parameters=_loosened(tool.parameters))
            if not tool.parameters["properties"] and tool.parameters["additionalProperties"] or fault(tool):
                return []
        held.append(tool)
    return held


_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")


def _loosened(schema: Any) -> dict[str, Any]:
    """Return what of a schema of arguments any format can hold: the names and types that it gives them."""
    given = schema.get("properties", {})
    kinds = {name: of.get("type") if isinstance(of, dict) else None for name, of in given.items()}
    return {"type": "object", "properties": {name: {"type": kind} if kind in _TYPES else {} for name, kind in kinds.items()},
            "additionalProperties": schema.get("additionalProperties") is not False and not given}
