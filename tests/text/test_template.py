"""Chat templates: the same text as transformers renders, and no harm from hostile ones."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pyengine.chat import defaults, sandbox
from pyengine.errors import RequestError, TemplateError
from pyengine.chat.defaults import default_template, GEMMA
from pyengine.chat.sandbox import MAX_SOURCE
from pyengine.chat.template import ChatTemplate

WEIGHTS = Path(os.environ.get("PYENGINE_TEST_WEIGHTS", Path(__file__).resolve().parents[2] / "models"))
REAL = ("gemma3-270m-q4_k_m.gguf", "smollm2-135m-q4_1.gguf", "qwen2.5-coder-0.5b-q4_k_m.gguf")

CONVERSATIONS = [
    [{"role": "user", "content": "Hi <b>é</b> & 'you'"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
     {"role": "assistant", "content": "Hello "}, {"role": "user", "content": " again\n"}],
]
TOOLS = [{"type": "function", "function": {"name": "get", "description": "d'é <x> \"q\"", "parameters": {
    "type": "object", "properties": {"a": {"type": "string"}}}}}]

# What real templates do, in small: blanks around blocks, loop variables, namespaces, macros, tool calls, break, indent.
TEMPLATES = {
    "blocks": "{{ bos_token }}\n{% for m in messages %}\n  {% if loop.first %}\n<{{ m['role'] }}>\n  {% endif %}\n"
              "{{ m['content'] | trim }}{{ eos_token if loop.last else '|' }}\n{% endfor %}\n"
              "{% if add_generation_prompt %}\n>>\n{% endif %}\n",
    "macro": "{% macro head(role, n=2) %}[{{ role | upper }}:{{ n }}]{% endmacro %}"
             "{% set ns = namespace(count=0, last='') %}"
             "{% for m in messages %}{% set ns.count = ns.count + 1 %}"
             "{{ head(m.role, n=ns.count * 3 % 4) ~ m.content }}"
             "{% set ns.last = m.content %}{% endfor %}{{ ns.count }}{{ ns.last[-2:] }}{{ ns.last.split(' ')[0] }}",
    "tools": "{% if tools is defined and tools %}{% for t in tools %}{{ t | tojson }}"
             "{{ t | tojson(indent=2) | indent(4) }}"
             "{{ t.function.parameters.properties.keys() | list | join(',') }}{% endfor %}{% endif %}"
             "{{ messages | length }}",
    "break": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}"
             "{{ m.content.replace('i', 'II') }}"
             "{% endfor %}{{ messages | map(attribute='role') | join('+') }}"
             "{{ messages | selectattr('role', 'equalto', "
             "'user') | list | length }}{{ messages[::-1][0].content }}{{ '%s-%d' % ('x', 3) }}",
    "blocks that set": "{% set x %}{{ messages[0].content }}!{% endset %}{{ x }}{% filter upper %}abc{{ x }}"
             "{% endfilter %}"
                       "{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}in{{ x }}{% endcall %}",
    "generation": "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "unpack": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% set a, b = (1, 'two') %}{{ a }}"
             "{{ b }}"
              "{% for i in range(3) %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}"
              "{{ [1, 2] + [3] }}{{ {'k': 1} }}{{ documents is none }}{{ undefined_thing }}{{ 2 ** 8 }}{{ '-' * 5 }}",
}


def theirs(source: str, messages: list, tools: list | None, prompt: bool) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils",
                                reason="transformers is not installed: pip install pyengine[test]")
    rendered, _ = utils.render_jinja_template([messages], chat_template=source, tools=tools, documents=None,
                                              add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>")
    return rendered[0]


def assert_same(source: str) -> None:
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):
            for prompt in (True, False):
                ours = ChatTemplate(source, "<s>", "</s>").render(messages, tools, prompt)
                assert ours == theirs(source, messages, tools, prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_as_transformers(name):
    assert_same(TEMPLATES[name])


@pytest.mark.parametrize("name", ["CHATML", "GEMMA", "LLAMA3", "INST", "PLAIN"])
def test_defaults_are_templates_for_transformers_too(name):
    assert_same(getattr(defaults, name))


@pytest.mark.parametrize("name", REAL)
def test_templates_of_real_files(name):
    if not (WEIGHTS / name).exists():
        pytest.skip(f"{WEIGHTS / name} is not there: make weights, or set PYENGINE_TEST_WEIGHTS")
    from pyengine.files.gguf import GGUFFile
    from pyengine.text.tokenizer import Tokenizer

    meta = GGUFFile(WEIGHTS / name).metadata
    tokenizer = Tokenizer.from_metadata(meta)
    made = ChatTemplate.from_metadata(meta, tokenizer)
    assert made.bos == tokenizer.piece(tokenizer.bos_id).decode()
    if meta.get("tokenizer.chat_template") is None:
        assert made.source == default_template(meta, tokenizer) == GEMMA
    else:
        assert made.source == meta["tokenizer.chat_template"]
    assert_same(made.source)


# -- messages --------------------------------------------------------------------------------------------------------

PARTS = ("{% for m in messages %}{% for p in m.content %}{{ p.text if p.type == 'text' else '<' ~ p.type ~ '>' }}"
         "{% endfor %}{% endfor %}")
BOTH = ("{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ p.text if p.type == 'text' else '<' ~ p.type ~ '>' }}{% endfor %}{% endif %}{% endfor %}")
TEXT = "{% for m in messages %}{{ m.content }}{% endfor %}"
PICTURE = [{"type": "text", "text": "What"}, {"type": "image_url", "image_url": {"url": "data:secret"}},
           {"type": "text", "text": "is it?"}]


def test_parts_and_strings():
    def show(source, content, **options):
        return ChatTemplate(source).render([{"role": "user", "content": content}], **options)

    for source in (PARTS, BOTH):
        assert show(source, PICTURE) == "What<image>is it?"
        assert show(source, "Hello") == "Hello"
    assert show(TEXT, "Hello") == "Hello"
    assert show(TEXT, PICTURE[::2]) == "What\nis it?"
    assert show(TEXT, PICTURE, media_marker="<image>") == "What\n<image>\nis it?"
    with pytest.raises(TemplateError, match="text only.*image"):
        show(TEXT, PICTURE)
    assert show("{{ messages[0].content is none }}", None) == "True"


def test_arguments_of_tool_calls_are_objects():
    call = {"type": "function", "function": {"name": "get", "arguments": '{"a": "é"}'}}
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert ChatTemplate(source).render([message]) == '{"a": "é"}'
    assert json.loads(call["function"]["arguments"]) == {"a": "é"}     # the caller's message is as it was
    call["function"]["arguments"] = "{"
    with pytest.raises(RequestError, match="JSON"):
        ChatTemplate(source).render([message])


@pytest.mark.parametrize("message", ["hi", {"content": "x"}, {"role": "user", "content": 3},
                                     {"role": "user", "content": [{"type": "smell"}]},
                                     {"role": "user", "content": [3]}, {"role": "user", "content": [{"type": "text"}]}])
def test_malformed_messages(message):
    with pytest.raises(RequestError):
        ChatTemplate(TEXT).render([message])


def test_variables():
    source = "{{ enable_thinking is defined }}{{ enable_thinking }}{{ extra }}"
    render = ChatTemplate(source).render
    assert render([]) == "False"
    assert render([], enable_thinking=False, variables={"extra": 5}) == "TrueFalse5"
    assert len(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render([])) == 10


# -- hostile and malformed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% endif %}", "{{ 'a' | no_such_filter }}",
                                    "{% include 'x' %}",
                                    "(" * 5000 + "{{" + "(" * 5000, "{{ " + "[" * 3000 + "]" * 3000 + " }}",
                                    "x" * (MAX_SOURCE + 1)],
                         ids=["for", "open", "endif", "filter", "include", "parentheses", "brackets", "long"])
def test_malformed_templates(source):
    with pytest.raises(TemplateError):
        ChatTemplate(source).render([])


def test_refusal_is_said():
    with pytest.raises(TemplateError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([])


HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.x }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "format attribute": "{{ '{0.__class__.x}'.format(messages) }}",
    "append": "{{ messages.append(1) }}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "silent loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops of calls": "{% set r = range(99999) %}{{ r | map('string') | list | length }}{% for a in r %}"
             "{% for b in r %}"
                      "{{ 'ab' if false }}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "times": "{{ 'x' * 10 ** 10 }}", "times list": "{{ [1] * 10 ** 10 }}", "times reversed": "{{ 10 ** 10 * 'x' }}",
    "power": "{{ 9 ** (9 ** 9) }}", "squares": "{% set n = namespace(x=9) %}{% for i in range(99) %}"
             "{% set n.x = n.x * n.x %}"
                                             "{% endfor %}{{ n.x }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "adding lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "nesting": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nesting maps": "{% set n = namespace(x={}) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}"
             "{% endfor %}"
                    "{{ n.x | tojson }}",
    "block": "{% set x = 'x' * 9999 %}{% for i in range(99999) %}{% set y %}{{ x }}{% endset %}{{ y }}{% endfor %}",
    "pad": "{{ 'x'.ljust(10 ** 10) }}", "center": "{{ 'x' | center(10 ** 10) }}", "zfill": "{{ '1'.zfill(10 ** 10) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 10) }}", "width": "{{ '%10000000000d' % 1 }}",
    "star": "{{ '%*d' % (10 ** 9, 1) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}", "format nested": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "replace": "{% set x = 'x' * 999999 %}{{ x.replace('x', x) }}", "replace filter": "{% set x = 'x' * 999999 %}"
    "{{ x | replace('x', x) }}", "join": "{% set x = 'x' * 999999 %}{{ x.join(range(99999) | map('string')) }}",
    "join filter": "{% set x = 'x' * 999999 %}{{ range(99999) | join(x) }}",
    "json": "{{ [1] | tojson(indent=10 ** 9) }}", "indent": "{{ ('\n' * 999999) | indent(10 ** 9) }}",
    "date": "{{ strftime_now('%999999999d') }}", "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "undefined": "{{ a.b.c }}", "type": "{{ 'a' + 1 }}", "zero": "{{ 1 / 0 }}",
    "none": "{% for x in none %}{% endfor %}",
    "lipsum": "{{ lipsum(n=10 ** 6) }}", "folded while compiling": "{{ 'x' | replace('x', 'xxxxxxxx' * 10 ** 9) }}",
}


@pytest.mark.parametrize("expression", ["raise_exception.__globals__", "''.__class__", "messages.__class__",
                                        "'{0.__class__}'.format(messages)", "cycler.__init__", "messages.__init__"])
def test_internals_are_out_of_reach(expression):
    assert ChatTemplate("{{ " + expression + " }}").render([]) == ""


def test_formats_that_are_not_hostile():
    source = "{{ 'in 2024: {} {x:>3}'.format(3, x=4) }}{{ ' %s 2024 %5.2f' % ('a', 1.5) }}"
    assert ChatTemplate(source).render([]) == "in 2024: 3   4 a 2024  1.50"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates(name, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    start = time.perf_counter()
    with pytest.raises(TemplateError):
        ChatTemplate(HOSTILE[name]).render([{"role": "user", "content": "x"}])
    assert time.perf_counter() - start < 10         # the budget's half second and, on a busy machine, some more


def test_long_conversations_are_well_within_the_budget():
    source = "{% for m in messages %}{{ m.role ~ ': ' ~ (m.content | trim) ~ '\n' }}{% endfor %}"
    messages = [{"role": "user", "content": "word " * 2000}] * 1000
    assert len(ChatTemplate(source).render(messages)) == 1000 * (6 + 9999 + 1)


# -- defaults --------------------------------------------------------------------------------------------------------


class Words:
    """A vocabulary of a few words, as far as default_template looks at one."""

    def __init__(self, *words: str):
        self.words = words

    def id_of(self, text: str) -> int | None:
        return self.words.index(text) if text in self.words else None


@pytest.mark.parametrize("words, name, want", [
    (["<|im_start|>"], "", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    (["<start_of_turn>"], "", "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"),
    (["<|start_header_id|>"], "", "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                                  "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    (["[INST]"], "", "<s>[INST] Hi [/INST]"), ([], "Mixtral 8x7B", "<s>[INST] Hi [/INST]"),
    ([], "Llama-2 7b chat", "<s>[INST] Hi [/INST]"), ([], "Some base model", "<s>User: Hi\nAssistant:"),
])
def test_defaults(words, name, want):
    source = default_template({"general.name": name}, Words(*words))
    assert ChatTemplate(source, "<s>", "</s>").render([{"role": "user", "content": "Hi"}]) == want
