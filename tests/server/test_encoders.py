"""A model of encoders over HTTP: vectors as the library's, and everything that it cannot do refused in each interface's own form."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_towers

import pyengine as pe
from converters.writer import convert
from pyengine.errors import RequestError
from pyengine.server import replies
from pyengine.server.models import load, Models

httpx = pytest.importorskip("httpx")

TEXTS = ["a dog and a fox", "the lazy dog.", "x"]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Any:
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    tiny_towers.save_word_piece(folder)
    config = transformers.BertConfig(vocab_size=160, hidden_size=96, num_hidden_layers=2, num_attention_heads=6, intermediate_size=128,
                                     max_position_embeddings=64)
    file = convert(tiny_towers.make("BertModel", config, folder), folder / "words.gguf", "f32")
    yield Models([load(str(file), n_threads=1, n_seq=4)]).all[0]


def test_vectors_are_the_librarys(client, model, served) -> None:
    want = model.embed(TEXTS)
    response = client.post("/v1/embeddings", json={"model": "words", "input": [TEXTS[0], {"text": TEXTS[1]}, {"type": "text", "text": TEXTS[2]}]})
    got = np.array([d["embedding"] for d in response.json()["data"]], np.float32)
    n = sum(len(model.tokenize(t)) for t in TEXTS)
    assert np.array_equal(got, want) and response.json()["usage"] == {"prompt_tokens": n, "total_tokens": n}
    got = client.post("/api/embed", json={"model": "words", "input": TEXTS}).json()
    assert np.array_equal(np.array(got["embeddings"], np.float32), want) and got["prompt_eval_count"] == n
    got = client.post("/api/embeddings", json={"model": "words", "prompt": TEXTS[0]}).json()["embedding"]
    assert np.array_equal(np.array(got, np.float32), model.embed(TEXTS[0], normalize=False))
    short = client.post("/v1/embeddings", json={"input": TEXTS[0], "dimensions": 7}).json()["data"][0]["embedding"]
    assert len(short) == 7 and abs(np.linalg.norm(short) - 1) < 1e-6
    many = client.post("/v1/embeddings", json={"input": TEXTS * 60}).json()["data"]
    assert np.array_equal(np.array([d["embedding"] for d in many], np.float32), model.embed(TEXTS * 60))


def test_texts_that_are_too_long(client, model) -> None:
    long = "dog " * 100
    assert client.post("/v1/embeddings", json={"input": [TEXTS[0], long]}).json()["error"]["message"].startswith("input[1]: a text of 102 tokens")
    assert len(client.post("/api/embed", json={"model": "words", "input": long}).json()["embeddings"]) == 1          # Ollama's truncate
    assert "error" in client.post("/api/embed", json={"model": "words", "input": long, "truncate": False}).json()


def test_a_context_that_it_cannot_have(client, served) -> None:
    """Settings of a server are for all of its models; what a request or a program asks of this one is refused in words."""
    response = client.post("/api/embed", json={"model": "words", "input": "a dog", "options": {"num_ctx": 2048}})
    assert response.status_code == 400 and "options.num_ctx: the model reads texts of at most 64 tokens" in response.json()["error"]
    assert client.post("/api/embed", json={"model": "words", "input": "a dog", "options": {"num_ctx": 64}}).status_code == 200
    with pytest.raises(RequestError, match="n_seq=4: words.gguf has no conversations"):
        pe.load(served.file.path, n_seq=4)
    with pytest.raises(RequestError, match="compress: words.gguf has no conversations"):
        pe.load(served.file.path, compress="look-m:ratio=0.2")
    with pytest.raises(RequestError, match="n_ctx is 65, but the model reads texts of at most 64 tokens"):
        pe.load(served.file.path, n_ctx=65)


@pytest.mark.parametrize("ours, theirs", [
    ("longer than the context of 8; load with a larger n_ctx", "longer than the context of 8; serve the model with a larger --ctx"),
    ("x has no media encoder; load with mmproj=", "x has no media encoder; serve the model with --mmproj"),
    ("make it smaller, or load with images=(640, 480)", "make it smaller, or serve the model with --picture 640x480"),
    ("load with images=(width, height, number) for a larger number", "serve the model with --picture WIDTHxHEIGHT --pictures NUMBER for a larger number"),
    ("or load with images=(width, height) of the largest one", "or serve the model with --picture WIDTHxHEIGHT of the largest one"),
    ("it was loaded with images=0, without", "it was loaded with --pictures 0, without"),
    ("side by side; load with n_seq=4", "side by side; serve the model with --seq 4"),
    ("bert.pooling_type is rank: no vectors; for vectors of its hidden states give pooling=, one of mean", "bert.pooling_type is rank: no vectors"),
    ("bert.pooling_type is x, which is not known; give pooling=, one of mean", "bert.pooling_type is x, which is not known")])
def test_errors_name_no_argument_of_the_library(ours: str, theirs: str) -> None:
    assert replies.told(ours) == theirs


def test_what_it_cannot_do_is_refused(client, model) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for path, body, status in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, 400), ("/v1/completions", {"prompt": "a"}, 400),
            ("/api/chat", {"model": "words", "messages": [{"role": "user", "content": "a"}]}, 400), ("/api/generate", {"model": "words", "prompt": "a"}, 400),
            ("/v1/responses", {"input": "a"}, 400), ("/v1/messages", {"max_tokens": 4, "messages": [{"role": "user", "content": "a"}]}, 400),
            ("/v1/embeddings", {"input": [picture]}, 400), ("/infill", {"input_prefix": "a", "input_suffix": "b"}, 400),
            ("/apply-template", {"messages": [{"role": "user", "content": "a"}]}, 400)):
        response = client.post(path, json=body)
        assert response.status_code == status and "error" in response.json(), (path, response.status_code, response.text)


def test_lists_say_what_it_is_for(client, model) -> None:
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["words"]
    assert client.post("/api/show", json={"model": "words"}).json()["capabilities"] == ["embedding"]
    assert client.get("/api/ps").json()["models"][0]["name"] == "words"
    assert client.get("/api/tags").json()["models"][0]["name"] == "words"
    assert client.get("/pyengine/models").json()["models"] == []
    assert "pyengine_prompt_tokens_total" in client.get("/metrics").text
    assert client.post("/tokenize", json={"content": "a dog"}).json()["tokens"] == model.tokenize("a dog", add_special=False)
    assert client.get("/props").status_code in (200, 400)


def test_scores_need_a_reranker(client, model) -> None:
    response = client.post("/v1/rerank", json={"model": "words", "query": "a", "documents": ["b", {"text": "c"}]})
    assert response.status_code == 400 and "no" in response.json()["error"]["message"]
    for wrong in ({}, {"query": "a"}, {"query": "a", "documents": []}, {"query": "a", "documents": [3]}, {"query": 1, "documents": ["a"]}):
        assert client.post("/v1/rerank", json=wrong).status_code == 400


def test_a_text_names_no_file_of_the_server(tmp_path: Path) -> None:
    """To the library a text is a path where a model reads pictures only; a request's text must not be one."""
    import cases
    from starlette.testclient import TestClient

    from pyengine.server.app import application

    picture = tmp_path / "secret.png"
    tiny_towers.pictures()[0].save(picture)
    served = load(str(convert(cases.towers()["vit"](tmp_path / "vit"), tmp_path / "sees.gguf", "f32")), n_threads=1, n_ctx=512, n_seq=2)
    with pytest.raises(RequestError, match="n_ctx=512: sees.gguf reads pictures only, and has no context"):
        pe.load(tmp_path / "sees.gguf", n_ctx=512)
    with served.model, TestClient(application([served]), base_url="http://localhost:8080") as client:
        for path, field in (("/v1/embeddings", "input"), ("/api/embed", "input"), ("/api/embeddings", "prompt")):
            for text in (str(picture), picture.as_uri(), str(tmp_path / "none"), "a"):
                response = client.post(path, json={"model": "sees", field: text})
                assert response.status_code == 400 and "input[0]: sees.gguf reads pictures only: give one as" in response.text
        response = client.post("/api/embed", json={"model": "sees", "input": [], "options": {"num_ctx": 2048}})
        assert response.status_code == 400 and "options.num_ctx: the model reads pictures only" in response.json()["error"]
        shown = {"image": base64.b64encode(picture.read_bytes()).decode()}
        got = client.post("/v1/embeddings", json={"model": "sees", "input": shown}).json()["data"][0]["embedding"]
        assert np.array_equal(np.array(got, np.float32), served.model.embed(picture))


