"""Replies as they are generated: grammars hold where they should, thinking ends by its budget, calls are told as they come."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from pyengine.chat.reply.deltas import joined
from pyengine.chat.reply.style import find
from pyengine.chat.reply.tools import read_tools
from pyengine.engine.guide import _holdable, Guide, Thoughts, Units
from pyengine.errors import RequestError
from pyengine.text.grammar import Grammars, shape
from pyengine.text.sampling import Sampler, SamplingParams

WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}}, "required": ["city"], "additionalProperties": False}}}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}}
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
          "required": ["name", "age"], "additionalProperties": False}


@functools.cache
def compiler(tokenizer: Any, *marks: int) -> Grammars:
    return Grammars(tokenizer, marks)


@pytest.fixture(scope="module")
def qwen(real_model) -> Any:
    return real_model("qwen", n_seq=2)


@pytest.fixture(scope="module")
def tokenizer(qwen) -> Any:
    return qwen.tokenizer


# -- structured output ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_an_answer_follows_its_schema(qwen, seed: int) -> None:
    answer = qwen.chat([{"role": "user", "content": "Invent a person."}], format=PERSON, temperature=1.5, seed=seed, max_tokens=100)
    assert answer.finish == "stop"
    jsonschema.validate(json.loads(answer), PERSON)


def test_regex_and_grammars(qwen) -> None:
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", qwen.generate("The date is ", regex="[0-9]{4}-[0-9]{2}", temperature=2.0, seed=1))
    for grammar in ('start: "yes" | "no"', 'root ::= "yes" | "no"'):
        assert qwen.chat(ASKED, grammar=grammar, temperature=0) in ("yes", "no")
    assert isinstance(json.loads(qwen.chat(ASKED, format="json", temperature=0, max_tokens=200)), dict)


def test_the_whole_is_told_without_another_step(qwen) -> None:
    steps = qwen.stats["steps"]
    answer = qwen.generate("The year is ", regex="[0-9]{4}", temperature=0, speculate=False)
    assert answer.finish == "stop" and qwen.stats["steps"] - steps == len(answer.tokens)      # one of them reads the prompt


def test_a_form_costs_others_nothing(qwen) -> None:
    free = qwen.chat(ASKED, temperature=0, max_tokens=12)
    handles = [qwen.submit(messages=ASKED, temperature=0, max_tokens=12), qwen.submit(messages=ASKED, format=PERSON, temperature=0, max_tokens=60)]
    assert handles[0].result(60) == free and json.loads(handles[1].result(60))


DEEP = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}, "required": ["a"]} for i in range(1300)}


def test_long_chains_of_rules_are_compiled(qwen) -> None:
    """Each would end the process where the compiler's recursion has a usual stack."""
    for asked in ({"format": {"$ref": "#/$defs/d0", "$defs": {**DEEP, "d1300": {"type": "integer"}}}},
                  {"grammar": "start: r0\n" + "".join(f'r{i}: "x" r{i + 1}\n' for i in range(3000)) + 'r3000: "y"\n'},
                  {"grammar": "start: T0\n" + "".join(f'T{i}: "x" T{i + 1}\n' for i in range(3000)) + 'T3000: "y"\n'}):
        answer = qwen.chat(ASKED, **asked, temperature=0, max_tokens=6)
        assert answer.finish == "length" and (answer[:2] == "xx" or answer[0] == "{")


