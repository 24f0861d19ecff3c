"""Python functions as tools: their schemas from hints and docstrings, calls with a model's arguments, results as contents of messages."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import datetime
import enum
import functools
import inspect
import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np

from pyengine.chat import docstrings, hints
from pyengine.errors import placed, RequestError, shown

MOST_FAULTS = 5                                    # of a call's arguments that are told at once
MOST_DEPTH = 200                                   # of lists and mappings in a result
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_-]{0,63}")          # what OpenAI's interface takes


class Function:
    """A Python function as a tool: `name`, `schema` in OpenAI's form, `call`. Raises: RequestError naming function and parameter."""

    def __init__(self, function: Callable[..., Any]):
        if isinstance(function, type) or not callable(function):
            raise RequestError(f"tools: a function, or an object with __call__, not {shown(function)}")
        self.function = function
        inner, bound = _unwrapped(function)
        self.name = _name(inner)
        self._signature = self._read_signature()
        members = [self._member(p, inner) for p in self._signature.parameters.values() if p.name not in bound]
        told = docstrings.read(_doc(inner), [m.name for m in members])
        self._members = {m.name: m for m in members}
        self.parameters = hints.objects(members, told.parameters)
        self.schema = {"type": "function", "function": {"name": self.name, "description": told.summary, "parameters": self.parameters}}

    def _read_signature(self) -> inspect.Signature:
        try:
            return inspect.signature(self.function)
        except (ValueError, TypeError):                      # of some functions that are written in C
            raise RequestError(f"{self.name}: Python does not know its parameters: wrap it in a function with type hints") from None

    def _member(self, parameter: inspect.Parameter, inner: Any) -> hints.Member:
        where = f"{self.name}: parameter {parameter.name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind == parameter.VAR_POSITIONAL else "**"
            raise RequestError(f"{self.name}: parameter {stars}{parameter.name}: a model is told each argument by its name and type; "
                               "give the function the parameters that it takes")
        if parameter.annotation is parameter.empty:
            raise RequestError(f"{where} has no type hint: {parameter.name}: str, for instance")
        code = inspect.unwrap(inner if inspect.isroutine(inner) else type(inner).__call__)
        hint = hints.hint_of(parameter.annotation, getattr(code, "__globals__", {}), _enclosing(code), where)
        return hints.member(parameter.name, hint, parameter.default is parameter.empty, where)

    def call(self, arguments: str) -> Any:
        """Call it with a JSON object of arguments; returns the content of a message: a text, or parts where pictures are among the result.

        Raises: RequestError with a text for the model where the arguments are none of the schema's; what the function raises.
        """
        given = self._built(arguments)
        places, names = [], {}
        for parameter in self._signature.parameters.values():
            if parameter.kind == parameter.POSITIONAL_ONLY:
                places.append(given.get(parameter.name, parameter.default))
            elif parameter.name in given:
                names[parameter.name] = given[parameter.name]
        result = self.function(*places, **names)
        return content_of(_awaited(result) if inspect.isawaitable(result) else result, self.name)

    def _built(self, arguments: str) -> dict[str, Any]:
        """Return the arguments as values of the parameters' types. Raises: RequestError."""
        from jsonschema import Draft202012Validator          # takes 60 ms to import

        try:
            value = json.loads(arguments if arguments.strip() else "{}", parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the arguments of {self.name} are no JSON: {error}") from None
        if not isinstance(value, dict):
            raise RequestError(f"the arguments of {self.name} must be an object, not {shown(value)}")
        faults = list(Draft202012Validator(hints.closed(self.parameters)).iter_errors(value))
        if faults:
            raise RequestError(f"the arguments of {self.name} are wrong: {'; '.join(map(placed, faults[:MOST_FAULTS]))}")
        return {name: self._members[name].kind.build(v, name) for name, v in value.items()}


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function as a tool in OpenAI's form. Raises: RequestError naming function and parameter."""
    return Function(function).schema


def call(function: Callable[..., Any], arguments_json: str) -> Any:
    """Call a function as `Function.call` does."""
    return Function(function).call(arguments_json)


def content_of(result: Any, name: str = "result") -> Any:
    """Return a function's result as the content of a message: texts stay, pictures are parts, everything else is JSON.

    A list with pictures in it becomes as many parts. Raises: RequestError for what JSON cannot say.
    """
    if isinstance(result, str):
        return str.__str__(result)
    if _is_picture(result):
        return [{"type": "image", "image": result}]
    if isinstance(result, (list, tuple)) and any(map(_is_picture, result)):
        return [{"type": "image", "image": part} if _is_picture(part) else {"type": "text", "text": content_of(part, name)} for part in result]
    return json.dumps(_plain(result, name), ensure_ascii=False)


def _is_picture(value: Any) -> bool:
    """Say whether a result is a picture: of Pillow, of pyengine, or an array [height, width, 3 or 4] of bytes."""
    if isinstance(value, np.ndarray):
        return value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] in (3, 4)
    return any((c.__module__, c.__qualname__) in (("PIL.Image", "Image"), ("pyengine.media.image", "Image")) for c in type(value).__mro__)


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """Return a value as JSON has it. Raises: RequestError."""
    if depth > MOST_DEPTH:
        raise RequestError(f"the result of {name} is nested deeper than {MOST_DEPTH} lists and mappings")
    if isinstance(value, enum.Enum):
        return _plain(value.value, name, depth + 1)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist(), name, depth + 1)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), name, depth + 1) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(_plain(k, name, depth + 1)): _plain(v, name, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple, Set)):
        return [_plain(v, name, depth + 1) for v in value]
    raise RequestError(f"the result of {name} holds a {type(value).__name__}, which JSON cannot say; give texts, numbers, lists, mappings "
                       "or pictures")


def _awaited(result: Any) -> Any:
    """Return what an async function gives: in a loop of its own, and in a thread of its own where a loop runs here."""
    async def wait() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    found: list[Any] = []
    context = contextvars.copy_context()

    def run() -> None:
        try:
            found.append((context.run(asyncio.run, wait()), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = found[0]
    if error is not None:
        raise error
    return value


def _unwrapped(function: Any) -> tuple[Any, set[str]]:
    """Return what functools.partial wraps, and the names of the parameters that it has bound, which a model is not told of."""
    bound: set[str] = set()
    while isinstance(function, functools.partial):
        bound |= set(function.keywords)
        function = function.func
    return function, bound


def _name(inner: Any) -> str:
    name = getattr(inner, "__name__", type(inner).__name__)
    if not _NAME.fullmatch(name):
        raise RequestError(f"tools: a model calls functions by names of letters, digits and _, which {shown(name)} is not: use def")
    return name


def _doc(inner: Any) -> str | None:
    """Return the docstring of a function; of an object with __call__ that of the method, or else of its class."""
    if inspect.isroutine(inner):
        return inspect.getdoc(inner)
    return type(inner).__call__.__doc__ or type(inner).__doc__


def _enclosing(code: Any) -> dict[str, Any]:
    """Return the variables of the functions around one, by which its hints may name types."""
    try:
        return dict(inspect.getclosurevars(code).nonlocals)
    except (TypeError, ValueError):                          # no Python function; a variable that has no value yet
        return {}


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
