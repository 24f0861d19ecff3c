"""Embeddings over HTTP: the library's vectors in each interface's own form."""

from __future__ import annotations

import base64
import threading
from typing import Any

import numpy as np
import pytest

from pyengine.server import embeddings
from pyengine.server.models import load, Models

httpx = pytest.importorskip("httpx")

TEXTS = ["What is in the picture?", "A dog and a fox in the snow.", "x"]
LONG = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def served(tiny_gguf) -> Any:
    found = Models([load(str(tiny_gguf("llama")[0]), n_ctx=128, n_threads=1, n_seq=2)]).all
    yield found[0]
    found[0].model.loop.close()


def vectors(response: Any) -> np.ndarray:
    """The vectors of an OpenAI answer, in order."""
    found = response.json()["data"]
    assert [d["index"] for d in found] == list(range(len(found))) and {d["object"] for d in found} == {"embedding"}
    return np.array([d["embedding"] for d in found], np.float32)


# -- OpenAI ---------------------------------------------------------------------------------------------------------------


def test_one_text_and_a_list(client, model, served) -> None:
    want = model.embed(TEXTS)
    response = client.post("/v1/embeddings", json={"model": served.name, "input": TEXTS, "user": "me"})
    got = response.json()
    assert np.array_equal(vectors(response), want) and got["object"] == "list" and got["model"] == served.name
    n = sum(len(model.tokenize(t)) for t in TEXTS)
    assert got["usage"] == {"prompt_tokens": n, "total_tokens": n}
    assert np.array_equal(vectors(client.post("/v1/embeddings", json={"input": TEXTS[1]})), want[1:2])


def test_token_ids(client, model) -> None:
    ids = [model.tokenize(t) for t in TEXTS]
    want = model.embed(TEXTS)
    assert np.array_equal(vectors(client.post("/v1/embeddings", json={"input": ids})), want)
    assert np.array_equal(vectors(client.post("/v1/embeddings", json={"input": ids[0]})), want[:1])
    assert np.array_equal(vectors(client.post("/v1/embeddings", json={"input": [TEXTS[0], ids[1]]})), want[:2])


def test_base64_is_little_endian_float32(client, model) -> None:
    got = client.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"}).json()["data"]
    found = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in got]
    assert np.array_equal(found, model.embed(TEXTS))


def test_dimensions_cut_and_give_length_1_again(client, model) -> None:
    want = model.embed(TEXTS, normalize=False)[:, :10].astype(np.float64)
    got = vectors(client.post("/v1/embeddings", json={"input": TEXTS, "dimensions": 10}))
    assert np.allclose(got, want / np.linalg.norm(want, axis=1, keepdims=True), rtol=1e-6, atol=0)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_a_long_list_is_queued_in_parts(client, model, monkeypatch) -> None:
    monkeypatch.setattr(embeddings, "QUEUED", 3)
    monkeypatch.setattr(model.loop, "limit", 4)
    texts = [f"text {i}" for i in range(20)]
    assert np.array_equal(vectors(client.post("/v1/embeddings", json={"input": texts})), model.embed(texts))
    assert model.loop.n_waiting == model.loop.n_running == 0


def test_a_full_queue_takes_nothing(client, model, monkeypatch) -> None:
    monkeypatch.setattr(model.loop, "limit", 1)
    response = client.post("/v1/embeddings", json={"input": [LONG[:300]] * 60})
    assert response.status_code == 503 and "try again later" in response.json()["error"]["message"]
    assert model.embed("a").shape == (96,) and model.loop.n_waiting == 0


def test_beside_answers(client, model, served) -> None:
    want, vector = model.generate("Once upon", max_tokens=40, temperature=0), model.embed(TEXTS)
    texts: list[str] = []

    def ask() -> None:
        asked = {"prompt": "Once upon", "max_tokens": 40, "temperature": 0}
        texts.append(client.post("/v1/completions", json=asked).json()["choices"][0]["text"])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for t in threads:
        t.start()
    found = [vectors(client.post("/v1/embeddings", json={"input": TEXTS})) for _ in range(3)]
    for t in threads:
        t.join(60)
    assert texts == [want] * 3 and all(np.array_equal(f, vector) for f in found)


