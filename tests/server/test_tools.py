"""Tools, structured output and OpenAI's Responses over HTTP: each interface tells what the library tells, in its own form."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from pyengine.server.app import application
from pyengine.server.models import Served

pytest.importorskip("httpx")
from starlette.testclient import TestClient  # noqa: E402  which needs httpx

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}}, "required": ["city"], "additionalProperties": False}
FUNCTION = {"name": "weather", "description": "The weather of a city.", "parameters": SCHEMA}
WEATHER = {"type": "function", "function": FUNCTION}
CHOICE = {"type": "function", "function": {"name": "weather"}}
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
          "required": ["name", "age"], "additionalProperties": False}


@pytest.fixture(scope="module")
def model(real_model) -> Any:
    return real_model("qwen", n_seq=2)


@pytest.fixture(scope="module")
def client(model) -> Any:
    return TestClient(application([Served(("qwen",), model, time.time(), 1)]), base_url="http://localhost:8080")


@pytest.fixture(scope="module")
def call(model) -> Any:
    """What the library answers where the call of the tool is demanded."""
    return model.chat(ASKED, tools=[WEATHER], tool_choice="weather", temperature=0).tool_calls[0]


def post(client: Any, path: str, **fields: Any) -> Any:
    response = client.post(path, json={"model": "qwen", "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return response


def events(response: Any) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events as (name, data); "[DONE]" is left out."""
    found = []
    for block in response.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        if lines and lines["data"] != "[DONE]":
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found


# -- OpenAI's chat completions ---------------------------------------------------------------------------------------------


def test_chat_calls_a_tool(client, call) -> None:
    choice = post(client, "/v1/chat/completions", messages=ASKED, tools=[WEATHER], tool_choice=CHOICE).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    made = choice["message"]["tool_calls"][0]
    assert made["type"] == "function" and made["function"] == {"name": "weather", "arguments": call.arguments} and len(made["id"]) == 9


def test_a_streamed_call_begins_with_its_name_and_grows(client, call) -> None:
    got = [e["choices"][0] for _, e in events(post(client, "/v1/chat/completions", messages=ASKED, tools=[WEATHER], tool_choice=CHOICE, stream=True))]
    deltas = [c["delta"]["tool_calls"][0] for c in got if "tool_calls" in c["delta"]]
    assert got[0]["delta"]["role"] == "assistant" and deltas[0]["function"] == {"name": "weather", "arguments": ""} and deltas[0]["id"]
    assert "".join(d["function"]["arguments"] for d in deltas) == call.arguments and len(deltas) > 3
    assert all(d["index"] == 0 and "id" not in d for d in deltas[1:]) and got[-1]["finish_reason"] == "tool_calls"


def test_results_are_read(client, model, call) -> None:
    said = post(client, "/v1/chat/completions", messages=ASKED, tools=[WEATHER], tool_choice=CHOICE).json()["choices"][0]["message"]
    told = [*ASKED, said, {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "18 degrees"}]
    usage = post(client, "/v1/chat/completions", messages=told, tools=[WEATHER], max_tokens=2).json()["usage"]
    assert usage["prompt_tokens"] == len(model.chat_ids(told, [WEATHER]))


