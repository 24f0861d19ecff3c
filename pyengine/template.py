"""Chat messages to the text of a prompt, by the model's own Jinja template.

A template comes out of a file that anybody may have written, so it runs in jinja2's sandbox and on a budget: so many
characters alive in one value, so much time. jinja2 alone stops neither `{% set x = x ~ x %}` in a loop nor two nested
loops without output, therefore each loop, call, filter, concatenation and literal of a template reports to the budget
(`_Metered`), and operators and methods that can grow a value in one step are checked before they run.

What templates may use is what transformers gives them (utils/chat_template_utils.py): `messages`, `tools`, `documents`,
`add_generation_prompt`, `bos_token`, `eos_token`, `raise_exception`, `strftime_now`, `tojson` without escapes, `break`
and `continue`, and the `{% generation %}` block.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.visitor import NodeTransformer

from .errors import RequestError, TemplateError
from .tokenizer import Tokenizer

MAX_SOURCE = 1_000_000                             # characters of a template; the longest known have 30,000
MAX_SIZE = 32_000_000                              # characters in one value; a million tokens are some 5,000,000
ITEM_SIZE = 64                                     # what one entry of a list or mapping counts for
MAX_SECONDS = 5.0                                  # real templates take milliseconds
MAX_BITS = 4096                                    # of an integer

_PART_KINDS = {"image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video",
               "audio": "audio", "audio_url": "audio", "input_audio": "audio"}


# ---------------------------------------------------------------------------------------------------------------------
# The budget


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise TemplateError(f"the chat template takes more than {MAX_SECONDS:g} s")


_budget: ContextVar[_Budget] = ContextVar("_budget")


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


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TemplateError(f"the chat template makes a value of more than {MAX_SIZE} characters")


@jinja2.pass_context                               # so that jinja2 does not evaluate it while compiling
def _bounded(_context: object, value: Any) -> Any:
    """Give the value back if it is of a bearable size."""
    _budget.get().tick()
    if isinstance(value, str):
        _check_size(len(value))
    elif isinstance(value, (list, tuple, set, frozenset, Mapping)):
        _check_size(_size(value))
    return value


@jinja2.pass_context
def _ticking(_context: object, items: Iterable[Any]) -> Iterator[Any]:
    """Give the items one by one, each against the clock."""
    tick = _budget.get().tick
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


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
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
        _budget.get().tick()
        integers = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and integers:
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int):
                    _check_size(_size(value) * max(count, 0))
        elif operator == "**" and integers:
            _check_bits(left.bit_length() * abs(right))
        elif operator == "+" and not integers:
            _check_size(_size(left) + _size(right))
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
        _budget.get().tick()
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
    _check_size(len(text) + fields * (1000 + _size(values)))


def _check_join(separator: str, items: Sequence[Any]) -> None:
    _check_size(len(separator) * len(items) + _size(items))


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


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
    _check_size(len(str(s)) + len(space) * len(lines))
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


# ---------------------------------------------------------------------------------------------------------------------
# The template


class ChatTemplate:
    """One compiled template; `render` may be called from several threads.

    Raises: TemplateError if the source is not a template.
    """

    def __init__(self, source: str, bos: str = "", eos: str = ""):
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE}")
        self.source, self.bos, self.eos = source, bos, eos
        try:
            self._template = _Sandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template is malformed: line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError, TypeError) as error:
            raise TemplateError(f"the chat template is malformed: {error}") from error
        self._takes: dict[type, bool] = {}

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """Make the template of a GGUF file (`tokenizer.chat_template`), or the default for its vocabulary."""
        source = meta.get("tokenizer.chat_template")
        if source is not None and not isinstance(source, str):
            raise TemplateError("tokenizer.chat_template: must be a string")
        bos, eos = (b"" if i is None else tokenizer.piece(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
        return cls(source or default_template(meta, tokenizer), bos.decode("utf-8", "replace"),
                   eos.decode("utf-8", "replace"))

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = True, *, enable_thinking: bool | None = None,
               documents: Sequence[Mapping[str, Any]] | None = None, media_marker: str | None = None,
               variables: Mapping[str, Any] | None = None) -> str:
        """Give the prompt for OpenAI-style messages.

        `content` is a string or a list of parts: {"type": "text", "text": ..} and pictures, videos, sounds, of which
        the template sees {"type": "image"}, never the data. A template that takes strings only gets the texts, a line
        each, with `media_marker` for every other part; one that takes parts only gets strings as a text part. The
        arguments of tool calls may be JSON text; the template sees the object. `enable_thinking` is what Qwen3 and its
        like ask for; further variables of a template go in `variables`.

        Raises: TemplateError if the template refuses, fails, or goes over the budget; RequestError for messages that
        are not of this form.
        """
        values: dict[str, Any] = {"documents": documents, **(variables or {})}
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        shown = [self._shown(message, media_marker) for message in messages]
        return self._run(shown, tools, add_generation_prompt, values)

    def _run(self, messages: Any, tools: Any, add_generation_prompt: bool, values: Mapping[str, Any]) -> str:
        budget = _Budget()
        token = _budget.set(budget)
        out, size = [], 0
        try:
            for piece in self._template.generate(**values, messages=messages, tools=tools, bos_token=self.bos,
                                                 eos_token=self.eos, add_generation_prompt=add_generation_prompt):
                budget.tick()
                size += len(piece)
                _check_size(size)
                out.append(piece)
        except TemplateError:
            raise
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, NameError,
                RuntimeError, TypeError, ValueError) as error:       # RecursionError is a RuntimeError
            raise TemplateError(f"the chat template fails: {type(error).__name__}: {error}") from error
        finally:
            _budget.reset(token)
        return "".join(out)

    # -- messages --------------------------------------------------------------------------------------------------

    def _shown(self, message: Mapping[str, Any], media_marker: str | None) -> dict[str, Any]:
        """Give a message in the form that this template takes."""
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError("a message must be a mapping with a role")
        shown = dict(message)
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = [_part(part) for part in content]
            shown["content"] = parts if self._takes_parts else _joined(parts, media_marker)
        elif isinstance(content, str):
            if not self._takes_text:
                shown["content"] = [{"type": "text", "text": content}]
        elif content is not None:
            raise RequestError(f"content must be a string or a list of parts, not {type(content).__name__}")
        if message.get("tool_calls"):
            shown["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        return shown

    @property
    def _takes_text(self) -> bool:
        """Whether a string as content comes out as itself; if nothing does, it may as well be a string."""
        return self._shows(str) or not self._shows(list)

    @property
    def _takes_parts(self) -> bool:
        return self._shows(list)

    def _shows(self, form: type) -> bool:
        """Find out by trying: give a text in this form and look for it, as text and not as a printed list."""
        if form not in self._takes:
            probe = "pyengine probe"
            content = probe if form is str else [{"type": "text", "text": probe}]
            try:
                out = self._run([{"role": "user", "content": content}], None, False, {})
            except TemplateError:
                out = ""
            printed = re.search(r"""['"]type['"]: ['"]text['"]""", out)
            self._takes[form] = probe in out and not printed
        return self._takes[form]


def _part(part: Any) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in _PART_KINDS:
        return {"type": _PART_KINDS[kind]}
    raise RequestError(f"a part of a message must be a text or one of {', '.join(_PART_KINDS)}, not {kind!r}")


def _joined(parts: Iterable[Mapping[str, str]], media_marker: str | None) -> str:
    """Give parts as lines (as llama.cpp's server and vLLM join them)."""
    lines = []
    for part in parts:
        if part["type"] != "text" and media_marker is None:
            raise TemplateError(f"the chat template takes text only, but a message holds {part['type']}")
        lines.append(part["text"] if part["type"] == "text" else media_marker)
    return "\n".join(lines)


def _tool_call(call: Any) -> Any:
    """Give a tool call with its arguments as an object, which is what templates turn into JSON themselves."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError as error:
            raise RequestError(f"the arguments of a tool call are not JSON: {error}") from error
        return {**call, "function": {**function, "arguments": arguments}}
    return call


# ---------------------------------------------------------------------------------------------------------------------
# Defaults for files without a template

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
GEMMA = """\
{{ bos_token }}{% set ns = namespace(system='') %}
{% for message in messages %}
{% if message.role == 'system' %}{% set ns.system = message.content + '\n\n' %}
{% else %}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{{- ns.system + message.content|trim + '<end_of_turn>\n' }}{% set ns.system = '' %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
LLAMA3 = """\
{{ bos_token }}{% for message in messages %}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content|trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
INST = """\
{{ bos_token }}{% set ns = namespace(system='') %}
{% for message in messages %}
{% if message.role == 'system' %}{% set ns.system = message.content + '\n\n' %}
{% elif message.role == 'user' %}{{ '[INST] ' + ns.system + message.content + ' [/INST]' }}{% set ns.system = '' %}
{% else %}{{ ' ' + message.content|trim + eos_token }}{% endif %}
{% endfor %}
"""
PLAIN = """\
{{ bos_token }}{% for message in messages %}
{{ message.role|capitalize + ': ' + message.content + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""


def default_template(meta: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Give the source of a template that fits a vocabulary: the one whose marks it has, or plain "User: ..." lines."""
    for mark, source in (("<|im_start|>", CHATML), ("<start_of_turn>", GEMMA), ("<|start_header_id|>", LLAMA3),
                         ("[INST]", INST)):
        if tokenizer.id_of(mark) is not None:
            return source
    name = str(meta.get("general.name", "")).lower()
    return INST if re.search(r"mi[sx]tral|llama[-_ ]?2", name) else PLAIN
