"""Templates of strangers' files, bounded in time and in all their memory: here where that is certain, else in a helper process.

A template is a program. In Python one expression of it can take any time and memory in one call into C, where no check of
ours runs: `1 // x`, `'%9999999999d' % 1`, `x == y` of lists that share their parts, `'a'.rsplit(b)`. Two mechanisms bound it.

1. `Sandbox` renders in this process what it can bound by construction, which is a closed world. Values are of the types
   in `KINDS` and no others. Each operation on them - operators, calls, filters, tests, attributes, output - is one that is
   listed with its cost, here or in `costs.py`, and is paid for from one budget (`budget.py`) *before* it runs. Loops and
   macros pay for their whole body at every turn. Nothing is paid back, so what is spent bounds what is alive, however it is
   spread over variables, and bounds the time as well. While compiling, nothing is evaluated, and the tree is bounded in size
   and depth before code is made of it.
2. Whatever is not listed, or does not fit the budget, raises `Outside`, and the template is rendered anew in a process of
   its own that the operating system bounds (`helper.py`). There, all of jinja2 and Python's methods may be used.

So a name that is not listed costs some 65 ms, not safety, and the list needs to hold only what real templates use: all of
the 90 that were at hand, from Llama 2 to gpt-oss, stay in this process. The alternatives: to meter everything here means to
know the cost of all of Python; to render everything in a helper means those 65 ms for everybody.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from types import BuiltinFunctionType, GeneratorType, MethodType
from typing import Any

from jinja2 import nodes, pass_context, Undefined
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import safe_range
from jinja2.tests import TESTS
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from pyengine.chat import dialect
from pyengine.chat.budget import (
    CHARACTER, checked_integer, current_budget, ENTRY, LISTS, listed, MAX_BITS, NUMBERS, only, Outside, SCALARS, ticking)
from pyengine.chat.costs import ANY_ARGUMENT, FILTER_COSTS, Format, METHOD_COSTS, pay_for_comparing, pay_for_text, paying, TEST_COSTS

MAX_SOURCE_HERE = 60_000                           # characters; the longest known have 30,000
MAX_NODES = 10_000                                 # of the syntax tree; known ones have up to 1,300
MAX_DEPTH = 100                                    # of the syntax tree and in the parser; known ones have 28
MAX_CALLS = 30                                     # macros and recursive loops inside each other

NODE = 16                                          # units of one node of a body at each turn; for some, what they make:
NODES_OF = {nodes.Dict: 256, nodes.List: 64, nodes.Tuple: 64, nodes.For: 512, nodes.Macro: 1024, nodes.CallBlock: 1024, nodes.Getattr: 64,
            nodes.Getitem: 64}


# ---------------------------------------------------------------------------------------------------------------------
# What jinja2 has no hook for: comparisons, slices, `~`, bodies. The syntax tree gets filters in their place


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt, "gteq": operator.ge,
    "in": lambda a, b: a in b, "notin": lambda a, b: a not in b,
}


def _compared(left: Any, name: str, right: Any) -> Any:
    pay_for_comparing(left, right)
    return _COMPARISONS[name](left, right)


def _sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    only(frozenset({int, type(None)}), start, stop, step)
    kind = type(value)
    if kind not in LISTS and kind is not str and kind is not range and not isinstance(value, Undefined):
        raise Outside                              # jinja2 gives Undefined for constants, and an error for others
    current_budget.get().spend(CHARACTER * len(value) if kind is str else 8 * len(value) if kind in LISTS else 0)
    return value[start:stop:step]


def _concatenated(items: list[Any]) -> str:
    for item in items:
        pay_for_text(item)
    return "".join(map(str, items))


def _spend(units: int) -> None:
    if type(units) is not int or units < 0:        # a template that has found the name
        raise Outside
    current_budget.get().spend(units)


@pass_context                                      # which keeps jinja2 from evaluating constants while compiling
def _shown(_context: object, value: Any) -> str:
    """Return what `{{ value }}` writes."""
    if type(value) is str:
        current_budget.get().spend(CHARACTER * len(value))
        return value
    pay_for_text(value)
    return str(value)


_OWN_FILTERS = {"_ticking": ticking, "_compared": _compared, "_sliced": _sliced, "_concatenated": _concatenated, "_spend": _spend}
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
    """Return what one turn of a body costs, without the bodies inside it that pay for themselves."""
    total, waiting = 0, list(body)
    while waiting:
        node = waiting.pop()
        total += NODES_OF.get(type(node), NODE) + (CHARACTER * len(node.data) if isinstance(node, nodes.TemplateData) else 0)
        inner = {id(n) for n in node.body} if isinstance(node, _BODIES) else ()
        waiting += [child for child in node.iter_child_nodes() if id(child) not in inner]
    return total


class _Metered(NodeTransformer):
    """Nodes of a template that put what jinja2 has no hook for under the budget."""

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


_HIDDEN = {kind: frozenset(dir(kind)) for kind in (*SCALARS, *LISTS, dict, range, GeneratorType, BuiltinFunctionType)}
_LOOP = frozenset({"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0", "previtem", "nextitem", "cycle"})


def _strftime_now(format: str) -> str:
    only(SCALARS, format)
    current_budget.get().spend(1024)
    if type(format) is str and (len(format) > 100 or re.search(r"%[^a-zA-Z%]*[0-9]", format)):       # glibc takes widths
        raise Outside
    return dialect.strftime_now(format)


def _raise_exception(message: Any) -> None:
    pay_for_text(message)
    dialect.raise_exception(message)


class Sandbox(dialect.Environment):
    """The closed world. Raises Outside, while compiling and while rendering, for what is not in it."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(optimized=False, finalize=_shown)
        known = {**FILTERS, "tojson": dialect.tojson}
        self.filters = {name: paying(known[name], FILTER_COSTS.get(name), name) for name in known} | _OWN_FILTERS
        self.tests = {name: paying(test, TEST_COSTS.get(name)) for name, test in TESTS.items()}
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
            return Format(obj)
        if name in METHOD_COSTS.get(kind, ()):
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
            bits = [checked_integer(n).bit_length() for n in (left, right) if type(n) is not float]
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
            cost = METHOD_COSTS.get(type(owner), {}).get(name)
            if cost is None:
                raise Outside
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            if kwargs:
                raise Outside
            if (type(owner), name) not in ANY_ARGUMENT:
                only(SCALARS, *args)
            try:
                if name == "join":
                    args = tuple(map(listed, args))
                elif name == "get":
                    only(SCALARS, *args[:1])
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
            only(NUMBERS, *args)
        elif kind is MethodType and type(function.__self__) is LoopContext:
            pass                                   # cycle
        elif not (kind is Format or function is _raise_exception or function is _strftime_now or isinstance(function, Undefined)):
            raise Outside
        return super().call(context, function, *args, **kwargs)
