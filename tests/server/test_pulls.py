"""Ollama's /api/pull against a registry of this file's own: progress by file, one at a time, ended by a client that leaves."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from running import running
from servers import trickle

from pyengine.files.stores import find_model
from pyengine.server.allowed import Allowed
from pyengine.server.app import application
from pyengine.server.models import load

httpx = pytest.importorskip("httpx")
from starlette.testclient import TestClient  # noqa: E402  which needs httpx

BIG = bytes(range(256)) * 2048


@pytest.fixture(scope="module")
def served(tiny_gguf) -> Any:
    found = load(str(tiny_gguf("llama")[0]), n_ctx=64, n_threads=1)
    yield found
    found.model.close()


@pytest.fixture
def client(served, remote) -> Any:
    return TestClient(application([served], allowed=Allowed(pulls=True)), base_url="http://localhost")


def test_a_model_is_fetched_with_progress(client, remote) -> None:
    remote.model("library/tiny", {"model": BIG, "license": b"MIT"})
    lines = [json.loads(line) for line in client.post("/api/pull", json={"model": "tiny"}).text.splitlines()]
    assert lines[0] == {"status": "pulling manifest"} and [x["status"] for x in lines[-2:]] == ["writing manifest", "success"]
    files = [x for x in lines if "digest" in x]
    assert all(x["status"] == f"pulling {x['digest'][7:19]}" and x["completed"] <= x["total"] for x in files)
    assert sorted({x["total"] for x in files if x["completed"] == x["total"]}) == sorted({3, 23, len(BIG)})
    assert find_model("tiny").read_bytes() == BIG
    assert client.post("/api/pull", json={"name": "tiny", "stream": False}).json() == {"status": "success"}


def test_what_is_not_there_is_told(client) -> None:
    lines = [json.loads(line) for line in client.post("/api/pull", json={"model": "nothing"}).text.splitlines()]
    assert "no such model or tag" in lines[-1]["error"]
    response = client.post("/api/pull", json={"model": "nothing", "stream": False})
    assert response.status_code == 400 and "no such model or tag" in response.json()["error"]


@pytest.mark.parametrize("asked, part", [({"model": "../../x"}, "names no model"), ({"model": "http://169.254.169.254/a/b"}, "not from 169.254.169.254"),
                                         ({"model": "registry.example.org/a/b"}, "not from registry.example.org"), ({}, "name: is missing"),
                                         ({"model": "tiny", "insecure": True}, "insecure")])
def test_refusals(client, asked: dict, part: str) -> None:
    response = client.post("/api/pull", json=asked)
    assert response.status_code == 400 and part in response.json()["error"]


def test_nothing_is_fetched_unless_that_is_allowed(served, remote) -> None:
    remote.model("library/tiny", {"model": BIG})
    response = TestClient(application([served]), base_url="http://localhost").post("/api/pull", json={"model": "tiny"})
    assert response.status_code == 400 and "--allow-pull" in response.json()["error"] and not remote.seen


def test_a_client_that_leaves_stops_it_and_another_has_to_wait(served, remote) -> None:
    blob = remote.model("library/tiny", {"model": BIG})["model"]
    remote.faults[blob] = [trickle(100_000, 1.0), trickle(100_000, 1.0)]
    with running(application([served], allowed=Allowed(pulls=True))) as address:
        url, deadline = f"{address}/api/pull", time.monotonic() + 20
        with httpx.stream("POST", url, json={"model": "tiny"}) as response:
            lines = response.iter_lines()                    # which closes the answer when it is forgotten
            while not json.loads(next(lines)).get("completed"):
                pass
            second = httpx.post(url, json={"model": "tiny", "stream": False})
            assert second.status_code == 503 and "already" in second.json()["error"]
        again: Any = None
        while time.monotonic() < deadline:                   # the first one ends with the next piece that comes
            again = httpx.post(url, json={"model": "tiny", "stream": False}, timeout=20)
            if again.status_code == 200:
                break
            time.sleep(0.1)
        assert again.json() == {"status": "success"} and find_model("tiny").read_bytes() == BIG
