"""Real clients: what they sent is sent again, byte for byte as JSON, and each answer has what they need; where they are installed they run themselves.

tests/data/clients has what `tests/support/record_clients.py` recorded, with the versions of the packages: openai, ollama, anthropic, LangChain's,
LiteLLM's for Python; openai, ai (with its providers for OpenAI), ollama and Anthropic's of npm. Names that an answer gives (of responses, items, calls) and
that later requests mention are replaced by those of the answers that come here. None of the packages is needed for that.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import clients
import frameworks  # noqa: F401  which adds its cases
import needs
import other_clients  # noqa: F401  which adds its cases
import pytest
from conftest import real_path
from record_clients import DATA, HERE, names_of

from pyengine.server.app import application, listen, server
from pyengine.server.models import load

pytest.importorskip("httpx")
from starlette.testclient import TestClient  # noqa: E402  which needs httpx

ROOT = Path(__file__).resolve().parents[2]
RECORDED = {path.stem: json.loads(path.read_text()) for path in sorted(DATA.glob("*.json"))}
OFTEN = ("openai", "ollama", "anthropic")                    # the others send what these send, or nearly
LONG = ("chat_tools_in_parallel_and_back", "chat_tool_of_a_class", "responses_parsed", "messages_parsed")
REPLAYED = [pytest.param(title, case, marks=[] if title in OFTEN and case not in LONG else [pytest.mark.slow], id=f"{title}-{case}")
            for title, made in RECORDED.items() for case in made["cases"]]
LIVE = [pytest.param(package, case, id=f"{package}-{case}") for package, cases in clients.CASES.items() for case in cases]
NODE = os.environ.get("PYENGINE_TEST_NODE", "")              # a folder with node_modules


@pytest.fixture(scope="module")
def served() -> Any:
    files = [real_path("qwen"), real_path("smollm2"), ROOT / "converters/demo/weights/demo-q8_0.gguf"]
    found = [load(str(path), n_ctx=1024, n_seq=2) for path in files]
    yield found
    for s in found:
        s.model.close()


@pytest.fixture(scope="module")
def app(served) -> Any:
    return application(served)


@pytest.fixture(scope="module")
def client(app) -> Any:
    return TestClient(app, base_url="http://localhost:8080")


@pytest.fixture(scope="module")
def url(app) -> Iterator[str]:
    """The address of a server on a real socket."""
    taken, running = listen("127.0.0.1", 0), server(app)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    running.should_exit = True
    thread.join(10)


# -- what was recorded -----------------------------------------------------------------------------------------------------


def table_of(exchange: dict[str, Any], status: int) -> Any:
    """What the client needs of an answer that is one JSON value."""
    path, anthropic = exchange["path"].partition("?")[0], "anthropic-version" in exchange["headers"]
    if status >= 400:
        return needs.OLLAMA_ERROR if path.startswith("/api/") else needs.ANTHROPIC_ERROR if anthropic else needs.OPENAI_ERROR
    if path.startswith("/v1/models"):
        one = needs.ANTHROPIC_MODEL if anthropic else needs.MODEL
        return one if path != "/v1/models" else {"data": [one], **({"has_more": bool, "first_id": str, "last_id": str} if anthropic else {"object": "list"})}
    if path.startswith("/v1/responses/"):
        return ({"object": "response.input_tokens", "input_tokens": int} if path.endswith("/input_tokens") else
                {"object": "list", "data": [{"id": str, "type": str}], "has_more": bool, "first_id": str, "last_id": str} if path.endswith("/input_items") else
                {"id": str, "object": "response", "deleted": bool} if exchange["method"] == "DELETE" else needs.RESPONSE)
    return {"/v1/chat/completions": needs.COMPLETION, "/v1/completions": needs.TEXT, "/v1/responses": needs.RESPONSE, "/v1/embeddings": needs.VECTORS,
            "/api/chat": needs.OLLAMA_CHAT, "/api/generate": needs.OLLAMA_TEXT, "/api/tags": needs.OLLAMA_TAGS, "/api/ps": needs.OLLAMA_PS,
            "/api/show": needs.OLLAMA_SHOW, "/api/embed": needs.OLLAMA_VECTORS, "/api/embeddings": {"embedding": [float]},
            "/v1/messages": needs.MESSAGE, "/v1/messages/count_tokens": {"input_tokens": int}}[path]


def check_stream(path: str, kind: str, text: str) -> None:
    """Check each piece of a streamed answer, and how it begins and ends."""
    if kind == "application/x-ndjson":
        lines = [json.loads(line) for line in text.splitlines()]
        table = needs.OLLAMA_CHAT if path == "/api/chat" else needs.OLLAMA_TEXT
        assert [f for line in lines for f in needs.faults(table, line)] == []
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True] and needs.faults(needs.OLLAMA_ENDS, lines[-1]) == []
        return
    assert kind.startswith("text/event-stream") and text.endswith("\n\n")
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.removesuffix("\n\n").split("\n\n")]
    if path in ("/v1/chat/completions", "/v1/completions"):
        assert blocks.pop() == {"data": "[DONE]"} and all(set(block) == {"data"} for block in blocks)
        pieces = [json.loads(block["data"]) for block in blocks]
        assert [f for piece in pieces for f in needs.faults(needs.CHUNK if path == "/v1/chat/completions" else needs.TEXT, piece)] == []
        assert len({piece["id"] for piece in pieces}) == 1 and any(choice["finish_reason"] for piece in pieces for choice in piece["choices"])
        return
    tables = needs.RESPONSE_EVENTS if path == "/v1/responses" else needs.MESSAGE_EVENTS
    events = [json.loads(block["data"]) for block in blocks]
    assert [event["type"] for event in events] == [block["event"] for block in blocks]
    names = [event["type"].removeprefix("response.") for event in events]
    assert [f for name, event in zip(names, events, strict=True) for f in needs.faults(tables[name], event)] == []
    assert (names[0], names[-1] in ("completed", "incomplete", "message_stop")) == ("created" if path == "/v1/responses" else "message_start", True)


@pytest.mark.parametrize("title, case", REPLAYED)
def test_what_clients_send_is_answered_as_they_need(client, title: str, case: str) -> None:
    names: dict[str, str] = {}
    for exchange in RECORDED[title]["cases"][case]:
        path, body = exchange["path"], json.dumps(exchange["body"])
        for old, new in names.items():
            path, body = path.replace(old, new), body.replace(json.dumps(old), json.dumps(new))
        content = None if exchange["body"] is None else body
        response = client.request(exchange["method"], path, headers=exchange["headers"], content=content)
        assert response.status_code == exchange["status"], response.text[:500]
        assert response.headers["x-request-id"] == response.headers["request-id"] != ""
        kind = response.headers["content-type"]
        if kind == "application/json":
            table = table_of(exchange, response.status_code)
            if path in ("/api/chat", "/api/generate") and response.json().get("done_reason") not in (None, "load"):
                assert needs.faults(needs.OLLAMA_ENDS, response.json()) == []
            assert needs.faults(table, response.json()) == []
        else:
            check_stream(path, kind, response.text)
        found = names_of(response.text)
        names.update({old: found[int(place)] for place, old in exchange.get("names", {}).items() if int(place) < len(found)})


@pytest.mark.parametrize("path, headers, table", [("/v1/chat/completions", {}, needs.OPENAI_ERROR), ("/v1/messages", {}, needs.ANTHROPIC_ERROR),
                                                  ("/v1/models", {"anthropic-version": "2023-06-01"}, needs.ANTHROPIC_ERROR), ("/api/chat", {}, needs.OLLAMA_ERROR)])
def test_refusals_before_any_route_have_the_interfaces_form(served, path: str, headers: dict[str, str], table: Any) -> None:
    client = TestClient(application(served, api_keys=["k"]), base_url="http://localhost")
    response = client.post(path, json={}, headers=headers)
    assert response.status_code == 401 and needs.faults(table, response.json()) == [] and response.headers["x-request-id"]
    for key in ({"authorization": "Bearer k"}, {"x-api-key": "k"}):
        for nowhere in ("/nowhere", "/there"):
            response = client.post(path + nowhere, json={}, headers={**headers, **key})
            assert response.status_code in (404, 405) and needs.faults(table, response.json()) == []


def test_browsers_may_send_what_clients_add(served) -> None:
    """OpenAI's and Anthropic's clients for browsers send headers of their own, which a preflight asks for."""
    client, asked = TestClient(application(served, origins=["https://a.page"]), base_url="http://localhost"), "authorization, x-stainless-lang, anthropic-version"
    preflight = {"origin": "https://a.page", "access-control-request-method": "POST", "access-control-request-headers": asked}
    headers = client.options("/v1/messages", headers=preflight).headers
    assert headers["access-control-allow-headers"] == asked and "X-Request-Id" in headers["access-control-expose-headers"]
    assert "x: y" not in client.options("/v1/messages", headers={**preflight, "access-control-request-headers": "a b: x: y"}).headers["access-control-allow-headers"]
    assert client.options("/v1/messages", headers={**preflight, "origin": "https://b.page"}).status_code == 403


def test_tables_find_what_is_missing() -> None:
    good = {"id": "x", "object": "model", "created": 1, "owned_by": "me"}
    assert needs.faults(needs.MODEL, good) == [] and needs.faults(needs.MODEL, {**good, "more": 1}) == []
    assert needs.faults(needs.MODEL, {**good, "created": True}) == ["answer.created: True is no int"]
    assert needs.faults(needs.MODEL, {**good, "object": "x"}) == ["answer.object: 'x' is not 'model'"]
    assert needs.faults({"a": [needs.maybe(int)], "b?": str}, {"a": [1, None, "x"]}) == ["answer.a[2]: 'x' is not null"]
    assert needs.faults({"a": [int]}, {}) == ["answer.a is missing"] and needs.faults([int], {}) == ["answer: {} is no list"]


def test_recordings_tell_nothing_of_their_machine() -> None:
    for title, made in RECORDED.items():
        text = json.dumps(made)
        assert made["version"] and made["made_by"] == "tests/support/record_clients.py", title
        assert not [word for word in ("user-agent", "stainless", "/home", "/root", "/tmp", "sk-") if word in text.lower()], title


# -- clients that run ------------------------------------------------------------------------------------------------------


def test_a_streamed_answer_comes_as_chunks_of_http(url) -> None:
    """Python's own client reads it line by line, as it comes; when it leaves, the server stops."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    body = json.dumps({"model": clients.TOOLS, "messages": clients.STORY, "stream": True, "temperature": 0})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200 and response.headers["transfer-encoding"] == "chunked"
    lines = [response.readline() for _ in range(8)]
    assert all(line.startswith(b"data: {") for line in lines[::2]) and lines[1::2] == [b"\n"] * 4 and clients.working(url)
    response.close()
    connection.close()
    clients.comes_to_rest(url)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_reads_a_stream(url) -> None:
    body = json.dumps({"model": clients.CHAT, "prompt": "Name a river.", "options": {"num_predict": 6}})
    got = subprocess.run(["curl", "-sSN", url + "/api/generate", "-d", body], capture_output=True, check=True, timeout=60).stdout
    lines = [json.loads(line) for line in got.splitlines()]
    assert lines[-1]["done"] and "".join(line["response"] for line in lines)


