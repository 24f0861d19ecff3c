"""What the command line shows: text that cannot steer the terminal, columns, sizes, and what goes on meanwhile."""

from __future__ import annotations

import json
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pyengine.cli.talk.terminal import quiet, width
from pyengine.cli.words import told
from pyengine.errors import RequestError, UnsupportedModelError

PROGRAM = "pyengine-run"
BAR_AFTER_SECONDS = 0.3

# Control characters but for newline and tab: neither a model's text nor a file's metadata may steer the terminal.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_COLUMNS = re.compile(r".*\S {2,}(?=\S)")               # up to a line's last column


def printable(text: str) -> str:
    """Return `text` with each control character as its visible escape, "\\x1b"."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def show(text: str = "", end: str = "\n") -> None:
    """Write text to standard output at once; control characters are made visible where that is a terminal."""
    sys.stdout.write((printable(text) if sys.stdout.isatty() else text) + end)
    sys.stdout.flush()


def folded(text: str, columns: int) -> str:
    """Fold lines between words; what goes on is indented as its line's last column is, or by two.

    A word that is longer, such as a path, stays whole.
    """
    lines = []
    for line in text.split("\n"):
        column = _COLUMNS.match(line)
        indent = len(column[0]) if column and len(column[0]) <= columns // 2 else len(line) - len(line.lstrip()) + 2
        lines.append(textwrap.fill(line, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False,
                                   replace_whitespace=False, expand_tabs=False) if len(line) > columns else line)
    return "\n".join(lines)


def note(text: str) -> None:
    """Write one line to standard error, so that standard output holds the answer only; a terminal gets it in lines of its width."""
    text = printable(text)
    print(folded(text, width(sys.stderr)) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def show_lines(text: str) -> None:
    """Write lines to standard output, those of words and columns that a terminal would cut in its width."""
    show(folded(printable(text), width(sys.stdout)) if sys.stdout.isatty() else text)


def show_rows(rows: Sequence[Sequence[str]]) -> None:
    """Write rows in columns; at a terminal the last one is wrapped within its width."""
    if not sys.stdout.isatty():
        show_columns(rows)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for number in range(len(rows[0])):
        table.add_column(no_wrap=number < len(rows[0]) - 1, overflow="fold", style="bold" if number == 0 else "")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(file=sys.stdout, width=width(sys.stdout)).print(table)


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


def load(model: str, writes: bool = True, modules: Sequence[str] = (), **settings: Any) -> Any:
    """Load a model, with a bar on standard error where that is a terminal; writes: one that writes text is needed; modules: imported meanwhile.

    Raises: as `pyengine.load`; UnsupportedModelError for a model that writes none.
    """
    import pyengine
    from pyengine.cli.beforehand import beside
    from pyengine.files.model_files import open_files
    from pyengine.programs.bound import bind

    try:
        with LoadingBar(model) as bar, quiet():
            found = pyengine.load(model, progress=beside(modules, bar if sys.stderr.isatty() else None), **settings)
    except RequestError:
        if writes and (bound := bind(open_files(model, settings.get("mmproj")))).towers:
            raise _writes_nothing(bound.files.name) from None          # whatever else it was asked for
        raise
    if writes and not getattr(found, "writes", True):
        found.close()
        raise _writes_nothing(found.plan.model)
    return found


def _writes_nothing(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} makes vectors and scores and writes no text; `{PROGRAM} show` says what can be done with it")
