"""What the command line shows: text that cannot steer the terminal, columns, sizes, and what goes on meanwhile."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pyengine.cli.words import told

PROGRAM = "pyengine-run"
BAR_AFTER_SECONDS = 0.3

# Control characters but for newline and tab: neither a model's text nor a file's metadata may steer the terminal.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Return `text` with each control character as its visible escape, "\\x1b"."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def show(text: str = "", end: str = "\n") -> None:
    """Write text to standard output at once; control characters are made visible where that is a terminal."""
    sys.stdout.write((printable(text) if sys.stdout.isatty() else text) + end)
    sys.stdout.flush()


def note(text: str) -> None:
    """Write one line to standard error, so that standard output holds the answer only."""
    print(printable(text), file=sys.stderr, flush=True)


def complain(text: object) -> None:
    """Write what went wrong to standard error, after the program's name."""
    note(f"{PROGRAM}: {told(str(text))}")


def show_json(value: Any) -> None:
    """Write plain data to standard output as JSON."""
    print(json.dumps(value, indent=2), flush=True)


def show_columns(rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> None:
    """Write rows in aligned columns, never wrapped or cut; the columns numbered in `right` are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        aligned = (cell.rjust(n) if i in right else cell.ljust(n) for i, (cell, n) in enumerate(zip(row, widths)))
        show("  ".join(aligned).rstrip())


def size(nbytes: float) -> str:
    """Return a number of bytes for people: "241.4 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} bytes" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


class LoadingBar:
    """A bar that shows loading, on a terminal and only if it takes a while; an instance is `load`'s `progress`.

    It ends when it is left: an image encoder that is loaded later, with the same `progress`, shows none.
    """

    def __init__(self, model: str):
        self._name, self._started, self._bar, self._left = Path(model).name, time.perf_counter(), None, False

    def __call__(self, done: int, total: int) -> None:
        """Take the bytes that are loaded, of how many."""
        if self._left:
            return
        if self._bar is None and done < total and time.perf_counter() - self._started > BAR_AFTER_SECONDS:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            self._bar = Progress(TextColumn("loading {task.description}", markup=False), BarColumn(),
                                 DownloadColumn(binary_units=True), console=Console(stderr=True), transient=True,
                                 auto_refresh=False)
            self._bar.add_task(printable(self._name), total=total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
            self._bar.refresh()

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._left = True
        if self._bar is not None:
            self._bar.stop()


def busy(what: str) -> AbstractContextManager[Any]:
    """Show on standard error, where that is a terminal, what is being done; it is gone when left."""
    if not what or not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(printable(what)))


def load(model: str, **settings: Any) -> Any:
    """Load a model, with a bar on standard error where that is a terminal. Raises as `pyengine.load`."""
    import pyengine

    with LoadingBar(model) as bar:
        return pyengine.load(model, progress=bar if sys.stderr.isatty() else None, **settings)
