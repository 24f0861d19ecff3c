"""The HTTP server: what clients get is what the library gives, in each interface's own form; what is not here is refused in words."""

from __future__ import annotations

import base64
import io
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from running import idle, running

import pyengine as pe
from pyengine.server import replies, streams
from pyengine.server.app import application
from pyengine.server.models import load, Models

httpx = pytest.importorskip("httpx")
from starlette.testclient import TestClient  # noqa: E402  which needs httpx

MESSAGES = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def served(tiny_gguf) -> Any:
    found = [load(str(tiny_gguf(kind)[0]), n_ctx=256, n_threads=1, n_seq=4) for kind in ("llama", "gemma3")]     # both files are f32.gguf
    found = Models(found).all
    yield found
    for s in found:
        s.model.loop.close()


@pytest.fixture
def client(served) -> Any:
    return TestClient(application(served), base_url="http://localhost:8080")


@pytest.fixture
def model(served) -> Any:
    return served[0].model


@pytest.fixture
def name(served) -> str:
    return served[0].name


def events(response: Any) -> list[Any]:
    """The values of server-sent events; the last one is the text [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


@pytest.mark.parametrize("value", [{}, [], "", "a\u2028\x00\"\\é\ud800", 1, 0.1, -9999.0, True, None, {"a": [1, {"b": (None, "\n")}], "é": 1e300}, [[], {}]])
def test_what_is_sent_is_the_json_that_python_writes(value: Any) -> None:
    assert streams.encoded(value) == json.dumps(value, ensure_ascii=False)


def picture(seed: int = 0) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


# -- OpenAI ---------------------------------------------------------------------------------------------------------------


def test_chat_is_the_librarys(client, model, name) -> None:
    want = model.chat(MESSAGES, max_tokens=12, seed=5)
    got = client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES, "max_tokens": 12, "seed": 5}).json()
    choice, usage = got["choices"][0], got["usage"]
    assert got["object"] == "chat.completion" and got["model"] == name and got["id"].startswith("chatcmpl-")
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"] == want and choice["finish_reason"] == want.finish
    assert usage["prompt_tokens"] == want.n_prompt and usage["completion_tokens"] == len(want.tokens)
    assert usage["total_tokens"] == want.n_prompt + len(want.tokens) and usage["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("extra", [{"top_n_sigma": 0.4}, {"xtc_probability": 1.0, "xtc_threshold": 0.001}, {"dynatemp_range": 0.7, "dynatemp_exponent": 0.3},
                                   {"mirostat": 1, "mirostat_tau": 1.0, "mirostat_eta": 0.5}, {"mirostat": 2, "mirostat_tau": 1.0},
                                   {"dry_multiplier": 50.0, "dry_allowed_length": 1, "dry_base": 2.0, "dry_penalty_last_n": -1, "dry_sequence_breakers": ["!"], "repeat_penalty": 0.3}],
                         ids=lambda extra: next(iter(extra)) + str(extra.get("mirostat", "")))
def test_every_step_of_the_sampler_is_asked_for_by_its_name(client, model, name, extra) -> None:
    """What OpenAI's clients send beside the body's own fields, Ollama's in "options", and llama.cpp's; each changes what comes."""
    plain = {"temperature": 0.7, "repeat_penalty": extra.get("repeat_penalty", 1.0), "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3}
    extra = plain | extra
    want = model.chat(MESSAGES, max_tokens=64, **extra)
    assert want != model.chat(MESSAGES, max_tokens=64, **plain)
    asked = {"model": name, "messages": MESSAGES}
    assert client.post("/v1/chat/completions", json={**asked, "max_tokens": 64, **extra}).json()["choices"][0]["message"]["content"] == want
    options = {"num_predict": 64, **extra}
    assert client.post("/api/chat", json={**asked, "stream": False, "options": options}).json()["message"]["content"] == want
    alone = model.generate("one two", max_tokens=64, **extra)
    assert client.post("/completion", json={"model": name, "prompt": "one two", "n_predict": 64, **extra}).json()["content"] == alone


def test_streamed_chat_is_the_same_text(client, model, name) -> None:
    asked = {"model": name, "messages": MESSAGES, "max_tokens": 12, "seed": 5, "stream": True, "stream_options": {"include_usage": True}}
    response = client.post("/v1/chat/completions", json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    got = events(response)
    assert {e["object"] for e in got} == {"chat.completion.chunk"} and len({e["id"] for e in got}) == 1
    assert got[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in got if e["choices"]) == model.chat(MESSAGES, max_tokens=12, seed=5)
    assert [e["choices"][0]["finish_reason"] for e in got if e["choices"]][-1] in ("stop", "length")
    assert got[-1]["choices"] == [] and got[-1]["usage"]["completion_tokens"] <= 12


def test_options_of_the_template(client, model, name, monkeypatch) -> None:
    source = model.template.source + "{{ mood }}"
    monkeypatch.setattr(model._language, "template", type(model.template)(source), raising=False)
    want = model.chat(MESSAGES, max_tokens=6, temperature=0, template_options={"mood": "glad"})
    assert want.n_prompt > model.chat(MESSAGES, max_tokens=6, temperature=0).n_prompt
    asked = {"model": name, "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "chat_template_kwargs": {"mood": "glad"}}
    assert client.post("/v1/chat/completions", json=asked).json()["usage"]["prompt_tokens"] == want.n_prompt


def test_several_choices(client, model, name) -> None:
    asked = {"model": name, "messages": MESSAGES, "max_tokens": 6, "seed": 5, "n": 3}
    want = [model.chat(MESSAGES, max_tokens=6, seed=s) for s in (5, 6, 7)]
    assert [c["message"]["content"] for c in client.post("/v1/chat/completions", json=asked).json()["choices"]] == want
    texts = ["", "", ""]
    for e in events(client.post("/v1/chat/completions", json={**asked, "stream": True})):
        for c in e["choices"]:
            texts[c["index"]] += c["delta"].get("content", "")
    assert texts == want


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client, model, name, stream: bool) -> None:
    want = model.chat(MESSAGES, max_tokens=5, temperature=0, logprobs=2)
    asked = {"model": name, "messages": MESSAGES, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 2, "stream": stream}
    response = client.post("/v1/chat/completions", json=asked)
    choices = [e["choices"][0] for e in events(response)] if stream else response.json()["choices"]
    content = [t for c in choices if c["logprobs"] for t in c["logprobs"]["content"]]
    assert [t["logprob"] for t in content] == [s.logprob for s in want.sampled]
    assert b"".join(bytes(t["bytes"]) for t in content) == b"".join(model.tokenizer.piece(t) for t in want.tokens)
    assert [len(t["top_logprobs"]) for t in content] == [2] * len(want.tokens)


def test_settings_reach_the_sampler(client, model, name) -> None:
    asked = {"max_tokens": 8, "seed": 1, "temperature": 1.5, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "presence_penalty": 0.5,
             "frequency_penalty": 0.25, "repeat_penalty": 1.1, "logit_bias": {"5": -100, "17": 2.5}}
    want = model.chat(MESSAGES, **{**asked, "logit_bias": {5: -100, 17: 2.5}})
    got = client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES, **asked}).json()
    assert got["choices"][0]["message"]["content"] == want
    stop = want[1:3]
    cut = client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES, **asked, "stop": [stop]}).json()["choices"][0]
    assert cut["message"]["content"] == want[: want.index(stop)] and cut["finish_reason"] == "stop"


def test_completions(client, model, name) -> None:
    ids = model.tokenize("Once upon")
    want = model.generate("Once upon", max_tokens=7, seed=2)
    got = client.post("/v1/completions", json={"model": name, "prompt": ["Once upon", ids], "max_tokens": 7, "seed": 2, "logprobs": 1}).json()
    assert [c["text"] for c in got["choices"]] == [want, want] and got["object"] == "text_completion"
    assert got["choices"][0]["logprobs"]["token_logprobs"] == [s.logprob for s in want.sampled]
    streamed = events(client.post("/v1/completions", json={"model": name, "prompt": "Once upon", "max_tokens": 7, "seed": 2, "stream": True}))
    assert "".join(e["choices"][0]["text"] for e in streamed) == want
    assert len(client.post("/v1/completions", json={"model": name, "prompt": "a", "temperature": 0}).json()["choices"][0]["text"]) > 0


def test_pictures_come_as_data_and_are_counted(client, served) -> None:
    model, data = served[1].model, picture()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}]}]
    want = model.chat([{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "image": data}]}], max_tokens=6, temperature=0)
    asked = {"model": served[1].name, "messages": messages, "max_tokens": 6, "temperature": 0}
    got = client.post("/v1/chat/completions", json=asked).json()
    assert got["choices"][0]["message"]["content"] == want
    assert got["usage"]["prompt_tokens_details"]["image_tokens"] == want.media[0].n_tokens > 0 and got["timings"]["cached_images"] == 1


def test_models_are_listed(client, served) -> None:
    got = client.get("/v1/models").json()
    assert [m["id"] for m in got["data"]] == [s.name for s in served] and got["object"] == "list"
    assert client.get(f"/v1/models/{served[0].name}").json()["id"] == served[0].name


@pytest.mark.parametrize("change, status, part, field", [
    ({"model": "gpt-4"}, 404, "there is no model 'gpt-4' here", None),
    ({"model": None}, 400, "model: is missing", "model"),
    ({"messages": "hi"}, 400, "messages: must be a list", "messages"),
    ({"messages": []}, 400, "messages: is empty", "messages"),
    ({"messages": [{"role": "user", "content": "x " * 600}]}, 400, "the context holds 256; serve the model with a larger --ctx", None),
    ({"temperature": "hot"}, 400, "temperature: must", "temperature"),
    ({"temperature": -1}, 400, "temperature: must", "temperature"),
    ({"n": 0}, 400, "n: must be a whole number from 1", "n"),
    ({"max_tokens": 1.5}, 400, "max_tokens: must be a whole number", "max_tokens"),
    ({"logit_bias": {"a": 1}}, 400, "token ids", "logit_bias"),
    ({"top_logprobs": 3}, 400, "needs logprobs", "top_logprobs"),
    ({"response_format": {"type": "xml"}}, 400, "json_schema", "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"type": "strin"}}}}}}, 400,
     "response_format.json_schema.schema.properties.a.type: 'strin'", "response_format.json_schema.schema.properties.a.type"),
    ({"tools": [{"type": "function", "function": {}}]}, 400, "tools[0].function.name: is missing", "tools[0].function.name"),
    ({"tool_choice": "required"}, 400, "there are no tools", "tool_choice"),
    ({"think": True}, 400, "think: this model's format has no thinking; leave it out or give false", "think"),
    ({"reasoning_effort": "high"}, 400, "reasoning_effort: this model's format has no thinking; leave it out or give none", "reasoning_effort"),
    ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs: 'messages' is not set here", "chat_template_kwargs"),
    ({"chat_template_kwargs": 5}, 400, "must be an object", "chat_template_kwargs"),
    ({"stream": "yes"}, 400, "stream: must be true or false", "stream"),
    ({"modalities": [{"a": 1}]}, 400, "only text comes out", "modalities"),
    ({"web_search_options": {}}, 400, "there is no web search", "web_search_options"),     # how it is asked for
    ({"regex": "(("}, 400, "regex: the grammar is refused: unclosed group", "regex"),
    ({"grammar": "start: nothing"}, 400, "grammar: the grammar is refused", "grammar"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}}}, 400, "cannot be enforced", "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object", "schema": {"type": "strin"}}}, 400, "'strin'", "response_format.schema.type"),
    ({"json_schema": {"type": "strin"}}, 400, "'strin'", "json_schema.type"),
])
def test_what_cannot_be_done_is_refused(client, name, change: dict, status: int, part: str, field: str | None) -> None:
    response = client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES, "max_tokens": 2, **change})
    error = response.json()["error"]
    assert response.status_code == status and part in error["message"] and error["param"] == field


def test_fields_that_ask_for_nothing_are_taken(client, name) -> None:
    empty = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "functions": None, "user": "me", "unknown": {"a": 1},
             "stop": None, "logprobs": False, "store": False, "seed": -5, "max_tokens": 1.0}
    assert client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES, **empty}).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": NaN}', b"[" * 100000, b'{"a":' * 200 + b"1" + b"}" * 200, b"\xff\xfe"])
def test_bodies_that_are_no_request(client, body: bytes) -> None:
    response = client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_a_body_has_a_limit(client, monkeypatch) -> None:
    monkeypatch.setattr(replies, "BODY_BYTES", 1000)
    assert client.post("/v1/chat/completions", content=b" " * 1001).status_code == 413


def test_no_file_of_the_server_is_read(client, served, tmp_path) -> None:
    there = tmp_path / "a.png"
    there.write_bytes(picture())
    answers: dict[Any, set[str]] = {there: set(), tmp_path / "b.png": set()}
    for path in answers:
        for url in (str(path), path.as_uri(), f"data:,{path}", f"http://127.0.0.1:1/{path.name}"):
            for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "image", "image": url}, {"type": "image", "path": url}):
                asked = {"model": served[1].name, "messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
                response = client.post("/v1/chat/completions", json=asked)
                assert response.status_code == 400
                answers[path].add(response.json()["error"]["message"].replace(str(path), "PATH").replace(path.name, "NAME"))
        for images in ([str(path)], str(path)):
            assert client.post("/api/chat", json={"model": served[1].name, "messages": [{"role": "user", "content": "a", "images": images}]}).status_code == 400
    one, other = answers.values()
    assert one == other                                      # they do not tell one that is there from one that is not


# -- Ollama ---------------------------------------------------------------------------------------------------------------


def test_ollamas_chat_is_the_librarys(client, model, name) -> None:
    want = model.chat(MESSAGES, max_tokens=9, seed=4, temperature=0.7)
    asked = {"model": name, "messages": MESSAGES, "options": {"num_predict": 9, "seed": 4, "temperature": 0.7}}
    response = client.post("/api/chat", json=asked)
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert response.headers["content-type"].startswith("application/x-ndjson")
    assert "".join(x["message"]["content"] for x in lines) == want and [x["done"] for x in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["done_reason"] == want.finish and lines[-1]["eval_count"] == len(want.tokens) and lines[-1]["prompt_eval_count"] == want.n_prompt
    whole = client.post("/api/chat", json={**asked, "stream": False}).json()
    assert whole["message"] == {"role": "assistant", "content": want} and whole["done"] and whole["total_duration"] > 0


def test_ollamas_generate(client, model, name) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    options = {"num_predict": 6, "temperature": 0}
    got = client.post("/api/generate", json={"model": name, "prompt": "Hi", "system": "Be brief.", "stream": False, "options": options}).json()
    assert got["response"] == model.chat(chat, max_tokens=6, temperature=0)
    raw = client.post("/api/generate", json={"model": name, "prompt": "Hi", "raw": True, "stream": False, "options": options}).json()
    assert raw["response"] == model.generate("Hi", max_tokens=6, temperature=0)
    assert client.post("/api/generate", json={"model": name}).json()["done_reason"] == "load"


def test_ollamas_pictures(client, served) -> None:
    data = base64.b64encode(picture(1)).decode()
    asked = {"model": served[1].name, "prompt": "What?", "images": [data], "stream": False, "options": {"num_predict": 4, "temperature": 0}}
    want = served[1].model.chat([{"role": "user", "content": "What?", "images": [picture(1)]}], max_tokens=4, temperature=0)
    assert client.post("/api/generate", json=asked).json()["response"] == want


def test_ollamas_lists(client, served, name) -> None:
    assert [m["name"] for m in client.get("/api/tags").json()["models"]] == [s.name for s in served]
    assert client.get("/api/ps").json()["models"][0]["size"] == served[0].model.plan.total
    assert client.get("/api/version").json() == {"version": pe.__version__}
    shown = client.post("/api/show", json={"model": name}).json()
    assert shown["details"]["family"] == "llama" and shown["capabilities"] == ["completion", "tools"] and shown["model_info"]["general.architecture"] == "llama"
    assert "vision" in client.post("/api/show", json={"name": served[1].name}).json()["capabilities"]


@pytest.mark.parametrize("path, change, part", [
    ("/api/chat", {"format": "xml"}, "JSON schema"), ("/api/chat", {"think": True}, "thinking"),
    ("/api/chat", {"options": {"num_ctx": 4096}}, "--ctx 4096"), ("/api/chat", {"options": {"tfs_z": 0.5}}, "no such step"),
    ("/api/chat", {"options": {"mirostat": 3}}, "options.mirostat: must be"),
    ("/api/pull", {}, "--allow-pull"), ("/api/delete", {}, "no request may delete"), ("/api/blobs/sha256:0", {}, "no request may store"),
])
def test_ollamas_refusals(client, name, path: str, change: dict, part: str) -> None:
    response = client.post(path, json={"model": name, "messages": MESSAGES, **change})
    assert response.status_code == 400 and part in response.json()["error"]


# -- Anthropic ------------------------------------------------------------------------------------------------------------


def anthropic_events(response: Any) -> list[Any]:
    found = []
    for event in response.text.strip().split("\n\n"):
        kind, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    return found


def test_anthropics_messages_are_the_librarys(client, model, name) -> None:
    chat = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    want = model.chat(chat, max_tokens=9, temperature=0, top_k=5)
    asked = {"model": name, "system": [{"type": "text", "text": "Be brief."}], "messages": MESSAGES, "max_tokens": 9, "temperature": 0, "top_k": 5}
    got = client.post("/v1/messages", json=asked).json()
    assert got["content"] == [{"type": "text", "text": want}] and got["role"] == "assistant" and got["type"] == "message"
    assert got["stop_reason"] == {"length": "max_tokens", "stop": "end_turn"}[want.finish] and got["stop_sequence"] is None
    assert got["usage"]["input_tokens"] + got["usage"]["cache_read_input_tokens"] == want.n_prompt and got["usage"]["output_tokens"] == len(want.tokens)
    events_ = anthropic_events(client.post("/v1/messages", json={**asked, "stream": True}))
    assert [e["type"] for e in events_ if e["type"] != "content_block_delta"] == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert "".join(e["delta"]["text"] for e in events_ if e["type"] == "content_block_delta") == want
    assert client.post("/v1/messages/count_tokens", json=asked).json() == {"input_tokens": want.n_prompt}


def test_anthropics_stop_sequences(client, model, name) -> None:
    want = model.chat(MESSAGES, max_tokens=9, temperature=0)
    asked = {"model": name, "messages": MESSAGES, "max_tokens": 9, "temperature": 0, "stop_sequences": ["never", want[2:4]]}
    got = client.post("/v1/messages", json=asked).json()
    assert got["stop_reason"] == "stop_sequence" and got["stop_sequence"] == want[2:4] and got["content"][0]["text"] == want[: want.index(want[2:4])]


def test_anthropics_pictures(client, served) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture(2)).decode()}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "What?"}]}]
    want = served[1].model.chat([{"role": "user", "content": [{"type": "image", "image": picture(2)}, {"type": "text", "text": "What?"}]}],
                                max_tokens=4, temperature=0)
    asked = {"model": served[1].name, "messages": messages, "max_tokens": 4, "temperature": 0}
    assert client.post("/v1/messages", json=asked).json()["content"][0]["text"] == want
    assert client.post("/v1/messages/count_tokens", json=asked).json()["input_tokens"] == want.n_prompt


@pytest.mark.parametrize("change, status, kind, part", [
    ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens: is missing"), ({"model": "claude"}, 404, "not_found_error", "claude"),
    ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "tools"), ({"system": 5}, 400, "invalid_request_error", "system"),
    ({"output_config": {"format": {"type": "json_schema"}}}, 400, "invalid_request_error", "output_config.format.schema: is missing"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "invalid_request_error", "thinking"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "/etc/passwd"}}]}]}, 400, "invalid_request_error", ""),
])
def test_anthropics_refusals(client, name, change: dict, status: int, kind: str, part: str) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens")[: 1 if change.keys() & {"max_tokens", "thinking", "output_config"} else 2]:
        response = client.post(path, json={"model": name, "messages": MESSAGES, "max_tokens": 2, **change})
        error = response.json()
        assert response.status_code == status and error["type"] == "error" and error["error"]["type"] == kind and part in error["error"]["message"]


# -- llama.cpp ------------------------------------------------------------------------------------------------------------


def test_llama_cpps_addresses(client, model, name) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    tokens = client.post("/tokenize", json={"model": name, "content": "Hello you"}).json()["tokens"]
    assert tokens == model.tokenize("Hello you", add_special=False)
    assert client.post("/detokenize", json={"model": name, "tokens": tokens}).json()["content"] == "Hello you"
    assert client.post("/apply-template", json={"model": name, "messages": MESSAGES}).json()["prompt"] == model.template.render(
        MESSAGES, add_generation_prompt=True)


# -- the guard ------------------------------------------------------------------------------------------------------------


def test_other_hosts_and_pages_are_refused(served) -> None:
    client = TestClient(application(served, hosts=("engine.home",), origins=("https://page.example",)), base_url="http://localhost:8080")
    for host, ok in {"localhost:8080": True, "127.0.0.1": True, "[::1]:80": True, "192.168.1.5:8080": True, "engine.home": True,
                     "evil.example": False, "localhost.evil.example": False, "": False}.items():
        assert client.get("/v1/models", headers={"Host": host}).status_code == (200 if ok else 403), host
    for origin, ok in {"http://localhost:8080": True, "https://page.example": True, "https://evil.example": False, "null": False}.items():
        response = client.get("/v1/models", headers={"Origin": origin})
        assert response.status_code == (200 if ok else 403), origin
        assert response.headers.get("access-control-allow-origin") == ("https://page.example" if "page" in origin else None)
    assert client.options("/v1/chat/completions", headers={"Origin": "https://page.example"}).status_code == 204


def test_keys(served) -> None:
    client = TestClient(application(served, api_keys=("one", "two")), base_url="http://localhost")
    for headers, ok in (({}, False), ({"Authorization": "Bearer one"}, True), ({"Authorization": "bearer two"}, True), ({"X-API-Key": "two"}, True),
                        ({"Authorization": "Bearer "}, False), ({"Authorization": "one"}, False), ({"Authorization": "Bearer onetwo"}, False)):
        assert client.get("/v1/models", headers=headers).status_code == (200 if ok else 401), headers
    assert client.get("/health").status_code == 200


def test_unknown_options_of_ollama_are_ignored_as_there(client, name) -> None:
    asked = {"model": name, "messages": MESSAGES, "stream": False, "options": {"num_predict": 1, "bogus": 1, "num_gpu": 99}}
    assert client.post("/api/chat", json=asked).status_code == 200


def test_the_only_model_needs_no_name_and_the_beginning_of_one_is_enough(served) -> None:
    one = TestClient(application(served[:1]), base_url="http://localhost")
    for asked in ({}, {"model": served[0].name[:2]}):
        assert one.post("/v1/completions", json={**asked, "prompt": "a", "max_tokens": 1}).json()["model"] == served[0].name
    assert one.post("/v1/completions", json={"model": "", "prompt": "a"}).status_code == 404


def test_the_root_says_that_it_runs(client) -> None:
    """Ollama's command asks for it first (HEAD /)."""
    assert client.get("/").text.startswith("pyengine is running") and client.head("/").status_code == 200


