"""llama.cpp's interface: its forms of tokens, templates, completions and infill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyengine.server.app import application
from pyengine.server.models import load

pytest.importorskip("httpx")
from starlette.testclient import TestClient  # noqa: E402  which needs httpx

MESSAGES = [{"role": "user", "content": "Hi there"}]
CODER = Path(__file__).resolve().parents[2] / "models" / "qwen2.5-coder-0.5b-q4_k_m.gguf"


@pytest.fixture(scope="module")
def served(tiny_gguf) -> Any:
    found = load(str(tiny_gguf("llama")[0]), n_ctx=256, n_threads=1, n_seq=2)
    yield found
    found.model.close()


def test_tokens_with_pieces(client, model) -> None:
    text = "Hé 🙂" + model.tokenizer.piece(max(model.tokenizer.special_ids)).decode()
    got = client.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert [t["id"] for t in got] == model.tokenize(text, add_special=False)
    assert b"".join(t["piece"].encode() if isinstance(t["piece"], str) else bytes(t["piece"]) for t in got).decode().lstrip() == text
    assert client.post("/tokenize", json={"content": text, "add_special": True}).json()["tokens"] == model.tokenize(text)
    plain = client.post("/tokenize", json={"content": text, "parse_special": False}).json()["tokens"]
    assert plain == model.tokenizer.tokenize(text, add_special=False, parse_special=False) and plain != [t["id"] for t in got]


@pytest.mark.parametrize("prompt", ["Once upon", [5, 6, 7], ["Once", 9, "upon"]])
@pytest.mark.parametrize("stream", [False, True])
def test_completion(client, model, prompt: Any, stream: bool) -> None:
    want = model.generate(prompt, max_tokens=7, seed=3)
    response = client.post("/completion", json={"prompt": prompt, "n_predict": 7, "seed": 3, "stream": stream, "cache_prompt": True})
    parts = [json.loads(e[6:]) for e in response.text.strip().split("\n\n")] if stream else [response.json()]
    assert "".join(p["content"] for p in parts) == want and [p["stop"] for p in parts] == [False] * (len(parts) - 1) + [True]
    end = parts[-1]
    assert end["tokens_predicted"] == len(want.tokens) == end["timings"]["predicted_n"] and end["tokens_evaluated"] == want.n_prompt
    assert end["stop_type"] == {"length": "limit", "stop": "eos"}[want.finish] and end["stopping_word"] == ""


def test_a_stop_word_is_named(client, model) -> None:
    want = model.generate("Once upon", max_tokens=9, temperature=0)
    got = client.post("/completion", json={"prompt": "Once upon", "n_predict": 9, "temperature": 0, "stop": [want[2:4]]}).json()
    assert got["stop_type"] == "word" and got["stopping_word"] == want[2:4] and got["content"] == want[: want.index(want[2:4])]


def test_properties_tell_no_path(client, served) -> None:
    got = client.get("/props").json()
    assert got["total_slots"] == 2 and got["default_generation_settings"]["n_ctx"] == 256 and got["modalities"] == {"vision": False, "audio": False}
    assert got["chat_template"] == served.model.template.source and str(Path(served.model.file.path).parent) not in json.dumps(got)
    assert client.get("/slots").status_code == 501 and "what others ask" in client.get("/slots").json()["error"]["message"]


def test_a_template_is_applied(client, model) -> None:
    assert client.post("/apply-template", json={"messages": MESSAGES}).json()["prompt"] == model.template.render(MESSAGES, add_generation_prompt=True)
    for messages in ([{"role": "user"}, 5], "x", [{"role": 3}], [{"role": "user", "content": {"a": 1}}]):
        assert client.post("/apply-template", json={"messages": messages}).status_code == 400


@pytest.mark.parametrize("path, change, part", [
    ("/completion", {"prompt": None}, "prompt: must be a text"), ("/completion", {"prompt": [True]}, "prompt: must be a text"),
    ("/completion", {"n_probs": 3}, "n_probs: give logprobs to /v1/completions"), ("/completion", {"mirostat": 3}, "mirostat: must be"),
    ("/completion", {"dry_sequence_breakers": "x"}, "dry_sequence_breakers: must be a list"), ("/completion", {"samplers": ["top_k"]}, "order"),
    ("/completion", {"json_schema": {"type": "strin"}}, "json_schema.type: 'strin'"), ("/completion", {"regex": "(("}, "regex: the grammar is refused"),
    ("/completion", {"n_predict": "a"}, "n_predict"), ("/infill", {"input_prefix": "a"}, "not made to fill in the middle"),
    ("/infill", {"input_prefix": 5}, "input_prefix: must be a text"), ("/infill", {"input_extra": [{"text": 5}]}, "input_extra[0]"),
    ("/tokenize", {}, "content: is missing"), ("/detokenize", {"tokens": [10**9]}, "not in the vocabulary"), ("/detokenize", {"tokens": [1.5]}, "must be an int")])
def test_refusals(client, path: str, change: dict, part: str) -> None:
    response = client.post(path, json={"prompt": "a", **change} if path == "/completion" else change)
    assert response.status_code == 400 and part in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def coder() -> Any:
    if not CODER.exists():
        pytest.skip(f"{CODER.name} is not there")
    found = load(str(CODER), n_ctx=512, n_threads=1, n_seq=1)
    yield found
    found.model.close()


@pytest.mark.parametrize("stream", [False, True])
def test_infill(coder, stream: bool) -> None:
    client = TestClient(application([coder]), base_url="http://localhost")
    asked = {"input_prefix": "def add(a, b):\n", "prompt": "    return", "input_suffix": "\n\nprint(add(2, 3))\n", "n_predict": 6, "temperature": 0, "stream": stream}
    response = client.post("/infill", json=asked)
    parts = [json.loads(e[6:]) for e in response.text.strip().split("\n\n")] if stream else [response.json()]
    text = "".join(p["content"] for p in parts)
    assert text.startswith(" a + b") and parts[-1]["tokens_evaluated"] == len(coder.model.tokenize(
        "<|fim_prefix|>def add(a, b):\n    return<|fim_suffix|>\n\nprint(add(2, 3))\n<|fim_middle|>"))
    same = client.post("/v1/completions", json={"prompt": asked["input_prefix"] + asked["prompt"], "suffix": asked["input_suffix"], "max_tokens": 6, "temperature": 0})
    assert same.json()["choices"][0]["text"] == text
    ollamas = client.post("/api/generate", json={"prompt": asked["input_prefix"] + asked["prompt"], "suffix": asked["input_suffix"], "stream": False,
                                                 "options": {"num_predict": 6, "temperature": 0}})
    assert ollamas.json()["response"] == text


def test_other_files_are_read(coder) -> None:
    client = TestClient(application([coder]), base_url="http://localhost")
    asked = {"input_extra": [{"filename": "shapes.py", "text": "def area_of_hexagon(side):\n    return 2.598 * side ** 2\n"}], "input_prefix": "from shapes import ",
             "input_suffix": "\n", "n_predict": 5, "temperature": 0}
    with_files, without = (client.post("/infill", json=a).json() for a in (asked, {**asked, "input_extra": []}))
    assert with_files["content"].startswith("area_of") and with_files["tokens_evaluated"] > without["tokens_evaluated"] + 20
