"""Chat templates for files without one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pyengine.text.tokenizer import Tokenizer

LLAMA3 = """\
{{ bos_token }}{% for message in messages %}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content|trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
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
INST = """\
{{ bos_token }}{% set ns = namespace(system='') %}
{% for message in messages %}
{% if message.role == 'system' %}{% set ns.system = message.content + '\n\n' %}
{% elif message.role == 'user' %}{{ '[INST] ' + ns.system + message.content + ' [/INST]' }}{% set ns.system = '' %}
{% else %}{{ ' ' + message.content|trim + eos_token }}{% endif %}
{% endfor %}
"""
SINGLE = """\
{% if messages|length != 1 or messages[0].role != 'user' %}
{{ raise_exception('this model turns one text into another and has no conversations: give one message of a user') }}
{% endif %}
{{- messages[0].content }}"""
PLAIN = """\
{{ bos_token }}{% for message in messages %}
{{ message.role|capitalize + ': ' + message.content + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""


def default_template(meta: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Give the source of a template that fits a vocabulary: the one whose marks it has, or plain "User: ..." lines; of an encoder-decoder
    the text alone."""
    if f"{meta.get('general.architecture')}.decoder_start_token_id" in meta:
        return SINGLE
    for mark, source in (("<|im_start|>", CHATML), ("<start_of_turn>", GEMMA), ("<|start_header_id|>", LLAMA3),
                         ("[INST]", INST)):
        if tokenizer.id_of(mark) is not None:
            return source
    name = str(meta.get("general.name", "")).lower()
    return INST if re.search(r"mi[sx]tral|llama[-_ ]?2", name) else PLAIN
