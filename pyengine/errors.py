"""Every error that pyengine raises on purpose. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from itertools import islice
from typing import Any


class PyEngineError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line and exits with code 2."""


class ModelWarning(UserWarning):
    """A model's files say something that cannot be followed, or leave something out: what was done instead, and what it costs."""


class ModelNotFoundError(PyEngineError):
    """No file of that path, and no model of that name in the places that were searched; `name` is the name, where one was looked up."""

    def __init__(self, message: str, name: str | None = None):
        super().__init__(message)
        self.name = name


class DownloadError(PyEngineError):
    """A model cannot be fetched: the server refuses, sends something else than it announced, or there is no room for it."""


class InvalidModelError(PyEngineError):
    """A model file is malformed: the message names file, field and byte offset."""


class UnsupportedModelError(PyEngineError):
    """A model file is well formed but asks for something that pyengine does not have."""


class PlanError(PyEngineError):
    """The request does not fit the memory that is there; `plan` holds the plan that was refused, if one was made."""

    def __init__(self, message: str, plan: object | None = None):
        super().__init__(message)
        self.plan = plan


class ContextOverflowError(PyEngineError):
    """A prompt, or a prompt and its continuation, needs more positions than the context has."""


class SessionError(PyEngineError):
    """A saved conversation cannot be written or read: the file is damaged, or of another model, version or cache format."""


class TemplateError(PyEngineError):
    """A chat template is malformed, or refuses the messages that it was given."""


class RequestError(PyEngineError):
    """An argument of a request is out of its range, or of a kind that the model cannot take."""


class BusyError(PyEngineError):
    """So many requests wait already that no more are taken; later there may be room."""


class ImageError(RequestError):
    """A picture or a video cannot be read: the message names it, its format, and what to do."""


class GraphError(PyEngineError):
    """A graph is built or run in a way that its ops do not allow."""


class ShapeError(GraphError):
    """Shapes or dtypes of an op's inputs contradict each other; the message names op, input and axis."""


def shown(value: object) -> str:
    """Return what a caller gave, for a message: cut where it is long, and never an error of its own."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    try:
        return reprlib.repr(value)
    except Exception:                                        # whatever a stranger's __repr__ raises
        return f"a {type(value).__name__}"


def place_of(fault: Any) -> str:
    """Return where jsonschema finds a fault, behind what it looked at: ".a[0].b"; "" for all of it."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in fault.absolute_path)


def placed(fault: Any) -> str:
    """Return what jsonschema finds, cut where it is long, after its place."""
    place, text = place_of(fault).lstrip("."), fault.message if len(fault.message) <= 200 else fault.message[:200] + " ..."
    return f"{place}: {text}" if place else text


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; near: a, b" for an error's end, or "" where nothing resembles `name`. Bounded for hostile names."""
    import difflib  # for errors only

    short = list(islice(dict.fromkeys(n for n in names if len(n) <= 200), 4096))
    near = difflib.get_close_matches(name, short, n=3) if len(name) <= 200 else []
    return f"; near: {', '.join(near)}" if near else ""
