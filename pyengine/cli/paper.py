"""An answer on the screen as it comes, with words that are not cut at the terminal's edge."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

from pyengine.cli.screen import printable, show
from pyengine.cli.talk.terminal import width

if TYPE_CHECKING:
    from pyengine.chat.reply.deltas import Delta

TAB = 8
SHOWN, FOLDED, HIDDEN = "shown", "folded", "hidden"                # thinking: as it comes, as one line that counts it, not at all
_DIM, _BRIGHT, _AFRESH = "\x1b[2m", "\x1b[22m", "\r\x1b[K"
FENCE = "```"                          # begins and ends lines of code, which are not wrapped: they can be copied as they are


class Paper:
    """Standard output for one answer that comes in pieces.

    Where words are wrapped, each is shown as it comes; one that reaches the edge is taken back and goes on the next line.
    thinking: one of SHOWN, FOLDED, HIDDEN, at a terminal; elsewhere standard output has the answer only.
    """

    def __init__(self, wrap: bool, thinking: str = SHOWN):
        self._pieces: list[str] = []
        self._wraps = wrap and can_wrap()
        self._words = self._new_words()
        self._thinking = thinking if sys.stdout.isatty() else HIDDEN
        self._thinks, self._n_thinking, self._since, self._last = False, 0, 0.0, ""

    def _new_words(self) -> Words | None:
        return Words(lambda: width(sys.stdout)) if self._wraps else None

    def take(self, delta: Delta, report: Any) -> None:
        """Show a piece of any kind; `report`: a Report, which counts thinking. Calls of tools are told by who runs them."""
        if delta.kind == "thinking":
            self._think(delta.text, report.n_thinking)
        elif self._thinks:
            self._end_thinking()
        if delta.kind == "text":
            self.write(delta.text)

    def _think(self, piece: str, n: int) -> None:
        if not self._thinks:
            self._thinks, self._since = True, time.perf_counter()
        self._n_thinking, self._last = n, piece or self._last
        dim = can_wrap()
        if self._thinking == SHOWN:
            text = printable(piece)
            text = text if self._words is None else self._words.push(text)
            sys.stdout.write(f"{_DIM}{text}{_BRIGHT}" if dim else text)
        elif self._thinking == FOLDED and dim:
            sys.stdout.write(f"{_AFRESH}{_DIM}thinking: {n} tokens{_BRIGHT}")
        sys.stdout.flush()

    def _end_thinking(self) -> None:
        """Set what follows apart from it."""
        self._thinks, self._words = False, self._new_words()
        if self._thinking == SHOWN:
            show("" if self._last.endswith("\n") else "\n")
        elif self._thinking == FOLDED:
            line = thought(self._n_thinking, time.perf_counter() - self._since)
            sys.stdout.write(f"{_AFRESH}{_DIM}{line}{_BRIGHT}\n" if can_wrap() else f"{line}\n")
            sys.stdout.flush()

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._pieces)

    def write(self, piece: str) -> None:
        """Show a piece."""
        self._pieces.append(piece)
        if self._words is None:
            show(piece, end="")
        else:
            sys.stdout.write(self._words.push(printable(piece)))
            sys.stdout.flush()

    def end(self) -> None:
        """End the last line, if there was any piece."""
        if self._thinks:
            self._end_thinking()
        if self._pieces and not self.text.endswith("\n"):
            show()


def thought(n: int, seconds: float) -> str:
    """Say how much was thought."""
    return f"thought for {n} token{'s' * (n != 1)}, {seconds:.1f} s"


def can_wrap() -> bool:
    """Say whether standard output is a terminal whose cursor can be moved back."""
    return sys.stdout.isatty() and os.name != "nt" and os.environ.get("TERM", "dumb") != "dumb"


class Words:
    """Where the words of a text that comes in pieces stand on lines of a terminal.

    `columns` gives the terminal's width. The last column stays free, so that the cursor never waits beyond it.
    """

    def __init__(self, columns: Callable[[], int]):
        self._columns = columns
        self._at = 0                                             # column of the cursor
        self._word, self._word_at = "", 0                        # what was shown since the last space, and the columns that it takes
        self._line = ""                                          # beginning of the text's line, to find fences
        self._code = False

    def push(self, text: str) -> str:
        """Return what to write for the next piece of text."""
        from rich.cells import cell_len

        edge = max(2, self._columns()) - 1
        out = []
        for char in text:
            if char == "\n":
                out.append(self._newline())
                continue
            self._line += char if len(self._line) < 80 else ""
            n = TAB - self._at % TAB if char == "\t" else cell_len(char)
            if self._code:
                out.append(char)
            elif char in " \t":
                out.append(self._space(char, n, edge))
            else:
                out.append(self._letter(char, n, edge))
        return "".join(out)

    def _newline(self) -> str:
        if self._line.strip().startswith(FENCE):
            self._code = not self._code
        self._at, self._word, self._word_at, self._line = 0, "", 0, ""
        return "\n"

    def _space(self, char: str, n: int, edge: int) -> str:
        self._word, self._word_at = "", 0
        if self._at + n > edge:                                  # the break stands for it
            self._at = edge
            return ""
        self._at += n
        return char

    def _letter(self, char: str, n: int, edge: int) -> str:
        """Place a letter; wide ones, of scripts that set no spaces, are words of their own."""
        if n > 1:
            self._word, self._word_at = "", 0
        moved = ""
        if self._at + n > edge:
            whole = self._word_at < self._at                     # a word that fills its line is cut
            back = self._word_at if whole else 0
            moved = (f"\x1b[{back}D\x1b[K" if back else "") + "\n" + (self._word if whole else "")
            self._at = back
            if not whole:
                self._word, self._word_at = "", 0
        self._at += n
        if n > 1:
            return moved + char
        self._word, self._word_at = self._word + char, self._word_at + n
        return moved + char
