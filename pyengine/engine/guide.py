"""How what is asked of a reply holds while it is generated.

A `Guide` follows one answer: it splits what comes into content, thinking and calls of tools, and says before each token which ones may
come. Grammars begin where content or a call begins, never within thinking.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy as np

from pyengine.engine.wishes import CHOICES, Wishes
from pyengine.errors import RequestError
from pyengine.text.grammar import Grammars, Matcher

if TYPE_CHECKING:
    from pyengine.chat.reply.deltas import Delta, Reader
    from pyengine.engine.language import Language
    from pyengine.engine.prompts import Prompt

class Thoughts(NamedTuple):
    """How thinking begins and ends: the token that begins it where the answer may; after `budget` tokens `closing` are forced; `gap` are
    the blanks between thinking and content."""

    opening: int | None = None
    budget: int | None = None
    closing: Sequence[int] = ()
    gap: Sequence[int] = ()


class Guide:
    """One answer's way: `allowed` before each token, `push` after it, `flush` at its end.

    reader    splits the text; None: all of it is content
    content   the grammar of the content, and of calls in its place; None: free
    unit      the grammar of one call, from its opening mark on; None: calls are free
    single    whether the answer ends after one unit of calls
    framed    whether content begins behind a mark of its own, and not where the answer does
    """

    def __init__(self, reader: Reader | None, grammars: Grammars, content: str | None = None, unit: str | None = None,
                 single: bool = False, thoughts: Thoughts = Thoughts(), framed: bool = False):
        self.reader, self._grammars, self._unit, self._single, self._thoughts, self._framed = reader, grammars, unit, single, thoughts, framed
        self._content = None if content is None else grammars.matcher(content)
        if unit is not None:
            grammars.matcher(unit)                           # what is wrong with it is told at once
        self._matcher: Matcher | None = None
        self._forced: deque[int] = deque()
        self._pushed: list[tuple[int, int, str]] = []        # where each token's text begins, the token, the text
        self._length = 0
        self.n_thinking = 0                                  # tokens so far
        self.ended = False                                   # the content is whole, and nothing can follow
        if reader is not None:
            reader.push("")                                  # it may begin within thinking
        if self.state in ("start", "text") and not framed:
            self._matcher = self._content

    @property
    def state(self) -> str:
        """Where the answer is: "start", "thinking", "text" or "call"."""
        return "text" if self.reader is None else self.reader.state

    def allowed(self) -> np.ndarray | None:
        """Return the tokens that may come next, uint32 [ceil(n_vocab / 32)]; None if all may. Valid until the next call."""
        if self._forced:
            mask = np.zeros((self._grammars.tokenizer.vocab_size + 31) // 32, np.uint32)
            return _with(mask, self._forced[0])
        if self._matcher is None:
            return None
        mask = self._matcher.mask()
        opening = self._thoughts.opening
        return _with(mask, opening) if opening is not None and not self._pushed else mask

    def push(self, token: int, text: str) -> list[Delta]:
        """Take a token and the text that it completes; return what that means."""
        if self._forced:
            self._forced.popleft()
        elif self._matcher is not None:
            self._follow(token)
        before = self.state
        if self.reader is None:
            return [_delta()("text", text)] if text else []
        self._pushed.append((self._length, token, text))
        self._length += len(text)
        deltas = self.reader.push(text)
        self._turn(before, self.state)
        return deltas

    def flush(self, tail: str = "") -> list[Delta]:
        """Take the end of the answer's text; return what was held back."""
        if self.reader is None:
            return [_delta()("text", tail)] if tail else []
        return [*self.reader.push(tail), *self.reader.flush()]

    def _follow(self, token: int) -> None:
        if token == self._thoughts.opening and not self._pushed:
            self._matcher = None                             # the content's grammar waits for the end of thinking
        elif not self._matcher.accept(token):
            raise RequestError(f"token {token} does not go on as the grammar says")
        elif self._matcher.ended:
            self.ended, self._matcher = self._single or self._matcher is self._content, None

    def _turn(self, before: str, now: str) -> None:
        """Begin and end what holds for a part of the answer."""
        if now == "thinking" or before == "thinking":
            self.n_thinking += 1
            if now == "thinking" and self._thoughts.budget is not None and self.n_thinking >= self._thoughts.budget and not self._forced:
                self._forced.extend(self._thoughts.closing)
            if now != "thinking" and self._content is not None and self._matcher is None and not self._framed:
                self._matcher = self._content
                if not self._forced:
                    self._forced.extend(self._thoughts.gap)
        if self._framed and now == "text" and before != "text":
            self._matcher = self._content
        if now == "call" and before != "call" and self._unit is not None and self._matcher is None:
            self._begin_call()

    def _begin_call(self) -> None:
        """Let the grammar of a call hold from its opening mark on, of which tokens are there already."""
        begun = self.reader.begun
        first = next(i for i in reversed(range(len(self._pushed))) if self._pushed[i][0] <= begun)
        start, _, text = self._pushed[first]
        lead = text[: begun - start]
        rule = self._unit if not lead else f"start: {self._grammars.literal(lead)} unit\n" + _renamed(self._unit, "unit")
        matcher = self._grammars.matcher(rule)
        if all(matcher.accept(token) for _, token, _ in self._pushed[first:]) and not matcher.ended:
            self._matcher = matcher


def _with(mask: np.ndarray, token: int) -> np.ndarray:
    mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def _delta() -> Any:
    from pyengine.chat.reply.deltas import Delta

    return Delta


def guide_of(language: Language, prompt: Prompt, wishes: Wishes, content: str | None) -> tuple[Guide | None, list[int]]:
    """Make the guide of an answer to a prompt, and the ids of the tokens that are marks in it; None where all is content, and free.

    content: the grammar of `Wishes.shape`. Raises: RequestError for what cannot be enforced.
    """
    if prompt.tools is None:                                 # a plain text goes on
        return Guide(None, language.grammars, content), []
    style, tokenizer, tools = language.style, language.tokenizer, list(prompt.tools)
    if not style.thinks and not tools:
        return (Guide(None, language.grammars, content) if content else None), []
    called = [t for t in tools if wishes.tool_choice in ("auto", "required", t.name)]
    unit = None
    if called:
        literal = language.grammars.literal
        unit = style.grammar(called, False, literal)
        whole_reply = style.grammar(called, wishes.parallel_tool_calls and wishes.tool_choice in CHOICES, literal)
        if wishes.tool_choice != "auto":
            content = whole_reply
        elif content is not None and not style.framed:
            content = "start: calls | content\n" + _renamed(whole_reply, "calls") + _renamed(content, "content")
    framed = style.framed and wishes.tool_choice in ("auto", "none")         # else the grammar of the whole reply has the thinking too
    budget = wishes.think if type(wishes.think) is int and framed == style.framed else None
    may_open = content is not None and style.thinks and not prompt.opened and wishes.think is not False and budget != 0
    end, ids = style.end_of_thinking, partial(tokenizer.tokenize, add_special=False)
    thoughts = Thoughts(tokenizer.id_of(style.opening) if may_open else None, budget, ids(end), ids(end[len(end.rstrip()):]))
    guide = Guide(style.reader(tools or None, prompt.opened), language.grammars, content, unit, not wishes.parallel_tool_calls, thoughts, framed)
    return guide, language.marks


def _renamed(grammar: str, name: str) -> str:
    """Return a grammar with another name of its first rule."""
    return re.sub(r"^start:", f"{name}:", grammar, flags=re.M)
