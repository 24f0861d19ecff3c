"""Python functions as tools: schemas as transformers makes them, calls with what a model writes, results as contents of messages."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import datetime
import enum
import functools
import json
from pathlib import Path
from typing import Annotated, Any, Dict, List, Literal, Optional, Sequence, TypedDict, Union

import jsonschema
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings as limits, strategies as st

import pyengine as pe
from pyengine.chat import docstrings, functions, hints
from pyengine.chat.functions import call, content_of, schema_of
from pyengine.errors import RequestError
from pyengine.media import messages as media


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Shape(enum.Enum):
    ROUND = (1, 1)
    FLAT = (9, 1)


@dataclasses.dataclass
class Place:
    """A place on a map.

    Attributes:
        name: what it is called
        height: in metres
    """

    name: str
    height: float = 0.0
    tags: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.height < -500:
            raise ValueError("no place is that low")


@dataclasses.dataclass
class Plain:
    day: datetime.date


class Query(TypedDict, total=False):
    words: str
    places: list[Place]


@dataclasses.dataclass
class Ring:
    next: Optional[Ring]


def parameters(function: Any) -> dict[str, Any]:
    return schema_of(function)["function"]["parameters"]["properties"]


# -- beside transformers --------------------------------------------------------------------------------------------------


def weather(city: str, days: int = 1, unit: Literal["celsius", "fahrenheit"] = "celsius") -> str:
    """
    Get the weather of a city.

    Args:
        city: The city, and where it is
            not the only one of its name, the country.
        days: How many days.
        unit: The unit.

    Returns:
        A sentence.
    """
    return f"{city} {days} {unit}"


def many(a: int, b: float, c: bool, d: list[int], e: dict[str, float], f: List[str], g: Dict[str, List[int]], h: list, i: dict, j: Any, k: None):
    """Take many.

    Args:
        a: a
        b: b
        c: c
        d: d
        e: e
        f: f
        g: g
        h: h
        i: i
        j: j
        k: k
    """


def unions(a: Union[int, str], b: Optional[int], c: str | None, d: Union[int, list[str]], e: Optional[Literal["x", "y"]] = None,
           f: list[Optional[int]] | None = None, g: Literal[1, "a", True, None] = 1, h: tuple[int, str] = (1, "")):
    """Take unions.

    Args:
        a: a
        b: b
        c: c
        d: d
        e: e
        f: f
        g: g
        h: h
    """


def enums(a: Colour, b: Level = Level.LOW):
    """Take enumerations.

    Args:
        a: one
        b: two
    """


class Shop:
    def price(self, item: str) -> float:
        """Tell the price.

        Args:
            item: what it costs
        """
        return 1.0


def as_here(schema: Any) -> Any:
    """A schema of transformers as JSON Schema says it: no "nullable", an array of fixed parts has their number, unions in one order."""
    if isinstance(schema, list):
        return [as_here(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {k: v if k == "enum" else as_here(v) for k, v in schema.items() if k != "nullable"}
    if "prefixItems" in out:
        out |= {"minItems": len(out["prefixItems"]), "maxItems": len(out["prefixItems"])}
    if schema.get("nullable"):
        about = {"description": out.pop("description")} if "description" in out else {}
        if out.keys() == {"type"}:
            types = out["type"]
            out = {"type": [*([types] if isinstance(types, str) else types), "null"]}
        else:
            out = {"anyOf": [*out.get("anyOf", [out]), {"type": "null"}]}
        out |= about
    return sorted_types(out)


def sorted_types(schema: Any) -> Any:
    if isinstance(schema, list):
        return [sorted_types(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: sorted(v) if k == "type" and isinstance(v, list) else v if k == "enum" else sorted_types(v) for k, v in schema.items()}


@pytest.mark.parametrize("function", [weather, many, unions, enums, Shop().price], ids=lambda f: f.__name__)
def test_schemas_are_those_of_transformers(function: Any) -> None:
    utils = pytest.importorskip("transformers.utils")
    theirs = copy.deepcopy(utils.get_json_schema(function))
    theirs["function"].pop("return", None)
    theirs["function"]["parameters"]["properties"].pop("return", None)
    assert sorted_types(schema_of(function)) == as_here(theirs)


# -- schemas --------------------------------------------------------------------------------------------------------------


def numpy_form(city: str, day: str, *, other: int = 0):
    """Look it up.

    More about it.

    Parameters
    ----------
    city, day : str
        Where and
        when.
    other : int, optional
        Something else.

    Returns
    -------
    str
        city : not this
    """


def sphinx_form(city: str, day: str):
    """Look it up.

    :param city: Where: a
        city.
    :param str day: When.
    :type city: str
    :returns: a text
    """


def google_types(city: str, *, day: str):
    """Look it up
    in a book. Args: none.

    Arguments:
        city (str, optional): Where.

            Even its quarter.
        day (`str`): When.
          note: in UTC.
    """


@pytest.mark.parametrize("function, city, day", [
    (numpy_form, "Where and when.", "Where and when."), (sphinx_form, "Where: a city.", "When."),
    (google_types, "Where. Even its quarter.", "When. note: in UTC.")], ids=lambda f: getattr(f, "__name__", ""))
def test_descriptions_are_found_in_every_form(function: Any, city: str, day: str) -> None:
    found = parameters(function)
    assert (found["city"]["description"], found["day"]["description"]) == (city, day)
    assert schema_of(function)["function"]["description"].startswith("Look it up")
    assert found.get("other", {}).get("description", "Something else.") == "Something else."


@limits(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["Args:", "  Args:", "Parameters", "----------", "a: x", "    a: x", "    a (int): y", ":param a: z", "", "a : int",
                                 "        more", "Returns:", "b, a : int", "@param", ":param", "\ta:"]), max_size=14))
def test_no_docstring_is_too_strange(lines: list[str]) -> None:
    told = docstrings.read("\n".join(lines), ["a"])
    assert set(told.parameters) <= {"a"} and "\n" not in told.summary


def test_annotated_says_what_the_docstring_does_not() -> None:
    def f(a: Annotated[int, "of the hint"], b: Annotated[list[int], 3, "second"] = []):
        """F.

        Args:
            a: of the docstring
        """

    assert parameters(f) == {"a": {"type": "integer", "description": "of the hint"},
                             "b": {"type": "array", "items": {"type": "integer"}, "description": "second"}}


def test_classes_are_objects() -> None:
    def f(where: Place, what: Query, when: Plain):
        """F."""

    place = {"type": "object", "description": "A place on a map.", "required": ["name"], "properties": {
        "name": {"type": "string", "description": "what it is called"}, "height": {"type": "number", "description": "in metres"},
        "tags": {"type": "array", "items": {"type": "string"}}}}
    assert parameters(f) == {
        "where": place, "what": {"type": "object", "properties": {"words": {"type": "string"}, "places": {"type": "array", "items": place}}},
        "when": {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]}}


def test_every_schema_is_one_and_grammars_are_made_of_it() -> None:
    def f(a: set[int], b: tuple[int, ...], c: Place | None, d: datetime.datetime | datetime.date, e: Shape, g: frozenset[str], h: Sequence[Query]):
        """F."""

    for function in (f, weather, many, unions, enums):
        schema = schema_of(function)["function"]["parameters"]
        jsonschema.Draft202012Validator.check_schema(schema)
        llguidance = pytest.importorskip("llguidance")
        assert not llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))


def test_functions_of_every_kind() -> None:
    class Adder:
        """Add to a number."""

        def __init__(self, n: int):
            self.n = n

        def __call__(self, m: int) -> int:
            return self.n + m

        @staticmethod
        def double(m: int) -> int:
            """Double it."""
            return 2 * m

        @classmethod
        def named(cls, m: int) -> str:
            return f"{cls.__name__} {m}"

    def wrapped(function: Any) -> Any:
        @functools.wraps(function)
        def inner(*args: Any, **more: Any) -> Any:
            return function(*args, **more)

        return inner

    def power(base: int, exponent: int, /, scale: int = 1, *, offset: int = 0) -> int:
        return scale * base**exponent + offset

    fixed = functools.partial(functools.partial(power, 2), offset=5)
    assert schema_of(Adder(1))["function"] | {"parameters": {}} == {"name": "Adder", "description": "Add to a number.", "parameters": {}}
    assert call(Adder(1), '{"m": 2}') == "3" and call(Adder.double, '{"m": 2}') == "4" and call(Adder.named, '{"m": 2}') == "Adder 2"
    assert call(wrapped(power), '{"base": 2, "exponent": 3}') == "8"
    assert call(power, '{"base": 2, "exponent": 3, "offset": 1}') == "9"
    assert list(parameters(fixed)) == ["exponent", "scale"] and call(fixed, '{"exponent": 3}') == "13"
    with pytest.raises(RequestError, match="offset"):
        call(fixed, '{"exponent": 3, "offset": 1}')


def test_async_functions_are_waited_for_with_and_without_a_loop() -> None:
    async def later(n: int) -> int:
        await asyncio.sleep(0)
        return n + 1

    async def fails() -> None:
        raise KeyError("gone")

    async def inside() -> str:
        with pytest.raises(KeyError):
            call(fails, "")
        return call(later, '{"n": 2}')

    assert call(later, '{"n": 1}') == "2" and asyncio.run(inside()) == "3"


def stars(*words: str): ...
def more(**words: str): ...
def bare(city): ...
def file(content: bytes): ...
def picture(seen: PIL.Image.Image): ...
def keys(of: dict[int, str]): ...
def gone(of: Missing): ...                        # noqa: F821
def ring(of: Ring): ...
def deep(of: list[dict[str, complex]]): ...
def literal(of: Literal[b"x"]): ...


@pytest.mark.parametrize("function, parts", [
    (stars, ["stars", "*words"]), (more, ["more", "**words"]), (bare, ["bare", "'city'", "no type hint"]), (file, ["file", "'content'", "bytes"]),
    (picture, ["'seen'", "PIL.Image.Image", "results"]), (keys, ["keys", "'of'", "texts"]), (gone, ["gone", "'of'", "Missing"]),
    (ring, ["ring", "'of'", "Ring", "itself"]), (deep, ["deep", "'of'", "complex"]), (literal, ["literal", "'of'"]),
    (lambda x: x, ["<lambda>"]), (int, ["int"]), (3, ["3"])])
def test_what_no_schema_can_say_is_refused_by_name(function: Any, parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        schema_of(function)
    assert all(part in str(caught.value) for part in parts), caught.value


# -- calls ----------------------------------------------------------------------------------------------------------------


def test_arguments_become_values_of_their_types() -> None:
    seen: dict[str, Any] = {}

    def f(a: int, b: float, c: Colour, d: Place, e: Query, g: datetime.date, h: datetime.datetime, i: tuple[int, Shape], j: set[int],
          k: int | str | None, m: Literal[1, "x"], n: datetime.date | str, o: Level = Level.LOW) -> None:
        seen.update(locals())

    given = {"a": 3.0, "b": 2, "c": "blue", "d": {"name": "Etna", "height": 3357}, "e": {"places": [{"name": "x"}]}, "g": "2024-02-29",
             "h": "2024-02-29T12:30:00Z", "i": [1, "FLAT"], "j": [1, 1, 2], "k": None, "m": 1, "n": "tomorrow"}
    assert call(f, json.dumps(given)) == "null"
    utc = datetime.timezone.utc
    assert {k: v for k, v in seen.items() if k != "seen"} == {
        "a": 3, "b": 2.0, "c": Colour.BLUE, "d": Place("Etna", 3357.0), "e": {"places": [Place("x")]}, "g": datetime.date(2024, 2, 29),
        "h": datetime.datetime(2024, 2, 29, 12, 30, tzinfo=utc), "i": (1, Shape.FLAT), "j": {1, 2}, "k": None, "m": 1, "n": "tomorrow", "o": Level.LOW}
    assert type(seen["a"]) is int and type(seen["b"]) is float


@pytest.mark.parametrize("arguments, parts", [
    ('{"days": 1}', ["weather", "'city' is a required property"]), ('{"city": 3}', ["city: 3 is not of type 'string'"]),
    ('{"city": "x", "unit": "kelvin"}', ["unit: 'kelvin' is not one of ['celsius', 'fahrenheit']"]), ('{"city": "x", "town": "y"}', ["town"]),
    ('{"city": "x"', ["no JSON"]), ("[]", ["object"]), ('{"city": "x", "days": NaN}', ["NaN"]), ('{"city": "x", "days": true}', ["days: True"]),
    ("[" * 100000, ["no JSON"]), ('{"city": "' + "x" * 9999, ["no JSON"])])
def test_wrong_arguments_are_told_to_the_model(arguments: str, parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        call(weather, arguments)
    assert all(part in str(caught.value) for part in parts) and len(str(caught.value)) < 2000


def test_what_a_schema_cannot_check_is_told_too() -> None:
    def f(where: list[Place] = [], day: datetime.date | None = None, x: float = 0.0): ...

    for arguments, part in (('{"where": [{"name": "x"}, {"name": "y", "height": -900}]}', "where[1]: no place is that low"),
                            ('{"day": "2024-02-30"}', "day: '2024-02-30' is no date: YYYY-MM-DD"), ('{"x": 1' + "0" * 400 + "}", "too large"),
                            ('{"where": [{"name": "x", "colour": 1}]}', "where[0]: ")):
        with pytest.raises(RequestError) as caught:
            call(f, arguments)
        assert part in str(caught.value)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "name", "height", "day", "x"]), inner, max_size=4))


@limits(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), JSON, max_size=4))
def test_any_arguments_are_taken_or_refused_in_words(value: dict[str, Any]) -> None:
    def f(a: Union[int, list[Place], Colour] = 0, b: Union[datetime.date, str, None] = None, c: dict[str, Union[bool, set[Any]]] = {}, d: Any = None):
        return "taken"

    fits = jsonschema.Draft202012Validator(hints.closed(functions.Function(f).parameters)).is_valid(value)
    try:
        assert call(f, json.dumps(value)) == "taken" and fits
    except RequestError as error:
        assert "f" in str(error) or "c" in str(error)


def test_an_exception_of_the_function_is_its_own() -> None:
    def f() -> None:
        raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError):
        call(f, "{}")


# -- results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result, content", [
    ("as it is", "as it is"), (None, "null"), (1.5, "1.5"), ({"ä": [1, (2, 3)]}, '{"ä": [1, [2, 3]]}'), (Place("x"), '{"name": "x", "height": 0.0, "tags": []}'),
    (datetime.date(2024, 1, 2), '"2024-01-02"'), ([Colour.RED, Level.LOW], '["red", 1]'), (np.float32(0.5), "0.5"), (np.arange(3), "[0, 1, 2]"),
    (Path("a/b"), '"a/b"'), ({1: "x", None: 2}, '{"1": "x", "None": 2}'), (np.zeros((2, 2), np.uint8), "[[0, 0], [0, 0]]")])
def test_results_are_json(result: Any, content: str) -> None:
    assert content_of(result) == content


def test_pictures_are_parts_that_a_conversation_takes() -> None:
    pillow, array = PIL.Image.new("RGB", (4, 3)), np.zeros((3, 4, 3), np.uint8)
    for picture in (pillow, array, pe.Image(array)):
        content = content_of(picture)
        shown, found = media.split([{"role": "tool", "content": content}])
        assert shown[0]["content"] == [{"type": "image"}] and found[0].source is picture
    mixed = content_of(["a screen", pillow, {"n": 1}])
    assert mixed == [{"type": "text", "text": "a screen"}, {"type": "image", "image": pillow}, {"type": "text", "text": '{"n": 1}'}]


def test_results_that_json_cannot_say() -> None:
    ring: list[Any] = []
    ring.append(ring)
    for result, part in ((object(), "object"), ({"a": b"x"}, "bytes"), (ring, "nested"), ((i for i in ()), "generator")):
        with pytest.raises(RequestError, match=part):
            content_of(result, "f")
