"""Replies: any cut tells the same, forms of real templates, what only looks like a mark, grammars and readers that agree.

Forms are those of public templates, which each row names; the grammars are run by llguidance itself over a vocabulary of bytes.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings, strategies as st
from replies import calls_of

from pyengine.chat.reply.deltas import Delta, joined, Reader, ToolCall
from pyengine.chat.reply.style import find, Style
from pyengine.chat.reply.tools import read_tools, Tool
from pyengine.errors import RequestError
from pyengine.text.marks import MARK

llguidance = pytest.importorskip("llguidance")

PLACE = {"type": "object", "properties": {"x": {"type": "number"}, "inside": {"$ref": "#/$defs/place"}}, "required": ["x"],
         "additionalProperties": False}
PARAMETERS = {
    "type": "object", "required": ["city", "days"], "additionalProperties": False, "$defs": {"place": PLACE},
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 0, "maximum": 20}, "unit": {"type": "string", "enum": ["C", "F"]},
                   "flag": {"type": "boolean"}, "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
                   "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "where": {"$ref": "#/$defs/place"},
                   "word": {"type": "string", "pattern": "^[a-c]+$", "maxLength": 5}},
}
TOOLS = read_tools([{"type": "function", "function": {"name": "get_weather", "description": "Tell the weather.", "parameters": PARAMETERS}},
                    {"type": "function", "function": {"name": "now"}}])
ARGUMENTS = {"city": 'Paris "<é\n</x>', "days": 3, "unit": "C", "flag": True, "tags": ["a,b", "c]"], "maybe": None,
             "where": {"x": 1.5, "inside": {"x": 2}}, "word": "abc"}

# What stands for a template: the words by which it is known, as the templates themselves have them.
TEMPLATES = {
    "hermes": r'{%- if tools %}{"name": <function-name>, \"arguments\": <args>} <tool_call> {{ message.tool_calls }}',           # Qwen2.5-7B-Instruct
    "hermes+think": r'{% if tools and enable_thinking is defined %}</think> <tool_call>\n{"name": "", "arguments": }{% endif %} tool_calls',    # Qwen3-0.6B
    "coder": "{% if tools %}<tool_call>\n<function=f>\n<parameter=p>\n{% endif %} tool_calls",                                    # Qwen3-Coder
    "llama": "<|start_header_id|>ipython {% if tools %}<|python_tag|>{'\"parameters\": '}{% endif %} tool_calls",                 # Llama 3.1
    "pythonic": "{% if tools %}Use exact format: [func_name1(param1=value1)]{% endif %} tool_calls",                              # Llama 4
    "liquid": "{% if tools %}<|tool_list_start|>{% endif %} <|tool_call_start|>",                                                 # LFM2
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS][ tool_calls",                                              # Mistral Nemo
    "mistral, names": "{% if tools %}{% endif %}[TOOL_CALLS] [CALL_ID] [ARGS] tool_calls",                                        # Mistral Small 3.2
    "mistral+brackets": "{% if tools %}{% endif %}[TOOL_CALLS] [ARGS] [THINK] tool_calls",                                        # Magistral, Ministral 3
    "granite+response": "{% if tools and thinking %}<|tool_call|> <think></think> <response></response>{% endif %}",              # Granite 3.3
    "granite+phrases": "{% if tools and thinking %}<|tool_call|> 'Here is my thought process:' 'Here is my response:'{% endif %}",  # Granite 3.2
    "deepseek+think": "{{'<｜tool▁calls▁begin｜><｜tool▁sep｜>' + '```json' }}</think> tool_calls",                                    # R1
    "deepseek, names": "{{'<｜tool▁calls▁begin｜><｜tool▁sep｜>'}}{% if thinking %}</think>{% endif %} tool_calls",                   # V3.1
    "gemma4+channel": "{% if enable_thinking and tools %}{{ '<|tool_call>call:' }}{% endif %} <|channel>thought <channel|> tool_calls",  # Gemma 4
    "harmony": "<|start|>assistant<|channel|>final<|message|>{{ reasoning_effort }}{% if tools %} tool_calls{% endif %}",         # gpt-oss
    "prompted": "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['content'] }}{% endfor %}",                # Gemma 3
}
# A reply of each with one call, as the template writes it, and what is around it.
REPLIES = {
    "hermes": 'Well.\n<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>',
    "hermes+think": '<think>\nHm.\n</think>\n\nWell.\n<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>',
    "coder": "Well.\n<tool_call>\n<function=now>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "llama": '{"name": "now", "parameters": {"a": 1}}',
    "pythonic": "[now(a=1)]",
    "liquid": "<|tool_call_start|>[now(a=1)]<|tool_call_end|>Well.",
    "mistral": '[TOOL_CALLS][{"name": "now", "arguments": {"a": 1}, "id": "abcdefghi"}]',
    "mistral, names": 'Well.[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{"a": 1}',
    "mistral+brackets": '[THINK]Hm.[/THINK]Well.[TOOL_CALLS]now[ARGS]{"a": 1}',
    "granite+response": '<think>Hm.</think><response>Well.</response><|tool_call|>[{"name": "now", "arguments": {"a": 1}}]',
    "granite+phrases": 'Here is my thought process: Hm.\n\nHere is my response: Well.\n<tool_call>[{"arguments": {"a": 1}, "name": "now"}]',
    "deepseek+think": ('<think>\nHm.\n</think>\n\nWell.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{"a": 1}\n```'
                       "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    "deepseek, names": '<think>Hm.</think>Well.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "gemma4+channel": "<|channel>thought\nHm.\n<channel|>Well.<|tool_call>call:now{a:1}<tool_call|>",
    "harmony": ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Well.<|end|>"
                '<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": 1}<|call|>'),
    "prompted": '```json\n{"name": "now", "parameters": {"a": 1}}\n```',
}
NAMES = sorted(TEMPLATES)
names = pytest.mark.parametrize("name", NAMES)
vocabularies = pytest.mark.parametrize("tokens", [False, True], ids=["letters", "tokens"])


def style_of(name: str, tokens: bool = False) -> Style:
    return find(TEMPLATES[name], lambda text: tokens)


def spelled(style: Style, text: str, tokens: bool) -> str:
    """Text as the decoder gives it: marks behind U+FDD0 where they are tokens."""
    return re.sub("|".join(map(re.escape, style.marks)), lambda m: MARK + m.group(), text) if tokens and style.marks else text


def read(reader: Reader, pieces: Iterable[str]) -> list[Delta]:
    return joined([*(delta for piece in pieces for delta in reader.push(piece)), *reader.flush()])


def cut(text: str, places: Iterable[int]) -> list[str]:
    ends = [0, *sorted({p % (len(text) + 1) for p in places}), len(text)]
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def told(style: Style, text: str, tools: Sequence[Tool] | None = TOOLS, opened: bool = False) -> list[Delta]:
    """What a reader tells of a text, which must be the same letter by letter."""
    whole = read(style.reader(tools, opened), [text])
    assert read(style.reader(tools, opened), text) == whole
    return whole


def texts(deltas: Iterable[Delta], kind: str = "text") -> str:
    return "".join(delta.text for delta in deltas if delta.kind == kind)


def made(deltas: Iterable[Delta]) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls_of(deltas)]


# -- forms ----------------------------------------------------------------------------------------------------------------


@names
def test_a_style_is_found(name: str) -> None:
    assert style_of(name).name == {"mistral, names": "mistral", "deepseek, names": "deepseek+think"}.get(name, name)


@vocabularies
@names
def test_a_reply_is_told(name: str, tokens: bool) -> None:
    style = style_of(name, tokens)
    deltas = told(style, spelled(style, REPLIES[name], tokens))
    assert made(deltas) == [("now", {"a": 1})]
    assert texts(deltas) == ("Well." if "Well" in REPLIES[name] else "")
    assert texts(deltas, "thinking") == ("Hm." if "Hm" in REPLIES[name] else "")


@vocabularies
@names
def test_what_is_written_is_read_and_allowed(name: str, tokens: bool) -> None:
    style, calls = style_of(name, tokens), [("get_weather", ARGUMENTS)]
    text = style._calls.write(calls)
    assert made(told(style, spelled(style, text, tokens))) == calls
    assert allowed(style, text.removesuffix("<|call|>"), tokens)


@names
def test_without_tools_nothing_is_a_call(name: str) -> None:
    style = style_of(name)
    deltas = told(style, REPLIES[name], None)
    assert calls_of(deltas) == [] and ("now" in texts(deltas) or name == "harmony")
    assert texts(deltas, "thinking") == ("Hm." if "Hm" in REPLIES[name] else "")


@names
def test_a_function_that_is_not_there_is_text(name: str) -> None:
    text = REPLIES[name].replace("now", "nowhere")
    style = style_of(name)
    deltas = told(style, text)
    assert calls_of(deltas) == []
    if name != "harmony":                                          # whose headers are no content
        shown = text.split("</think>")[-1].split("[/THINK]")[-1].split("<channel|>")[-1].split("response:")[-1].replace("<response>", "")
        assert texts(deltas) == shown.replace("</response>", "").lstrip()


@pytest.mark.parametrize("name, text", [
    ("hermes", '<tool_call>{"name": "now"}</tool_call>\n<tool_call>{"name": "get_weather", "arguments": {"city": "x"}}</tool_call>'),
    ("hermes", '{"name": "now", "arguments": {}}\n{"name": "get_weather", "arguments": {"city": "x"}}'),
    ("hermes", '```json\n{"name": "now", "arguments": {}}\n{"name": "get_weather", "arguments": {"city": "x"}}\n```'),
    ("hermes+think", '<think>Hm.</think>\n\n{"name": "now", "arguments": {}}\n<tool_call>{"name": "get_weather", "arguments": {"city": "x"}}</tool_call>'),
    ("coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n<parameter=city>\nx\n</parameter>\n</function>"),
    ("llama", '{"name": "now", "parameters": {}}; {"type": "function", "name": "get_weather", "parameters": {"city": "x"}}'),
    ("pythonic", "[now(), get_weather(city='x')]"),
    ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "x"}}]'),
    ("mistral, names", '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{"city": "x"}'),
    ("granite+response", '<|tool_call|>[{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "x"}}]'),
    ("gemma4+channel", '<|tool_call>call:now{}<tool_call|><|tool_call>call:get_weather{city:<|"|>x<|"|>}<tool_call|>'),
    ("prompted", '[{"name": "now", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "x"}}]'),
    ("prompted", '{"name": "now", "parameters": {}}\n{"name": "get_weather", "parameters": {"city": "x"}}'),
])
def test_several_calls(name: str, text: str) -> None:
    deltas = told(style_of(name), text)
    assert made(deltas) == [("now", {}), ("get_weather", {"city": "x"})]
    assert [d.index for d in deltas if d.kind != "thinking"] == sorted(d.index for d in deltas if d.kind != "thinking") and texts(deltas) == ""


@pytest.mark.parametrize("text", ['So: {"name": "now", "arguments": {}}', '{"name": "Ada", "age": 5}', '{"a": 1}', "```python\nprint(1)\n```", '```json\n{"name": "Ada"}\n```',
                                  '{"of": 1, "name": "now"}'])
def test_objects_that_are_no_calls_of_hermes_stay_text(text: str) -> None:
    for cut in range(len(text)):
        reader = style_of("hermes").reader(TOOLS, False)
        deltas = [*reader.push(text[:cut]), *reader.push(text[cut:]), *reader.flush()]
        assert texts(deltas) == text and not calls_of(deltas)


def test_values_of_python_and_tags_become_json() -> None:
    text = r"""[get_weather(city='it\'s \x41\u00e9\U0001F600', days=-1, tags=["a", 'b',], where={'x': None, "y": [True, False]},)]"""
    assert made(told(style_of("pythonic"), text)) == [("get_weather", {
        "city": "it's Aé😀", "days": -1, "tags": ["a", "b"], "where": {"x": None, "y": [True, False]}})]
    parts = {"city": "two\nlines <b>", "days": "3", "flag": "True", "maybe": "nothing", "tags": '["a"]', "new": "free text", "word": ""}
    text = "<function=get_weather>\n" + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parts.items()) + "</function>"
    assert made(told(style_of("coder"), text)) == [("get_weather", {
        "city": "two\nlines <b>", "days": 3, "flag": True, "maybe": "nothing", "tags": ["a"], "new": "free text", "word": ""})]


def test_llamas_built_in_tools() -> None:
    tools = read_tools([{"function": {"name": "brave_search"}},
                        {"function": {"name": "python", "parameters": {"type": "object", "properties": {"code": {"type": "string"}}}}}])
    style = style_of("llama")
    assert made(told(style, '<|python_tag|>brave_search.call(query="a b")', tools)) == [("brave_search", {"query": "a b"})]
    assert made(told(style, '<|python_tag|>print("a")\nx = 1\n', tools)) == [("python", {"code": 'print("a")\nx = 1\n'})]
    assert made(told(style, '<|python_tag|>{"name": "python", "parameters": {}}', tools)) == [("python", {})]


# -- as it comes ----------------------------------------------------------------------------------------------------------

_PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|tool_call|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "[", "]", "{", "}",
           '"', ",", ":", "now", "get_weather", '{"name": "now", "arguments": {"a": [1, "\\u00e9"]}}', '"arguments": {"a": 1}', "now(a=1)", "<function=now>",
           "<parameter=city>", "\n</parameter>", "</function>", "<|channel|>", "analysis", "commentary", "final", " to=functions.now", "<|message|>", "<|end|>",
           "<|start|>", "assistant", "<|call|>", "<|constrain|>json", "<|channel>thought", "<channel|>", "<|tool_call>", "call:now{", '<|"|>', "<tool_call|>",
           "Here is my thought process:", "Here is my response:", "<response>", "</response>", "[THINK]", "[/THINK]", "```json", "```", "<｜tool▁calls▁begin｜>",
           "<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", " ", "\n", "\\", "'", "1", "-", MARK, "a:", "\n\n", ".5", "é", "<", "a < b"]
replies = st.lists(st.sampled_from(_PIECES), max_size=25).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=replies, places=st.lists(st.integers(0, 10_000), max_size=12), name=st.sampled_from(NAMES), tokens=st.booleans(), opened=st.booleans(),
       tools=st.sampled_from([TOOLS, None]))
def test_any_cut_tells_the_same(text: str, places: list[int], name: str, tokens: bool, opened: bool, tools: list[Tool] | None) -> None:
    style = style_of(name, tokens)
    text = spelled(style, text, tokens)
    deltas = told(style, text, tools, opened)
    assert read(style.reader(tools, opened), cut(text, places)) == deltas
    assert MARK not in texts(deltas) + texts(deltas, "thinking") + texts(deltas, "arguments")


@vocabularies
@names
def test_a_mark_of_nothing_is_told_nowhere(name: str, tokens: bool) -> None:
    """U+FDD0 before no mark's text: alone, at the beginning, at the end and between, in text, thinking, calls and their strings."""
    style = style_of(name, tokens)
    for stray in (MARK, MARK * 2, "\\" + MARK):
        for text in ("", "Well.", " \n"):
            for at in range(len(text) + 1):
                said = text[:at] + stray.replace(MARK, "") + text[at:]
                assert told(style, text[:at] + stray + text[at:]) == ([Delta("text", said)] if said else [])
    code = read_tools([{"function": {"name": "python", "parameters": {"properties": {"code": {}}}}}])
    call = spelled(style, style._calls.write([("get_weather", {"city": "a"})]), tokens)
    for text, tools, opened in ((call, TOOLS, False), (spelled(style, REPLIES[name], tokens), None, True), (spelled(style, "<|python_tag|>f()", tokens), code, False)):
        for at in range(len(text) + 1):
            deltas = told(style, f"{text[:at]}\\{MARK}{text[at:]}", tools, opened)
            assert MARK not in "".join(delta.text for delta in deltas)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), text=replies, tokens=st.booleans(), at=st.integers(0, 10_000))
