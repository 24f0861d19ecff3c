"""Records behave as the classes of the standard library that they stand for."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
import typing
from typing import Any

import pytest

from pyengine import records
from pyengine.cache.policy import Sliding


def build(decorate: Any, **how: bool) -> tuple[Any, Any]:
    """A class and one below it, with every kind of field that there is in the package."""
    made: list[Any] = []

    @decorate(**how)
    class Base:
        """A base."""

        a: int
        b: str = "b"
        shared: typing.ClassVar[int] = 7

    @decorate(**how)
    class Below(Base):
        """One below."""

        c: list[int] = dataclasses.field(default_factory=list)
        d: int = dataclasses.field(default=3, repr=False, compare=False)
        e: int = dataclasses.field(init=False, default=5)

        def __post_init__(self) -> None:
            made.append((self.a, self.c))

    Below.made = made
    return Base, Below


@pytest.mark.parametrize("how", [{}, {"frozen": True}, {"eq": False}, {"frozen": True, "eq": False}, {"order": True}, {"repr": False}], ids=str)
def test_dataclasses_are_those_of_the_standard_library(how: dict[str, bool]) -> None:
    found = []
    for Base, Below in (build(records.dataclass, **how), build(dataclasses.dataclass, **how)):
        x, y, z = Below(1), Below(1, "x", [2], d=9), Below(a=1)
        facts: list[Any] = [vars(x), vars(y), Below.made, x == z, x == y, Below.shared, Below.__match_args__, Base(1) == Base(1), Base(4).a]
        facts += [repr(v) if how.get("repr", True) and how.get("eq", True) else "" for v in (x, y)]
        facts += [vars(dataclasses.replace(y, a=8)), dataclasses.asdict(y), copy.deepcopy(y).c, dataclasses.is_dataclass(Below)]
        facts += [[(f.name, f.init, f.repr) for f in dataclasses.fields(kind)] for kind in (Base, Below)]
        for wrong in (lambda: Below(), lambda: Below(1, nothing=2), lambda: Below(1, "b", [], 3, 5), lambda: setattr(x, "a", 2), lambda: hash(x),
                      lambda: x < y):
            try:
                facts.append(type(wrong()).__name__)
            except (TypeError, dataclasses.FrozenInstanceError) as error:
                facts.append(type(error).__name__)
        found.append(facts)
    assert found[0] == found[1]


def test_a_class_knows_its_fields_before_there_is_one() -> None:
    for ask in (dataclasses.fields, lambda kind: kind.__dataclass_fields__, lambda kind: kind.__match_args__, dataclasses.is_dataclass):
        of = [ask(build(decorate, frozen=True)[1]) for decorate in (records.dataclass, dataclasses.dataclass)]
        assert str(of[0]) == str(of[1])
    assert dataclasses.is_dataclass(Sliding) and pickle.loads(pickle.dumps(Sliding(4))) == Sliding(4)


def test_what_cannot_be_finished_later_is_refused() -> None:
    with pytest.raises(TypeError, match="no slots"):
        build(records.dataclass, slots=True)
    with pytest.raises(TypeError, match="__init__ is made"):
        records.dataclass(type("Own", (), {"__init__": lambda self: None}))


def test_many_threads_may_be_the_first() -> None:
    for _ in range(50):
        Below, failed, start = build(records.dataclass, frozen=True)[1], [], threading.Barrier(4)

        def call() -> None:
            start.wait()
            try:
                assert Below(1, "x").b == "x" and Below(1) == Below(1)
            except Exception as error:                       # what a thread raises is not seen otherwise
                failed.append(error)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not failed


def test_named_tuples_are_those_of_typing() -> None:
    found = []
    for base in (records.NamedTuple, typing.NamedTuple):
        class Pair(base):  # type: ignore[misc, valid-type]
            """Two."""

            a: int
            b: str = "x"

            @property
            def both(self) -> tuple[int, str]:
                return self.a, self.b

            def twice(self) -> int:
                return 2 * self.a

        p = Pair(1)
        found.append([tuple(p), p.both, p.twice(), repr(p), Pair._fields, Pair._field_defaults, Pair.__doc__, Pair.__module__, Pair.__annotations__.keys(),
                      p._replace(b="y") == (1, "y"), p._asdict(), isinstance(p, tuple), Pair.__mro__[1:], Pair.__qualname__, Pair(b="q", a=3) > p])
    assert found[0] == found[1]
    with pytest.raises(TypeError, match="without a default"):
        class Wrong(records.NamedTuple):
            a: int = 1
            b: str
