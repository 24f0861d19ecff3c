"""An answer on the screen as it comes, with words that are not cut at the terminal's edge."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pyengine.cli.screen import printable, show
from pyengine.cli.talk.terminal import width

TAB = 8
FENCE = "```"                          # begins and ends lines of code, which are not wrapped: they can be copied as they are


class Paper:
    """Standard output for one answer that comes in pieces.

    Where words are wrapped, each is shown as it comes; one that reaches the edge is taken back and goes on the next line.
    """

    def __init__(self, wrap: bool):
        self._pieces: list[str] = []
        self._words = Words(lambda: width(sys.stdout)) if wrap and can_wrap() else None

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
        if self._pieces and not self.text.endswith("\n"):
            show()


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
