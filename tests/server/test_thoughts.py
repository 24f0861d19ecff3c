"""Thinking over HTTP: each interface tells it apart, streamed and whole alike, counts it, and takes it back in later turns."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("transformers", reason="needs transformers and torch: pip install -r requirements/test.txt")
from scripted import called, make, said, thought, writing
from starlette.testclient import TestClient

import pyengine as pe
from pyengine.server.app import application
from pyengine.server.models import Served

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"], "additionalProperties": False}
FUNCTION = {"name": "weather", "description": "", "parameters": SCHEMA}
WEATHER = {"type": "function", "function": FUNCTION}
ASKED = [{"role": "user", "content": "How is it?"}]
ARGUMENTS = '{"city": "Oslo"}'


@pytest.fixture(scope="module", params=["tokens", "letters", "harmony"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory) -> Any:
    return pe.load(make(kind, tmp_path_factory.mktemp("thinks")), n_ctx=2048, n_seq=3)


@pytest.fixture(scope="module")
def client(model) -> Any:
    return TestClient(application([Served(("tiny",), model, time.time(), 1)]), base_url="http://localhost:8080")


@pytest.fixture
def ask(client, model) -> Any:
    """ask(text, path, ..) -> the reply where the model wants to write that text."""
    def post(wanted: str, path: str, /, **fields: Any) -> Any:
        with writing(model, wanted):
            response = client.post(path, json={"model": "tiny", **({} if path.startswith("/api") else {"temperature": 0}), **fields})
        assert response.status_code == 200, response.text
        return response

    return post


def events(response: Any) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def texts(kind: str) -> tuple[str, str]:
    """What the model writes: thinking and a text; thinking and a call."""
    return thought(kind, "So so.") + said(kind, "Well."), thought(kind, "So so.") + called(kind, "weather", ARGUMENTS)


def test_openais_chat(ask, kind: str, model) -> None:
    text, call = texts(kind)
    whole = ask(text, "/v1/chat/completions", messages=ASKED, logprobs=True, n=2, seed=3).json()
    for choice in whole["choices"]:
        message = choice["message"]
        assert (message["content"], message["reasoning_content"], choice["finish_reason"]) == ("Well.", "So so.", "stop")
    details = whole["usage"]["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < whole["usage"]["completion_tokens"] and details["reasoning_tokens"] % 2 == 0
    got = events(ask(text, "/v1/chat/completions", messages=ASKED, logprobs=True, n=2, seed=3, stream=True, stream_options={"include_usage": True}))
    for i, choice in enumerate(whole["choices"]):
        own = [c for e in got for c in e["choices"] if c["index"] == i]
        assert "".join(c["delta"].get("content") or "" for c in own) == "Well."
        assert "".join(c["delta"].get("reasoning_content") or "" for c in own) == "So so."
        assert [t["token"] for c in own if c["logprobs"] for t in c["logprobs"]["content"]] == [t["token"] for t in choice["logprobs"]["content"]]
    assert got[-1]["usage"]["completion_tokens_details"] == details
    choice = ask(call, "/v1/chat/completions", messages=ASKED, tools=[WEATHER], logprobs=True).json()["choices"][0]
    message = choice["message"]
    assert message["reasoning_content"] == "So so." and message["content"] is None and message["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
    streamed = [e["choices"][0] for e in events(ask(call, "/v1/chat/completions", messages=ASKED, tools=[WEATHER], stream=True, logprobs=True)) if e["choices"]]
    assert [t for c in streamed if c["logprobs"] for t in c["logprobs"]["content"]] == choice["logprobs"]["content"]
    own = [c["delta"] for c in streamed]
    assert "".join(d.get("reasoning_content") or "" for d in own) == "So so." and not any(d.get("content") for d in own)
    assert "".join(c["function"]["arguments"] for d in own for c in d.get("tool_calls", ())) == ARGUMENTS
    told = [*ASKED, message, {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "18"}]
    usage = ask("So.", "/v1/chat/completions", messages=told, tools=[WEATHER], max_tokens=4).json()["usage"]
    assert usage["prompt_tokens"] == len(model.chat_ids(told, [WEATHER]))


@pytest.mark.parametrize("asked, thinks", [({"reasoning_effort": "none"}, False), ({"think": False}, False), ({"think": 0}, False), ({"think": True}, True),
                                           ({"think": 500}, True), ({"chat_template_kwargs": {"enable_thinking": True}}, True), ({}, True)])
def test_openais_switches(ask, client, kind: str, asked: dict[str, Any], thinks: bool) -> None:
    if kind == "harmony" and not thinks:
        response = client.post("/v1/chat/completions", json={"model": "tiny", "messages": ASKED, **asked})
        assert response.status_code == 400 and "think: False is not possible" in response.json()["error"]["message"]
        return
    text = texts(kind)[0] if thinks else "Well."
    message = ask(text, "/v1/chat/completions", messages=ASKED, **asked).json()["choices"][0]["message"]
    assert message["content"] == "Well." and ("reasoning_content" in message) == thinks


def test_responses(ask, kind: str) -> None:
    text, call = texts(kind)
    whole = ask(text, "/v1/responses", input="How is it?", reasoning={"effort": "low"} if kind == "harmony" else {}).json()
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message"]
    assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": "So so."}] and whole["output"][1]["content"][0]["text"] == "Well."
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    for fields, wanted in (({}, text), ({"tools": [{"type": "function", **FUNCTION}]}, call)):
        whole = ask(wanted, "/v1/responses", input="How is it?", **fields).json()
        got = events(ask(wanted, "/v1/responses", input="How is it?", stream=True, **fields))
        last = got[-1]["response"]
        assert [plain(item) for item in last["output"]] == [plain(item) for item in whole["output"]] and last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
        done = [plain(e["item"]) for e in got if e["type"] == "response.output_item.done"]
        assert done == [plain(item) for item in last["output"]]
        assert "".join(e["delta"] for e in got if e["type"] == "response.reasoning_text.delta") == "So so."
    again = ask(text, "/v1/responses", previous_response_id=whole["id"], input=[{"type": "function_call_output", "call_id": whole["output"][1]["call_id"], "output": "18"}])
    assert again.json()["output"][1]["content"][0]["text"] == "Well."


def plain(item: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in item.items() if k not in ("id", "call_id")}


def test_anthropics_messages(ask, kind: str) -> None:
    text, call = texts(kind)
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    for wanted, fields, last in ((text, {}, {"type": "text", "text": "Well."}), (call, {"tools": tools}, {"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}})):
        for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
            whole = ask(wanted, "/v1/messages", messages=ASKED, max_tokens=300, thinking=thinking, **fields).json()
            assert [plain(b) for b in whole["content"]] == [{"type": "thinking", "thinking": "So so.", "signature": ""}, last]
            got = events(ask(wanted, "/v1/messages", messages=ASKED, max_tokens=300, thinking=thinking, stream=True, **fields))
            assert [e["content_block"]["type"] for e in got if e["type"] == "content_block_start"] == [b["type"] for b in whole["content"]]
            deltas = [e["delta"] for e in got if e["type"] == "content_block_delta"]
            assert "".join(d.get("thinking", "") for d in deltas) == "So so."
            assert "".join(d.get("text", "") + d.get("partial_json", "") for d in deltas) == (last.get("text") or ARGUMENTS)
            assert got[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"] and got[-2]["delta"]["stop_reason"] == whole["stop_reason"]
        told = [*ASKED, {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": whole["content"][1].get("id", "x"), "content": "18"}] if "tools" in fields else "And?"}]
        assert ask(text, "/v1/messages", messages=told, max_tokens=300, **fields).json()["content"][1]["text"] == "Well."


def test_ollamas_chat_and_generate(ask, client, kind: str) -> None:
    text, call = texts(kind)
    for think in (True, None, "low" if kind == "harmony" else True):
        whole = ask(text, "/api/chat", messages=ASKED, stream=False, think=think).json()
        assert whole["message"] == {"role": "assistant", "content": "Well.", "thinking": "So so."}
        lines = [json.loads(line) for line in ask(text, "/api/chat", messages=ASKED, think=think).text.splitlines()]
        assert "".join(line["message"].get("thinking", "") for line in lines) == "So so." and "".join(line["message"]["content"] for line in lines) == "Well."
        assert lines[-1]["eval_count"] == whole["eval_count"]
        made = ask(text, "/api/generate", prompt="How is it?", stream=False, think=think).json()
        assert (made["response"], made["thinking"]) == ("Well.", "So so.")
    whole = ask(call, "/api/chat", messages=ASKED, stream=False, tools=[WEATHER]).json()["message"]
    assert whole["thinking"] == "So so." and whole["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"} and whole["content"] == ""
    told = [*ASKED, whole, {"role": "tool", "tool_name": "weather", "content": "18"}]
    assert ask(text, "/api/chat", messages=told, stream=False, tools=[WEATHER]).json()["message"]["content"] == "Well."
    response = client.post("/api/chat", json={"model": "tiny", "messages": ASKED, "think": "much"})
    assert response.status_code == 400 and "think" in response.json()["error"]


def test_a_form_behind_thinking(ask, kind: str) -> None:
    wanted = thought(kind, "So so.") + said(kind, '{"city": "Rome"}')
    form = {"type": "json_schema", "schema": SCHEMA, "name": "x", "strict": True}
    got = ask(wanted, "/v1/chat/completions", messages=ASKED, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}).json()
    assert (got["choices"][0]["message"]["content"], got["choices"][0]["message"]["reasoning_content"]) == ('{"city": "Rome"}', "So so.")
    got = ask(wanted, "/v1/responses", input="How is it?", text={"format": form}).json()
    assert got["output"][1]["content"][0]["text"] == '{"city": "Rome"}'
    got = ask(wanted, "/api/chat", messages=ASKED, format=SCHEMA, stream=False).json()["message"]
    assert (got["content"], got["thinking"]) == ('{"city": "Rome"}', "So so.")
    got = ask(wanted, "/v1/messages", messages=ASKED, max_tokens=200, output_config={"format": {"type": "json_schema", "schema": SCHEMA}}).json()
    assert got["content"][1]["text"] == '{"city": "Rome"}'
