"""Chat messages to the text of a prompt, by the model's own Jinja template.

A template comes out of a file that anybody may have written. It gets so much time and memory for compiling and rendering
together, whatever it does: `sandbox.py` says how. What it may use is what transformers gives to templates, and some names
of llama.cpp's: `dialect.py`. Its variables are `messages`, `tools`, `documents`, `add_generation_prompt`, `bos_token` and
`eos_token`.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from pyengine.chat import helper
from pyengine.chat.checks import MAX_NESTING
from pyengine.chat.defaults import default_template
from pyengine.chat.dialect import explained
from pyengine.chat.helper import over_budget, OverBudget, render_apart
from pyengine.chat.budget import Budget, current_budget, Outside
from pyengine.chat.sandbox import Sandbox
from pyengine.arguments import iterates
from pyengine.errors import RequestError, shown, TemplateError
from pyengine.text.tokenizer import Tokenizer

_PART_KINDS = {"image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video",
               "audio": "audio", "audio_url": "audio", "input_audio": "audio"}
_REASONING = ("reasoning_content", "thinking", "reasoning")            # as in transformers: the first is the standard
MAX_SOURCE = 1_000_000                             # characters of a template; the longest known have 30,000


# ---------------------------------------------------------------------------------------------------------------------
# The template


class ChatTemplate:
    """One compiled template; `render` may be called from several threads.

    Raises: TemplateError if the source is not a template; RequestError if it is no text.
    """

    def __init__(self, source: str, bos: str = "", eos: str = ""):
        if not isinstance(source, str):
            raise RequestError(f"a chat template is a text, not {type(source).__name__}")
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE}")
        self.source, self.bos, self.eos = source, bos, eos
        started = time.monotonic()
        self._compiled = _compiled(source)
        self._compile_seconds = time.monotonic() - started
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
        if not isinstance(variables, (Mapping, type(None))):
            raise RequestError(f"variables of a chat template: a mapping, not {type(variables).__name__}")
        if isinstance(messages, (str, bytes)) or not iterates(messages):
            raise RequestError(f"messages: a list of messages, not {type(messages).__name__}")
        values: dict[str, Any] = {"documents": documents, **(variables or {})}
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        deadline = time.monotonic() + helper.MAX_SECONDS - self._compile_seconds
        seen = [self._shown(message, media_marker, deadline) for message in messages]
        return self._run(seen, tools, add_generation_prompt, values, deadline)

    def _run(self, messages: Any, tools: Any, add_generation_prompt: bool, values: Mapping[str, Any], deadline: float) -> str:
        values = _plain({**values, "messages": messages, "tools": tools, "bos_token": self.bos, "eos_token": self.eos,
                         "add_generation_prompt": add_generation_prompt})
        if self._compiled is not None:
            try:
                return _render_here(self._compiled, values, deadline)
            except Outside:
                pass                               # and let go of what it made
        return render_apart(self.source, values, deadline)

    # -- messages --------------------------------------------------------------------------------------------------

    def _shown(self, message: Mapping[str, Any], media_marker: str | None, deadline: float) -> dict[str, Any]:
        """Give a message in the form that this template takes."""
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError("a message must be a mapping with a role")
        reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
        seen = dict(message) if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = [_part(part) for part in content]
            seen["content"] = parts if self._shows(list, deadline) else _joined(parts, media_marker)
        elif isinstance(content, str):
            # If nothing comes out as itself, it may as well be a string.
            if not self._shows(str, deadline) and self._shows(list, deadline):
                seen["content"] = [{"type": "text", "text": content}]
        elif content is not None:
            raise RequestError(f"content must be a string or a list of parts, not {type(content).__name__}")
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, (list, tuple)):
            raise RequestError(f"tool_calls: a list of tool calls, not {type(calls).__name__}")
        if calls:
            seen["tool_calls"] = [_tool_call(call) for call in calls]
        return seen

    def _shows(self, form: type, deadline: float) -> bool:
        """Find out by trying: give a text in this form and look for it, as text and not as a printed list."""
        if form not in self._takes:
            probe = "pyengine probe"
            content = probe if form is str else [{"type": "text", "text": probe}]
            try:
                out = self._run([{"role": "user", "content": content}], None, False, {}, deadline)
            except OverBudget:
                raise
            except TemplateError:
                out = ""
            printed = re.search(r"""['"]type['"]: ['"]text['"]""", out)
            self._takes[form] = probe in out and not printed
        return self._takes[form]


@functools.cache
def _sandbox() -> Sandbox:
    return Sandbox()


def _compiled(source: str) -> jinja2.Template | None:
    """Return the template for this process, or None if it is none that can be bounded here. Raises TemplateError if it is
    malformed."""
    try:
        return _sandbox().from_string(source)
    except (Outside, RecursionError):              # the recursion of a caller that is deep already
        return None
    except MemoryError:
        raise over_budget() from None
    except Exception as error:
        raise TemplateError(explained(error)) from error


def _render_here(template: jinja2.Template, values: dict[str, Any], deadline: float) -> str:
    token = current_budget.set(Budget(deadline))
    try:
        return template.render(values)
    except RecursionError:
        raise Outside from None
    except MemoryError:
        raise over_budget() from None
    except Exception as error:
        raise TemplateError(explained(error)) from error
    finally:
        current_budget.reset(token)


def _plain(value: Any, seen: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """Copy a value as None, booleans, numbers, strings, lists, tuples and mappings; anything else becomes its type's name.

    Shared parts stay shared. As transformers does it: other objects have methods of which some write files.
    """
    kind = type(value)
    if kind is str or kind is int or kind is bool or kind is float or value is None:
        return value
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)][1]
    if depth > MAX_NESTING:
        raise RequestError(f"messages, tools and variables of a chat template are nested deeper than {MAX_NESTING} lists and mappings")
    if kind is dict or isinstance(value, Mapping):
        made: Any = {k if type(k) is str else _plain(k, seen, depth + 1): v if type(v) is str else _plain(v, seen, depth + 1)
                     for k, v in value.items()}
    elif isinstance(value, (list, tuple)):
        made = [v if type(v) is str else _plain(v, seen, depth + 1) for v in value]
        made = tuple(made) if isinstance(value, tuple) else made
    elif isinstance(value, (str, int, float)):     # bool has no subclasses
        base = next(base for base in (str, int, float) if isinstance(value, base))
        return base.__str__(value) if base is str else base.__int__(value) if base is int else base.__float__(value)
    elif isinstance(value, np.generic):
        return _plain(value.item(), seen, depth + 1)
    else:
        return f"<{kind.__name__}>"
    seen[id(value)] = (value, made)                # the value too, so that its id stays its own
    return made


def _part(part: Any) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise RequestError(f"a part of a message has a type, a text, not {type(kind).__name__}")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in _PART_KINDS:
        return {"type": _PART_KINDS[kind]}
    raise RequestError(f"a part of a message must be a text or one of {', '.join(_PART_KINDS)}, not {shown(kind)}")


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
            arguments = json.loads(function["arguments"] or "{}")              # some clients write none so
        except (ValueError, RecursionError) as error:        # the second: lists in lists, by the thousand
            raise RequestError(f"the arguments of a tool call are not JSON: {error}") from None
        return {**call, "function": {**function, "arguments": arguments}}
    return call
