"""The terminal itself: its width, and keys that are not shown while a model works."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_KEYS = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|.)?|[\x00-\x08\x0b\x0c\x0e-\x1f]", re.DOTALL)     # that write nothing
_TAKEN_BACK = re.compile(r"[^\x7f]?\x7f")


def width(stream: TextIO) -> int:
    """Return the columns of a terminal; 80 where they are not known."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what is typed in this context off the screen; it waits for whoever reads next. Ctrl-C still interrupts, and drops nothing.

    Does nothing where input or output is no terminal, on Windows, and in the background.
    """
    if os.name == "nt" or not _ours():
        yield
        return
    import termios

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    silent = [list(a) if isinstance(a, list) else a for a in before]
    silent[0] &= ~termios.ICRNL                                  # Enter comes as a prompt reads it
    silent[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
    silent[3] |= termios.NOFLSH
    silent[6][termios.VMIN], silent[6][termios.VTIME] = 1, 0

    def apply(*_: object) -> None:
        termios.tcsetattr(fd, termios.TCSANOW, silent)

    resumed = signal.signal(signal.SIGCONT, apply)               # a shell sets the terminal while a program is stopped
    try:
        apply()
        yield
    finally:
        signal.signal(signal.SIGCONT, resumed)
        termios.tcsetattr(fd, termios.TCSANOW, before)


def typed_ahead() -> str:
    """Take what has been typed and not read yet, in `quiet`, as text: Enter is a new line in it, but not at its end.

    There is nothing where the input is no terminal, and on Windows.
    """
    if os.name == "nt" or not _ours():
        return ""
    import select

    typed, fd = b"", sys.stdin.fileno()
    while select.select([fd], [], [], 0)[0] and (more := os.read(fd, 4096)):
        typed += more
    text = _KEYS.sub("", typed.decode("utf-8", "ignore").replace("\r", "\n"))
    while _TAKEN_BACK.search(text):
        text = _TAKEN_BACK.sub("", text)
    return text.rstrip("\n")


def _ours() -> bool:
    """Say whether input and output are a terminal, and ours to set: not in the background, nor with a pager at the other end."""
    if sys.stdin is None or sys.stdout is None:                  # closed by the shell
        return False
    try:
        return sys.stdin.isatty() and sys.stdout.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
