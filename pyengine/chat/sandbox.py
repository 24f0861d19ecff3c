"""Templates of strangers' files, bounded in time and in all their memory: here where that is certain, else in a helper process.

A template is a program. In Python one expression of it can take any time and memory in one call into C, where no check of
ours runs: `1 // x`, `'%9999999999d' % 1`, `x == y` of lists that share their parts, `'a'.rsplit(b)`. Two mechanisms bound it.

1. `Sandbox` renders in this process what it can bound by construction, which is a closed world. Values are of the types
   below and no others. Each operation on them - operators, calls, filters, tests, attributes, output - is one that is
   listed here with its cost, and is paid for from one budget *before* it runs: bytes that are made (a character counts as
   the 4 bytes it may take) and steps. Loops and macros pay for their whole body at every turn. Nothing is paid back, so
   what is spent bounds what is alive, however it is spread over variables, and bounds the time as well. While compiling,
   nothing is evaluated, and the tree is bounded in size and depth before code is made of it.
2. Whatever is not listed, or does not fit the budget, raises `Outside`, and the template is rendered anew in a process of
   its own that the operating system bounds (`helper.py`). There, all of jinja2 and Python's methods may be used.

So a forgotten corner costs some 60 ms, not safety, and the list needs to hold only what real templates use: all of the 90
that were at hand (of 70 model families) stay in this process. The alternatives: to meter everything here means to know
the cost of all of Python; to render everything in a helper means those 60 ms for everybody.
"""

from __future__ import annotations

import functools
import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import BuiltinFunctionType, GeneratorType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import nodes, pass_context, Undefined
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import safe_range
from jinja2.tests import TESTS
from jinja2.utils import _PassArg
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from pyengine.chat import dialect

WORK = 64 << 20                                    # units that a rendering may spend in this process
MAX_SECONDS_HERE = 1.0                             # real templates take milliseconds
MAX_SOURCE_HERE = 60_000                           # characters; the longest known have 30,000
MAX_NODES = 10_000                                 # of the syntax tree; known ones have up to 1,300
MAX_DEPTH = 100                                    # of the syntax tree and in the parser; known ones have 28
MAX_CALLS = 30                                     # macros and recursive loops inside each other
MAX_NESTING = 60                                   # of lists and mappings that are printed or compared
MAX_BITS = 1024                                    # of an integer
MAX_CHAIN = 20                                     # of iterators that draw on each other

CHARACTER = 4                                      # bytes that it may take
ENTRY = 64                                         # units of one entry of a list or mapping
STEP = 64                                          # units of any operation
NODE = 16                                          # units of one node of a body at each turn; for some, what they make:
NODES_OF = {nodes.Dict: 256, nodes.List: 64, nodes.Tuple: 64, nodes.For: 512, nodes.Macro: 1024, nodes.CallBlock: 1024, nodes.Getattr: 64,
            nodes.Getitem: 64}

SCALARS = frozenset({str, int, float, bool, type(None)})
NUMBERS = frozenset({int, float, bool})
LISTS = frozenset({list, tuple})
VIEWS = frozenset({type({}.keys()), type({}.values()), type({}.items())})


class Outside(BaseException):
    """This cannot be bounded here. No Exception, so that nothing in jinja2 takes it for an error of the template."""


# ---------------------------------------------------------------------------------------------------------------------
# The budget


class Budget:
    """What one rendering may still use."""

    def __init__(self, deadline: float):
        self.deadline = min(deadline, time.monotonic() + MAX_SECONDS_HERE)
        self.left = WORK
        self.steps = 0
        self.depth = 0                             # of calls
        self.chains: WeakKeyDictionary[Any, int] = WeakKeyDictionary()        # how many iterators each draws on

    def spend(self, units: int) -> None:
        self.left -= units + STEP
        self.steps += 1
        if self.left < 0 or not self.steps & 15 and time.monotonic() > self.deadline:
            raise Outside

    def afford(self, units: int) -> None:
        """Check that what is about to be made fits, where what it really takes is known, and spent, afterwards."""
        if units > self.left:
            raise Outside


current_budget: ContextVar[Budget] = ContextVar("current_budget")


