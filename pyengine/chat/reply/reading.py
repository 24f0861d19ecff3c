"""Readers of replies: what tells deltas, and the reader of text with thinking before it and calls in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyengine.chat.reply.calls import Calls, Unit
from pyengine.chat.reply.deltas import Delta, joined, Reader
from pyengine.chat.reply.tape import Malformed, Reading, stops, Tape
from pyengine.chat.reply.tools import Tool
from pyengine.records import dataclass
from pyengine.text.marks import MARK

BLANKS = " \t\r\n"


@dataclass(frozen=True)
class Thinking:
    """How a family marks its thinking, as its marks come to a reader; `frame` marks the answer after it, where the family marks that too."""

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    frame: tuple[str, ...] = ()


class TapeReader(Reader):
    """A reader whose `_read` is a generator over a tape; what it tells is joined for each push."""

    def __init__(self) -> None:
        self._tape, self._told = Tape(), list[Delta]()
        self._steps = self._read()
        self._finished = False

    def _read(self) -> Reading[None]:
        raise NotImplementedError

    def push(self, text: str) -> list[Delta]:
        """Read on: give what can be told."""
        self._tape.add(text)
        return self._step()

    def flush(self) -> list[Delta]:
        """End the reply: give what was held back."""
        self._tape.ended = True
        return self._step()

    def _step(self) -> list[Delta]:
        if not self._finished:
            try:
                next(self._steps)
            except StopIteration:
                self._finished = True
        told, self._told = joined(self._told), []
        return told

    def _tell(self, kind: str, text: str, index: int = 0) -> None:
        self._told.append(Delta(kind, text, index))

    def _enter_call(self, begun: int) -> None:
        self.state, self.begun = "call", begun


class TaggedReader(TapeReader):
    """Text, with thinking before it, and units of calls between marks.

    Blanks around thinking and calls are dropped, so the end of a text is held back while it is blank and a call may follow.
    `marks` are all that the decoder may give: those that nobody waits for are left out.
    """

    def __init__(self, thinking: Thinking | None, calls: Calls | None, tools: Sequence[Tool] | None, marks: Sequence[str], opened: bool):
        self._thinking, self._calls, self._opened = thinking, calls if tools else None, opened
        self._tools: Mapping[str, Tool] = {tool.name: tool for tool in tools or ()}
        self._marks = [m for m in marks if m.startswith(MARK)] + [MARK]
        self._call_marks = () if calls is None else (*calls.opening, *calls.leading, *calls.inner)
        self._blanks: list[str] = []                     # held back
        self._count = 0                                  # of calls
        self._orphans: set[str] = set()                  # inner marks of a call that broke, which are letters
        self._drops = False                              # blanks before the next text
        self._thought = False
        super().__init__()

    def _read(self) -> Reading[None]:
        if self._opened:
            yield from self._think()
        while True:
            mark, begun = yield from self._next_mark()
            if not mark:
                return
            if self._thinking and mark in self._thinking.opening:
                yield from self._think()
            elif self._calls and mark in (*self._calls.opening, *self._calls.leading):
                yield from self._read_calls(self._calls, mark, begun)
            elif self._thinking and mark in self._thinking.frame:
                self._blanks, self._drops = [], True
            elif mark in self._orphans:
                self._orphans.discard(mark)
                self._tell_text(mark.removeprefix(MARK))

    # -- text ------------------------------------------------------------------------------------------------------------

    def _next_mark(self) -> Reading[tuple[str, int]]:
        """Tell text up to the next mark. Gives it, and where it begins; "" at the end."""
        tape, fresh = self._tape, self.state == "start" or self._drops
        if fresh:
            yield from tape.skip_blanks(None if self._drops else self._blanks.append)
            mark = yield from tape.word(*self._awaited(True))
            if mark or (yield from tape.peek()) == "":
                if not mark and not self._drops:
                    self._tell("text", self._held())
                return mark, tape.offset - len(mark)
        mark = yield from tape.until(stops(*self._awaited(False)), self._tell_text)
        if not mark:
            self._tell("text", self._held())
        return mark, tape.offset - len(mark)

    def _awaited(self, fresh: bool) -> list[str]:
        """List what is a mark at this place: after blanks only (`fresh`), or inside of a text."""
        found = list(self._marks)
        if self._calls:
            found += (*self._calls.opening, *self._calls.leading) if fresh else self._calls.opening
        if self._thinking and fresh:
            found += self._thinking.opening
        if self._thinking and self._thought:
            found += self._thinking.frame
        return found

    def _tell_text(self, text: str) -> None:
        self._drops = False
        self._hold(text, "text", self._calls is not None or (self._thought and bool(self._thinking and self._thinking.frame)))
        if text:
            self.state = "text"

    def _hold(self, text: str, kind: str, holds: bool) -> None:
        """Tell a text but for the blanks at its end, which are held back."""
        solid = text.rstrip(BLANKS) if holds else text
        if solid:
            self._tell(kind, self._held() + solid)
        if len(solid) < len(text):
            self._blanks.append(text[len(solid) :])

    def _held(self) -> str:
        held, self._blanks = "".join(self._blanks), []
        return held

    # -- thinking --------------------------------------------------------------------------------------------------------

    def _think(self) -> Reading[None]:
        thinking, tape = self._thinking, self._tape
        assert thinking
        self.state, self._thought, self._blanks = "thinking", True, []
        yield from tape.skip_blanks()
        yield from tape.word(*thinking.opening)          # some open it again after the prompt did
        yield from tape.skip_blanks()
        awaited = stops(*thinking.closing, *self._marks)
        while True:
            mark = yield from tape.until(awaited, lambda text: self._hold(text, "thinking", True))
            if mark in thinking.closing:
                self._blanks, self._drops = [], True
                self.state = "text"
                return
            if not mark:
                self._tell("thinking", self._held())
                return
            if mark in self._call_marks:
                self._hold(mark.removeprefix(MARK), "thinking", True)

    # -- calls -----------------------------------------------------------------------------------------------------------

    def _read_calls(self, calls: Calls, opening: str, begun: int) -> Reading[None]:
        tape = self._tape
        unit = Unit(tape, self._tools, self._tell, self._count, lambda: self._enter_call(begun))
        self.bare = opening in calls.leading
        if not self.bare:
            self._enter_call(begun)
        tape.past, whole = [opening], True
        try:
            yield from calls.read(unit, opening)
        except Malformed:
            whole = False
        past, tape.past, self._count, self.state = tape.past, None, unit.index, "text"
        if whole or unit.was_told:
            self._blanks = []
        self._drops = whole
        if not whole:
            self._tell_text("".join(past or ()).replace(MARK, ""))
            self._orphans.update(mark for mark in calls.inner if mark.startswith(MARK))