@pytest.mark.parametrize("schema, texts, others", [
    ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-13-01"', '"x"']),
    ({"type": "string", "format": "int32"}, ['"x"', '""'], ["3"]), ({"type": "integer", "format": "int64"}, ["3"], ['"x"']),
    ({"type": "object", "properties": {"format": {"type": "string", "format": "password"}}, "required": ["format"], "additionalProperties": False}, ['{"format":"x"}'], ["{}"]),
    ({"enum": [{"format": "x"}, "ä", "日本", "🙂", "<|im_end|>", None]}, ['{"format":"x"}', '"ä"', '"日本"', '"🙂"', '"<|im_end|>"', "null"], ['"a"', '{}']),
    ({"const": 'a"\n'}, ['"a\\"\\n"'], ['"a"']), ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["3", "null"], ['"3"', "true"]),
    ({"type": "string", "pattern": "^a/b+$", "maxLength": 4}, ['"a/b"', '"a/bb"'], ['"a/"', '"a/bbb"']),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}, ["[true, false]", "[true,true,true]"], ["[true]", "[]"]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, ["{}", '{"x":1}', '{"x": 1, "y": 2}'], ['{"x":"1"}']),
    ({"type": "object", "properties": {}, "additionalProperties": False}, ["{}"], ['{"a":1}']), ({}, ["3", "[]", '{"a":null}'], ["a"]),
    ({"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}}, "required": ["v"], "additionalProperties": False},
     ['{"v":1}', '{"v":1,"next":{"v":2,"next":{"v":3}}}'], ['{"next":{"v":1}}']),
    ({"oneOf": [{"type": "object", "properties": {"k": {"const": k}}, "required": ["k"], "additionalProperties": False} for k in "ab"]}, ['{"k":"a"}', '{"k":"b"}'], ['{"k":"c"}'])])
def test_schemas(tokenizer, schema: Any, texts: list[str], others: list[str]) -> None:
    grammars = compiler(tokenizer)
    for text in (*texts, *others):
        matcher = grammars.matcher(shape(format=schema))
        ids = [*tokenizer.tokenize(text, add_special=False, parse_special=False), min(tokenizer.eog_ids)]
        assert (all(map(matcher.accept, ids[:-1])) and (matcher.ended or matcher.allows(ids[-1]))) == (text in texts), text


def test_regexes_with_slashes(tokenizer) -> None:
    for regex, text in ((r"a/b", "a/b"), (r"a\/b", "a/b"), (r"[/]", "/"), (r"\\/", "\\/"), ("a\nb", "a\nb")):
        matcher = compiler(tokenizer).matcher(shape(regex=regex))
        assert all(map(matcher.accept, tokenizer.tokenize(text, add_special=False))) and matcher.ended, regex


def test_names_of_rules_are_the_users_own(qwen) -> None:
    """The grammar of calls has rules of these names too."""
    grammar = 'start: calls unit content\ncalls: call\ncall: "a" args_0\nargs_0: "b"\nunit: "}" /[{}]/\ncontent: "c" start?\n'
    for tools in ({}, {"tools": [WEATHER]}):
        answer = qwen.chat([{"role": "user", "content": "Hi"}], grammar=grammar, temperature=0, max_tokens=40, **tools)
        assert re.fullmatch(r"(ab\}[{}]c)+.*", answer) or answer.tool_calls