def measured(value: Any, per_character: int = CHARACTER, per_entry: int = ENTRY, per_level: int = 0) -> int:
    """Units of a value with all that it holds, shared parts each time they would be visited: for printing and comparing."""
    kind = type(value)
    if kind is str or kind is Markup:
        return per_character * len(value)
    total, waiting, limit = 0, [(value, 0)], current_budget.get().left
    while waiting:
        item, depth = waiting.pop()
        kind = type(item)
        if kind is str or kind is Markup:
            total += per_character * len(item) + per_entry + depth * per_level
            continue
        total += per_entry + depth * per_level
        if kind in LISTS or kind in VIEWS:
            parts: Iterable[Any] = item
        elif kind is dict:
            parts = (part for pair in item.items() for part in pair)
        elif kind is dialect.Namespace:
            parts = item._Namespace__attrs.items()
        elif kind is int:
            total += _checked_integer(item).bit_length()
            continue
        elif kind in SCALARS or kind is range or isinstance(item, Undefined):
            continue
        else:                                      # a function, a generator ...
            raise Outside
        if depth > MAX_NESTING or total + per_entry * _length(item) > limit:
            raise Outside
        waiting += [(part, depth + 1) for part in parts]
    return total


def _length(value: Any) -> int:
    return 2 * len(value) if type(value) is dict else 0 if type(value) is dialect.Namespace else len(value)


def _checked_integer(value: int) -> int:
    if value.bit_length() > MAX_BITS:
        raise Outside
    return value


def _ticking(items: Iterable[Any]) -> Iterator[Any]:
    """Give the items one by one, each paid for."""
    spend = current_budget.get().spend
    for item in items:
        spend(ENTRY)
        yield item


def _listed(items: Any) -> Any:
    return [*_ticking(items)] if isinstance(items, GeneratorType) or type(items) not in LISTS else items


def _only(kinds: frozenset[type], *values: Any) -> None:
    for value in values:
        if type(value) not in kinds:
            raise Outside


# ---------------------------------------------------------------------------------------------------------------------
# Methods: what each pays before it runs, given the object and its arguments; scalars only


def _free(_budget: Budget, _value: Any, *_args: Any) -> None:
    """Takes a step, whatever the value is."""


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
    """At most so many lines."""
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


