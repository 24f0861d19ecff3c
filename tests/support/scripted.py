"""Tiny random models that think, and a sampler that writes what a test wants of them, as far as the model may write it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import cases
import tiny
from pyengine.text.sampling import Sampled, Sampler

# What Qwen3's template does, on the tokens of the tiny checkpoints (Qwen/Qwen3-0.6B, tokenizer_config.json).
_TURNS = """{%- if tools %}<|turn|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|stop|>{% endif %}
{%- for message in messages %}<|turn|>{{ 'user' if message.role == 'tool' else message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|stop|>{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
"""
_HARMONY = """{%- for message in messages %}<|start|>{{ message.role }}<|message|>{% if message.thinking %}({{ message.thinking }}){% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function.name }}{% endfor %}<|end|>{% endfor %}{% if tools %}{{ tools | length }}{% endif %}
{%- if reasoning_effort is defined %}{{ reasoning_effort }}{% endif %}{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|> #}"""
_BRACKETS = """{%- for message in messages %}<|turn|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments }}{% endfor %}<|stop|>
{%- endfor %}{% if tools %}{{ tools | length }}{% endif %}<|turn|>assistant{# [THINK] #}"""
_CHANNEL = _BRACKETS.replace("[TOOL_CALLS]{{ call.function.name }}[ARGS]", "<|tool_call>call:{{ call.function.name }}").replace(
    "[THINK]", "<|channel>thought {% if enable_thinking %}")
_PHRASES = _BRACKETS.replace("[TOOL_CALLS]", "<|tool_call|>").replace("[THINK]", "{% if thinking %} 'Here is my thought process:' 'Here is my response:'")
_OFF = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

# Kinds of models that think: template, control tokens, other tokens.
KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "tokens": (_TURNS + _OFF, (), _TAGS),
    "letters": (_TURNS + _OFF, (), ()),
    "opens": (_TURNS + "<think>\n{% endif %}", (), _TAGS),
    "opens, letters": (_TURNS + "<think>\n{% endif %}", (), ()),
    "harmony": (_HARMONY, ("<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>", "<|constrain|>"), ()),
    "channel": (_CHANNEL, ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'), ()),
    "phrases": (_PHRASES, (), ()),
    "brackets": (_BRACKETS, ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"), ()),
}
# A reply of each: thinking, a text, a call of `weather`, and how the model ends it.
THOUGHT = {"harmony": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant", "brackets": "[THINK]{}[/THINK]", "opens": "{}\n</think>\n\n",
           "opens, letters": "{}\n</think>\n\n", "channel": "<|channel>thought\n{}\n<channel|>",
           "phrases": "Here is my thought process:\n{}\n\nHere is my response:\n"}
SAID = {"harmony": "<|channel|>final<|message|>{}<|return|>"}
CALLED = {"harmony": '<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>', "brackets": "[TOOL_CALLS]{}[ARGS]{}",
          "channel": "<|tool_call>call:{}{}<tool_call|>", "phrases": '<|tool_call|>[{{"name": "{}", "arguments": {}}}]'}


def thought(kind: str, text: str) -> str:
    """What a model of this kind writes when it thinks."""
    return THOUGHT.get(kind, "<think>\n{}\n</think>\n\n").format(text)


def said(kind: str, text: str) -> str:
    return SAID.get(kind, "{}").format(text)


def called(kind: str, name: str, arguments: str) -> str:
    text = CALLED.get(kind)
    if kind == "channel":                                    # keys are bare, and texts between marks
        arguments = re.sub(r'"(\w+)": "(\w+)"', r'\1:<|"|>\2<|"|>', arguments)
    return text.format(name, arguments) if text else f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def make(kind: str, folder: Path) -> Path:
    """Write the tiny model of a kind; returns its file."""
    from converters import convert

    case, (template, special, added) = cases.find("qwen3"), KINDS[kind]
    tokens = dataclasses.replace(case.tokens, special=(*case.tokens.special, *special), added=(*case.tokens.added, *added), template=template)
    tiny.make_checkpoint(dataclasses.replace(case, tokens=tokens), folder / "hf", seed=1, max_position_embeddings=4096)
    convert(folder / "hf", folder / f"{kind.replace(', ', '-')}.gguf", "f32")
    return folder / f"{kind.replace(', ', '-')}.gguf"


class Scripted(Sampler):
    """Draws the tokens of a script one after the other, then the one that ends answers; what is not allowed there the model itself draws."""

    script: list[int] = []
    end = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._left = list(type(self).script)

    def sample(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> Sampled:
        drawn = super().sample(logits, allowed)
        wanted = self._left[0] if self._left else type(self).end
        if allowed is not None and not allowed[wanted // 32] >> wanted % 32 & 1:
            return drawn
        del self._left[:1]
        return drawn._replace(token=wanted)


@contextmanager
def writing(model: Any, text: str) -> Iterator[None]:
    """Let a model write a text, in which the texts of tokens stand for them, in every answer that is asked for in the block."""
    import pyengine.engine.model as engine

    script = type("Scripted", (Scripted,), {"script": model.tokenizer.tokenize(text, add_special=False), "end": min(model.tokenizer.eog_ids)})
    before: Callable[..., Any] = engine.Sampler
    engine.Sampler = script                                                    # type: ignore[misc]
    try:
        yield
    finally:
        engine.Sampler = before                                                # type: ignore[misc]
