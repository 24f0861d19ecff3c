"""What docstrings say: the first paragraph, and a text for each parameter, in the forms that Google, NumPy and Sphinx have for them.

Sections of Google's form: google.github.io/styleguide/pyguide.html, 3.8.3; of NumPy's: numpydoc.readthedocs.io/en/latest/format.html;
fields of Sphinx's: www.sphinx-doc.org/en/master/usage/domains/python.html.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

_TITLES = r"(?:Args|Arguments|Attributes|Fields|Keyword Arg(?:ument)?s|Other Parameters|Parameters|Params)"
_GOOGLE = re.compile(rf"(\s*){_TITLES}\s*:\s*$")
_NUMPY = re.compile(rf"(\s*){_TITLES}\s*$")
_RULE = re.compile(r"\s*-{3,}\s*$")
_SECTION = re.compile(r"\s*[A-Z][\w ]{0,30}:\s*$")             # Returns:, Raises:, Example:
_FIELD = re.compile(r"\s*[:@][a-z]+\b[^:\n]*:")               # :param x:, :returns:, @param x:
_PARAM = re.compile(r"\s*[:@](?:param|parameter|arg|argument|key|keyword|ivar|var|cvar)\s+(?:[^:\n]*\s)?\*{0,2}(\w+)\s*:\s?(.*)$")
_ENTRY = re.compile(r"\s*\*{0,2}(\w+)\s*(?:\([^\n]*?\))?\s*:(?:\s+(.*))?$")                      # name (type): text
_NUMPY_ENTRY = re.compile(r"\s*([\w*]+(?:\s*,\s*[\w*]+)*)\s*(?::.*)?$")                          # name, other : type


class Told(NamedTuple):
    """What a docstring tells: its first paragraph, and texts by the names of parameters; all without line breaks."""

    summary: str
    parameters: dict[str, str]


def read(text: str | None, names: Collection[str]) -> Told:
    """Read a docstring; only the parameters that are there, by `names`, are looked for."""
    lines = inspect.cleandoc(text or "").split("\n")
    found: dict[str, list[str]] = {}
    at = 0
    while at < len(lines):
        line, following = lines[at], lines[at + 1] if at + 1 < len(lines) else ""
        if _GOOGLE.match(line):
            at = _google(lines, at + 1, names, found)
        elif _NUMPY.match(line) and _RULE.match(following):
            at = _numpy(lines, at + 2, names, found)
        elif field := _PARAM.match(line):
            at = _sphinx(lines, at, field, names, found)
        else:
            at += 1
    return Told(_joined(_first(lines)), {name: _joined(said) for name, said in found.items() if _joined(said)})


def _first(lines: Sequence[str]) -> list[str]:
    """Return the lines before the first empty one, section or field."""
    found: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""]):
        if not line.strip() or _SECTION.match(line) or _FIELD.match(line) or _RULE.match(following):
            break
        found.append(line)
    return found


def _google(lines: Sequence[str], at: int, names: Collection[str], found: dict[str, list[str]]) -> int:
    """Take the entries below a title; they are indented more than it. Returns the line after them."""
    edge, last = _indent(lines[at - 1]), None
    while at < len(lines) and (not lines[at].strip() or _indent(lines[at]) > edge):
        entry = _ENTRY.match(lines[at])
        if entry and entry[1] in names and entry[1] not in found:
            last = found.setdefault(entry[1], [entry[2] or ""])
        elif last is not None:
            last.append(lines[at])
        at += 1
    return at


def _numpy(lines: Sequence[str], at: int, names: Collection[str], found: dict[str, list[str]]) -> int:
    """Take the entries below a title and its rule: each name begins where the title does, its text is indented."""
    edge, last = _indent(lines[at - 2]), []
    while at < len(lines) and not (at + 1 < len(lines) and _RULE.match(lines[at + 1])):
        line = lines[at]
        if line.strip() and _indent(line) <= edge:
            entry = _NUMPY_ENTRY.match(line)
            if entry is None:
                return at
            last = []
            for name in re.split(r"\s*,\s*", entry[1]):
                if name.lstrip("*") in names:
                    found[name.lstrip("*")] = last
        else:
            last.append(line)
        at += 1
    return at


def _sphinx(lines: Sequence[str], at: int, field: re.Match[str], names: Collection[str], found: dict[str, list[str]]) -> int:
    """Take one field; lines that go on with it are indented more."""
    edge, said = _indent(lines[at]), [field[2]]
    at += 1
    while at < len(lines) and lines[at].strip() and _indent(lines[at]) > edge:
        said.append(lines[at])
        at += 1
    if field[1] in names:
        found[field[1]] = said
    return at


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _joined(lines: Sequence[str]) -> str:
    return " ".join(" ".join(lines).split())
