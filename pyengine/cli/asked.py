"""What is asked: the words of a command line, standard input, files and the pictures that are named among them."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from pyengine.cli import pictures
from pyengine.cli.screen import note
from pyengine.errors import RequestError
from pyengine.records import NamedTuple

WAIT_SECONDS = 3.0                   # for standard input, before it is said that it is waited for


class Asked(NamedTuple):
    """A question: its parts in their order, and paths in it that are no pictures."""

    parts: list[str | pictures.Picture]
    wrong: list[str]                 # what is wrong with pictures that the words seem to name
    text: str                        # all of it, for models without pictures
    piped: str                       # what of it came from standard input and files: nothing in there is opened

    @property
    def found(self) -> list[pictures.Picture]:
        """Pictures that the words name."""
        return [part for part in self.parts if not isinstance(part, str)]

    def settle(self, sees: bool, model: str) -> list[str | pictures.Picture]:
        """Return the parts for a model that takes pictures or does not, and say on standard error what stays text.

        Raises: RequestError if it would be asked about a picture that cannot be shown to it.
        """
        if not sees:
            if self.found:
                note(f"({model} has no image encoder: {', '.join(p.name for p in self.found)} stays text)")
            return [self.text]
        if self.wrong:
            raise RequestError(f"{self.wrong[0]}; a question that only mentions the name is read from --file or standard input")
        for name in pictures.mentioned(self.piped):
            note(f"({name} is text here, as all of standard input and files; --image {name} shows it)")
        return self.parts


def question(words: Sequence[str], files: Sequence[str], options: pictures.Options) -> Asked | None:
    """Put a question together: texts of files, then standard input if it is no terminal, then the words; None if there is nothing.

    A single "-" among no other words is standard input. Raises: RequestError.
    """
    dash = list(words) == ["-"]
    words = [] if dash else words
    piped = [read_file(file) for file in files if file != "-"]
    if dash or "-" in files or not (sys.stdin is None or sys.stdin.isatty()):
        piped.append(read_stdin())
    if dash and not any(piped):
        raise RequestError("standard input is empty, and there is no other prompt")
    parts, wrong = pictures.read_words(words, options)
    above = "\n\n".join(filter(None, (text.strip("\n") if words else text for text in piped)))
    if not above and not parts:
        return None
    return Asked(arranged(parts, above), wrong, "\n\n".join(filter(None, (above, " ".join(words)))), above)


def arranged(parts: list[str | pictures.Picture], above: str = "") -> list[str | pictures.Picture]:
    """Return the parts of a message as a model gets them: the pictures around its words first, then a text `above`, then the words."""
    first, rest = _outer_pictures(parts)
    return _joined([*first, above + ("\n\n" if above and rest else ""), *rest])


def _outer_pictures(parts: list[str | pictures.Picture]) -> tuple[list[str | pictures.Picture], list[str | pictures.Picture]]:
    """Tell the pictures around a message from the message: they come before its text, as models were taught.

    Where others stand between its words, all stay in their places.
    """
    whole = [part for part in parts if not isinstance(part, str) or part.strip()]
    texts = [i for i, part in enumerate(whole) if isinstance(part, str)]
    if not texts:
        return whole, []
    inner = whole[texts[0] : texts[-1] + 1]
    if len(inner) == len(whole) or not all(isinstance(part, str) for part in inner):
        return [], parts
    return [*whole[: texts[0]], *whole[texts[-1] + 1 :]], ["".join(map(str, (p for p in parts if isinstance(p, str)))).strip()]


def _joined(parts: Sequence[str | pictures.Picture]) -> list[str | pictures.Picture]:
    """Return the parts with neighbouring texts as one."""
    found: list[str | pictures.Picture] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part:
            found.append(part)
    return found


def refuse_silence(model: str | None) -> None:
    """Refuse: nobody can be asked for the question. Raises: RequestError; ModelNotFoundError where the model of this name is missing too."""
    from pyengine.files.stores import look_up

    if model is not None:
        look_up(model)
    raise RequestError("there is no PROMPT, and standard input is empty; at a terminal, MODEL alone is a conversation")


def read_file(name: str) -> str:
    """Return the text of a file. Raises: RequestError."""
    try:
        return _decoded(Path(os.path.expanduser(name)).read_bytes(), f"--file {name}")
    except OSError as error:
        raise RequestError(f"--file {name}: {error.strerror}") from None


def read_stdin() -> str:
    """Return all of standard input; it is said if nothing comes for a while. Raises: RequestError."""
    if sys.stdin is None:
        return ""
    _say_if_it_waits()
    try:
        return _decoded(sys.stdin.buffer.read(), "standard input")
    except OSError as error:
        if error.errno is None:                        # no file of the system's, as in a notebook: nothing can come from it
            return ""
        raise RequestError(f"standard input: {error.strerror}") from None


def _say_if_it_waits() -> None:
    try:
        waits = not sys.stdin.isatty() and not select.select([sys.stdin], [], [], WAIT_SECONDS)[0]
    except (OSError, ValueError):                      # nothing to select on: no file of the system's, or Windows
        return
    if waits:
        note("(waiting for the end of standard input, which comes before the prompt; `< /dev/null` gives none)")


def _decoded(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"{what}: byte {error.start} is no UTF-8 text; a picture is given with --image") from None
