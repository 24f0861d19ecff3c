"""What chat templates pay for methods, filters and tests before these run: the list of what is bounded in this process.

Each cost is a function of the arguments that the operation will get. What has no cost here is `Outside`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import BuiltinFunctionType, GeneratorType
from typing import Any

from jinja2 import Undefined
from jinja2.runtime import LoopContext, Macro
from jinja2.utils import _PassArg
from markupsafe import Markup

from pyengine.chat import dialect
from pyengine.chat.budget import (
    Budget, CHARACTER, checked_integer, counted, current_budget, ENTRY, LISTS, listed, MAX_BITS, MAX_CHAIN, measured, NUMBERS, only,
    Outside, SCALARS, ticking, VIEWS)

# ---------------------------------------------------------------------------------------------------------------------
# Methods: what each pays before it runs, given the object and its arguments; scalars only


def _free(_budget: Budget, _value: Any, *_args: Any) -> None:
    """Take a step, whatever the value is."""


def _scan(budget: Budget, text: str, *args: Any) -> None:
    budget.spend(len(text))


def _scan_for_any(budget: Budget, text: str, chars: Any = None) -> None:
    budget.spend(CHARACTER * len(text) + len(text) * (len(chars) if type(chars) is str else 0) // 8)


def _scan_backwards(budget: Budget, text: str, part: Any = None, *args: Any) -> None:
    budget.spend(len(text) * (1 + (len(part) if type(part) is str else 0) // 4))     # CPython has no fast search from the end


def _copy(budget: Budget, text: str, *args: Any) -> None:
    budget.spend(CHARACTER * len(text))


def _recase(budget: Budget, text: str, *args: Any) -> None:
    budget.spend(3 * CHARACTER * len(text))        # up to three characters for one


def _split(budget: Budget, text: str, sep: Any = None, maxsplit: Any = -1) -> None:
    budget.spend(CHARACTER * len(text))
    pieces = text.count(sep) if type(sep) is str and sep else len(text) // 2
    if type(maxsplit) is int and 0 <= maxsplit < pieces:
        pieces = maxsplit
    budget.spend(2 * ENTRY * (pieces + 1))


def _split_backwards(budget: Budget, text: str, sep: Any = None, maxsplit: Any = -1) -> None:
    _scan_backwards(budget, text, sep)
    _split(budget, text, sep, maxsplit)


def _splitlines(budget: Budget, text: str, *args: Any) -> None:
    budget.spend(CHARACTER * len(text))
    budget.spend(2 * ENTRY * _lines(text))


def _lines(text: str) -> int:
    """Allow at most so many lines."""
    return 1 + sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))


def _partition(budget: Budget, text: str, sep: Any) -> None:
    budget.spend(CHARACTER * len(text))


def _rpartition(budget: Budget, text: str, sep: Any) -> None:
    _scan_backwards(budget, text, sep)
    budget.spend(CHARACTER * len(text))


def _replacing(budget: Budget, text: str, old: Any, new: Any, count: Any = -1) -> None:
    budget.spend(len(text))
    if type(old) is str and type(new) is str:
        budget.spend(CHARACTER * (len(text) + (text.count(old) if old else len(text) + 1) * len(new)))


def _joining(budget: Budget, text: str, items: Any) -> None:
    budget.spend(measured(items) + CHARACTER * len(text) * len(items))


def _append(budget: Budget, items: list[Any], value: Any) -> None:
    budget.spend(ENTRY)


def _pop(budget: Budget, items: list[Any], *args: Any) -> None:
    budget.spend(len(items) // 4)


def _named(cost: Callable[..., None], *names: str) -> dict[str, Callable[..., None]]:
    return dict.fromkeys(names, cost)


METHOD_COSTS: dict[type, dict[str, Callable[..., None]]] = {
    str: {**_named(_scan_for_any, "strip", "lstrip", "rstrip"), **_named(_split, "split"), **_named(_split_backwards, "rsplit"),
          **_named(_splitlines, "splitlines"), **_named(_partition, "partition"), **_named(_rpartition, "rpartition"),
          **_named(_scan, "startswith", "endswith", "find", "index", "count", "isdigit", "isalpha", "isalnum", "isspace", "isupper",
                   "islower", "isnumeric", "isdecimal", "isascii", "istitle"),
          **_named(_scan_backwards, "rfind", "rindex"), **_named(_copy, "removeprefix", "removesuffix"),
          **_named(_recase, "upper", "lower", "title", "capitalize", "casefold", "swapcase"),
          **_named(_replacing, "replace"), **_named(_joining, "join")},
    dict: _named(_free, "get", "items", "keys", "values"),
    list: {**_named(_append, "append"), **_named(_pop, "pop")},
}
ANY_ARGUMENT = {(str, "join"), (list, "append"), (dict, "get")}


class Format:
    """`"...".format` where the fields are {}, {0} or {name}, and nothing more."""

    FIELD = re.compile(r"\{(\w{0,100})\}")

    def __init__(self, text: str):
        self.text = text

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        values = [*args, *kwargs.values()]
        only(SCALARS, *values)
        largest = max(map(measured, values), default=0)
        current_budget.get().spend(3 * CHARACTER * len(self.text) + self.text.count("{") * (2 * ENTRY + largest))
        rest = self.FIELD.sub("", self.text)
        if "{" in rest or "}" in rest:
            raise Outside
        return self.text.format(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Filters and tests: what each pays, given its arguments


def pay_for_text(value: Any, factor: int = 1) -> None:
    """Pay for what is made a string first."""
    budget = current_budget.get()
    kind = type(value)
    if kind is str or kind is Markup:
        budget.spend(factor * CHARACTER * len(value))
    else:
        characters, entries, _ = counted(value)
        budget.afford(factor * (10 * CHARACTER * characters + ENTRY * entries))      # repr writes up to ten characters for one
        budget.spend(factor * (CHARACTER * characters + ENTRY * entries))


def _number(value: Any, *args: Any, **kwargs: Any) -> None:
    current_budget.get().spend(0)
    only(NUMBERS, value, *args, *kwargs.values())
    for n in (value, *args):
        if type(n) is int:
            checked_integer(n)


def _small(value: Any, *args: Any, **kwargs: Any) -> None:
    """Pay for int and float: a text is as long as numbers are."""
    current_budget.get().spend(0)
    for n in (value, *args, *kwargs.values()):
        if type(n) is str and len(n) > 400 or type(n) is int and n.bit_length() > MAX_BITS:
            raise Outside


def _rounding(value: Any, precision: Any = 0, method: Any = "common") -> None:
    _number(value, precision)
    if not -15 <= precision <= 15:
        raise Outside


def _comparing(value: Any, *args: Any, **kwargs: Any) -> None:
    """Pay for sort and its like. The argument is a list by then."""
    units = measured(value, 2 * CHARACTER, 4 * ENTRY) + ENTRY * len(value)
    current_budget.get().spend(units * max(1, len(value)).bit_length())


def _unique(value: Any, *args: Any, **kwargs: Any) -> None:
    current_budget.get().spend(measured(value, 2 * CHARACTER, 4 * ENTRY) + ENTRY * len(value))
    if not args and not kwargs:
        only(SCALARS, *value)                     # these are hashed
    else:
        raise Outside


def _sum(value: Any, *args: Any, **kwargs: Any) -> None:
    current_budget.get().spend(ENTRY * len(value))
    if args or kwargs:
        raise Outside
    _number(0, *value)


def _nothing(value: Any, *args: Any, **kwargs: Any) -> None:
    current_budget.get().spend(0)


def _scalar(value: Any, *args: Any, **kwargs: Any) -> None:
    current_budget.get().spend(0)
    only(SCALARS, value)


def _counted(value: Any, *args: Any, **kwargs: Any) -> None:
    """Pay for what takes an entry for each item; iterators pay as they go."""
    current_budget.get().spend(2 * ENTRY * len(value) if hasattr(type(value), "__len__") else 0)


def _reverse(value: Any) -> None:
    if type(value) is GeneratorType:               # becomes a list
        raise Outside
    current_budget.get().spend(CHARACTER * len(value) if type(value) is str else 0)


def _trim(value: Any, chars: Any = None) -> None:
    pay_for_text(value)
    if chars is not None:
        only(SCALARS, chars)
        only(frozenset({str}), value)
        _scan_for_any(current_budget.get(), value, chars)


def _title(value: Any) -> None:
    pay_for_text(value, 25)                               # an entry for each word


def _indent(value: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    only(frozenset({str}), value)
    only(frozenset({str, int, bool}), width)
    budget = current_budget.get()
    budget.spend(3 * CHARACTER * len(value))
    lines, space = _lines(value), len(width) if type(width) is str else max(0, width)
    budget.spend((2 * CHARACTER * (space + 1) + 2 * ENTRY) * (lines + 1))


def _replace(value: Any, old: Any, new: Any, count: Any = None) -> None:
    only(frozenset({str}), value, old, new)
    _replacing(current_budget.get(), value, old, new)


def _join(value: Any, d: Any = "", attribute: Any = None) -> None:
    only(SCALARS, d, attribute)
    budget = current_budget.get()
    between = (CHARACTER * len(str(d)) + ENTRY) * len(value)
    characters, entries, _ = counted(value)
    budget.afford(10 * CHARACTER * characters + ENTRY * entries + between)
    budget.spend(CHARACTER * characters + ENTRY * entries + between)


def _tojson(value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False) -> None:
    only(SCALARS, ensure_ascii, indent, sort_keys)
    budget, level = current_budget.get(), 0
    if indent is not None:
        level = CHARACTER * (len(indent) if type(indent) is str else max(0, int(indent)))
    between = 0
    if separators is not None:
        only(LISTS, separators)
        only(frozenset({str}), *separators)
        between = CHARACTER * sum(map(len, separators))
    characters, entries, levels = counted(value)
    rest = (2 * ENTRY + between) * entries + level * levels
    budget.afford(12 * CHARACTER * characters + rest)                    # \ud83d\ude00 for one character
    budget.spend(CHARACTER * characters + rest)


def _dictsort(value: Any, *args: Any, **kwargs: Any) -> None:
    only(frozenset({dict}), value)
    _comparing(value)


_LAZY = frozenset({"map", "select", "reject", "selectattr", "rejectattr", "list"})       # take items one by one
_WHOLE = frozenset({"join", "sort", "unique", "min", "max", "sum"})      # take items as a list
_ITERATORS = frozenset({"items", "unique", "reverse"})                   # give items one by one
FILTER_COSTS: dict[str, Callable[..., None]] = {
    "trim": _trim, "title": _title,
    "upper": lambda v: pay_for_text(v, 3), "lower": lambda v: pay_for_text(v, 3), "capitalize": lambda v: pay_for_text(v, 6),
    "string": pay_for_text, "replace": _replace, "indent": _indent, "join": _join, "tojson": _tojson, "safe": pay_for_text,
    "length": _nothing, "count": _nothing, "default": _nothing, "d": _nothing, "first": _nothing, "last": _nothing, "items": _nothing,
    "list": _counted, "reverse": _reverse, "sort": _comparing, "min": _comparing, "max": _comparing, "dictsort": _dictsort,
    "unique": _unique, "sum": _sum, "abs": _number, "round": _rounding, "int": _small, "float": _small,
    **dict.fromkeys(_LAZY - {"list"}, _nothing),
}


def pay_for_comparing(left: Any, right: Any) -> None:
    budget = current_budget.get()
    if type(left) in SCALARS:
        if type(right) in SCALARS:
            budget.spend(len(right) if type(right) is str else 0)
        elif type(right) is dict or isinstance(right, Undefined):
            budget.spend(0)
        elif type(right) in LISTS:
            budget.spend(16 * len(right) + (len(left) * len(right) // 8 if type(left) is str else 0))
        elif type(right) is range:
            budget.spend(0 if type(left) is int else ENTRY * len(right))
        else:
            budget.spend(measured(right))
    elif type(right) is dict and type(left) is not dict:
        raise Outside                              # would be hashed, which tuples do anew each time
    else:
        budget.spend(measured(left) + measured(right))


TEST_COSTS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("defined", "undefined", "none", "boolean", "true", "false", "integer", "float", "number", "string", "mapping",
                     "iterable", "sequence", "callable", "sameas", "escaped"), _nothing),
    **dict.fromkeys(("filter", "test"), _scalar),
    **dict.fromkeys(("odd", "even", "divisibleby"), _number),            # of a string, % would format it
    **dict.fromkeys(("lower", "upper"), pay_for_text),
    **dict.fromkeys(("eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">", "ge", ">=", "in"),
                    pay_for_comparing),
}


def _chain(made: Any, source: Any) -> None:
    """Pay for iterators: bound how deep they go, as the next item is had through all of them."""
    chains = current_budget.get().chains
    chains[made] = depth = 1 + (chains.get(source, 0) if type(source) is GeneratorType else 0)
    if depth > MAX_CHAIN:
        raise Outside


KINDS = frozenset({*SCALARS, *LISTS, *VIEWS, dict, range, Markup, GeneratorType, LoopContext, Macro, dialect.Namespace, dialect.Dict,
                    BuiltinFunctionType, type(dialect.tojson), type, type(reversed([])), type(reversed("")), type(iter([])), Format})


def paying(original: Callable[..., Any], cost: Callable[..., None] | None, name: str = "") -> Callable[..., Any]:
    """Wrap a filter (by its name) or test of jinja2, which pays before it runs; without a cost, one that is not for this
    process."""
    skip = int(_PassArg.from_obj(original) is not None)                  # the environment or context comes first

    @functools.wraps(original)                     # and says so on the copy too
    def run(*args: Any, **kwargs: Any) -> Any:
        if cost is None:
            raise Outside
        head, value, rest = args[:skip], args[skip], args[skip + 1:]
        if type(value) not in KINDS and not isinstance(value, Undefined):
            raise Outside
        try:
            if name in _WHOLE and type(value) is not str and not isinstance(value, Undefined):
                value = listed(value)
            cost(value, *rest, **kwargs)
        except Exception:                          # an error of the template's, and when and whether it comes is jinja2's to say
            raise Outside from None
        if name in _LAZY and value:                # jinja2 takes None for an empty list here
            value = ticking(value)
        made = original(*head, value, *rest, **kwargs)
        if name in _ITERATORS and type(made) is not str:
            made = ticking(made)
        if type(made) is GeneratorType:
            _chain(made, args[skip])
        return made

    return run