def test_a_reranker(tmp_path: Path) -> None:
    """It is not said to give vectors, and its tokens are those of the request, whatever else is asked meanwhile."""
    import transformers
    from starlette.testclient import TestClient

    from pyengine.server.app import application

    tiny_towers.save_word_piece(tmp_path)
    config = transformers.BertConfig(vocab_size=160, hidden_size=96, num_hidden_layers=1, num_attention_heads=6, intermediate_size=128,
                                     max_position_embeddings=64, num_labels=1)
    served = load(str(convert(tiny_towers.make("BertForSequenceClassification", config, tmp_path), tmp_path / "ranks.gguf", "f32")), n_threads=1)
    with served.model as model, TestClient(application([served]), base_url="http://localhost:8080") as client:
        assert served.capabilities == []
        refused = client.post("/v1/embeddings", json={"input": "a dog"})
        assert refused.status_code == 400 and refused.json()["error"]["message"] == "ranks.gguf gives scores and no vectors"
        ranked = model.ranked
        model.ranked = lambda *asked: (model.classify("another's text"), ranked(*asked))[1]
        found = client.post("/v1/rerank", json={"query": "a dog", "documents": TEXTS}).json()
        n = sum(len(model.tokenize("a dog")) + len(model.tokenize(text)) - 1 for text in TEXTS)
        assert found["usage"] == {"prompt_tokens": n, "total_tokens": n}
        assert {r["index"]: np.float32(r["relevance_score"]) for r in found["results"]} == dict(enumerate(model.rerank("a dog", TEXTS)))