def test_unknown_addresses(client) -> None:
    for method, path, status in (("GET", "/v1/none", 404), ("POST", "/v1/models", 405), ("GET", "/..%2f..%2fetc/passwd", 404)):
        assert client.request(method, path).status_code == status
    assert "there is /v1/chat/completions" in client.post("/chat/completions", json={}).json()["error"]["message"]


# -- over a socket --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(served) -> Any:
    with running(application(served)) as url:
        yield "127.0.0.1", urlsplit(url).port


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_no_longer_worked_for(address, model, name, stream: bool) -> None:
    body = json.dumps({"model": name, "messages": MESSAGES, "temperature": 0, "stream": stream, "logit_bias": {str(t): -100 for t in model.tokenizer.eog_ids}}).encode()
    with socket.create_connection(address) as s:
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        if stream:
            assert s.recv(10)
    assert idle(model)


def test_many_clients_get_what_each_would_get_alone(address, model, name) -> None:
    asked = [{"model": name, "messages": [{"role": "user", "content": f"Tell me {i}"}], "max_tokens": 4 + i % 9, "seed": i} for i in range(24)]
    want = [model.chat(a["messages"], max_tokens=a["max_tokens"], seed=a["seed"]) for a in asked]

    def ask(a: dict[str, Any]) -> str:
        url = f"http://localhost:{address[1]}/v1/chat/completions"
        if a["seed"] % 2:
            return httpx.post(url, json=a, timeout=60).json()["choices"][0]["message"]["content"]
        with httpx.stream("POST", url, json={**a, "stream": True}, timeout=60) as response:
            lines = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
        return "".join(e["choices"][0]["delta"].get("content", "") for e in lines)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, asked)) == want
    assert idle(model)