def test_arguments_are_prefixes_of_objects(name: str, text: str, tokens: bool, at: int) -> None:
    style = style_of(name, tokens)
    good = spelled(style, style._calls.write([("get_weather", ARGUMENTS)]), tokens)
    at %= len(good) + 1
    for call in calls_of(told(style, good[:at] + spelled(style, text, tokens))):
        assert call.name in ("get_weather", "now")
        assert begins_json(call.arguments), call.arguments


def begins_json(text: str) -> bool:
    """Say whether an object begins so: whether something completes it."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*("|$)', "", text)
    closers: list[str] = []
    for letter in bare:
        if letter in "{[":
            closers.append("}" if letter == "{" else "]")
        elif letter in "}]" and (not closers or closers.pop() != letter):
            return False
    ends = ["", '"', '":0', ":0", "0", '"":0', "rue", "ue", "e", "alse", "lse", "se", "ull", "ll", "l"]
    return not text or any(is_object(text + end + "".join(reversed(closers))) for end in ends)


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("text, begins", [('{"a": [1, "\\u00e9', True), ('{"a": -', True), ("{", True), ('{"a', True), ('{"a": tr', True), ('{"a": {"b": 1}, ', True),
                                          ("{]", False), ('{"a" 1', False), ("[", False), ('{"a": 01', False), ("{}}", False)])
def test_beginnings_of_objects_are_told(text: str, begins: bool) -> None:
    assert begins_json(text) == begins


@names
def test_every_prefix_tells_a_prefix(name: str) -> None:
    style = style_of(name)
    text = style._calls.write([("get_weather", ARGUMENTS), ("now", {})])
    whole = told(style, text)
    for end in range(len(text)):
        reader = style.reader(TOOLS, False)
        early = joined(reader.push(text[:end]))
        if early:
            assert early[:-1] == whole[: len(early) - 1]
            assert whole[len(early) - 1].text.startswith(early[-1].text)


@vocabularies
@names
def test_the_name_comes_at_once_and_says_where_the_call_began(name: str, tokens: bool) -> None:
    style = style_of(name, tokens)
    text = spelled(style, REPLIES[name], tokens)
    reader, deltas = style.reader(TOOLS, False), list[Delta]()
    for n, letter in enumerate(text):
        deltas += reader.push(letter)
        if any(delta.kind == "call" for delta in deltas):
            break
    if name != "granite+phrases":                                  # whose arguments come first
        behind = text[text.rindex("now", 0, n + 1) + 3 : n + 1].replace(MARK, "")
        assert behind in ("[CALL_ID]", "[ARGS]", "<｜tool▁sep｜>") or len(behind) == 1
    assert reader.state == "call"
    opening, place = ((spelled(style, "<|channel|>", tokens),), text.rindex) if name == "harmony" else ((*style._calls.opening, *style._calls.leading), text.index)
    assert reader.begun == min(place(mark) for mark in opening if mark in text)


@pytest.mark.parametrize("text", ["<thin", "a < b", "<tool_cal l>", "1 << 2 <", "<tool_call", "<think", "< tool_call>", "x <tool_calls>", "{", "[1]", "\n"])
@names
def test_what_only_looks_like_a_mark_is_text(name: str, text: str) -> None:
    assert told(style_of(name), text) == [Delta("text", text)]


def test_text_comes_as_soon_as_it_is_no_mark() -> None:
    reader = style_of("hermes").reader(TOOLS, False)
    seen = [(piece, texts(reader.push(piece))) for piece in ["Look", " <tool", "_cal", " l", ">", " \n", "x"]]
    assert seen == [("Look", "Look"), (" <tool", ""), ("_cal", ""), (" l", " <tool_cal l"), (">", ">"), (" \n", ""), ("x", " \nx")]
    reader = style_of("llama").reader(TOOLS, False)
    assert [texts(reader.push(piece)) for piece in ['{"', "answer", '": ', "1}"]] == ["", "", '{"answer":', " 1}"]


@pytest.mark.parametrize("name, text", [
    ("gemma4+channel", f"<|tool_call>call:now{{a{MARK}b:1}}"), ("gemma4+channel", f"<|tool_call>call:{'n' * 1500}{{}}"), ("pythonic", f"[now({'a' * 1500}=1)]"),
    ("coder", f"<tool_call><function=now><parameter={'a' * 1500}>1</parameter>"), ("coder", "<tool_call><function=now\n>"),
    ("mistral, names", f"[TOOL_CALLS]{'n' * 1500}[ARGS]{{}}"), ("harmony", f"<|channel|>commentary to=functions.{'n' * 1500}<|message|>x"),
])
def test_names_that_are_none(name: str, text: str) -> None:
    deltas = told(style_of(name), text)                            # letter by letter the same
    assert [call.arguments for call in calls_of(deltas)] in ([], [""], ["{"])


def test_states() -> None:
    reader = style_of("hermes+think").reader(TOOLS, False)
    states = []
    for piece in [" ", "<think>", "x", "</think>", "\n", "a", "<tool_call>", '{"name": "now"', "}", "</tool_call>", "b"]:
        reader.push(piece)
        states.append(reader.state)
    assert states == ["start", "thinking", "thinking", "text", "text", "text", "call", "call", "call", "text", "text"]


@pytest.mark.parametrize("text, arguments", [
    ('<tool_call>{"name": "now", "arguments": {"a": [1, "x', '{"a": [1, "x'), ('<tool_call>{"name": "now", "arguments": ', ""),
    ('<tool_call>{"name": "now", "arguments": {"a": "\\u00', '{"a": "'), ('<tool_call>{"name": "now", "arguments": {"a": 1}', '{"a": 1}'),
])
def test_a_call_that_is_cut_leaves_its_arguments(text: str, arguments: str) -> None:
    (call,) = calls_of(deltas := told(style_of("hermes"), text))
    assert call.arguments == arguments and texts(deltas) == ""


@pytest.mark.parametrize("text", [
    '<tool_call>{"name": "now", }</tool_call>x', '<tool_call>{"arguments": {"a": 1,}, "name": "now"}</tool_call>', "<tool_call>now</tool_call>",
    '<tool_call>{"arguments": {"a": 01}', '<tool_call>{"arguments": {"a": 1}}</tool_call>', '<tool_call>{"name": "n', "<tool_call>\n<tool_call>",
])
@vocabularies
def test_a_malformed_call_is_text(text: str, tokens: bool) -> None:
    style = style_of("hermes", tokens)
    deltas = told(style, spelled(style, text, tokens))
    if '"name": "now", }' in text:                                 # its name was told by then
        assert calls_of(deltas)[0].arguments == "" and texts(deltas) == "}</tool_call>x"
    else:
        assert deltas == [Delta("text", text)]


def test_thinking() -> None:
    style = style_of("hermes+think")
    call = '<tool_call>{"name": "now"}</tool_call>'
    assert told(style, f"<think>a {call}\n</think>\n\nb") == [Delta("thinking", f"a {call}"), Delta("text", "b")]
    assert told(style, "\n a\n</think>\n b", opened=True) == [Delta("thinking", "a"), Delta("text", "b")]
    assert told(style, "<think>\na</think>b", opened=True) == [Delta("thinking", "a"), Delta("text", "b")]
    assert told(style, "<think>\n\n</think>\n\nb") == [Delta("text", "b")]
    assert told(style, "  \n<think>a\n") == [Delta("thinking", "a\n")]
    assert told(style, " Use <think> to think. ") == [Delta("text", " Use <think> to think. ")]
    tokens = style_of("hermes+think", True)
    assert told(tokens, f"{MARK}<think>a</think>{MARK}</think>b{MARK}</think>") == [Delta("thinking", "a</think>"), Delta("text", "b")]


HOSTILE = ["<", "<tool_call>", " ", "\n", '{"a":', "[", '[TOOL_CALLS]["', "<think>", "</think>", '<tool_call>{"arguments": {"a": "', "<|channel|>", "a\n",
           '{"name": "', '<tool_call>{"name": "now", "arguments": {"a": -', "[now(a=", "<|channel|>analysis to=functions.now "]


@vocabularies
@pytest.mark.parametrize("name", ["hermes+think", "mistral", "llama", "pythonic", "coder", "gemma4+channel", "harmony", "prompted"])
def test_hostile_texts_take_linear_time(name: str, tokens: bool) -> None:
    style = style_of(name, tokens)
    for piece in HOSTILE:
        text = spelled(style, piece * 4000, tokens)
        reader, started = style.reader(TOOLS, False), time.process_time()
        for letter in text[:3000]:
            reader.push(letter)
            assert len(reader._tape.text) < 100                    # so pushing on never copies much
        read(reader, [text[3000:]])
        assert time.process_time() - started < 2, piece            # quadratic would be minutes


def test_a_long_call_is_held_in_linear_time() -> None:
    text = '<tool_call>{"arguments": {"a": "' + "x" * 200_000 + '"}, "name": "now"}</tool_call>'
    reader, started = style_of("hermes").reader(TOOLS, False), time.process_time()
    deltas = read(reader, text)
    assert made(deltas) == [("now", {"a": "x" * 200_000})] and time.process_time() - started < 4


# -- calls without their marks --------------------------------------------------------------------------------------------

LOOSE = ("hermes", "hermes+think", "granite+response", "mistral")
CALL = '{"name": "now", "arguments": {"a": 1}}'


@pytest.mark.parametrize("text", [
    CALL, f"\n {CALL}\n", '{"arguments": {"a": 1}, "name": "now"}', '{\n  "name": "now",\n  "arguments": {\n    "a": 1\n  }\n}', f"```json\n{CALL}\n```",
    f"```\n{CALL}```", '{"name": "now", "parameters": {"a": 1}}', f"[{CALL}]"])
@vocabularies
@pytest.mark.parametrize("name", LOOSE)
def test_a_call_may_lack_its_marks(name: str, tokens: bool, text: str) -> None:
    style = style_of(name, tokens)
    deltas = told(style, text)
    assert made(deltas) == [("now", {"a": 1})] and texts(deltas) == ""
    matcher = llguidance.LLMatcher(tokenizer(style.marks), style.bare(TOOLS, True))
    solid = text.strip().replace('"a": 1', "")
    assert not matcher.is_error() and (text.startswith('{"arg') or matcher.try_consume_tokens(list(solid.encode())) == len(solid))
    assert told(style, text, None) == [Delta("text", text)]


@pytest.mark.parametrize("between", ["\n", "", ", ", ";\n", "\n\n"])
@pytest.mark.parametrize("name", LOOSE)
def test_calls_without_marks_follow_each_other(name: str, between: str) -> None:
    second = '{"name": "get_weather", "arguments": {"city": "x"}}'
    deltas = told(style_of(name), CALL + between + second)
    assert made(deltas) == [("now", {"a": 1}), ("get_weather", {"city": "x"})] and texts(deltas) == ""
    deltas = told(style_of(name), f"{CALL}\nThat is all: {second}")
    assert made(deltas) == [("now", {"a": 1})] and texts(deltas) == f"That is all: {second}"


@pytest.mark.parametrize("text", [
    f"Here: {CALL}", '{"name": "Ada", "arguments": {}}', '{"name": "now"}', '{"name": "now", "age": 3}', '{"name": "now", "arguments": "none"}',
    '{"name": "now", "arguments": ', '{"name": ["now"]}', '{"temperature": 3}', "{", "[", "[1, 2]", '["now"]', "{name: now}", "{}", "```json\n[1]\n```",
    "```json", "```python\nprint(1)\n```", '```\n{"name": "now"}\n```', "{{ now }}", '{"name": "now", "name": "now", "arguments": {}}', ' {"name": "no',
    f"> {CALL}", '{"arguments": {"a": 1}}', '{"arguments": {"a": 1}, "name": "nowhere"} \n'])
@vocabularies
@pytest.mark.parametrize("name", LOOSE)
def test_what_is_no_call_is_text_to_the_letter(name: str, tokens: bool, text: str) -> None:
    assert told(style_of(name, tokens), text) == [Delta("text", text)]


_BARE = st.sampled_from(['{"name": "now"', ', "arguments": {"a": 1}', "}", "{", "[", "]", "```json\n", "```", '"name": ', '"now"', '"arguments": ', ", ", ": ", "1",
                         '"x"', " ", "\n", CALL, "text", "null", '"', "\\", '"id": "1"', ";", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|tool_call|>"])


@settings(max_examples=200, deadline=None)
@given(text=st.lists(_BARE, max_size=14).map("".join), places=st.lists(st.integers(0, 10_000), max_size=12), name=st.sampled_from(LOOSE), tokens=st.booleans())
def test_any_cut_of_what_may_be_a_call_tells_the_same(text: str, places: list[int], name: str, tokens: bool) -> None:
    style = style_of(name, tokens)
    text = spelled(style, text, tokens)
    deltas = told(style, text)
    assert read(style.reader(TOOLS, False), cut(text, places)) == deltas
    if not calls_of(deltas):                                       # nothing is lost but blanks around a mark that was none
        assert re.sub(r"\s", "", texts(deltas)) == re.sub(rf"\s|{MARK}(</tool_call>)?", "", text) or tokens
    for call in calls_of(deltas):
        assert call.name == "now" and begins_json(call.arguments)


# -- grammars -------------------------------------------------------------------------------------------------------------


class Bytes:
    """A vocabulary of all bytes and of marks."""

    def __init__(self, marks: Sequence[str]):
        self.tokens = [*(bytes([i]) for i in range(256)), *(mark.encode() for mark in marks), b"<eos>"]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.eos_token_id, self.bos_token_id = len(self.tokens) - 1, None

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def tokenizer(marks: Sequence[str]) -> Any:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes(marks)), slices=[])


def matcher_of(style: Style, whole: bool, tokens: bool, several: bool = True, tools: Sequence[Tool] = TOOLS) -> Any:
    literal: Callable[[str], str] = (lambda m: f"<[{256 + style.marks.index(m)}]>") if tokens else (lambda m: json.dumps(m, ensure_ascii=False))
    matcher = llguidance.LLMatcher(tokenizer(style.marks), style.grammar(tools, whole, several, literal))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def ids_of(style: Style, text: str, tokens: bool) -> list[int]:
    if not tokens or not style.marks:
        return list(text.encode())
    parts = re.split(f"({'|'.join(map(re.escape, style.marks))})", text)
    return [i for part in parts for i in ([256 + style.marks.index(part)] if part in style.marks else part.encode())]


def allowed(style: Style, text: str, tokens: bool) -> bool:
    matcher, ids = matcher_of(style, False, tokens), ids_of(style, text, tokens)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def sampled(matcher: Any, marks: Sequence[str], rng: random.Random) -> str | None:
    """A text that the grammar allows, by random tokens; None where it did not end."""
    ids: list[int] = []
    while len(ids) < 1500 and not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        may = [i for i in range(256 + len(marks) + 1) if mask[i >> 3] >> (i & 7) & 1]
        ending = [i for i in may if i >= 256 or i in b'"}])\n<>/']
        readable = [i for i in may if 32 <= i < 127] or may
        pick = rng.choice(ending if ending and rng.random() < (0.3 if len(ids) < 200 else 0.9) else readable if rng.random() < 0.9 else may)
        if pick == 256 + len(marks):
            break
        matcher.consume_token(pick)
        ids.append(pick)
    if not matcher.is_accepting():
        return None
    return b"".join(bytes([i]) if i < 256 else (MARK + marks[i - 256]).encode() for i in ids).decode("utf-8", "replace")


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("whole", [False, True], ids=["unit", "whole"])
@vocabularies
@names
def test_what_a_grammar_allows_is_read_as_calls_that_fit(name: str, tokens: bool, whole: bool, several: bool) -> None:
    style = style_of(name, tokens)
    start, ended = matcher_of(style, whole, tokens, several), 0
    for seed in range(12):
        text = sampled(start.deep_copy(), style.marks, random.Random(seed))
        if text is None:
            continue
        ended += 1
        deltas = told(style, text)
        calls = calls_of(deltas)
        assert calls and texts(deltas) == "" and (several or len(calls) == 1), text
        for call in calls:
            tool = next(tool for tool in TOOLS if tool.name == call.name)
            jsonschema.Draft202012Validator(dict(tool.parameters)).validate(json.loads(call.arguments))
    assert ended >= 2


@vocabularies
@names
def test_what_a_grammar_refuses(name: str, tokens: bool) -> None:
    style = style_of(name, tokens)
    for arguments in ({"days": 3}, {"city": "x", "days": "many"}, {"city": "x", "days": 99}, {"city": "x", "days": 3, "unit": "K"},
                      {"city": "x", "days": 3, "word": "xyz"}, {"city": "x", "days": 3, "more": 1}):
        assert not allowed(style, style._calls.write([("get_weather", arguments)]).removesuffix("<|call|>"), tokens), arguments
    assert not allowed(style, style._calls.write([("nowhere", {})]), tokens)
    assert allowed(style, style._calls.write([("get_weather", {"city": "x", "days": 3, "flag": False})]).removesuffix("<|call|>"), tokens)


@pytest.mark.parametrize("name", ["coder", "pythonic", "gemma4+channel"])
def test_what_no_grammar_can_hold_is_refused_in_words(name: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "minProperties": 1}
    tools = read_tools([{"type": "function", "function": {"name": "f", "parameters": schema}}])
    with pytest.raises(RequestError, match=r"f\.parameters\.minProperties"):
        style_of(name).grammar(tools, True, True, json.dumps)


# -- what is asked of a template ------------------------------------------------------------------------------------------


def test_switches_and_variables() -> None:
    qwen, plain, gpt = style_of("hermes+think"), style_of("hermes"), style_of("harmony")
    assert qwen.switches == {"on", "off", "budget"} and plain.switches == set() and gpt.switches == {"on", "budget", "effort"}
    assert [qwen.variables(think) for think in (None, True, False, 100)] == [{}, {"enable_thinking": True}, {"enable_thinking": False}, {"enable_thinking": True}]
    assert plain.variables(None) == plain.variables(False) == {} and gpt.variables("low") == {"reasoning_effort": "low"}
    assert style_of("granite+response").variables(True) == {"thinking": True}
    for style, think in [(qwen, "low"), (plain, True), (plain, 5), (gpt, False), (qwen, "much"), (qwen, -1), (qwen, 1.5), (qwen, [])]:
        with pytest.raises(RequestError, match="^think: "):
            style.variables(think)


def test_prompts_that_open_and_close_thinking() -> None:
    style = style_of("hermes+think")
    assert style.opened("<|im_start|>assistant\n<think>\n") and not style.opened("what is <think>?<|im_start|>assistant\n")
    assert style.unthought("assistant\n<think>\n") == "</think>\n\n" and style.unthought("assistant\n<think>\n\n</think>\n\n") == ""
    assert style.unthought("assistant\n") == "<think>\n\n</think>\n\n" and style_of("hermes").unthought("assistant\n") == ""
    assert read(style.reader(None, True), ["so", style.end_of_thinking, "yes"]) == [Delta("thinking", "so"), Delta("text", "yes")]
    gpt = style_of("harmony")
    assert gpt.opened("<|start|>assistant<|channel|>analysis<|message|>")
    assert read(gpt.reader(None, True), ["so", gpt.end_of_thinking, "yes"]) == [Delta("thinking", "so"), Delta("text", "yes")]


CONVERSATION = [
    {"role": "user", "content": "How is it there?"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}},
                                                         {"id": "call_2", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "x"}}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "a picture:"}, {"type": "image_url", "image_url": "..."}]},
    {"role": "user", "content": "And now?"},
]


def test_tools_are_told_in_words_where_a_template_knows_none() -> None:
    style = style_of("prompted")
    messages, tools = style.prepare(CONVERSATION, TOOLS)
    assert tools is None and [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert json.dumps(PARAMETERS) in messages[0]["content"] and '{"name": "name_of_function", "parameters"' in messages[0]["content"]
    assert made(told(style, messages[2]["content"])) == [("now", {}), ("get_weather", {"city": "x"})]
    assert [part.get("text", part["type"]) for part in messages[3]["content"]] == [
        "Result of now:\nnoon", "Result of get_weather:", "a picture:", "image_url", "And now?"]
    (told_first, *_), _ = find("raise_exception('System role not supported')", lambda _: False).prepare(CONVERSATION[:1], TOOLS)
    assert told_first["role"] == "user" and told_first["content"].endswith("How is it there?")
    assert style.prepare(CONVERSATION[:1], None) == (CONVERSATION[:1], None)


@names
def test_what_a_template_is_rendered_with(name: str) -> None:
    style = style_of(name)
    messages, tools = style.prepare(CONVERSATION, TOOLS)
    shown = json.dumps([messages, tools])
    assert "get_weather" in shown and "noon" in shown and "minimum" in shown
    assert (tools is None) == (name in ("prompted", "deepseek+think", "deepseek, names"))
    if name in ("llama", "harmony"):
        assert [len(m.get("tool_calls", ())) for m in messages] == [0, 1, 0, 1, 0, 0]
    if name.startswith("mistral"):
        ids = [call["id"] for call in messages[1]["tool_calls"]]
        assert ids == [m["tool_call_id"] for m in messages if m["role"] == "tool"] and all(re.fullmatch("[a-zA-Z0-9]{9}", i) for i in ids)
    assert CONVERSATION[2] == {"role": "tool", "tool_call_id": "call_1", "content": "noon"}      # the caller's stay as they were


# -- tools ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools, words", [
    ("now", "tools: a list"), ({}, "tools: a list"), ([1], r"tools\[0\]: an object"), ([{}], r"tools\[0\]\.function is missing"),
    ([{"type": "web_search"}], r"tools\[0\]\.type"), ([{"function": []}], r"tools\[0\]\.function: an object"),
    ([{"function": {"name": "a"}}, {"function": {}}], r"tools\[1\]\.function\.name is missing"),
    ([{"function": {"name": "a b"}}], r"function\.name: up to 64"), ([{"function": {"name": "a"}}] * 2, r"tools\[1\]\.function\.name: 'a' is the name of two"),
    ([{"function": {"name": "a", "description": 1}}], r"function\.description: a text"), ([{"function": {"name": "a", "strict": 1}}], r"function\.strict"),
    ([{"function": {"name": "a", "parameters": []}}], r"function\.parameters: a JSON schema"),
    ([{"function": {"name": "a", "parameters": {"type": "array"}}}], r"parameters\.type: arguments are an object"),
    ([{"function": {"name": "a", "parameters": {"properties": {"x": {"type": "text"}}}}}], r"tools\[0\]\.function\.parameters\.properties\.x\.type: 'text'"),
    ([{"function": {"name": "a", "parameters": {"required": "x"}}}], r"parameters\.required: 'x' is not of type 'array'"),
])
def test_faults_of_tools_are_said_with_their_path(tools: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_tools(tools)


def test_tools_and_calls_in_openais_form() -> None:
    assert [tool.name for tool in TOOLS] == ["get_weather", "now"] and TOOLS[0].parameters == PARAMETERS and TOOLS[1].parameters["type"] == "object"
    assert TOOLS[0].as_dict()["function"]["parameters"] == PARAMETERS
    assert ToolCall("abc", "now", "{}").as_dict() == {"id": "abc", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    first, second = calls_of([Delta("call", "now"), Delta("call", "now", 1), Delta("arguments", "{}", 1)])
    assert first.id != second.id and re.fullmatch("[a-zA-Z0-9]{9}", first.id) and (first.arguments, second.arguments) == ("", "{}")
