"""Type hints as JSON schemas, and values of JSON as values of those types.

    str int float bool None Any      as JSON has them
    list[T] tuple[T, ...] set[T]     an array; tuple[A, B] has its length
    dict[str, T]                     an object
    Optional Union Literal Enum      an enumeration stands for its members' values, or their names where values are none of JSON
    dataclasses, TypedDict           an object of their fields
    date, datetime                   a text of ISO 8601
    Annotated[T, "description"]      what a model is told about it
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import types
import typing
from collections import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union

from pyengine.chat import docstrings
from pyengine.errors import RequestError, shown

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_ARRAYS: dict[Any, Callable[[Any], Any]] = {list: list, abc.Sequence: list, abc.Iterable: list, abc.Collection: list, set: set, abc.Set: set,
                                            frozenset: frozenset}
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_DATES: dict[Any, tuple[str, str]] = {datetime.date: ("date", "YYYY-MM-DD"), datetime.datetime: ("date-time", "YYYY-MM-DDThh:mm:ss")}
_TAKEN = ("str, int, float, bool, None, list, tuple, set, dict[str, ...], Optional, Union, Literal, Enum, dataclasses, TypedDict, date and "
          "datetime are")


class Kind(NamedTuple):
    """A type that JSON can have values of.

    build(value, place) makes the Python value of one that the schema allows. Raises: RequestError naming the place.
    """

    schema: dict[str, Any]
    build: Callable[[Any, str], Any]


class Member(NamedTuple):
    """A parameter, or a field of an object: `needed` if it has no default."""

    name: str
    kind: Kind
    needed: bool


def kind_of(hint: Any, where: str, inside: tuple[Any, ...] = ()) -> Kind:
    """Return what a hint means; `where` it stands, for messages; `inside` which classes.

    Raises: RequestError for a type that JSON has no values of.
    """
    hint = described(hint)[0]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return Kind({}, lambda value, place: value)
    if hint is None:
        hint = type(None)
    if isinstance(hint, type) and hint in _PLAIN:
        return Kind({"type": _PLAIN[hint]}, _converted(hint))
    if origin in (Union, types.UnionType):
        return _union(arguments, where, inside)
    if origin is Literal:
        return _literal(arguments, where)
    base = origin or hint
    if base is tuple:
        return _tuple(arguments, where, inside)
    if base in _ARRAYS if isinstance(base, type) else False:
        return _array(_ARRAYS[base], arguments[:1], where, inside)
    if base in _MAPPINGS:
        return _mapping(arguments, where, inside)
    if isinstance(hint, type):
        return _class(hint, where, inside)
    raise RequestError(f"{where}: {_named(hint)} is no type of arguments: {_TAKEN}")


def described(hint: Any) -> tuple[Any, str]:
    """Return a hint without Annotated, Required and the like, and the first text of Annotated; "" where there is none."""
    text = ""
    while True:
        if typing.get_origin(hint) is Annotated:
            text = text or next((m for m in hint.__metadata__ if isinstance(m, str)), "")
            hint = hint.__origin__
        elif _mark(hint) in ("Required", "NotRequired", "ReadOnly"):
            hint = typing.get_args(hint)[0]
        else:
            return hint, text


def hint_of(annotation: Any, globals_: Mapping[str, Any], locals_: Mapping[str, Any], where: str) -> Any:
    """Return a hint that may be written as a text. Raises: RequestError for names in it that are not there."""
    def holder() -> None: ...

    holder.__annotations__ = {"hint": annotation}
    try:
        return typing.get_type_hints(holder, dict(globals_), dict(locals_), include_extras=True)["hint"]
    except Exception as error:                               # whatever evaluating a text raises
        raise RequestError(f"{where}: its hint {shown(annotation)} cannot be read: {error}") from None


def objects(members: Sequence[Member], told: Mapping[str, str]) -> dict[str, Any]:
    """Return the schema of an object with these members; `told`: what docstrings say of them, where hints say nothing."""
    properties = {}
    for name, kind, _ in members:
        text = kind.schema.get("description") or told.get(name)
        properties[name] = {**kind.schema, **({"description": text} if text else {})}
    needed = [member.name for member in members if member.needed]
    return {"type": "object", "properties": properties, **({"required": needed} if needed else {})}


def member(name: str, hint: Any, needed: bool, where: str, inside: tuple[Any, ...] = ()) -> Member:
    """Return a parameter or field by its hint. Raises: RequestError."""
    kind, text = kind_of(hint, where, inside), described(hint)[1]
    return Member(name, Kind({**kind.schema, "description": text}, kind.build) if text else kind, needed)


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Say whether a value is one of a schema's."""
    from jsonschema import Draft202012Validator              # takes 60 ms to import

    return bool(Draft202012Validator(closed(schema)).is_valid(value))


