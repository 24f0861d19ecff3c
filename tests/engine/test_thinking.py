"""Models that think, end to end: tiny random ones whose vocabulary has the marks or spells them, with scripted and with random draws."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

pytest.importorskip("transformers", reason="needs transformers and torch: pip install -r requirements/test.txt")
from scripted import called, KINDS, make, said, thought, writing

import pyengine as pe
from pyengine.chat.reply.deltas import joined
from pyengine.errors import RequestError

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"], "additionalProperties": False}}}
ASKED = [{"role": "user", "content": "How is it?"}]
PAIR = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"], "additionalProperties": False}
ARGUMENTS = '{"city": "Oslo"}'
SLOW = ("opens, letters", "phrases", "brackets")                               # much like others
kinds = pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    """model(kind) -> a loaded model; each is made once."""
    loaded: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in loaded:
            loaded[kind] = pe.load(make(kind, tmp_path_factory.mktemp("thinks")), n_ctx=2048, n_seq=3)
        return loaded[kind]

    return get


def chat(model: Any, text: str, thrice: bool = True, **asked: Any) -> Any:
    """The answer when the model wants to write a text: whole, streamed and queued it is the same, where all of these are asked for."""
    with writing(model, text):
        if not thrice:
            return model.chat(ASKED, **{"temperature": 0, "seed": 1, **asked})
        whole = model.chat(ASKED, **{"temperature": 0, "seed": 1, **asked})
        stream = model.chat(ASKED, stream=True, **{"temperature": 0, "seed": 1, **asked})
        handle = model.submit(messages=ASKED, **{"temperature": 0, "seed": 1, **asked})
        deltas = joined(stream.deltas())
        assert joined(handle.deltas()) == deltas and handle.result(60) == whole
    for kind, told in (("text", whole), ("thinking", whole.thinking), ("arguments", "".join(c.arguments for c in whole.tool_calls))):
        assert "".join(d.text for d in deltas if d.kind == kind) == told
    for other in (stream, handle):
        assert (other.tokens, other.finish, other.thinking, other.report.n_thinking) == (whole.tokens, whole.finish, whole.thinking, whole.report.n_thinking)
    return whole


@kinds
@pytest.mark.parametrize("think", [None, True, 100])
def test_thinking_is_apart(model, kind: str, think: Any) -> None:
    m = model(kind)
    answer = chat(m, thought(kind, "So so.") + said(kind, "Well."), think=think)
    assert (answer, answer.thinking, answer.finish) == ("Well.", "So so.", "stop")
    assert answer.message == {"role": "assistant", "content": "Well.", "reasoning_content": "So so."}
    assert len(m.tokenizer.tokenize("So so.", add_special=False)) <= answer.report.n_thinking < len(answer.tokens)
    answer = chat(m, said(kind, "Well.") if "opens" not in kind else "\n</think>\n\nWell.", think=think)
    assert (answer, answer.thinking) == ("Well.", "")


@kinds
@pytest.mark.parametrize("think", [False, 0])
def test_thinking_is_left_out(model, kind: str, think: Any) -> None:
    m = model(kind)
    if kind == "harmony":
        with pytest.raises(RequestError, match="not possible with this model; it takes true, a budget"):
            m.chat(ASKED, think=think)
        return
    answer = chat(m, "Well.", think=think)
    assert (answer, answer.thinking, answer.report.n_thinking) == ("Well.", "", 0)
    ids = m._prompts.chat(ASKED, wishes=pe.engine.wishes.Wishes(think=think)).segments[0].ids
    ends = {"brackets": "[/THINK]", "channel": "<channel|>", "phrases": "Here is my response:"}
    assert m.tokenizer.detokenize(ids).rstrip().endswith(ends.get(kind, "</think>"))


@kinds
@pytest.mark.parametrize("form", [{}, {"format": PAIR}])
@pytest.mark.parametrize("budget", [1, 7])
def test_a_budget_holds(model, kind: str, budget: int, form: dict[str, Any]) -> None:
    m = model(kind)
    more = len(m.tokenizer.tokenize(m._language.style.end_of_thinking, add_special=False))
    answer = chat(m, thought(kind, "a b c d e f g h i j k l m n o p"), think=budget, max_tokens=200, **form)
    assert budget <= answer.report.n_thinking <= budget + more and "p" not in answer.thinking
    if form:
        assert answer.finish == "stop"
        jsonschema.validate(json.loads(answer), PAIR)
    else:
        assert "o p" in answer                               # what it wanted to think comes as its text


@kinds
def test_a_form_holds_behind_thinking(model, kind: str) -> None:
    m, text = model(kind), '{"a": true, "b": "x"}'
    answer = chat(m, thought(kind, '{"a": 3} is no answer') + said(kind, text), format=PAIR, max_tokens=200)
    assert (answer, answer.thinking, answer.finish) == (text, '{"a": 3} is no answer', "stop")
    if kind != "harmony" and "opens" not in kind:
        assert chat(m, text, format=PAIR) == text            # it need not think
        answer = chat(m, thought(kind, "no") + text, format=PAIR, think=False)
        jsonschema.validate(json.loads(answer), PAIR)        # and must not
        assert not answer.thinking


@kinds
@pytest.mark.parametrize("seed", range(2))
def test_random_draws_keep_a_form(model, kind: str, seed: int) -> None:
    answer = model(kind).chat(ASKED, format=PAIR, think=6, temperature=3.0, top_k=0, min_p=0, top_p=1, seed=seed, max_tokens=400)
    assert answer.finish == "stop"
    jsonschema.validate(json.loads(answer), PAIR)


@kinds
def test_an_answer_cannot_end_in_thinking_where_a_form_is_wanted(model, kind: str) -> None:
    m = model(kind)
    beginning = thought(kind, "So")[: thought(kind, "So").index("So") + 2]
    end = m.tokenizer.piece(min(m.tokenizer.eog_ids)).decode()
    answer = chat(m, beginning + end + "." + "!" * 8, think=8, format=PAIR, max_tokens=300)
    assert answer.thinking.startswith("So") and answer.finish == "stop"
    jsonschema.validate(json.loads(answer), PAIR)
    assert chat(m, beginning).finish == "stop"               # without one it may


@kinds
def test_calls_come_behind_thinking(model, kind: str) -> None:
    m = model(kind)
    for choice in ("auto", "required", "weather"):
        answer = chat(m, thought(kind, "So so.") + called(kind, "weather", ARGUMENTS), choice == "auto", tools=[WEATHER], tool_choice=choice, max_tokens=300)
        assert (answer, answer.thinking, answer.finish) == ("", "So so.", "tool_calls"), choice
        assert [(c.name, c.arguments) for c in answer.tool_calls] == [("weather", ARGUMENTS)]
    answer = chat(m, thought(kind, "So so.") + called(kind, "weather", ARGUMENTS), False, tools=[WEATHER], format=PAIR, max_tokens=300)
    assert [c.arguments for c in answer.tool_calls] == [ARGUMENTS] and answer.thinking == "So so."
    answer = chat(m, thought(kind, "So so.") + said(kind, '{"a": true, "b": "x"}'), tools=[WEATHER], format=PAIR, max_tokens=300)
    assert answer == '{"a": true, "b": "x"}' and not answer.tool_calls and answer.thinking == "So so."
    answer = chat(m, thought(kind, "So so.") + called(kind, "weather", ARGUMENTS), False, tools=[WEATHER], tool_choice="none", max_tokens=300)
    assert not answer.tool_calls and answer.thinking == "So so."


@kinds
def test_a_budget_goes_with_a_call_that_is_demanded(model, kind: str) -> None:
    m = model(kind)
    answer = chat(m, thought(kind, "a b c d e f g h i j k l m n o p"), tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, think=4, max_tokens=300)
    assert answer.finish == "tool_calls" and len(answer.tool_calls) == 1 and "p" not in answer.thinking and answer.thinking
    jsonschema.validate(json.loads(answer.tool_calls[0].arguments), WEATHER["function"]["parameters"])


@kinds
def test_stop_texts_end_the_content_only(model, kind: str) -> None:
    m = model(kind)
    answer = chat(m, thought(kind, "So so.") + called(kind, "weather", '{"city": "so"}'), tools=[WEATHER], stop=["so", "weather"])
    assert answer.thinking == "So so." and answer.tool_calls[0].arguments == '{"city": "so"}' and answer.finish == "tool_calls"
    answer = chat(m, thought(kind, "So so.") + said(kind, "It is so and so."), stop=["so", "is s"])
    assert (answer, answer.finish, answer.report.stopped_by) == ("It ", "stop", "is s")


@kinds
def test_max_tokens_cuts_anywhere(model, kind: str) -> None:
    m, text = model(kind), thought(kind, "So so.") + called(kind, "weather", ARGUMENTS)
    with writing(m, text):
        whole = m.chat(ASKED, tools=[WEATHER])
        for n in range(1, len(whole.tokens), 9):
            cut = m.chat(ASKED, tools=[WEATHER], max_tokens=n)
            assert cut.tokens == whole.tokens[:n] and cut.finish == "length" and cut.report.n_thinking <= min(n, whole.report.n_thinking)
            assert thought(kind, "So so.").partition("So")[2].startswith(cut.thinking[2:])         # with what of the mark had come
            assert all(ARGUMENTS.startswith(c.arguments) for c in cut.tool_calls)


@kinds
def test_a_cancelled_answer_keeps_what_it_thought(model, kind: str) -> None:
    m = model(kind)
    with writing(m, thought(kind, "So so " * 200)):
        handle = m.submit(messages=ASKED, max_tokens=1500)
        first = [delta for delta, _ in zip(handle.deltas(), range(3))][0]
        handle.cancel()
        answer = handle.result(60)
    assert first.kind == "thinking" and (answer, answer.finish) == ("", "cancelled") and answer.thinking.startswith("So")
    assert answer.report.n_thinking > 0


@pytest.mark.parametrize("kind", ["tokens", "harmony"])
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_earlier_thinking_is_shown_by_whatever_name(model, kind: str, key: str) -> None:
    m = model(kind)
    told = [*ASKED, {"role": "assistant", "content": "Well.", key: "So so."}, {"role": "user", "content": "And?"}]
    assert "So so." in m.tokenizer.detokenize(m.chat_ids(told))
