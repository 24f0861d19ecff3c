"""Modules that an answer needs are imported while weights are packed: C code does that, without Python's lock."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

ANSWERING = ("pyengine.chat.template", "pyengine.chat.reply.style", "pyengine.media.messages", "pyengine.text.grammar", "pyengine.engine.guide", "tokenizers")

Progress = Callable[[int, int], None]


def beside(names: Sequence[str], progress: Progress | None) -> Progress | None:
    """Return a `progress` of `load` that imports modules in a thread from its first call on, and passes each call on.

    Who needs one of the modules meanwhile waits for it, and where one cannot be imported, it is their import that says so.
    """
    if not names:
        return progress
    left = [names]

    def told(done: int, total: int) -> None:
        if left:
            threading.Thread(target=_import, args=(left.pop(),), name="pyengine imports", daemon=True).start()
        if progress is not None:
            progress(done, total)

    return told


def _import(names: Sequence[str]) -> None:
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)