def closed(schema: Any) -> Any:
    """Return a schema whose objects have no members but the declared ones."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    inner = {k: {name: closed(s) for name, s in v.items()} if k == "properties" else v if k == "enum" else closed(v) for k, v in schema.items()}
    return {"additionalProperties": False, **inner} if "properties" in schema else inner


# -- each kind of types ---------------------------------------------------------------------------------------------------


def _converted(plain: Any) -> Callable[[Any, str], Any]:
    """Return a builder: JSON has 3.0 for whole numbers and 3 for others, too."""
    def build(value: Any, place: str) -> Any:
        try:
            return plain(value) if plain in (int, float) else value
        except OverflowError:
            raise RequestError(f"{place}: {shown(value)} is too large") from None

    return build


def _union(arguments: Sequence[Any], where: str, inside: tuple[Any, ...]) -> Kind:
    kinds = [kind_of(argument, where, inside) for argument in arguments]
    names = list(dict.fromkeys(kind.schema["type"] for kind in kinds if set(kind.schema) == {"type"}))
    plain = sum(set(kind.schema) == {"type"} and isinstance(kind.schema["type"], str) for kind in kinds) == len(kinds)
    schema = {"type": names if len(names) > 1 else names[0]} if plain else {"anyOf": [kind.schema for kind in kinds]}

    def build(value: Any, place: str) -> Any:
        fitting, fault = [kind for kind in kinds if fits(value, kind.schema)], None
        for kind in fitting:
            try:
                return kind.build(value, place)
            except RequestError as error:                    # a text that is no date may be another's
                fault = fault or error
        raise fault or RequestError(f"{place}: {shown(value)} is none of its types")

    return Kind(schema, build)


def _literal(values: Sequence[Any], where: str) -> Kind:
    if not values or any(type(value) not in _PLAIN for value in values):
        raise RequestError(f"{where}: Literal takes texts, numbers, True, False and None, not {shown(list(values))}")
    return _choice({value: value for value in values}, list(values))


def _choice(found: Mapping[Any, Any], values: Sequence[Any]) -> Kind:
    """Return the kind of these values of JSON, and what each stands for."""
    names = list(dict.fromkeys(_PLAIN[type(value)] for value in values))
    pairs = [(value, found[value]) for value in values]

    def build(value: Any, place: str) -> Any:
        return next(meant for known, meant in pairs if known == value and isinstance(known, bool) == isinstance(value, bool))

    return Kind({"type": names if len(names) > 1 else names[0], "enum": list(values)}, build)


def _array(make: Callable[[Any], Any], arguments: Sequence[Any], where: str, inside: tuple[Any, ...]) -> Kind:
    if not arguments:
        return Kind({"type": "array"}, lambda value, place: make(value))
    inner = kind_of(arguments[0], where, inside)

    def build(value: Any, place: str) -> Any:
        try:
            return make([inner.build(v, f"{place}[{i}]") for i, v in enumerate(value)])
        except TypeError as error:                           # a set of lists
            raise RequestError(f"{place}: {error}") from None

    return Kind({"type": "array", "items": inner.schema}, build)


def _tuple(arguments: Sequence[Any], where: str, inside: tuple[Any, ...]) -> Kind:
    if not arguments or arguments[-1] is ...:
        return _array(tuple, arguments[:1], where, inside)
    kinds = [kind_of(argument, where, inside) for argument in arguments]
    schema = {"type": "array", "prefixItems": [kind.schema for kind in kinds], "minItems": len(kinds), "maxItems": len(kinds)}
    return Kind(schema, lambda value, place: tuple(kind.build(v, f"{place}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value))))


def _mapping(arguments: Sequence[Any], where: str, inside: tuple[Any, ...]) -> Kind:
    if not arguments:
        return Kind({"type": "object"}, lambda value, place: dict(value))
    if described(arguments[0])[0] is not str:
        raise RequestError(f"{where}: the keys of an object are texts: dict[str, ...], not dict[{_named(arguments[0])}, ...]")
    inner = kind_of(arguments[1], where, inside)
    return Kind({"type": "object", "additionalProperties": inner.schema},
                lambda value, place: {k: inner.build(v, f"{place}.{k}") for k, v in value.items()})


def _class(cls: Any, where: str, inside: tuple[Any, ...]) -> Kind:
    if cls in inside:
        raise RequestError(f"{where}: {cls.__name__} holds itself, which no schema here can say")
    inside = (*inside, cls)
    if issubclass(cls, enum.Enum):
        values = {m.value: m for m in cls} if all(type(m.value) in _PLAIN for m in cls) else {m.name: m for m in cls}
        if not values:
            raise RequestError(f"{where}: {cls.__name__} has no members")
        return _choice(values, list(values))
    if cls in _DATES:
        return _date(cls)
    if dataclasses.is_dataclass(cls):
        fields = [f for f in dataclasses.fields(cls) if f.init]
        defaults = {f.name for f in fields if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING}
        made = "" if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else cls.__doc__            # dataclasses write one themselves
        return _object(cls, {f.name: f.name not in defaults for f in fields}, made, where, inside)
    if typing.is_typeddict(cls):
        return _object(cls, {name: name in cls.__required_keys__ for name in cls.__annotations__}, cls.__doc__, where, inside)
    picture = " (pictures can be results)" if cls.__module__.startswith(("PIL.", "numpy", "pyengine.media")) else ""
    raise RequestError(f"{where}: {_named(cls)} is no type of arguments{picture}: {_TAKEN}")


def _object(cls: Any, names: Mapping[str, bool], doc: str | None, where: str, inside: tuple[Any, ...]) -> Kind:
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except Exception as error:                               # whatever evaluating texts raises
        raise RequestError(f"{where}: the hints of {cls.__name__} cannot be read: {error}") from None
    needed = {name: _mark(hints[name]) == "Required" or default and _mark(hints[name]) != "NotRequired" for name, default in names.items()}
    members = [member(name, hints[name], needed[name], f"{where}, {cls.__name__}.{name}", inside) for name in names]
    told = docstrings.read(doc, names)

    def build(value: Any, place: str) -> Any:
        given = {m.name: m.kind.build(value[m.name], f"{place}.{m.name}") for m in members if m.name in value}
        try:
            return cls(**given)
        except (TypeError, ValueError) as error:             # of its __post_init__
            raise RequestError(f"{place}: {error}") from None

    return Kind({**objects(members, told.parameters), **({"description": told.summary} if told.summary else {})}, build)


def _date(cls: Any) -> Kind:
    form, example = _DATES[cls]

    def build(value: Any, place: str) -> Any:
        try:
            text = value[:-1] + "+00:00" if form == "date-time" and value[-1:] in ("Z", "z") else value      # which Python 3.10 does not read
            return cls.fromisoformat(text)
        except ValueError:
            raise RequestError(f"{place}: {shown(value)} is no {form.replace('-', ' and ')}: {example}") from None

    return Kind({"type": "string", "format": form}, build)


def _mark(hint: Any) -> str:
    """Return the name of a special form around a hint: "Required", "NotRequired", of `typing` or of typing_extensions."""
    return str(getattr(typing.get_origin(hint), "_name", "") or "")


def _named(hint: Any) -> str:
    if isinstance(hint, type):
        return hint.__qualname__ if hint.__module__ == "builtins" else f"{hint.__module__}.{hint.__qualname__}"
    return shown(hint)
