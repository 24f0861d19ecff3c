"""Encoder-decoders over HTTP: completions, streams, beams, chat, embeddings; what they cannot do is an error of the request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import tiny
import tiny_sources

from converters.writer import convert
from pyengine.server.models import load, Models

httpx = pytest.importorskip("httpx")
TEXT = tiny.TEXTS[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("t5")
    path = convert(tiny_sources.make(cases.sources()["t5"], folder / "hf"), folder / "t5.gguf")
    found = Models([load(str(path), n_threads=1)]).all
    yield found[0]
    found[0].model.loop.close()


def test_completions(client: Any, model: Any) -> None:
    want = model.generate(TEXT, max_tokens=8)
    got = client.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 8}).json()
    n = len(model.tokenize(TEXT))
    assert got["choices"][0]["text"] == want and got["usage"]["prompt_tokens"] == n == want.n_prompt
    several = client.post("/v1/completions", json={"prompt": [TEXT, "a dog"], "max_tokens": 8}).json()["choices"]
    assert [c["text"] for c in several] == [want, model.generate("a dog", max_tokens=8)]
    with client.stream("POST", "/v1/completions", json={"prompt": TEXT, "max_tokens": 8, "stream": True}) as r:
        lines = [line for line in r.iter_lines() if line.startswith("data: {")]
    import json

    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines) == want


def test_beams(client: Any, model: Any) -> None:
    got = client.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 8, "n_beams": 3, "length_penalty": 2.0})
    assert got.status_code == 200, got.text
    assert got.json()["choices"][0]["text"] == model.generate(TEXT, max_tokens=8, n_beams=3, length_penalty=2.0)
    wrong = client.post("/v1/completions", json={"prompt": TEXT, "n_beams": 3, "top_p": 0.5})
    assert wrong.status_code == 400 and "top_p does not go with beams" in wrong.text


def test_chat_is_one_message(client: Any, model: Any) -> None:
    user = {"role": "user", "content": TEXT}
    got = client.post("/v1/chat/completions", json={"messages": [user], "max_tokens": 8}).json()
    assert got["choices"][0]["message"]["content"] == model.generate(TEXT, max_tokens=8)
    wrong = client.post("/v1/chat/completions", json={"messages": [user, {"role": "assistant", "content": "b"}, user]})
    assert wrong.status_code == 400 and "one message of a user" in wrong.text


def test_vectors(client: Any, model: Any) -> None:
    got = client.post("/v1/embeddings", json={"input": [TEXT, "a dog"]}).json()
    assert np.array_equal(np.array([d["embedding"] for d in got["data"]], np.float32), model.embed([TEXT, "a dog"]))
    assert got["usage"]["prompt_tokens"] == sum(len(model.tokenize(t)) for t in (TEXT, "a dog"))


def test_a_prompt_has_no_probabilities(client: Any) -> None:
    wrong = client.post("/v1/completions", json={"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 1})
    assert wrong.status_code == 400 and "foretells nothing" in wrong.text