@pytest.mark.parametrize("change, field, part", [
    ({"input": None}, "input", "is missing"), ({"input": ""}, "input", "is empty"), ({"input": []}, "input", "is empty"),
    ({"input": ["a", ""]}, "input", "empty text"), ({"input": [1.5]}, "input", "must be a text"), ({"input": {"a": 1}}, "input[0]", "must be a text"),
    ({"input": [{"image": 3}]}, "input[0].image", "must be a text"), ({"input": [{"image": "x.png"}]}, None, "input[0]: "), ({"input": [[]]}, "input", "must be a text"), ({"input": [True]}, "input", "must be a text"), ({"input": ["a"] * 2049}, "input", "at most 2048"),
    ({"encoding_format": "int8"}, "encoding_format", "float or base64"), ({"dimensions": 0}, "dimensions", "1 to 96"),
    ({"dimensions": 97}, "dimensions", "1 to 96"), ({"input": [10**6]}, None, "input[0]: token id 1000000 is outside"),
])
def test_refusals(client, change: dict, field: str | None, part: str) -> None:
    response = client.post("/v1/embeddings", json={"input": "a", **change})
    error = response.json()["error"]
    assert response.status_code == 400 and part in error["message"] and error["param"] == field and error["type"] == "invalid_request_error"


def test_what_exceeds_the_context_has_openais_code(client) -> None:
    response = client.post("/v1/embeddings", json={"input": ["a", LONG]})
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "context_length_exceeded"
    assert error["message"].startswith("input[1]: ") and "--ctx" in error["message"]
    assert client.post("/v1/embeddings", json={"model": "other", "input": "a"}).status_code == 404


# -- Ollama ---------------------------------------------------------------------------------------------------------------


def test_ollamas_embed(client, model, served) -> None:
    got = client.post("/api/embed", json={"model": served.name, "input": TEXTS, "options": {"num_ctx": 64}, "keep_alive": "5m"}).json()
    assert np.array_equal(np.array(got["embeddings"], np.float32), model.embed(TEXTS)) and got["model"] == served.name
    assert got["prompt_eval_count"] == sum(len(model.tokenize(t)) for t in TEXTS)
    assert got["total_duration"] > got["load_duration"] >= 0
    one = client.post("/api/embed", json={"model": served.name, "input": TEXTS[0], "dimensions": 7}).json()["embeddings"]
    assert len(one) == 1 and len(one[0]) == 7 and abs(np.linalg.norm(one[0]) - 1) < 1e-6
    assert len(client.post("/api/embed", json={"input": "a", "dimensions": 5000}).json()["embeddings"][0]) == 96     # as Ollama does


def test_ollamas_empty_inputs_load_the_model(client) -> None:
    for given in ({}, {"input": ""}, {"input": []}):
        assert client.post("/api/embed", json=given).json()["embeddings"] == []
    assert client.post("/api/embeddings", json={}).json() == {"embedding": []}


def test_long_texts_are_cut_unless_that_is_not_wanted(client, model) -> None:
    got = client.post("/api/embed", json={"input": ["a", LONG]}).json()
    assert np.array_equal(np.array(got["embeddings"][1], np.float32), model.embed([model.tokenize(LONG)[:128]])[0])
    assert got["prompt_eval_count"] == len(model.tokenize("a")) + 128
    refused = client.post("/api/embed", json={"input": ["a", LONG], "truncate": False})
    assert refused.status_code == 400 and refused.json()["error"].startswith("input[1]: ") and list(refused.json()) == ["error"]


def test_the_older_address_gives_one_vector_as_it_is(client, model) -> None:
    got = client.post("/api/embeddings", json={"prompt": TEXTS[0]}).json()
    assert list(got) == ["embedding"] and np.array_equal(np.array(got["embedding"], np.float32), model.embed(TEXTS[0], normalize=False))


@pytest.mark.parametrize("path, body, part", [
    ("/api/embed", {"input": 5}, "must be a text"), ("/api/embed", {"input": ["a", 5]}, "must be a text"),
    ("/api/embed", {"input": "a", "options": {"num_ctx": 4096}}, "--ctx 4096"), ("/api/embed", {"input": "a", "truncate": "no"}, "truncate"),
    ("/api/embeddings", {"prompt": 5}, "prompt: must be a text"), ("/api/embeddings", {"prompt": LONG}, "--ctx"),
])
def test_ollamas_refusals(client, path: str, body: dict, part: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 400 and part in response.json()["error"]


def test_capabilities_name_models_whose_files_say_how_vectors_are_made(client, served, monkeypatch) -> None:
    assert served.capabilities == ["completion", "tools"]
    monkeypatch.setattr("pyengine.server.models.pooling_of", lambda h: "mean")
    assert client.post("/api/show", json={}).json()["capabilities"] == ["completion", "tools", "embedding"]
