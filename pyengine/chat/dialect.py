"""The Jinja that chat templates are written in: jinja2 in its sandbox, with the names that transformers adds.

Follows transformers' utils/chat_template_utils.py: `tojson` that escapes no HTML and takes json.dumps' arguments,
`raise_exception`, `strftime_now`, `break` and `continue`, `{% generation %}`, and `namespace` and `dict` that cannot be
used to get at Python's internals. Differs: lists have `append` and `pop`, which llama.cpp has and some files rely on; what
a template sees is a copy, so nothing of the caller's changes.

This module needs jinja2 alone: the helper process (`helper.py`) starts with it.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.utils import Namespace as JinjaNamespace

MAX_MESSAGE = 1000                                      # characters of an error's text
LIST_METHODS = ("append", "pop")                        # that change a list


class Refusal(jinja2.TemplateError):
    """What `raise_exception` raises: the template was written to refuse such messages."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks an answer for training; here it is its contents."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class Namespace(JinjaNamespace):
    """`namespace(...)`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:     # no `self`, so that namespace(self=1) works
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        JinjaNamespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        JinjaNamespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no names that begin with an underscore, such as {name[:100]!r}")


class Dict:
    """`dict(...)`, which is no class here, so that nothing leads from it to Python's internals."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


def explained(error: Exception) -> str:
    """Say what went wrong, where, and what to do."""
    text = str(getattr(error, "message", None) or error)[:MAX_MESSAGE]
    if isinstance(error, Refusal):
        return f"the chat template refuses these messages: {text}"
    if isinstance(error, jinja2.TemplateAssertionError) and text.startswith("No "):
        text += " There are those of jinja2 and of transformers."
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"the chat template is malformed: line {error.lineno}: {text}"
    if isinstance(error, RecursionError):
        return "the chat template is nested too deeply, or a macro of it calls itself without end"
    if isinstance(error, SyntaxError):                   # of the Python code that jinja2 makes
        return f"the chat template is malformed: {text}"
    return f"the chat template fails: {type(error).__name__}: {text}"


def tojson(x: Any, ensure_ascii: bool = False, indent: int | str | None = None, separators: Any = None,
           sort_keys: bool = False) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: Any) -> None:
    raise Refusal(str(message)[:MAX_MESSAGE])


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2 as transformers sets it up."""

    def __init__(self, **options: Any) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation], **options)
        self.filters["tojson"] = tojson
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": Namespace, "dict": Dict()}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return isinstance(obj, list) and attr in LIST_METHODS or super().is_safe_attribute(obj, attr, value)
