"""Requests' bodies as JSON objects, read field by field: what has another type, or is not here, is refused with its name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from pyengine.errors import RequestError, shown
from pyengine.text.vocabulary import SURROGATE

MOST_DEPTH = 100                     # of JSON: real requests have some ten levels


class FieldError(RequestError):
    """A field of a request that is missing, of another type, or asks for what is not here. `field` is its name."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


class Fields:
    """The fields of one JSON object; `within` begins their names in errors: "options."."""

    def __init__(self, values: Mapping[str, Any], within: str = ""):
        self.values, self.within = values, within

    def any_of(self, *names: str) -> bool:
        """Return whether one of these is there, were it null: most requests say nothing of most things."""
        return not self.values.keys().isdisjoint(names)

    def _read(self, name: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is ...:
                raise FieldError(self.within + name, "is missing")
            return default
        if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
            raise FieldError(self.within + name, f"must be {what}, got {shown(value)}")
        return value

    def text(self, name: str, default: Any = ...) -> Any:
        """Return a text. Raises: FieldError, as all of these."""
        return self._read(name, default, (str,), "a text")

    def choice(self, name: str, table: Mapping[str, Any], default: Any = ...) -> Any:
        """Return what a table has for a text."""
        value = self.text(name, None if default is not ... else ...)
        if value is None:
            return default
        if value not in table:
            raise FieldError(self.within + name, f"must be one of {', '.join(table)}, got {shown(value)}")
        return table[value]

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        return self._read(name, default, (bool,), "true or false")

    def policy(self, name: str) -> Any:
        """Return a text, an object or false; None where it is not there."""
        value = self._read(name, None, (str, dict, bool), "a policy's text, an object as {\"policy\": text}, or false")
        if value is True:
            raise FieldError(self.within + name, "true names no policy")
        return value

    def items(self, name: str, default: Any = ...) -> Any:
        """Return a list."""
        return self._read(name, default, (list,), "a list")

    def object(self, name: str, default: Any = ...) -> Any:
        """Return an object as a dict."""
        return self._read(name, default, (dict,), "an object")

    def whole(self, name: str, default: Any = ..., low: int = 0, high: int = 2**31 - 1) -> Any:
        """Return a whole number from `low` to `high`; 5.0 is one."""
        value = self._read(name, default, (int, float), "a whole number")
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or not low <= value <= high:
            raise FieldError(self.within + name, f"must be a whole number from {low} to {high}, got {shown(value)}")
        return value

    def number(self, name: str) -> float:
        """Return a number."""
        return self._read(name, ..., (int, float), "a number")

    def stops(self, name: str = "stop") -> tuple[str, ...] | None:
        """Return texts that end an answer, given as one or as a list; None where nothing is said."""
        value = self._read(name, None, (str, list), "a text or a list of texts")
        return None if value is None else (value,) if isinstance(value, str) else tuple(value)

    def given(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Return the settings that are there, under our names for theirs."""
        return {names[theirs]: value for theirs, value in self.values.items() if theirs in names and value is not None}

    def refuse(self, names: Mapping[str, str], harmless: Collection[Any] = (False, 0, "", "auto", "none", [], {})) -> None:
        """Refuse fields that ask for what is not here, unless their value asks for nothing. `names` says why."""
        for name, why in names.items():
            value = self.values.get(name)
            if value is not None and not any(value is h or type(value) is type(h) and value == h for h in harmless):
                raise FieldError(self.within + name, why)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


_decode = json.JSONDecoder(parse_constant=_refuse).decode


def parse(body: bytes) -> Fields:
    """Read a body. Raises: RequestError for what is no JSON object, or too deep."""
    try:
        text = body.decode()                                 # RFC 8259, section 8.1: JSON is UTF-8
        found = _decode(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise RequestError(f"the body must be a JSON object, not {type(found).__name__}")
    level: list[Any] = [found]
    for _ in range(MOST_DEPTH):
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value) if isinstance(inner, (dict, list))]
        if not level:
            escaped = b"\\" in body and ("\\ud" in text or "\\uD" in text)     # pictures have no backslash, and looking for one is cheap
            return Fields(_whole(found) if escaped else found)
    raise RequestError(f"the body is nested more than {MOST_DEPTH} levels deep")


def _whole(value: Any) -> Any:
    """Return the same with U+FFFD for halves of surrogate pairs, as which scripts escape characters that they have cut: they are no text."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return {_whole(k): _whole(v) for k, v in value.items()} if isinstance(value, dict) else value
