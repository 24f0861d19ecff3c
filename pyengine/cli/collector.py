"""When the garbage collector looks at what there is: a start makes many objects, nearly all of which stay."""

from __future__ import annotations

import gc

YOUNG = 100_000          # objects that are made before the first look
_usual = gc.get_threshold()


def rest() -> None:
    """Let the collector wait."""
    gc.set_threshold(YOUNG)


def settle() -> None:
    """Let it look as often as usual from now on, if it waits: what goes on for long may make much that is garbage."""
    if gc.get_threshold()[0] == YOUNG:
        gc.set_threshold(*_usual)