@pytest.mark.parametrize("form", [{"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}},
                                  {"json_schema": PERSON}, {"response_format": {"type": "json_object", "schema": PERSON}}])
def test_chat_answers_in_a_form(client, model, form: dict[str, Any]) -> None:
    asked = [{"role": "user", "content": "Invent a person."}]
    content = post(client, "/v1/chat/completions", messages=asked, **form).json()["choices"][0]["message"]["content"]
    assert set(json.loads(content)) == {"name", "age"} and content == model.chat(asked, format=PERSON, temperature=0)


# -- OpenAI's Responses ----------------------------------------------------------------------------------------------------


def test_a_response_is_the_chats_answer(client, model) -> None:
    want = model.chat([{"role": "system", "content": "Be brief."}, *ASKED], temperature=0, max_tokens=12)
    got = post(client, "/v1/responses", input=ASKED[0]["content"], instructions="Be brief.", max_output_tokens=12).json()
    assert got["object"] == "response" and got["output"][0]["content"][0] == {"type": "output_text", "text": want, "annotations": [], "logprobs": []}
    assert got["status"] == ("incomplete" if want.finish == "length" else "completed")
    assert got["usage"]["input_tokens"] == want.n_prompt and got["usage"]["output_tokens"] == len(want.tokens)
    assert client.get(f"/v1/responses/{got['id']}").json() == got


def test_a_response_goes_on_from_another(client, model) -> None:
    first = post(client, "/v1/responses", input="My name is Ada.", max_output_tokens=8).json()
    said = first["output"][0]["content"][0]["text"]
    second = post(client, "/v1/responses", input="What is my name?", previous_response_id=first["id"], max_output_tokens=8).json()
    whole = [{"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": said}, {"role": "user", "content": "What is my name?"}]
    assert second["output"][0]["content"][0]["text"] == model.chat(whole, temperature=0, max_tokens=8)
    assert client.delete(f"/v1/responses/{first['id']}").json()["deleted"]
    for response in (client.get(f"/v1/responses/{first['id']}"),
                     client.post("/v1/responses", json={"model": "qwen", "input": "x", "previous_response_id": first["id"]})):
        assert response.status_code == 404 and first["id"] in response.json()["error"]["message"]
    unkept = post(client, "/v1/responses", input="x", store=False, max_output_tokens=1).json()["id"]
    assert client.get(f"/v1/responses/{unkept}").status_code == 404


def test_a_streamed_response_has_every_event(client, call) -> None:
    asked = {"input": ASKED, "tools": [{"type": "function", **FUNCTION}], "tool_choice": {"type": "function", "name": "weather"}}
    got = events(post(client, "/v1/responses", **asked, stream=True))
    assert [e["sequence_number"] for _, e in got] == list(range(len(got))) and all(name == e["type"] for name, e in got)
    names = [name.removeprefix("response.") for name, _ in got]
    assert names[:3] == ["created", "in_progress", "output_item.added"]
    assert names[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert "".join(e["delta"] for n, e in got if n.endswith("arguments.delta")) == call.arguments
    item = got[-1][1]["response"]["output"][0]
    assert item["type"] == "function_call" and item["name"] == "weather" and item["arguments"] == call.arguments and item == got[-2][1]["item"]
    told = [*ASKED, item, {"type": "function_call_output", "call_id": item["call_id"], "output": "18 degrees"}]
    assert post(client, "/v1/responses", **{**asked, "input": told}, max_output_tokens=2).json()["output"]


def test_a_streamed_text_is_whole_in_the_end(client) -> None:
    got = events(post(client, "/v1/responses", input="Name a river.", max_output_tokens=12, stream=True))
    text = "".join(e["delta"] for name, e in got if name == "response.output_text.delta")
    assert text and [e["text"] for name, e in got if name == "response.output_text.done"] == [text]
    assert got[-1][1]["response"]["output"][0]["content"][0]["text"] == text
    kinds = [name for name, _ in got if "delta" not in name]
    assert kinds[2:7] == [f"response.{n}" for n in ("output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done")]


def test_a_response_in_a_form(client) -> None:
    got = post(client, "/v1/responses", input="Invent a person.", text={"format": {"type": "json_schema", "name": "person", "schema": PERSON}}).json()
    assert set(json.loads(got["output"][0]["content"][0]["text"])) == {"name", "age"}


@pytest.mark.parametrize("change, part", [
    ({"input": []}, "input: is empty"), ({"input": [{"type": "computer_call", "id": "x"}]}, "'computer_call' is not taken"), ({"tools": [{"type": "web_search"}]}, "web_search"),
    ({"reasoning": {"effort": "much"}}, "reasoning.effort"), ({"reasoning": {"effort": "high"}}, "no thinking"), ({"truncation": "some"}, "truncation"),
    ({"background": True}, "background"), ({"text": {"format": {"type": "xml"}}}, "text.format.type"), ({"tool_choice": {"type": "mcp"}}, "tool_choice.type")])
def test_what_responses_cannot_do_is_refused(client, change: dict[str, Any], part: str) -> None:
    response = client.post("/v1/responses", json={"model": "qwen", "input": "Hi", **change})
    assert response.status_code == 400 and part in response.json()["error"]["message"]


# -- Anthropic and Ollama --------------------------------------------------------------------------------------------------


def test_anthropics_tools(client, model, call) -> None:
    asked = {"messages": ASKED, "max_tokens": 200, "tools": [{"name": "weather", "description": FUNCTION["description"], "input_schema": SCHEMA}],
             "tool_choice": {"type": "tool", "name": "weather"}}
    got = post(client, "/v1/messages", **asked).json()
    assert got["stop_reason"] == "tool_use" and [b["type"] for b in got["content"]] == ["tool_use"]
    assert got["content"][0]["input"] == json.loads(call.arguments)
    streamed = events(post(client, "/v1/messages", **asked, stream=True))
    begun = next(e for name, e in streamed if name == "content_block_start")
    assert begun["content_block"]["type"] == "tool_use" and begun["content_block"]["name"] == "weather" and begun["content_block"]["input"] == {}
    assert "".join(e["delta"]["partial_json"] for name, e in streamed if name == "content_block_delta") == call.arguments
    assert next(e for name, e in streamed if name == "message_delta")["delta"]["stop_reason"] == "tool_use"
    told = [*ASKED, {"role": "assistant", "content": got["content"]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": got["content"][0]["id"], "content": [{"type": "text", "text": "18 degrees"}]},
                                         {"type": "text", "text": "So?"}]}]
    ours = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call.as_dict()]}, {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"},
            {"role": "user", "content": "So?"}]
    count = client.post("/v1/messages/count_tokens", json={"model": "qwen", "messages": told, "tools": asked["tools"]}).json()
    assert count["input_tokens"] == len(model.chat_ids(ours, [WEATHER]))


