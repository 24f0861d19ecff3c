"""The terminal itself: its width, and keys that are not shown while a model works."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


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


def _ours() -> bool:
    """Say whether input and output are a terminal, and ours to set: not in the background, nor with a pager at the other end."""
    if sys.stdin is None or sys.stdout is None:                  # closed by the shell
        return False
    try:
        return sys.stdin.isatty() and sys.stdout.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
