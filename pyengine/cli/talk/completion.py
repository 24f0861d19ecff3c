"""What Tab offers while a message is typed: commands, names and values of settings, files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pyengine.cli.talk import commands as commands, settings, saved as talks
from pyengine.cli.pictures import is_named

_FILM = re.compile(r"\.(?:mp4|m4v|mov|mkv|webm|avi|mpe?g|gif)$", re.IGNORECASE)
_ENDINGS = {"tools": (".py", ".json"), "json": (".json",)}                 # of other kinds of files
_WORD = re.compile(r"""(?:(?<=\s)|^)(?:'[^']*|"[^"]*|(?:\\.|[^\s\\'"])(?:\\.|[^\s\\])*)$""")       # the last one, quoted or escaped or not
_ESCAPED = re.compile(r"([^\w./~+%@,:=-])")


class Offer(NamedTuple):
    """A text that can stand in place of the last `n` characters, as it is listed, and what it means."""

    text: str
    n: int
    shown: str
    meaning: str = ""


def is_film(path: str) -> bool:
    """Say whether a path ends as names of videos do."""
    return bool(_FILM.search(path))


def offers(line: str) -> Iterator[Offer]:
    """List what the text before the cursor can go on with."""
    name, space, rest = line.partition(" ")
    command = commands.COMMANDS.get(commands.OTHER_NAMES.get(name, name))
    if line.startswith("/") and not space:
        names = [*commands.COMMANDS, *(commands.OTHER_NAMES if len(line) > 1 else ())]
        found = [known for known in names if known.startswith(line)]
        yield from (Offer(n, len(line), n, commands.COMMANDS[commands.OTHER_NAMES.get(n, n)].meaning) for n in found)
        if found:
            return
    elif command is not None and command.file == "saved":
        yield from _files(rest, "", False, lambda path: talks.is_saved(Path(path)))
        return
    elif command is not None and command.file in _ENDINGS:
        yield from _words(rest, command)
        yield from _files(rest, "", False, lambda path: path.lower().endswith(_ENDINGS[command.file]))
        return
    elif command is not None and command.file:
        yield from _media(rest, True, is_film if command.file == "video" else is_named)
        return
    elif command is not None:
        yield from _words(rest, command)
        return
    yield from _media(line, False, is_named)


def _words(rest: str, command: commands.Command) -> Iterator[Offer]:
    """List arguments of a command that are known words."""
    known, typed = dict(command.words), rest
    if command.do is commands.choose:
        name, space, value = rest.partition(" ")
        words = settings.THINK if name == "think" else settings.WORDS.get(name, ())
        known, typed = (dict.fromkeys(words, ""), value) if space else (settings.MEANINGS, name)
    yield from (Offer(word, len(typed), word, meaning) for word, meaning in known.items() if word.startswith(typed))


def _media(text: str, empty: bool, wanted: Callable[[str], bool]) -> Iterator[Offer]:
    """List files of a kind that the last word begins to name; without a word, all of the current folder, if `empty`."""
    word = _WORD.search(text)
    if word is None and not (empty and text[-1:] in ("", " ")):
        return
    typed = word[0] if word else ""
    quote = typed[:1] if typed[:1] in ("'", '"') else ""
    bare = typed[1:] if quote else re.sub(r"\\(.)", r"\1", typed)
    yield from _files(bare, quote, not quote, wanted)


def _files(typed: str, quote: str, escape: bool, wanted: Callable[[str], bool]) -> Iterator[Offer]:
    """List folders, and files that are wanted, whose path begins as it is typed; hidden ones only after a dot."""
    folder, start = os.path.split(typed)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return
    for entry in entries:
        if not entry.name.startswith(start) or entry.name.startswith(".") and not start.startswith("."):
            continue
        is_folder = entry.is_dir()
        if is_folder or wanted(entry.path):
            more = entry.name[len(start):]
            end = "/" if is_folder else quote
            yield Offer((_ESCAPED.sub(r"\\\1", more) if escape else more) + end, 0, entry.name + ("/" if is_folder else ""))
