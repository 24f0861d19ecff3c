"""Every error that pyengine raises on purpose. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any


class PyEngineError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line and exits with code 2."""


class ModelWarning(UserWarning):
    """A model's files say something that cannot be followed, or leave something out: what was done instead, and what it costs."""


class ModelNotFoundError(PyEngineError):
    """No file of that path, and no model of that name in the places that were searched."""


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


class ImageError(RequestError):
    """A picture or a video cannot be read: the message names it, its format, and what to do."""


class GraphError(PyEngineError):
    """A graph is built or run in a way that its ops do not allow."""


class ShapeError(GraphError):
    """Shapes or dtypes of an op's inputs contradict each other; the message names op, input and axis."""


def whole_number(name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    """Return an argument as an int of low..high. Raises: RequestError."""
    if not isinstance(value, Integral) or isinstance(value, bool):                           # NumPy's are such too
        raise RequestError(f"{name}={shown(value)}: must be an int")
    number = int(value)
    if number < low:
        raise RequestError(f"{name}={shown(value)}: must be at least {low}")
    if number > high:
        raise RequestError(f"{name}={shown(value)}: must be at most {high}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return an argument that says yes or no. Raises: RequestError."""
    try:
        return bool(value)
    except Exception as error:                               # an array's, or a stranger's
        raise RequestError(f"{name}={shown(value)}: must be True or False") from error


def iterates(value: Any) -> bool:
    """Say whether an argument can be gone through: an array of a single number looks so, and cannot."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


def as_path(name: str, value: Any) -> Path:
    """Return an argument that is a path. Raises: RequestError."""
    try:
        return Path(os.fsdecode(value))
    except Exception:                                        # so does a stranger's __fspath__
        raise RequestError(f"{name}: a path is a text or a Path, not {shown(value)}") from None


def shown(value: object) -> str:
    """Return what a caller gave, for a message: cut where it is long, and never an error of its own."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    try:
        return reprlib.repr(value)
    except Exception:                                        # whatever a stranger's __repr__ raises
        return f"a {type(value).__name__}"