def test_a_client_that_has_no_time_leaves_others_alone(url) -> None:
    """One gives up after 0.2 seconds; another one's answer is what it is alone."""
    asked = json.dumps({"model": clients.TOOLS, "prompt": "def f(", "raw": True, "stream": False, "options": {"num_predict": 24, "temperature": 0}})
    address = urlsplit(url)

    def ask(body: str, seconds: float, path: str = "/api/generate") -> Any:
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=seconds)
        try:
            connection.request("POST", path, body)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    alone, found = ask(asked, 60)["response"], []
    other = threading.Thread(target=lambda: found.append(ask(asked, 60)["response"]))
    other.start()
    time.sleep(0.05)
    with pytest.raises(TimeoutError):
        ask(json.dumps({"model": clients.TOOLS, "messages": clients.STORY, "stream": False}), 0.2, "/api/chat")
    other.join()
    clients.comes_to_rest(url)
    assert found == [alone]


@pytest.mark.slow
@pytest.mark.parametrize("package, case", LIVE)
def test_clients_of_python(url, package: str, case: str) -> None:
    pytest.importorskip(package)
    clients.CASES[package][case](url)


@pytest.mark.slow
@pytest.mark.skipif(not NODE, reason="PYENGINE_TEST_NODE names no folder with node_modules")
def test_clients_of_npm(url) -> None:
    script, env = str(HERE / "clients.mjs"), {**os.environ, "CLIENTS_HOME": NODE}
    for package, cases in json.loads(subprocess.run(["node", script, "--list"], capture_output=True, check=True).stdout).items():
        for case in cases:
            ran = subprocess.run(["node", script, url, package, case], capture_output=True, text=True, timeout=120, env=env, check=False)
            assert ran.returncode == 0, f"{package} {case}: {ran.stderr[-2000:]}"
