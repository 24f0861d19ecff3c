"""Chat templates: the same text as transformers renders, and no harm from hostile ones."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from pyengine.chat import defaults, dialect, helper, template
from pyengine.chat.defaults import default_template, GEMMA
from pyengine.chat.template import ChatTemplate, MAX_SOURCE
from pyengine.errors import RequestError, TemplateError

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
             "'user') | list | length }}{{ messages[::-1][0].content }}{{ '{}-{n}'.format('x', n=3) }}",
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
                                reason="transformers is not installed: pip install 'pyengine-local[test]'")
    rendered, _ = utils.render_jinja_template([messages], chat_template=source, tools=tools, documents=None,
                                              add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>")
    return rendered[0]


def assert_same(source: str) -> None:
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):
            for prompt in (True, False):
                ours = ChatTemplate(source, "<s>", "</s>").render(messages, tools, prompt)
                assert ours == theirs(source, messages, tools, prompt)


@pytest.fixture
def stays(monkeypatch):
    """No template may need the helper process."""
    def refuse(*_):
        raise AssertionError("rendered in the helper process")

    monkeypatch.setattr(template, "render_apart", refuse)


@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_as_transformers(name, stays):
    assert_same(TEMPLATES[name])


@pytest.mark.parametrize("name", ["CHATML", "GEMMA", "LLAMA3", "INST", "PLAIN"])
def test_defaults_are_templates_for_transformers_too(name, stays):
    assert_same(getattr(defaults, name))


@pytest.mark.parametrize("name", REAL)
def test_templates_of_real_files(name, stays):
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


# -- names -----------------------------------------------------------------------------------------------------------

# Every filter of jinja2 and transformers; in each, what may well go wrong: other types, arguments, order, letters beyond ASCII.
FILTERS = {
    "abs": "-3 | abs", "attr": "messages | attr('x') is undefined", "batch": "range(5) | batch(2, 'x') | list",
    "capitalize": "'élan vital' | capitalize",
    "center": "'x' | center(5)", "count": "'abc' | count", "d": "x | d('y')", "default": "'' | default('y', true)",
    "dictsort": "{'b': 1, 'A': 2} | dictsort(reverse=true)", "e": "'<&>' | e", "escape": "'<' | escape",
    "filesizeformat": "123456 | filesizeformat",
    "first": "'abc' | first", "float": "'1.5' | float + 1", "forceescape": "'<' | forceescape",
    "format": "'%s %05.1f' | format('a', 2)",
    "groupby": "[{'a': 1}, {'a': 2}, {'a': 1}] | groupby('a') | map('last') | list",
    "indent": "'a\nb\n\nc' | indent(2, first=true)",
    "int": "'0x1f' | int(0, 16)", "items": "{'a': 1} | items | list", "join": "[{'a': 1}, {'a': 'é'}] | join('-', attribute='a')",
    "last": "[1, 2] | last",
    "length": "{'a': 1} | length", "list": "'aé' | list", "lower": "'ÀB' | lower", "map": "['a', 'b'] | map('upper') | list",
    "max": "['a', 'B'] | max", "min": "[3, 1, 2] | min", "pprint": "{'b': [1]} | pprint", "random": "[7] | random",
    "reject": "range(4) | reject('odd') | list",
    "rejectattr": "[{'a': 1}, {}] | rejectattr('a') | list", "replace": "'aaa' | replace('a', 'b', 2)",
    "reverse": "'abc' | reverse ~ ([1, 2] | reverse | list)",
    "round": "42.55 | round(1, 'floor') ~ 7 | round ~ (-2.5) | round", "safe": "'<' | safe ~ '<'",
    "select": "[0, 1, ''] | select | list",
    "selectattr": "[{'a': 1}, {'a': 2}] | selectattr('a', 'gt', 1) | list", "slice": "range(5) | slice(2) | list",
    "sort": "['b', 'A', 'c'] | sort(case_sensitive=true)",
    "string": "[1, none, 'é\n'] | string", "striptags": "'<b>a</b>  b' | striptags", "sum": "[1, 2.5] | sum",
    "title": "'one two-three' | title",
    "tojson": "{'b': '<é\n>', 'a': [1, 2.5, none, true]} | tojson(indent=2, sort_keys=true, ensure_ascii=true, separators=(',', ':'))",
    "trim": "'  xax ' | trim(' x')",
    "truncate": "'one two three four' | truncate(9, leeway=0)", "unique": "['a', 'A', 'b'] | unique | list",
    "upper": "'straße' | upper",
    "urlencode": "{'a': 'é b'} | urlencode", "urlize": "'see example.com now' | urlize", "wordcount": "'a b c' | wordcount",
    "wordwrap": "'aa bb cc' | wordwrap(5)",
    "xmlattr": "{'a': 1, 'b': none} | xmlattr",
}
TESTS = {
    "boolean": "true is boolean", "callable": "range is callable", "defined": "x is defined", "divisibleby": "9 is divisibleby(3)",
    "eq": "1 is eq 1.0", "equalto": "'a' is equalto 'b'",
    "escaped": "'a' is escaped", "even": "2 is even", "false": "false is false", "filter": "'tojson' is filter",
    "float": "1.0 is float", "ge": "1 is ge 1", "greaterthan": "1 is greaterthan 2",
    "gt": "2 is gt 1", "in": "'a' is in 'abc'", "integer": "true is integer", "iterable": "'a' is iterable", "le": "1 is le 2",
    "lessthan": "1 is lessthan 2", "lower": "'a' is lower", "lt": "1 is lt 2",
    "mapping": "{} is mapping", "ne": "1 is ne 2", "none": "none is none", "number": "1.5 is number", "odd": "3 is odd",
    "sameas": "none is sameas none", "sequence": "messages is sequence",
    "string": "1 is string", "test": "'odd' is test", "true": "1 is true", "undefined": "x is undefined", "upper": "'A' is upper",
    "==": "[1] | select('==', 1) | list", "!=": "[1] | select('!=', 1) | list",
    "<": "[1] | select('<', 2) | list", "<=": "[1] | select('<=', 2) | list", ">": "[1] | select('>', 2) | list",
    ">=": "[1] | select('>=', 2) | list",
}
EXPRESSIONS = {
    "strip": "' a '.strip() ~ 'xax'.strip('x') ~ 'ab'.lstrip('a') ~ 'ab'.rstrip('b')",
    "split": "'a b  c'.split() + 'a,b,c'.split(',', 1) + 'a,b,c'.rsplit(',', 1) + 'a\nb\r\nc'.splitlines()",
    "startswith": "'abc'.startswith('ab') and 'abc'.endswith(('c', 'd'))",
    "find": "'abcabc'.find('c') ~ 'abcabc'.rfind('c') ~ 'abc'.index('b') ~ 'aXa'.count('a')",
    "partition": "'a=b=c'.partition('=') + 'a=b=c'.rpartition('=')",
    "cases": "'aB é'.upper() ~ 'aB'.lower() ~ 'aB c'.title() ~ 'aB'.capitalize() ~ 'aB'.swapcase() ~ 'ß'.casefold()",
    "removeprefix": "'abc'.removeprefix('a').removesuffix('c')", "join": "'-'.join(['a', 'b']) ~ ','.join({'a': 1})",
    "replace": "'aaa'.replace('a', 'b', 1) ~ ''.replace('', 'x')",
    "is": "'12'.isdigit() ~ 'a'.isalpha() ~ 'A'.isupper() ~ ' '.isspace() ~ '½'.isnumeric()",
    "pads": "'a'.ljust(3) ~ 'a'.rjust(3, '.') ~ 'a'.center(3) ~ '7'.zfill(3) ~ 'a\tb'.expandtabs(2)",
    "format": "'{} {1}'.format(1, 2) if false else '{0:>4}|{a}|{b[c]}'.format(1, a='x', b={'c': 2})",
    "format_map": "'{a}'.format_map({'a': 1})", "percent": "'%s|%5.2f|%(a)s' % {'a': 1} if false else '%s|%5.2f' % ('a', 1.5)",
    "encode": "'é'.encode() | length", "translate": "'abc'.translate({97: 'x'})",
    "get": "{'a': 1}.get('a') ~ {'a': 1}.get('b') ~ {'a': 1}.get('b', 2)",
    "views": "{'a': 1}.keys() | list ~ {'a': 1}.values() | list ~ {'a': 1}.items() | list ~ {'a': 1}.items()",
    "copy": "{'a': 1}.copy()", "index of a list": "[1, 2].index(2) ~ [1, 1].count(1)",
    "numbers": "7 // 2 ~ 7 % 3 ~ 7 / 2 ~ 2 ** 10 ~ 2 ** -1 ~ -7 // 2 ~ 1.5 * 2 ~ (- 3) ~ (+ 3)",
    "sequences": "([1] + [2]) ~ ((1,) + (2,)) ~ 'ab' * 2 ~ 2 * [0] ~ [1, 2, 3][1:] ~ 'abc'[::-1] ~ [1, 2, 3][-1] ~ 'abc'[1]",
    "comparing": "1 < 2 < 3 and 'a' in 'abc' and 'x' not in ['a'] and [1, [2]] == [1, [2]] and 'a' in {'a': 1} and 1 in range(3)",
    "conditional": "'a' if x else 'b' if messages else 'c'",
    "undefined": "(x.y is defined) if false else x ~ messages[0].nothing ~ messages[0]['nothing'] ~ messages[99]",
    "range": "range(5, 1, -2) | list ~ range(3)", "dict": "dict(a=1, b='x') ~ dict([('a', 1)], c=2) ~ dict.fromkeys(['a'], 1)",
    "namespace": "namespace(a=1).a ~ namespace({'b': 2}).b", "lipsum": "lipsum(n=1, html=false) | length > 0",
    "numbers of texts": "'9' * 3 ~ ('5' | int + 1) ~ 1.0 ~ 1e100 ~ 10 ** 30",
    "printing": "[1, 'é\n', {'a': (1,)}, none, true, 1.5]",
    "by name": "messages[0]['role'] ~ messages[0].role ~ messages[0]['items']() | list | length ~ messages['0']",
    "markup": "('<a>' | safe + '<b>') ~ ('<' | e)", "fields": "'{{}}{}'.format(1)",
    "star arguments": "range(*[1, 3]) | list ~ dict(**{'a': 1})",
}
STATEMENTS = {
    "loop": "{% for a in 'abc' %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('x', 'y') }}{{ loop.changed(a) }}{{ loop.depth }}{% else %}none{% endfor %}",
    "loop with test": "{% for a in range(9) if a is odd %}{{ a }}{{ loop.index }}{{ loop.last }}{% else %}-{% endfor %}{% for a in [] %}{% else %}empty{% endfor %}",
    "recursive loop": "{% for a in [1, [2, [3]]] recursive %}{{ loop.depth }}{{ loop(a) if a is iterable else a }}{% endfor %}",
    "break": "{% for a in range(9) %}{% if a == 2 %}{% continue %}{% endif %}{% if a == 5 %}{% break %}{% endif %}{{ a }}{% endfor %}",
    "cycler": "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner('|') %}{{ j() }}{{ j() }}",
    "with": "{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a }}",
    "macro": "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller is defined }}{% endmacro %}{{ f(1) }}{{ f(1, 2, 3, c=4) }}{{ f.name }}{% call(x) f(0) %}{{ x }}{% endcall %}",
    "recursive macro": "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(12) }}",
    "block": "{% block a %}x{{ self.a is defined }}{% endblock %}{{ self.a() }}",
    "set": "{% set a, b = 1, 'x' %}{{ a }}{{ b }}{% set c %}<{{ a }}>{% endset %}{{ c }}{% set d | upper %}x{% endset %}{{ d }}{% if true %}{% set a = 2 %}{% endif %}{{ a }}{% for i in [1] %}{% set a = 3 %}{% endfor %}{{ a }}",
    "filter block": "{% filter upper | replace('A', 'b') %}a{{ 'é' }}{% endfilter %}",
    "raw": "{% raw %}{{ x }}{% endraw %}{# comment #}", "autoescape": "{% autoescape true %}{{ '<' }}{% endautoescape %}{{ '<' }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "blanks": "a\n  {% if true %}\n  b\n  {%- endif %}\n  c {{- 1 -}} d\n  {%+ if true %}e{% endif %}\n",
    "if": "{% if x %}a{% elif messages %}b{% else %}c{% endif %}{{ 'd' if not x }}",
    "namespace": "{% set n = namespace(a=1) %}{% for i in range(3) %}{% set n.a = n.a + i %}{% endfor %}{{ n.a }}{{ n.b is defined }}{{ n['a'] }}",
    "tools": "{% for t in [{'f': {'p': {'a': 1}}}] %}{{ t.f | tojson }}{% for k, v in t.f.p | dictsort %}{{ k }}{{ v }}{% endfor %}{% for k, v in t | items %}{{ k }}{% endfor %}{{ t['f']['p'].keys() | list }}{% endfor %}",
    "date": "{{ strftime_now('%Y') | length }}",
}


@pytest.mark.parametrize("kind", ["filters", "tests", "expressions", "statements"])
def test_names_are_those_of_transformers(kind):
    """The same text, and the same again from the helper process; in one rendering, which starts it once."""
    known = {"filters": set(dialect.Environment().filters), "tests": set(dialect.Environment().tests)}
    shown = {"filters": FILTERS, "tests": TESTS, "expressions": EXPRESSIONS, "statements": STATEMENTS}[kind]
    assert set(shown) == known.get(kind, set(shown))
    sources = {name: text if kind == "statements" else "{{ " + text + " }}" for name, text in shown.items()}
    for name, source in sources.items():
        want = theirs(source, CONVERSATIONS[1], None, False)
        assert ChatTemplate(source, "<s>", "</s>").render(CONVERSATIONS[1], add_generation_prompt=False) == want, name
    apart = [(name, source) for name, source in sources.items() if "block" not in name and "'%Y'" not in source]
    values = {"messages": CONVERSATIONS[1]}
    text = helper.render_apart("|".join(source for _, source in apart), values, time.monotonic() + 60)
    assert text == dialect.Environment().from_string("|".join(source for _, source in apart)).render(values)


def test_lists_can_grow_and_the_callers_do_not():
    messages = [{"role": "user", "content": "a", "names": ["x"]}]
    source = "{% set l = [] %}{% for m in messages %}{{ l.append(m.content) or '' }}{{ m.names.append('y') or '' }}{% endfor %}{{ l }}{{ messages[0].names.pop() }}{{ messages[0].names.append('z') }}"
    assert ChatTemplate(source).render(messages) == "['a']yNone"
    assert messages == [{"role": "user", "content": "a", "names": ["x"]}]


def test_reasoning_has_the_names_that_transformers_gives_it():
    source = "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.reasoning }}|{% endfor %}"
    messages = [{"role": "assistant", "content": "a", name: "b"} for name in ("reasoning_content", "thinking", "reasoning")] + [{"role": "user", "content": "c"}]
    assert ChatTemplate(source).render(messages, add_generation_prompt=False) == theirs(source, messages, None, False)


@pytest.mark.parametrize("source, said", [
    ("{{ 1 | wibble }}", "line 1: No filter named 'wibble'"), ("\n{{ 1 is wobble }}", "line 2: No test named 'wobble'"),
    ("{{ wubble(1) }}", "'wubble' is undefined"),
    ("{% wabble %}", "unknown tag 'wabble'"), ("{{ 'a'.webble() }}", "no attribute 'webble'"), ("{% include 'x' %}", "no loader"),
])
def test_unknown_names_are_named(source, said):
    with pytest.raises(TemplateError, match=said):
        ChatTemplate(source).render([])


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


class Odd:
    """An object with methods that a template must not reach."""

    def save(self):
        raise AssertionError


def test_templates_see_plain_values():
    import numpy as np

    class Name(str):
        __slots__ = ()

    values = {"a": Odd(), "b": np.float32(1.5), "c": Name("x"), "d": (1, [2]), "e": {1: np.bool_(False)}}
    source = "{{ a }}{{ b }}{{ c }}{{ d }}{{ e }}{{ a.save is defined }}"
    assert ChatTemplate(source).render([], variables=values) == "<Odd>1.5x(1, [2]){1: False}False"
    assert ChatTemplate(source + "{{ 'x' | center(3) }}").render([], variables=values) == "<Odd>1.5x(1, [2]){1: False}False x "
    loop: list = []
    loop.append(loop)
    with pytest.raises(RequestError, match="nested deeper"):
        ChatTemplate("x").render([], variables={"a": loop})
    shared: list = ["x"]
    for _ in range(100):
        shared = [shared, shared]
    assert ChatTemplate("x").render([], variables={"a": shared}) == "x"
    with pytest.raises(TemplateError, match="5 s"):
        helper.render_apart("{{ a }}", template._plain({"a": shared}), time.monotonic() + 0.3)


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
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
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
    monkeypatch.setattr(helper, "MAX_SECONDS", 1.0)
    start = time.perf_counter()
    with pytest.raises(TemplateError):
        ChatTemplate(HOSTILE[name]).render([{"role": "user", "content": "x"}])
    assert time.perf_counter() - start < 10         # the budget's second and, on a busy machine, some more


def test_long_conversations_are_well_within_the_budget():
    source = "{% for m in messages %}{{ m.role ~ ': ' ~ (m.content | trim) ~ '\n' }}{% endfor %}"
    messages = [{"role": "user", "content": "word " * 2000}] * 1000
    assert len(ChatTemplate(source).render(messages)) == 1000 * (6 + 9999 + 1)


def test_longer_ones_are_rendered_apart(monkeypatch):
    source = "{% for m in messages %}{{ m.role ~ ': ' ~ (m.content | trim) ~ '\n' }}{% endfor %}"
    messages = [{"role": "user", "content": "wörd " * 2000}] * 1000
    apart = []
    monkeypatch.setattr(template, "render_apart", lambda *args: apart.append(1) or helper.render_apart(*args))
    assert len(ChatTemplate(source).render(messages)) == 1000 * (6 + 9999 + 1) and apart


# -- the helper process ----------------------------------------------------------------------------------------------

APART = "{{ messages[0].content | center(7) }}"


def test_the_helper_process_works_from_threads():
    made, texts = ChatTemplate(APART), []
    threads = [threading.Thread(target=lambda i=i: texts.append(made.render([{"role": "user", "content": str(i)}]))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == [f"   {i}   " for i in range(4)]


def test_any_text_comes_back_from_the_helper_process():
    for text in ("", "\0", "\r\n", "\ud800x", "\U0001f600é"):
        message = {"role": "user", "content": text}
        assert ChatTemplate("{{ messages[0].content | center(0) }}").render([message]) == text


def test_the_helper_process_ends_in_time(monkeypatch):
    monkeypatch.setattr(helper, "MAX_SECONDS", 0.5)
    start = time.perf_counter()
    with pytest.raises(TemplateError, match="0.5 s and 160 MiB"):
        ChatTemplate("{{ 1 | round(999999999, 'ceil') }}").render([])
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("executable", ["/nowhere/python", "", None])
def test_without_a_helper_process_the_reason_is_said(executable, monkeypatch):
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(TemplateError, match="helper process cannot be started"):
        ChatTemplate(APART).render([{"role": "user", "content": "x"}])


def test_a_program_that_is_no_python_gives_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TemplateError):
        ChatTemplate(APART).render([{"role": "user", "content": "x"}])


def test_a_deep_caller_gets_the_same_text():
    made = ChatTemplate("{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(9) }}")

    def deep(n):
        return made.render([]) if n == 0 else deep(n - 1)

    here = 0
    frame = sys._getframe()
    while frame:
        here, frame = here + 1, frame.f_back
    for left in (150, 100, 80):
        assert deep(sys.getrecursionlimit() - here - left) == "9876543210"


def test_a_failed_probe_is_tried_again(monkeypatch):
    made = ChatTemplate(APART + "{{ messages[0].content }}")
    monkeypatch.setattr(helper, "MAX_SECONDS", 0.0)
    with pytest.raises(TemplateError, match="0 s"):
        made.render([{"role": "user", "content": "x"}])
    monkeypatch.undo()
    assert made.render([{"role": "user", "content": "x"}]) == "   x   x"


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