def test_anthropics_form(client) -> None:
    got = post(client, "/v1/messages", messages=[{"role": "user", "content": "Invent a person."}], max_tokens=100,
               output_config={"format": {"type": "json_schema", "schema": PERSON}}).json()
    assert set(json.loads(got["content"][0]["text"])) == {"name", "age"} and got["stop_reason"] == "end_turn"


@pytest.mark.parametrize("change, part", [
    ({"tools": [{"type": "computer_20250124", "name": "computer"}]}, "computer_20250124"), ({"tools": [{"name": "f"}]}, "tools[0].input_schema: is missing"),
    ({"tool_choice": {"type": "all"}}, "tool_choice.type"), ({"thinking": {"type": "some"}}, "thinking.type"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id: is missing")])
def test_what_anthropics_clients_cannot_have(client, change: dict[str, Any], part: str) -> None:
    response = client.post("/v1/messages", json={"model": "qwen", "messages": ASKED, "max_tokens": 5, **change})
    assert response.status_code == 400 and part in response.json()["error"]["message"]


def test_ollamas_tools_and_format(client, model) -> None:
    tools = [WEATHER]
    want = model.chat(ASKED, tools=tools, temperature=0, max_tokens=60)
    asked = {"messages": ASKED, "tools": tools, "options": {"temperature": 0, "num_predict": 60}}
    whole = post(client, "/api/chat", **asked, stream=False).json()["message"]
    lines = [json.loads(line) for line in post(client, "/api/chat", **asked).text.splitlines()]
    calls = [c["function"] for c in whole.get("tool_calls", [])]
    assert calls == [{"index": i, "name": c.name, "arguments": json.loads(c.arguments)} for i, c in enumerate(want.tool_calls)] and whole["content"] == want
    assert [c["function"] for line in lines for c in line["message"].get("tool_calls", [])] == calls
    assert "".join(line["message"]["content"] for line in lines) == want and lines[-1]["done"]
    formed = post(client, "/api/generate", prompt="Invent a person.", format=PERSON, stream=False, options={"temperature": 0}).json()["response"]
    assert set(json.loads(formed)) == {"name", "age"}
