"""jinja2 on a budget: templates of strangers' files, bounded in time and memory."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2.sandbox
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.visitor import NodeTransformer

from pyengine.errors import TemplateError

MAX_SOURCE = 1_000_000                             # characters of a template; the longest known have 30,000
MAX_SIZE = 32_000_000                              # characters in one value; a million tokens are some 5,000,000
ITEM_SIZE = 64                                     # what one entry of a list or mapping counts for
MAX_SECONDS = 5.0                                  # real templates take milliseconds
MAX_BITS = 4096                                    # of an integer


# ---------------------------------------------------------------------------------------------------------------------
# The budget


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise TemplateError(f"the chat template takes more than {MAX_SECONDS:g} s")


current_budget: ContextVar[Budget] = ContextVar("current_budget")


def _size(value: Any, limit: int = MAX_SIZE) -> int:
    """Count characters and entries, shared ones each time they would be printed; stop counting beyond the limit."""
    total, waiting = 0, [value]
    while waiting and total <= limit:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += ITEM_SIZE * len(item)
            waiting += [*item.keys(), *item.values()] if total <= limit else []
        elif isinstance(item, (list, tuple, set, frozenset)):
            total += ITEM_SIZE * len(item)
            waiting += item if total <= limit else []
    return total


def check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TemplateError(f"the chat template makes a value of more than {MAX_SIZE} characters")


@jinja2.pass_context                               # so that jinja2 does not evaluate it while compiling
def _bounded(_context: object, value: Any) -> Any:
    """Give the value back if it is of a bearable size."""
    current_budget.get().tick()
    if isinstance(value, str):
        check_size(len(value))
    elif isinstance(value, (list, tuple, set, frozenset, Mapping)):
        check_size(_size(value))
    return value


@jinja2.pass_context
def _ticking(_context: object, items: Iterable[Any]) -> Iterator[Any]:
    """Give the items one by one, each against the clock."""
    tick = current_budget.get().tick
    for item in items:
        tick()
        yield item


class _Metered(NodeTransformer):
    """Puts every expression that can grow, and every loop, under the budget."""

    def _bound(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return nodes.Filter(node, "_bounded", [], [], None, None, lineno=node.lineno)

    visit_Concat = visit_Filter = visit_List = visit_Dict = _bound

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        return self._bound(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._bound(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_ticking", [], [], None, None, lineno=node.lineno)
        return node

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.FilterBlock:
        node.body = [self.visit(child) for child in node.body]      # its filter must stay a filter
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        node.body = [self.visit(child) for child in node.body]      # its call must stay a call
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        node.body = [self.visit(child) for child in node.body]
        return node


# ---------------------------------------------------------------------------------------------------------------------
# The sandbox


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks an answer for training; here it is its contents."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox with the budget, without filters and methods that pad, wrap or match."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        for name in ("center", "format", "wordwrap", "urlize", "xmlattr", "striptags", "pprint", "batch", "slice",
                     "filesizeformat", "random"):
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {"_bounded": _bounded, "_ticking": _ticking, "tojson": _tojson, "join": _join,
                         "replace": _replace, "indent": _indent}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Metered().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        current_budget.get().tick()
        integers = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and integers:
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int):
                    check_size(_size(value) * max(count, 0))
        elif operator == "**" and integers:
            _check_bits(left.bit_length() * abs(right))
        elif operator == "+" and not integers:
            check_size(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """Check what `"{}".format` is given; jinja2 already keeps it from reaching attributes."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, [*args, *kwargs.values()])
            return safe(*args, **kwargs)

        return checked

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        pads = isinstance(obj, (str, bytes)) and attr in ("center", "ljust", "rjust", "zfill", "expandtabs",
                                                          "translate", "format_map")
        return not pads and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        current_budget.get().tick()
        text = getattr(function, "__self__", None)
        if isinstance(text, str) and not isinstance(function, type):
            name = getattr(function, "__name__", "")
            if name == "join" and args:
                args = (_listed(args[0]), *args[1:])
                _check_join(text, args[0])
            elif name == "replace" and len(args) >= 2:
                _check_replace(text, args[0], args[1])
        return super().call(context, function, *args, **kwargs)


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateError(f"the chat template makes an integer of more than {MAX_BITS} bits")


def _check_format(text: str, values: Any) -> None:
    # Widths and precisions multiply: "%999999999d", "{:>999999999}", "%*d", "{:{}}".
    if re.search(r"%[^a-zA-Z%]*([0-9]{4}|\*)|\{[^{}]*:[^}]*[0-9]{4}|\{[^{}]+\{", text):
        raise TemplateError("the chat template formats with a width that is too large or comes from a value")
    fields = text.count("%") + text.count("{")
    check_size(len(text) + fields * (1000 + _size(values)))


def _check_join(separator: str, items: Sequence[Any]) -> None:
    check_size(len(separator) * len(items) + _size(items))


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _listed(items: Iterable[Any]) -> list[Any]:
    return [*_ticking(None, items)]


def _join(items: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    listed = _listed(items)
    if attribute is not None:
        listed = [item.get(attribute, "") if isinstance(item, Mapping) else item[attribute] for item in listed]
    _check_join(str(d), listed)
    return str(d).join(map(str, listed))


def _replace(s: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(s)
    _check_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    space = width if isinstance(width, str) else " " * min(int(width), 1000)
    lines = (str(s) + "\n").splitlines()           # the ending keeps an empty last line, as jinja2's own filter does
    check_size(len(str(s)) + len(space) * len(lines))
    out = [space + line if (i or first) and (line or blank) else line for i, line in enumerate(lines)]
    return "\n".join(out)


def _tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:
    if isinstance(indent, int) and indent > 64 or isinstance(indent, str) and len(indent) > 64:
        raise TemplateError("the chat template indents JSON by more than 64 columns")
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateError(f"the chat template refuses these messages: {str(message)[:1000]}")


def _strftime_now(format: str) -> str:
    if re.search(r"[0-9]{3}", format):             # glibc takes widths: "%999999999d"
        raise TemplateError("the chat template formats a date with a width")
    return datetime.now().strftime(format)