_METHODS: dict[type, dict[str, Callable[..., None]]] = {
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
_ANY_ARGUMENT = {(str, "join"), (list, "append"), (dict, "get")}


class _Format:
    """`"...".format` where the fields are {}, {0} or {name}, and nothing more."""

    FIELD = re.compile(r"\{(\w{0,100})\}")

    def __init__(self, text: str):
        self.text = text

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        values = [*args, *kwargs.values()]
        _only(SCALARS, *values)
        largest = max(map(measured, values), default=0)
        current_budget.get().spend(3 * CHARACTER * len(self.text) + self.text.count("{") * (2 * ENTRY + largest))
        rest = self.FIELD.sub("", self.text)
        if "{" in rest or "}" in rest:
            raise Outside
        return self.text.format(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Filters and tests: what each pays, given its arguments


def _text(value: Any, factor: int = 1) -> None:
    """For what is made a string first."""
    budget = current_budget.get()
    kind = type(value)
    if kind is str or kind is Markup:
        budget.spend(factor * CHARACTER * len(value))
    else:
        budget.afford(factor * measured(value, 10 * CHARACTER))          # repr writes up to ten characters for one
        budget.spend(factor * measured(value))


def _number(value: Any, *args: Any, **kwargs: Any) -> None:
    current_budget.get().spend(0)
    _only(NUMBERS, value, *args, *kwargs.values())
    for n in (value, *args):
        if type(n) is int:
            _checked_integer(n)


def _small(value: Any, *args: Any, **kwargs: Any) -> None:
    """For int and float: a text is as long as numbers are."""
    current_budget.get().spend(0)
    for n in (value, *args, *kwargs.values()):
        if type(n) is str and len(n) > 400 or type(n) is int and n.bit_length() > MAX_BITS:
            raise Outside


def _rounding(value: Any, precision: Any = 0, method: Any = "common") -> None:
    _number(value, precision)
    if not -15 <= precision <= 15:
        raise Outside


def _comparing(value: Any, *args: Any, **kwargs: Any) -> None:
    """For sort and its like. The argument is a list by then."""
    units = measured(value, 2 * CHARACTER, 4 * ENTRY) + ENTRY * len(value)
    current_budget.get().spend(units * max(1, len(value)).bit_length())


def _unique(value: Any, *args: Any, **kwargs: Any) -> None:
    current_budget.get().spend(measured(value, 2 * CHARACTER, 4 * ENTRY) + ENTRY * len(value))
    if not args and not kwargs:
        _only(SCALARS, *value)                     # these are hashed
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
    _only(SCALARS, value)


def _counted(value: Any, *args: Any, **kwargs: Any) -> None:
    """For what takes an entry for each item; iterators pay as they go."""
    current_budget.get().spend(2 * ENTRY * len(value) if hasattr(type(value), "__len__") else 0)


def _reverse(value: Any) -> None:
    if type(value) is GeneratorType:               # becomes a list
        raise Outside
    current_budget.get().spend(CHARACTER * len(value) if type(value) is str else 0)


def _trim(value: Any, chars: Any = None) -> None:
    _text(value)
    if chars is not None:
        _only(SCALARS, chars)
        _only(frozenset({str}), value)
        _scan_for_any(current_budget.get(), value, chars)


def _title(value: Any) -> None:
    _text(value, 25)                               # an entry for each word


def _indent(value: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    _only(frozenset({str}), value)
    _only(frozenset({str, int, bool}), width)
    budget = current_budget.get()
    budget.spend(3 * CHARACTER * len(value))
    lines, space = _lines(value), len(width) if type(width) is str else max(0, width)
    budget.spend((2 * CHARACTER * (space + 1) + 2 * ENTRY) * (lines + 1))


def _replace(value: Any, old: Any, new: Any, count: Any = None) -> None:
    _only(frozenset({str}), value, old, new)
    _replacing(current_budget.get(), value, old, new)


def _join(value: Any, d: Any = "", attribute: Any = None) -> None:
    _only(SCALARS, d, attribute)
    budget = current_budget.get()
    between = (CHARACTER * len(str(d)) + ENTRY) * len(value)
    budget.afford(measured(value, 10 * CHARACTER) + between)
    budget.spend(measured(value) + between)


def _tojson(value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False) -> None:
    _only(SCALARS, ensure_ascii, indent, sort_keys)
    budget, level = current_budget.get(), 0
    if indent is not None:
        level = CHARACTER * (len(indent) if type(indent) is str else max(0, int(indent)))
    between = 0
    if separators is not None:
        _only(LISTS, separators)
        _only(frozenset({str}), *separators)
        between = CHARACTER * sum(map(len, separators))
    entry = 2 * ENTRY + between
    budget.afford(measured(value, 12 * CHARACTER, entry, level))         # \ud83d\ude00 for one character
    budget.spend(measured(value, CHARACTER, entry, level))


def _dictsort(value: Any, *args: Any, **kwargs: Any) -> None:
    _only(frozenset({dict}), value)
    _comparing(value)


_LAZY = frozenset({"map", "select", "reject", "selectattr", "rejectattr", "list"})       # take items one by one
_WHOLE = frozenset({"join", "sort", "unique", "min", "max", "sum"})      # take items as a list
_ITERATORS = frozenset({"items", "unique", "reverse"})                   # give items one by one
_FILTERS: dict[str, Callable[..., None]] = {
    "trim": _trim, "upper": lambda v: _text(v, 3), "lower": lambda v: _text(v, 3), "capitalize": lambda v: _text(v, 6), "title": _title,
    "string": _text, "replace": _replace, "indent": _indent, "join": _join, "tojson": _tojson, "safe": _text,
    "length": _nothing, "count": _nothing, "default": _nothing, "d": _nothing, "first": _nothing, "last": _nothing, "items": _nothing,
    "list": _counted, "reverse": _reverse, "sort": _comparing, "min": _comparing, "max": _comparing, "dictsort": _dictsort,
    "unique": _unique, "sum": _sum, "abs": _number, "round": _rounding, "int": _small, "float": _small,
    **dict.fromkeys(_LAZY - {"list"}, _nothing),
}


_TESTS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("defined", "undefined", "none", "boolean", "true", "false", "integer", "float", "number", "string", "mapping",
                     "iterable", "sequence", "callable", "sameas", "escaped"), _nothing),
    **dict.fromkeys(("filter", "test"), _scalar),
    **dict.fromkeys(("odd", "even", "divisibleby"), _number),            # of a string, % would format it
    **dict.fromkeys(("lower", "upper"), _text),
    **dict.fromkeys(("eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">", "ge", ">=", "in"),
                    lambda left, right: _pay_for_comparing(left, right)),
}


def _chain(made: Any, source: Any) -> None:
    """Bound how deep iterators go, as the next item is had through all of them."""
    chains = current_budget.get().chains
    chains[made] = depth = 1 + (chains.get(source, 0) if type(source) is GeneratorType else 0)
    if depth > MAX_CHAIN:
        raise Outside


def _paying(original: Callable[..., Any], cost: Callable[..., None] | None, name: str = "") -> Callable[..., Any]:
    """A filter (by its name) or test of jinja2 that pays before it runs; without a cost, one that is not for this process."""
    skip = int(_PassArg.from_obj(original) is not None)                  # the environment or context comes first

    @functools.wraps(original)                     # and says so on the copy too
    def run(*args: Any, **kwargs: Any) -> Any:
        if cost is None:
            raise Outside
        head, value, rest = args[:skip], args[skip], args[skip + 1:]
        if type(value) not in _KINDS and not isinstance(value, Undefined):
            raise Outside
        try:
            if name in _WHOLE and type(value) is not str and not isinstance(value, Undefined):
                value = _listed(value)
            cost(value, *rest, **kwargs)
        except Exception:                          # an error of the template's, and when and whether it comes is jinja2's to say
            raise Outside from None
        if name in _LAZY and value:                # jinja2 takes None for an empty list here
            value = _ticking(value)
        made = original(*head, value, *rest, **kwargs)
        if name in _ITERATORS and type(made) is not str:
            made = _ticking(made)
        if type(made) is GeneratorType:
            _chain(made, args[skip])
        return made

    return run


# ---------------------------------------------------------------------------------------------------------------------
# What jinja2 has no hook for: comparisons, slices, `~`, bodies. The syntax tree gets filters in their place


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt, "gteq": operator.ge,
    "in": lambda a, b: a in b, "notin": lambda a, b: a not in b,
}


def _pay_for_comparing(left: Any, right: Any) -> None:
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


def _compared(left: Any, name: str, right: Any) -> Any:
    _pay_for_comparing(left, right)
    return _COMPARISONS[name](left, right)


def _sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    _only(frozenset({int, type(None)}), start, stop, step)
    kind = type(value)
    if kind not in LISTS and kind is not str and kind is not range and not isinstance(value, Undefined):
        raise Outside                              # jinja2 gives Undefined for constants, and an error for others
    current_budget.get().spend(CHARACTER * len(value) if kind is str else 8 * len(value) if kind in LISTS else 0)
    return value[start:stop:step]


def _concatenated(items: list[Any]) -> str:
    for item in items:
        _text(item)
    return "".join(map(str, items))


def _spend(units: int) -> None:
    if type(units) is not int or units < 0:        # a template that has found the name
        raise Outside
    current_budget.get().spend(units)


@pass_context                                      # which keeps jinja2 from evaluating constants while compiling
def _shown(_context: object, value: Any) -> str:
    """What `{{ value }}` writes."""
    if type(value) is str:
        current_budget.get().spend(CHARACTER * len(value))
        return value
    _text(value)
    return str(value)


_OWN_FILTERS = {"_ticking": _ticking, "_compared": _compared, "_sliced": _sliced, "_concatenated": _concatenated, "_spend": _spend}
_NODES = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock,
          nodes.Assign, nodes.AssignBlock, nodes.With, nodes.Scope, nodes.Continue, nodes.Break, nodes.Name, nodes.NSRef, nodes.Const,
          nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call,
          nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat, nodes.Compare, nodes.Operand, nodes.Not, nodes.And, nodes.Or,
          nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Neg, nodes.Pos)
