"""A conversation whose calls are run: in their order, with errors as texts, until an answer has none, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import pytest

import pyengine as pe
from pyengine.chat.functions import schema_of
from pyengine.chat.reply.deltas import Delta, ToolCall
from pyengine.engine.answer import Answer
from pyengine.engine.request import Report
from pyengine.engine.tools import run_tools, ToolStream
from pyengine.errors import RequestError

QUESTION = [{"role": "user", "content": "How warm is it?"}]


def said(text: str, *calls: tuple[str, Any], finish: str = "") -> Answer:
    """An answer of a script: a text, and calls (name, arguments)."""
    given = [ToolCall(f"{i:09}", name, a if isinstance(a, str) else json.dumps(a)) for i, (name, a) in enumerate(calls)]
    return Answer(text, Report(calls=given, finish=finish or ("tool_calls" if given else "stop")))


class Piecewise:
    """The stream of such an answer; `closed` says whether it was ended."""

    def __init__(self, whole: Answer):
        self.whole, self.report, self.closed = whole, whole.report, False

    def deltas(self):
        yield Delta("thinking", "hm")
        yield from (Delta("text", letter) for letter in self.whole)
        for i, call in enumerate(self.whole.tool_calls):
            yield Delta("call", call.name, i)
            yield Delta("arguments", call.arguments, i)

    def close(self) -> None:
        self.closed = True


class Script:
    """A chat that gives one answer after the other; `asked` are the conversations that it was shown."""

    def __init__(self, *answers: Answer, stream: bool = False):
        self.answers, self.stream, self.asked, self.tools, self.streams = list(answers), stream, [], [], []

    def __call__(self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]]) -> Any:
        self.asked.append(list(messages))
        self.tools = tools
        answer = self.answers.pop(0)
        if self.stream:
            self.streams.append(Piecewise(answer))
        return self.streams[-1] if self.stream else answer


order: list[str] = []


def warmth(city: str) -> dict[str, float]:
    """Tell how warm it is."""
    order.append(city)
    return {"celsius": 17.5}


def broken() -> None:
    """Fail."""
    raise KeyError("no sensor")


def speechless() -> None:
    """Fail with an error that cannot say what it is."""
    raise type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})


def leaving() -> None:
    """Leave, as scripts do."""
    raise SystemExit(3)


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    order.clear()


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_run_and_the_model_is_asked_again(stream: bool) -> None:
    first, second = said("I look.", ("warmth", {"city": "Rome"}), ("warmth", {"city": "Oslo"})), said("17.5 degrees.")
    chat = Script(first, second, stream=stream)
    tools = [warmth, broken]
    results = [{"role": "tool", "tool_call_id": c.id, "name": "warmth", "content": '{"celsius": 17.5}'} for c in first.tool_calls]
    if stream:
        pieces = ToolStream(chat, QUESTION, tools)
        assert "".join(pieces) == "I look.17.5 degrees."
        answer, added = pieces.ran()
        assert pieces.answer() == second
    else:
        answer, added = run_tools(chat, QUESTION, tools)
    assert answer == second and added == answer.messages == [first.message, *results, second.message]
    assert order == ["Rome", "Oslo"] and [t["function"]["name"] for t in chat.tools] == ["warmth", "broken"]
    assert chat.asked == [QUESTION, [*QUESTION, first.message, *results]]


def test_the_stream_has_thinking_and_calls_of_all_answers() -> None:
    deltas = list(ToolStream(Script(said("a", ("warmth", {"city": "x"})), said("b"), stream=True), QUESTION, [warmth]).deltas())
    assert deltas == [Delta("thinking", "hm"), Delta("text", "a"), Delta("call", "warmth"), Delta("arguments", '{"city": "x"}'),
                      Delta("thinking", "hm"), Delta("text", "b")]


@pytest.mark.parametrize("call, part", [
    (("broken", {}), "error: KeyError: 'no sensor'"), (("speechless", {}), "error: Odd: without a text"), (("leaving", {}), "error: SystemExit: 3"), (("warmth", {}), "error: the arguments of warmth are wrong: 'city' is a required property"),
    (("warmth", '{"city"'), "error: the arguments of warmth are no JSON"), (("warmht", {}), "error: there is no tool warmht; near: warmth"),
    (("zzz", {}), "error: there is no tool zzz; there are warmth, broken, speechless, leaving")])
def test_what_goes_wrong_is_told_to_the_model(call: tuple[str, Any], part: str) -> None:
    _, added = run_tools(Script(said("", call), said("Sorry.")), QUESTION, [warmth, broken, speechless, leaving])
    assert added[1]["content"].startswith(part)


def test_ctrl_c_in_a_function_ends_it() -> None:
    def long() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tools(Script(said("", ("long", {}))), QUESTION, [long])


@pytest.mark.parametrize("stream", [False, True])
def test_the_limit_ends_a_model_that_goes_on_calling(stream: bool) -> None:
    chat = Script(*(said("", ("warmth", {"city": str(i)})) for i in range(9)), stream=stream)
    answer, added = ToolStream(chat, QUESTION, [warmth], limit=3).ran() if stream else run_tools(chat, QUESTION, [warmth], limit=3)
    assert order == ["0", "1"] and len(chat.asked) == 3 and answer.tool_calls and added[-1] == answer.message


@pytest.mark.parametrize("finish", ["length", "cancelled"])
def test_calls_of_an_answer_that_was_cut_are_not_run(finish: str) -> None:
    cut = said("", ("warmth", {"city": "x"}), finish=finish)
    for ran in (run_tools(Script(cut), QUESTION, [warmth]), ToolStream(Script(cut, stream=True), QUESTION, [warmth]).ran()):
        assert not order and ran.answer.tool_calls and ran.messages == [cut.message]


def test_a_stream_that_is_closed_asks_no_more() -> None:
    chat = Script(said("abc", ("warmth", {"city": "x"})), said("b"), stream=True)
    with ToolStream(chat, QUESTION, [warmth]) as pieces:
        assert next(pieces) == "a"
    assert list(pieces) == [] and chat.streams[0].closed and not order and len(chat.asked) == 1
    with pytest.raises(RequestError, match="closed"):
        pieces.answer()


@pytest.mark.parametrize("tools, limit, part", [
    ([warmth, {"type": "function"}], 3, r"tools\[1\]: only functions"), ([warmth, warmth], 3, r"tools\[1\]: there are two"), ([warmth], 0, "limit"),
    ([lambda: 1], 3, "<lambda>"), ([], 3, "a list of functions is needed"),
    (None, 3, "a list of functions")])
def test_what_cannot_be_run_is_refused_before_the_model_is_asked(tools: list[Any], limit: int, part: str) -> None:
    chat = Script(said("x"))
    for run in (run_tools, ToolStream):
        with pytest.raises(RequestError, match=part):
            run(chat, QUESTION, tools, limit)
    assert not chat.asked


def test_models_take_functions_as_tools(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("qwen2")[0], n_ctx=1024)
    schemas = [schema_of(warmth), schema_of(broken)]
    assert model.chat_ids(QUESTION, [warmth, broken]) == model.chat_ids(QUESTION, schemas) != model.chat_ids(QUESTION)
    plain = model.chat(QUESTION, [warmth, broken], max_tokens=5, temperature=0)
    ran = model.chat(QUESTION, [warmth, broken], max_tokens=5, temperature=0, run_tools=True)
    assert ran == plain == "".join(model.chat(QUESTION, [warmth, broken], True, 5, temperature=0, run_tools=True))
    assert ran.messages == [ran.message] and plain.messages == [plain.message]
    for tools, part in (([lambda x: x], "<lambda>"), (schemas, "only functions can be run"), (None, "a list of functions is needed")):
        with pytest.raises(RequestError, match=part):
            model.chat(QUESTION, tools, run_tools=True)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_real_model_is_run(real_model, stream: bool) -> None:
    model, seen = real_model("qwen"), []

    def temperature(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> dict[str, Any]:
        """Get the current temperature in a city.

        Args:
            city: The city's name.
            unit: The unit of the result.
        """
        seen.append(city)
        return {"city": city, "temperature": 17.5}

    question = [{"role": "user", "content": "How warm is it in Paris now?"}]
    found = model.chat(question, [temperature], stream, 60, run_tools=True, temperature=0, tool_choice="required", parallel_tool_calls=False)
    deltas = list(found.deltas()) if stream else []
    answer = found.answer() if stream else found
    assert seen[0] == "Paris" and [m["role"] for m in answer.messages[:3]] == ["assistant", "tool", "assistant"]
    assert answer.messages[1]["content"] == '{"city": "Paris", "temperature": 17.5}' and answer.messages[-1] == answer.message
    assert model.chat([*question, *answer.messages[:-1]], [temperature], max_tokens=60, temperature=0, parallel_tool_calls=False) == answer
    assert not stream or deltas[0] == Delta("call", "temperature") and "".join(d.text for d in deltas if d.kind == "text").endswith(answer)
