"""The text of a reply as a tape: it is read once, from left to right, by generators that yield where they need more of it.

A generator that reads is run by `yield from`; each `yield` means "more text, please". So a form is written down as what comes
after what, and where the text was cut makes no difference. Nothing is read twice, so the time is linear in the text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]       # what gives a T when it has read enough

_BLANKS = re.compile(r"[ \t\r\n]*")


class Malformed(Exception):
    """What comes next, or the reply's end, cannot be there."""


class Tape:
    """Text that was pushed and not yet read; `past`, where it is a list, gathers what is read."""

    def __init__(self) -> None:
        self.text, self.at, self.ended = "", 0, False
        self.base = 0                                    # offset of `text` in all that was pushed
        self.past: list[str] | None = None

    @property
    def offset(self) -> int:
        """How much was read."""
        return self.base + self.at

    def add(self, text: str) -> None:
        """Append text; what was read is let go of."""
        self.base += self.at
        self.text, self.at = self.text[self.at :] + text, 0

    def take(self, end: int) -> str:
        """Read on up to the position `end` of the text that is here."""
        piece, self.at = self.text[self.at : end], end
        if self.past is not None and piece:
            self.past.append(piece)
        return piece

    def peek(self) -> Reading[str]:
        """Wait for the next character and give it, unread; "" at the end."""
        while self.at >= len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def skip_blanks(self, out: Callable[[str], object] | None = None) -> Reading[str]:
        """Read blanks, which `out` may see, and give the next character, unread; "" at the end."""
        while True:
            end = _BLANKS.match(self.text, self.at).end()        # type: ignore[union-attr]
            if end > self.at:
                blanks = self.take(end)
                if out:
                    out(blanks)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            yield

    def word(self, *words: str) -> Reading[str]:
        """Read the one of these words that comes next, the longest where several do, and give it; "" where none does."""
        while True:
            rest = len(self.text) - self.at
            waits = not self.ended and any(rest < len(w) and w.startswith(self.text[self.at :]) for w in words)
            if not waits:
                found = max((w for w in words if self.text.startswith(w, self.at)), key=len, default="")
                self.take(self.at + len(found))
                return found
            yield

    def expect(self, word: str) -> Reading[None]:
        """Read this word. Raises Malformed where something else comes."""
        if not (yield from self.word(word)):
            raise Malformed

    def until(self, stops: Stops, out: Callable[[str], object]) -> Reading[str]:
        """Read what comes before the first of some words, which `out` sees as it comes; the word is read and given, "" at the end."""
        while True:
            found = stops.find(self.text, self.at)
            if found and not self.ended and stops.may_grow(self.text, found.start()):
                found = None
            end = found.start() if found else len(self.text) if self.ended else stops.safe(self.text, self.at)
            if end > self.at:
                out(self.take(end))
            if found:
                return self.take(found.end())
            if self.ended:
                return ""
            yield


class Stops:
    """Words that end a text: where the first of them is, and how much of a text cannot become one."""

    def __init__(self, *words: str):
        self.words = tuple(sorted(set(words), key=len, reverse=True))
        self._longest = max(map(len, words), default=0)
        self._whole = re.compile("|".join(map(re.escape, self.words)) or r"(?!)")
        self._begun = re.compile("|".join(_prefixes(w) for w in self.words if len(w) > 1) or r"(?!)")

    def find(self, text: str, at: int) -> re.Match[str] | None:
        """Find the first of the words."""
        return self._whole.search(text, at)

    def may_grow(self, text: str, at: int) -> bool:
        """Say whether a longer word than the one that stands here may come of the text's end."""
        rest = len(text) - at
        return rest < self._longest and any(len(w) > rest and w.startswith(text[at:]) for w in self.words)

    def safe(self, text: str, at: int) -> int:
        """Give the position before which no word can begin, whatever comes."""
        begun = self._begun.search(text, max(at, len(text) - self._longest + 1))
        return begun.start() if begun else len(text)


@functools.lru_cache(256)
def stops(*words: str) -> Stops:
    """Return `Stops` of these words, made once."""
    return Stops(*words)


def _prefixes(word: str) -> str:
    """Return a pattern of this word's beginnings at a text's end."""
    pattern = ""
    for letter in reversed(word[1:-1]):
        pattern = f"(?:{re.escape(letter)}{pattern})?"
    return f"{re.escape(word[0])}{pattern}\\Z"
