"""Fetching models: what it will take is said first, progress is shown at a terminal, and a model that is not there is offered."""

from __future__ import annotations

import re
import sys
import warnings
from typing import TYPE_CHECKING, NamedTuple

from pyengine.cli.screen import busy, note, printable, PROGRAM, show, size
from pyengine.errors import DownloadError, ModelNotFoundError, PyEngineError, RequestError
from pyengine.pull.names import HubName, parse

if TYPE_CHECKING:
    from pyengine.pull.offer import Offer

DECLINED = 1                         # exit code where the answer was no


class Verdict(NamedTuple):
    """What is known of a model before it is fetched."""

    runs: bool
    fits: bool
    text: str


def pull(name: str, yes: bool = False) -> int:
    """Fetch a model and print the name by which it can be run; returns the exit code. Arguments and errors are those of `fetch`."""
    found = fetch(name, yes)
    if found is not None:
        show(found)
    return DECLINED if found is None else 0


def fetch(name: str, yes: bool = False) -> str | None:
    """Fetch a model; returns the name by which it can be run, None where it does not fit or run and was not wanted therefore.

    yes: ask nothing, and fetch also what this program cannot run
    Raises: RequestError, DownloadError; DownloadError too where nobody can be asked about a model that cannot be run.
    """
    from pyengine.pull import find, offer as offers

    with busy(f"asking for {name}"):
        found = find(name)
    for text in found.notes:
        note(text)
    if not found.is_whole:
        offers.check_room(found)
        began = [file.partial for file in found.files if not file.partial.exists()]
        if _at_terminal():
            note(f"{found.name}: {size(found.nbytes)}{_parts(found)}; into {found.where}")
        with busy(f"reading the header of {found.name}"):
            verdict = judge(found)
        wanted = verdict.fits or yes or (_ask(f"{verdict.text}. Fetch it all the same?") if _at_terminal() else verdict.runs)
        if not wanted:
            for path in began:
                path.unlink(missing_ok=True)
            if _at_terminal():
                return None
            raise DownloadError(f"{found.name}: {verdict.text}; --yes fetches it all the same")
        if not verdict.fits or _at_terminal():
            note(verdict.text)
    try:
        with _Bar(found) as bar:
            offers.fetch(found, bar.show)
    except KeyboardInterrupt:
        note(f"stopped: `{PROGRAM} pull {name}` goes on from here")
        raise
    return found.name


def judge(found: Offer) -> Verdict:
    """Plan a model by its header alone. Raises: DownloadError where even that cannot be fetched."""
    from pyengine.memory import fit
    from pyengine.pull.offer import FOLDER, headers

    try:
        with headers(found) as (model, projector), warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # they are said when it is loaded
            plan = fit.plan(model, mmproj=projector)
    except DownloadError:
        raise
    except PyEngineError as error:
        return Verdict(False, False, f"it cannot be run here: {re.sub(rf'[^ ]*{FOLDER}[^/]*/', '', str(error))}")
    return Verdict(True, plan.fits, f"it {plan.verdict()}, with a context of {plan.n_ctx:,}")


def offer(error: ModelNotFoundError) -> None:
    """Ask at a terminal whether the model that was not found should be fetched, and fetch it.

    Raises: the error again, with the command that would fetch it, where nobody can be asked or the answer is no; as `fetch`.
    """
    try:
        source = parse(error.name or "")
    except RequestError:
        raise error from None
    whose = "Hugging Face" if isinstance(source, HubName) else "Ollama's registry"
    if _at_terminal():
        note(f"{error.name} is not on this machine.")
        if _ask(f"Fetch it from {whose}?") and fetch(error.name):
            return
    raise ModelNotFoundError(f"{error}. If {whose} has it, `{PROGRAM} pull {error.name}` fetches it") from None


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _ask(question: str) -> bool:
    """Ask a question at the terminal; anything but yes is no."""
    print(printable(f"{question} [y/N] "), end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _parts(found: Offer) -> str:
    """Say how many files it is, and whether some of it is here."""
    there = found.nbytes - found.n_missing
    return f" in {len(found.files)} files" * (len(found.files) > 1) + f", {size(there)} of it here already" * bool(there)


class _Bar:
    """A bar on standard error, where that is a terminal."""

    def __init__(self, found: Offer):
        self._name, self._total, self._there, self._bar = found.name, found.nbytes, found.nbytes - found.n_missing, None

    def show(self, done: int, total: int) -> None:
        """Take the bytes that are there, of how many."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def __enter__(self) -> _Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

            self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True),
                                 TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.add_task(printable(self._name), total=self._total, completed=self._there)
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
