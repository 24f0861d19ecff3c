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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2.sandbox

from pyengine.chat.defaults import default_template
from pyengine.chat.sandbox import Budget, current_budget, check_size, Sandbox, MAX_SOURCE
from pyengine.errors import RequestError, TemplateError
from pyengine.text.tokenizer import Tokenizer

_PART_KINDS = {"image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video",
               "audio": "audio", "audio_url": "audio", "input_audio": "audio"}


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
            self._template = Sandbox().from_string(source)
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
        budget = Budget()
        token = current_budget.set(budget)
        out, size = [], 0
        try:
            for piece in self._template.generate(**values, messages=messages, tools=tools, bos_token=self.bos,
                                                 eos_token=self.eos, add_generation_prompt=add_generation_prompt):
                budget.tick()
                size += len(piece)
                check_size(size)
                out.append(piece)
        except TemplateError:
            raise
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, NameError,
                RuntimeError, TypeError, ValueError) as error:       # RecursionError is a RuntimeError
            raise TemplateError(f"the chat template fails: {type(error).__name__}: {error}") from error
        finally:
            current_budget.reset(token)
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