_BODIES = (nodes.For, nodes.Macro, nodes.CallBlock)


def _check_tree(tree: nodes.Template) -> None:
    """Refuse what the compiler may take long for, and constructs that are not listed."""
    count, waiting = 0, [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH or type(node) not in _NODES:
            raise Outside
        if isinstance(node, (nodes.Call, nodes.Filter, nodes.Test)) and (node.dyn_args or node.dyn_kwargs):
            raise Outside
        if isinstance(node, (nodes.Filter, nodes.Test)) and node.name in _OWN_FILTERS:
            raise Outside
        if isinstance(node, nodes.Dict) and not all(_is_scalar(pair.key) for pair in node.items):
            raise Outside
        if isinstance(node, nodes.Compare) and len(node.ops) > 1:
            raise Outside
        waiting += [(child, depth + 1) for child in node.iter_child_nodes()]


def _is_scalar(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and type(node.value) in SCALARS


def _units_of(body: list[nodes.Node]) -> int:
    """What one turn of a body costs, without the bodies inside it that pay for themselves."""
    total, waiting = 0, list(body)
    while waiting:
        node = waiting.pop()
        total += NODES_OF.get(type(node), NODE) + (CHARACTER * len(node.data) if isinstance(node, nodes.TemplateData) else 0)
        inner = {id(n) for n in node.body} if isinstance(node, _BODIES) else ()
        waiting += [child for child in node.iter_child_nodes() if id(child) not in inner]
    return total


class _Metered(NodeTransformer):
    """Puts what jinja2 has no hook for under the budget."""

    def _bodied(self, node: Any) -> nodes.Node:
        units = _units_of(node.body)
        self.generic_visit(node)
        spending = nodes.Filter(nodes.Const(units, lineno=node.lineno), "_spend", [], [], None, None, lineno=node.lineno)
        node.body = [nodes.ExprStmt(spending, lineno=node.lineno), *node.body]
        return node

    visit_Macro = visit_CallBlock = _bodied

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.test is not None:                  # turns that the test leaves out do not come to the body
            node.iter = _filter("_ticking", node.iter)
        return self._bodied(node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        self.generic_visit(node)
        (operand,) = node.ops
        if operand.op in ("eq", "ne") and (_is_scalar(node.expr) or _is_scalar(operand.expr)):
            return node                            # bounded by the constant
        return _filter("_compared", node.expr, nodes.Const(operand.op, lineno=node.lineno), operand.expr)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter("_sliced", node.node, *(nodes.Const(None, lineno=node.lineno) if end is None else end for end in ends))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("_concatenated", nodes.List(node.nodes, lineno=node.lineno))


def _filter(name: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


class _Parser(Parser):
    """jinja2's parser, which calls itself only so deep."""

    depth = 0

    def _deeper(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Outside
        try:
            return getattr(super(), name)(*args, **kwargs)
        finally:
            self.depth -= 1

    def parse_condexpr(self) -> nodes.Expr:
        return self._deeper("parse_condexpr")

    def parse_not(self) -> nodes.Expr:
        return self._deeper("parse_not")

    def parse_unary(self, with_filter: bool = True) -> nodes.Expr:
        return self._deeper("parse_unary", with_filter)

    def subparse(self, end_tokens: Any = None) -> list[nodes.Node]:
        return self._deeper("subparse", end_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The sandbox


_KINDS = frozenset({*SCALARS, *LISTS, *VIEWS, dict, range, Markup, GeneratorType, LoopContext, Macro, dialect.Namespace, dialect.Dict,
                    BuiltinFunctionType, type(dialect.tojson), type, type(reversed([])), type(reversed("")), type(iter([])), _Format})
_HIDDEN = {kind: frozenset(dir(kind)) for kind in (*SCALARS, *LISTS, dict, range, GeneratorType)}
_LOOP = frozenset({"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0", "previtem", "nextitem", "cycle"})


def _strftime_now(format: str) -> str:
    _only(SCALARS, format)
    current_budget.get().spend(1024)
    if type(format) is str and (len(format) > 100 or re.search(r"%[^a-zA-Z%]*[0-9]", format)):       # glibc takes widths
        raise Outside
    return dialect.strftime_now(format)


def _raise_exception(message: Any) -> None:
    _text(message)
    dialect.raise_exception(message)


class Sandbox(dialect.Environment):
    """The closed world. Raises Outside, while compiling and while rendering, for what is not in it."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(optimized=False, finalize=_shown)
        known = {**FILTERS, "tojson": dialect.tojson}
        self.filters = {name: _paying(known[name], _FILTERS.get(name), name) for name in known} | _OWN_FILTERS
        self.tests = {name: _paying(test, _TESTS.get(name)) for name, test in TESTS.items()}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE_HERE:
            raise Outside
        try:
            tree = _Parser(self, source, name, filename).parse()
        except RecursionError:                     # of a caller that is deep already
            raise Outside from None
        _check_tree(tree)
        return _Metered().visit(tree)

    # -- attributes ------------------------------------------------------------------------------------------------

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        hidden = _HIDDEN.get(kind)
        if hidden is None:
            if kind is dialect.Namespace:
                attributes = obj._Namespace__attrs
                return attributes[attribute] if attribute in attributes else self.undefined(obj=obj, name=attribute)
            if kind is LoopContext and attribute in _LOOP or isinstance(obj, Undefined):
                return super().getattr(obj, attribute)
            raise Outside
        if attribute in hidden:
            return self._method(obj, kind, attribute)
        if kind is dict and attribute in obj:
            return obj[attribute]
        return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        kind = type(obj)
        if type(argument) not in SCALARS:
            if isinstance(argument, Undefined):
                return super().getitem(obj, argument)
            raise Outside
        if kind not in _HIDDEN:
            if kind is dialect.Namespace:
                return self.getattr(obj, argument) if type(argument) is str else self.undefined(obj=obj, name=argument)
            if isinstance(obj, Undefined):
                return super().getitem(obj, argument)
            raise Outside
        try:
            return obj[argument]
        except (TypeError, LookupError):
            if type(argument) is str and argument in _HIDDEN[kind]:
                return self._method(obj, kind, argument)
            return self.undefined(obj=obj, name=argument)

    def _method(self, obj: Any, kind: type, name: str) -> Any:
        if kind is str and name == "format":
            return _Format(obj)
        if name in _METHODS.get(kind, ()):
            return getattr(obj, name)
        raise Outside

    # -- operators and calls ---------------------------------------------------------------------------------------

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget, kinds = current_budget.get(), (type(left), type(right))
        if operator == "+" and kinds == (str, str):
            budget.spend(CHARACTER * (len(left) + len(right)))
            return left + right
        budget.spend(0)
        if kinds[0] in NUMBERS and kinds[1] in NUMBERS:
            bits = [_checked_integer(n).bit_length() for n in (left, right) if type(n) is not float]
            if operator == "**" and len(bits) == 2 and right > 0 and bits[0] * right > MAX_BITS:
                raise Outside
        elif operator == "+" and kinds in ((list, list), (tuple, tuple)):
            budget.spend(ENTRY * (len(left) + len(right)))
        elif operator == "+" and Markup in kinds and {*kinds} <= {str, Markup}:
            budget.spend(6 * CHARACTER * (len(left) + len(right)))                   # a character may become &#34;
        elif operator == "*" and (kinds[0] in NUMBERS or kinds[1] in NUMBERS):
            value, count = (right, left) if kinds[0] in NUMBERS else (left, right)
            if type(value) is str or type(value) in LISTS:
                budget.spend((CHARACTER if type(value) is str else ENTRY) * len(value) * max(int(count), 0))
        elif operator == "%" and kinds[0] is str or not all(k in SCALARS or k in LISTS or k is dict or issubclass(k, Undefined) for k in kinds):
            raise Outside
        value = self.binop_table[operator](left, right)
        if type(value) is complex:
            raise Outside
        return value

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget, kind = current_budget.get(), type(function)
        budget.spend(0)
        if kind is BuiltinFunctionType:
            owner, name = function.__self__, function.__name__
            cost = _METHODS.get(type(owner), {}).get(name)
            if cost is None:
                raise Outside
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            if kwargs:
                raise Outside
            if (type(owner), name) not in _ANY_ARGUMENT:
                _only(SCALARS, *args)
            try:
                if name == "join":
                    args = tuple(map(_listed, args))
                elif name == "get":
                    _only(SCALARS, *args[:1])
                cost(budget, owner, *args)
            except Exception:                      # such as a wrong number of arguments
                raise Outside from None
            return function(*args)
        if kind is Macro or kind is LoopContext:
            budget.depth += 1
            if budget.depth > MAX_CALLS:
                raise Outside
            try:
                return super().call(context, function, *args, **kwargs)
            finally:
                budget.depth -= 1
        if function is dialect.Namespace or kind is dialect.Dict:
            if args:
                raise Outside
            budget.spend(512 + 2 * ENTRY * len(kwargs))
        elif function is safe_range:
            _only(NUMBERS, *args)
        elif kind is MethodType and type(function.__self__) is LoopContext:
            pass                                   # cycle
        elif not (kind is _Format or function is _raise_exception or function is _strftime_now or isinstance(function, Undefined)):
            raise Outside
        return super().call(context, function, *args, **kwargs)