@pytest.mark.parametrize("form, said", [
    ({"format": {"$ref": "#"}}, "nothing can be written"), ({"format": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum (5) is greater than maximum (3)"),
    ({"format": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "write anyOf"), ({"format": False}, "format: allows nothing"),
    ({"format": {"$ref": "http://example.com/x"}}, "http://example.com/x"), ({"format": {"$ref": "#/$defs/no"}}, "'/$defs/no' does not exist"),
    ({"format": {"enum": ["x" * 200_000]}}, "the schema has 2000"), ({"regex": "x" * 70_000}, "70000 characters"), ({"grammar": "#" * 70_000}, "70000 characters"),
    ({"grammar": "root ::= " + '"a" ' * 5000}, "write it in Lark"), ({"regex": "(?=a)b"}, "look-around"), ({"format": {"type": "string", "pattern": "(?=a)b"}}, "cannot be enforced"),
    ({"format": {"type": "strin"}}, "format.type: 'strin'"),
    ({"format": {"properties": {"a": {"items": {"minimum": "x"}}}}}, "format.properties.a.items.minimum: 'x'"),
    ({"format": {"properties": {"a": {"uniqueItems": True}}}}, "'uniqueItems' at properties.a.uniqueItems"),
    ({"format": "xml"}, '"json" or a JSON schema'), ({"format": 3}, "format: must be a JSON schema"), ({"format": {"enum": [float("nan")]}}, "no JSON"),
    ({"regex": "(a"}, "unclosed group"), ({"regex": ""}, "regex: is empty"), ({"grammar": "start: nothing"}, "unknown name"),
    ({"grammar": "root ::= ("}, "GBNF"), ({"format": "json", "regex": "a"}, "format and regex: give one of them"), ({"regex": b"a"}, "regex: must be a text")])
def test_forms_that_cannot_be_are_refused(qwen, form: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=re.escape(said)) as raised:
        qwen.chat(ASKED, **form)
    assert re.match(f"{' and '.join(form)}[.\\w]*: ", str(raised.value))         # which of them it is


def test_blanks_have_a_bound(qwen) -> None:
    grammars = compiler(qwen.tokenizer)
    for text, whole in (('{"name": "a", "age": 3}', True), ('{\n  "name": "a",\n  "age": 3\n}', True), ('{"name":   "a"}', False), ('{\n\n"name"', False)):
        matcher = grammars.matcher(shape(format=PERSON))
        assert all(matcher.accept(t) for t in qwen.tokenizer.tokenize(text, add_special=False)) == whole, text


# -- tools ----------------------------------------------------------------------------------------------------------------


def test_a_call_can_be_demanded(qwen) -> None:
    answer = qwen.chat(ASKED, tools=[TIME, WEATHER], tool_choice="weather", temperature=0)
    assert answer == "" and answer.finish == "tool_calls" and [c.name for c in answer.tool_calls] == ["weather"]
    jsonschema.validate(json.loads(answer.tool_calls[0].arguments), WEATHER["function"]["parameters"])
    one = qwen.chat(ASKED, tools=[TIME], tool_choice="required", parallel_tool_calls=False, temperature=2.0, seed=3)
    assert [(c.name, json.loads(c.arguments)) for c in one.tool_calls] == [("time", {})]
    assert not qwen.chat(ASKED, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=20).tool_calls


@pytest.fixture(scope="module")
def called(qwen) -> Any:
    """The answer that calls for the weather."""
    return qwen.chat(ASKED, tools=[WEATHER], tool_choice="weather", temperature=0)


def test_a_call_comes_in_pieces(qwen, called) -> None:
    stream = qwen.chat(ASKED, tools=[WEATHER], tool_choice="weather", temperature=0, stream=True)
    deltas = list(stream.deltas())
    assert deltas[0] == ("call", "weather", 0) and len(deltas) > 3 and stream.finish == "tool_calls"
    assert joined(deltas)[1] == ("arguments", called.tool_calls[0].arguments, 0)
    handle = qwen.submit(messages=ASKED, tools=[WEATHER], tool_choice="weather", temperature=0)
    assert joined(handle.deltas()) == joined(deltas) and handle.result(1) == ""


def test_results_of_tools_go_on(qwen, called) -> None:
    told = [*ASKED, called.message, {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "18 degrees, rain"}]
    told_in = qwen.tokenizer.detokenize(qwen.chat_ids(told, [WEATHER]))
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"' in told_in and "<tool_response>\n18 degrees, rain\n</tool_response>" in told_in


def test_a_schema_that_is_nested_too_deeply_is_refused_in_words(qwen) -> None:
    deep: Any = {"type": "integer"}
    for _ in range(400):
        deep = {"type": "array", "items": deep}
    for asked in ({"format": deep}, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": deep}}}}]}):
        with pytest.raises(RequestError, match="deep"):
            qwen.chat(ASKED, **asked)


ODD = {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "n": {"type": "integer"}}, "required": ["tags"]}


def test_what_no_grammar_holds_is_held_as_far_as_it_can(qwen, tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "odd", "parameters": ODD}}, WEATHER]
    said = qwen.chat(ASKED, tools=tools, temperature=0, max_tokens=60)         # not refused
    assert said or said.tool_calls
    for asked in ({"tool_choice": "required"}, {"tool_choice": "odd"}):
        with pytest.raises(RequestError, match="^tools: .*'uniqueItems' at properties.tags.uniqueItems"):
            qwen.chat(ASKED, tools=tools, **asked)
    strict = [{"type": "function", "function": {**tools[0]["function"], "strict": True}}]
    with pytest.raises(RequestError, match="^tools: .*uniqueItems"):
        qwen.chat(ASKED, tools=strict)
    held = _holdable(find(HERMES, lambda text: False), read_tools(tools), compiler(tokenizer))
    assert held[1] == read_tools(tools)[1] and dict(held[0].parameters)["properties"] == {"tags": {"type": "array"}, "n": {"type": "integer"}}


@pytest.mark.parametrize("asked, said", [
    ({"tool_choice": "required"}, "there are no tools"), ({"tools": [WEATHER], "tool_choice": "wether"}, "'wether'; near: weather"),
    ({"tools": [WEATHER], "tool_choice": 3}, "tool_choice: must be one of"), ({"tools": "weather"}, "tools"), ({"think": True}, "no thinking"),
    ({"tools": [WEATHER], "parallel_tool_calls": "no"}, "True or False"), ({"think": "deeply"}, "low, medium, high"), ({"think": -1}, "think")])
def test_wishes_that_cannot_be_are_refused(qwen, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=re.escape(said)):
        qwen.chat(ASKED, **asked)


@pytest.mark.parametrize("wrong", [{"name": 5}, {"tool_call_id": {"a": 1}}, {"tool_call_id": ["x"]}])
def test_names_of_results_are_texts(qwen, wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=rf"messages\[1\].{next(iter(wrong))}: a text"):
        qwen.chat([*ASKED, {"role": "tool", "content": "18 degrees", **wrong}], tools=[WEATHER], max_tokens=1)


def test_prompts_have_no_tools(qwen) -> None:
    for more in ({"tools": [WEATHER]}, {"think": False}):
        with pytest.raises(RequestError, match="needs messages"):
            qwen.submit("Hello", **more)


# -- one answer's way -----------------------------------------------------------------------------------------------------


class Way:
    """A guide that is led along a text, token by token, as far as it allows them."""

    def __init__(self, tokenizer: Any, template: str, tools: Any = None, opened: bool = False, single: bool = False, **more: Any):
        self.tokenizer, self.style = tokenizer, find(template, lambda text: tokenizer.id_of(text) is not None)
        marks = [i for i in map(tokenizer.id_of, self.style.marks) if i is not None]
        self.grammars, self.decoder = compiler(tokenizer, *marks), tokenizer.decoder(marks=marks)
        known = read_tools(tools) if tools else None
        unit = self.style.grammar(known, False, True, self.grammars.literal) if known else None
        units = Units(unit, self.style.bare(known, not single) if known else None, single)
        self.guide = Guide(self.style.reader(known, opened), self.grammars, units=units, **more)
        self.deltas: list[Any] = []

    def lead(self, text: str) -> str:
        """Go on with a text; return what of it is not allowed."""
        ids = self.tokenizer.tokenize(text, add_special=False)
        for n, token in enumerate(ids):
            if not self.allows(token):
                return self.tokenizer.detokenize(ids[n:])
            self.take(token)
        return ""

    def allows(self, token: int) -> bool:
        allowed = self.guide.allowed()
        return allowed is None or bool(allowed[token // 32] >> token % 32 & 1)

    def take(self, token: int) -> None:
        self.deltas += self.guide.push(token, self.decoder.push(token))

    def forced(self) -> str:
        """Take the tokens that have no other way; return their text."""
        ids: list[int] = []
        while (allowed := self.guide.allowed()) is not None and sum(map(int.bit_count, allowed.tolist())) == 1:
            ids.append(next(i for i in range(self.tokenizer.vocab_size) if allowed[i // 32] >> i % 32 & 1))
            self.take(ids[-1])
        return self.tokenizer.detokenize(ids)

    def read(self) -> list[Any]:
        return joined([*self.deltas, *self.guide.flush(self.decoder.flush())])


HERMES = """{{ tools }}<tool_call>\n{"name": "{{ call.name }}", "arguments": {{ call.arguments }}}\n</tool_call>"""
THINKS = "{% if enable_thinking %}<think></think>{% endif %}" + HERMES


def test_a_call_is_held_to_its_schema_from_its_mark_on(tokenizer) -> None:
    way = Way(tokenizer, HERMES, [WEATHER])
    assert way.lead('Let me see {"name": 3}.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Par') == ""
    assert not way.allows(tokenizer.tokenize("<tool_call>", add_special=False)[0])
    assert way.lead('is", "town": 3}}') == 'town": 3}}'
    assert way.lead('unit": "C"}}\n</tool_call>') == ""
    assert way.guide.allowed() is None and not way.guide.ended             # free again
    assert way.lead("\nAnd so on") == ""
    assert [d[:2] for d in way.read()] == [("text", 'Let me see {"name": 3}.'), ("call", "weather"), ("arguments", '{"city": "Paris", "unit": "C"}'),
                                           ("text", "And so on")]


def test_one_call_ends_the_answer_where_several_are_not_wanted(tokenizer) -> None:
    way = Way(tokenizer, HERMES, [TIME], single=True)
    assert way.lead('<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>') == "" and way.guide.ended


@pytest.mark.parametrize("text", ['{"name": "weather", "arguments": {"city": "Paris"}}', '{\n  "name": "weather",\n  "arguments": {\n    "city": "Paris"\n  }\n}',
                                  '```json\n{"name": "weather", "parameters": {"city": "Paris"}}\n```'])
def test_a_call_without_its_mark_is_held_too(tokenizer, text: str) -> None:
    way = Way(tokenizer, HERMES, [TIME, WEATHER], single=True)
    at = text.index('"Paris"')
    assert way.lead(text[:at]) == "" and way.lead("3") == "3" and way.lead(text[at:]) == "" and way.guide.ended
    assert [d[:2] for d in way.read()][0] == ("call", "weather")
    way = Way(tokenizer, HERMES, [TIME], single=False)
    assert way.lead('{"name": "time", "arguments":') == "" and way.lead(" {}") == "" and way.lead("}") == ""
    assert way.lead(" and so on") != "" and way.lead('\n{"name": "time", "arguments": {}}') == ""
    way = Way(tokenizer, HERMES, [TIME])
    assert way.lead('{"name": "Ada", "arguments": 3}') == "" and way.guide.allowed() is None


def test_an_answer_of_calls_may_end_where_the_model_ends(tokenizer, qwen) -> None:
    """Behind a line's end too, and without marks where the model leaves them out: else a small model goes on with calls that nobody asked for."""
    calls = ('<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>', '{"name": "time", "arguments": {}}')
    style = find(HERMES, lambda text: tokenizer.id_of(text) is not None)
    grammars = compiler(tokenizer, *(i for i in map(tokenizer.id_of, style.marks) if i is not None))
    for text in (call + more for call in calls for more in ("", "\n", "\n" + call, "\n" + call + "\n")):
        matcher = grammars.matcher(style.demanded(read_tools([TIME]), True, grammars.literal))
        assert all(matcher.accept(token) for token in tokenizer.tokenize(text, add_special=False)) and matcher.allows(min(tokenizer.eog_ids)), text
        assert not matcher.allows(tokenizer.tokenize("x", add_special=False)[0])
    for choice in ("required", "time"):
        answer = qwen.chat([{"role": "user", "content": "What is the time? Use the tool."}], tools=[TIME], tool_choice=choice, temperature=0, max_tokens=100)
        assert len(answer.tool_calls) == 1 and answer.finish == "tool_calls"


def test_one_call_is_one_call(qwen) -> None:
    for choice in ("required", "time"):
        answer = qwen.chat(ASKED, tools=[TIME], tool_choice=choice, parallel_tool_calls=False, temperature=1.0, seed=1)
        assert len(answer.tool_calls) == 1 and answer.finish == "tool_calls"


def test_a_vocabulary_may_be_longer_than_the_head(tiny_gguf) -> None:
    import pyengine as pe

    model = pe.load(tiny_gguf("mllama")[0], n_ctx=256)
    assert model.tokenizer.vocab_size > model.n_vocab
    assert model.generate("a", regex="[ab]{2}", temperature=0) in ("aa", "ab", "ba", "bb")


def test_thinking_is_cut_at_its_budget(tokenizer) -> None:
    style = find(THINKS, lambda text: False)
    closing = tokenizer.tokenize(style.end_of_thinking, add_special=False)
    way = Way(tokenizer, THINKS, opened=True, thoughts=Thoughts(budget=5, closing=closing))
    assert way.lead("one two three four five six") == " six" and way.forced() == style.end_of_thinking
    assert way.guide.state != "thinking" and way.lead("So it is six.") == ""
    assert way.read() == [("thinking", "one two three four five", 0), ("text", "So it is six.", 0)] and way.guide.n_thinking >= 5


def test_a_grammar_waits_for_the_end_of_thinking(tokenizer) -> None:
    gap = tokenizer.tokenize("\n\n", add_special=False)
    way = Way(tokenizer, THINKS, opened=True, content=shape(regex="[0-9]+"), thoughts=Thoughts(gap=gap))
    assert way.lead("it may be many</think>") == "" and way.forced() == "\n\n"
    assert way.lead("many") == "many" and way.lead("42") == ""
    assert [d[:2] for d in way.read()] == [("thinking", "it may be many"), ("text", "42")]


def test_draws_stay_within_the_mask(tokenizer) -> None:
    mask = compiler(tokenizer).matcher(shape(regex="[ab]")).mask()
    logits = np.random.default_rng(0).normal(size=tokenizer.vocab_size).astype(np.float32)
    drawn = {Sampler(SamplingParams(seed=s, temperature=5.0, top_k=0, top_p=1, min_p=0), len(logits)).sample(logits, mask).token for s in range(20)}
    assert {tokenizer.piece(t) for t in drawn} == {b"a", b"b"}


def test_forms_pictures_and_vectors_side_by_side_keep_their_bits(tiny_gguf) -> None:
    import cases
    from PIL import Image

    import pyengine as pe

    file, _ = tiny_gguf(cases.first(sees=True, mrope=True))
    model = pe.load(file, n_ctx=512, n_seq=6)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8))
    asked = [{"prompt": "Invent", "format": PERSON}, {"prompt": "The year", "regex": "[0-9]{4}-[a-f]{12}"}, {"prompt": "The quick brown fox"},
             {"messages": [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}], "format": {"type": "integer"}}]
    alone = [model.submit(**a, temperature=1.0, seed=i, max_tokens=30).result(60) for i, a in enumerate(asked)]
    vector = model.embed("The quick brown fox")
    for _ in range(2):
        model.reset()
        handles = [model.submit(**a, temperature=1.0, seed=i, max_tokens=30) for i, a in enumerate(asked)]
        assert np.array_equal(model.embed("The quick brown fox"), vector)
        for handle, want in zip(handles, alone, strict=True):
            got = handle.result(60)
            assert (got, got.tokens, got.logprobs) == (want, want.tokens, want.logprobs)
    assert re.match(r"[0-9]{4}-[a-f]{12}$", alone[1]) and re.match(r"-?[0-9]+$", alone[3])
