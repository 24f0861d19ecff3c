"""Completions of plain text: the prompt given back and scored, offsets of tokens, texts filled in between two others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyengine as pe
from pyengine.server.models import load

MODELS = Path(__file__).resolve().parents[2] / "models"
CODER = MODELS / "qwen2.5-coder-0.5b-q4_k_m.gguf"


@pytest.fixture(scope="module")
def served(tiny_gguf) -> Any:
    found = load(str(tiny_gguf("llama")[0]), n_ctx=512, n_threads=1, n_seq=4, n_batch=32)
    yield found
    found.model.close()


def expected(model: Any, ids: list[int]) -> list[float]:
    """Log-probabilities of all tokens but the first, by the definition."""
    logits = model.logits(ids)[:, : model.tokenizer.vocab_size].astype(np.float64)
    total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return [float(logits[i, token] - total[i]) for i, token in enumerate(ids[1:])]


def events(response: Any) -> list[Any]:
    return [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]


def merged(found: list[Any], n: int = 1) -> list[Any]:
    """Streamed choices put together."""
    out = [{"text": "", "finish_reason": None, "logprobs": {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}} for _ in range(n)]
    for choice in (c for e in found for c in e["choices"]):
        one = out[choice["index"]]
        one["text"] += choice["text"]
        one["finish_reason"] = choice["finish_reason"] or one["finish_reason"]
        for name, values in (choice["logprobs"] or {}).items():
            one["logprobs"][name] += values
    return out


@pytest.mark.parametrize("n_words", [3, 90])
def test_a_text_is_scored_as_the_logits_say(client, model, n_words: int) -> None:
    text = "Once upon a time " * (n_words // 3)
    ids = model.tokenize(text)
    got = client.post("/v1/completions", json={"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 2}).json()
    choice = got["choices"][0]
    assert choice["text"] == text and choice["finish_reason"] == "length" and got["usage"]["completion_tokens"] == 0
    assert choice["logprobs"]["token_logprobs"][0] is None and choice["logprobs"]["top_logprobs"][0] is None
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"][1:], expected(model, ids), atol=2e-5)
    assert len(choice["logprobs"]["tokens"]) == len(ids) == got["usage"]["prompt_tokens"] and got["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_harness_is_served(client, model) -> None:
    """What lm-evaluation-harness sends for a task of choices, and how it reads the answer (lm_eval/models/openai_completions.py)."""
    contexts, ends = ["The cat sat on", "Rivers run to"], [" the mat", " the sea again"]
    asked = [[*model.tokenize(a), *model.tokenize(b, add_special=False)] for a, b in zip(contexts, ends)]
    lengths = [len(model.tokenize(a)) for a in contexts]
    got = client.post("/v1/completions", json={"prompt": asked, "model": "f32", "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, "temperature": 0}).json()
    assert [c["index"] for c in got["choices"]] == [0, 1]
    for choice, ids, n in zip(got["choices"], asked, lengths):
        scores, best = choice["logprobs"]["token_logprobs"][n:-1], choice["logprobs"]["top_logprobs"][n:-1]
        assert sum(scores) == pytest.approx(sum(expected(model, ids)[n - 1 :]), abs=1e-4)
        greedy = [int(np.argmax(row)) == token for row, token in zip(model.logits(ids)[n - 1 :], ids[n:])]
        assert [score == max(top.values()) for score, top in zip(scores, best)] == greedy


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_ends_at_once_has_a_token_too(client, model, stream: bool) -> None:
    """Else a client that asks for one token beside the prompt, and drops it, drops one of the prompt's."""
    end = min(model.tokenizer.eog_ids)
    asked = {"prompt": "Once upon", "max_tokens": 1, "echo": True, "logprobs": 1, "logit_bias": {str(end): 100}, "stream": stream}
    response = client.post("/v1/completions", json=asked)
    choice = merged(events(response))[0] if stream else response.json()["choices"][0]
    n = len(model.tokenize("Once upon"))
    assert choice["text"] == "Once upon" and choice["finish_reason"] == "stop" and len(choice["logprobs"]["tokens"]) == n + 1
    assert choice["logprobs"]["text_offset"][-1] == len("Once upon")
    assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(expected(model, [*model.tokenize("Once upon"), end])[-1], abs=2e-5)


def test_the_echo_is_no_other_answer(client, model) -> None:
    asked = {"prompt": "Once upon", "max_tokens": 9, "seed": 3, "logprobs": 1}
    plain, echoed = (client.post("/v1/completions", json={**asked, "echo": e}).json()["choices"][0] for e in (False, True))
    n = len(model.tokenize("Once upon"))
    assert echoed["text"] == "Once upon" + plain["text"]
    for name in plain["logprobs"]:
        assert echoed["logprobs"][name][n:] == plain["logprobs"][name], name
    only = client.post("/v1/completions", json={**asked, "echo": True, "logprobs": None}).json()["choices"][0]
    assert only["text"] == echoed["text"] and only["logprobs"] is None


@pytest.mark.parametrize("change", [{}, {"echo": True}, {"echo": True, "max_tokens": 0}, {"n": 2, "echo": True}, {"logit_bias": {"5": 40, "9": 40}}])
def test_streamed_is_the_same(client, change: dict) -> None:
    asked = {"prompt": "Once upon é🙂", "max_tokens": 12, "seed": 2, "temperature": 1.5, "logprobs": 1, **change}
    want = client.post("/v1/completions", json=asked).json()["choices"]
    got = merged(events(client.post("/v1/completions", json={**asked, "stream": True})), len(want))
    for a, b in zip(want, got):
        assert a["text"] == b["text"] and a["finish_reason"] == b["finish_reason"] and a["logprobs"] == b["logprobs"]


def test_offsets_are_places_in_the_text(client, model) -> None:
    text = "Hé 🙂 you"
    choice = client.post("/v1/completions", json={"prompt": text, "max_tokens": 20, "echo": True, "logprobs": 0, "seed": 1}).json()["choices"][0]
    found = choice["logprobs"]
    assert found["text_offset"] == sorted(found["text_offset"]) and found["text_offset"][0] == 0 and found["text_offset"][-1] <= len(choice["text"])
    for token, at in zip(found["tokens"], found["text_offset"]):
        if not token.startswith("bytes:") and token not in ("<s>", model.detokenize([model.tokenizer.bos_id])):
            assert choice["text"][at:].startswith(token.lstrip(" ")) or choice["text"][at:].startswith(token), (token, at)


def test_scores_beside_others(model) -> None:
    """A scored prompt and answers of others in the same steps: each as alone."""
    alone = model.submit([5, 6, 7] * 30, max_tokens=3, temperature=0, prompt_logprobs=1).result()
    want = model.submit("Tell me", max_tokens=30, temperature=0).result()
    handles = [model.submit("Tell me", max_tokens=30, temperature=0, client=str(i)) for i in range(3)]
    scored = model.submit([5, 6, 7] * 30, max_tokens=3, temperature=0, prompt_logprobs=1)
    assert [h.result(60) for h in handles] == [want] * 3
    assert scored.result(60) == alone and scored.report.prompted == alone.report.prompted
    assert scored.report.prompted[0] is None and len(scored.report.prompted) == 90
    assert all(-math.inf < s.logprob <= 0 and len(s.top) == 1 for s in scored.report.prompted[1:])


@pytest.mark.parametrize("change, part", [({"suffix": "x"}, "suffix: this model was not made to fill in the middle"), ({"echo": 1}, "echo: must be true or false"),
                                          ({"best_of": 3}, "best_of: answers are not ranked"), ({"logprobs": 6}, "logprobs: must be a whole number from 0 to 5"),
                                          ({"suffix": "x", "echo": True}, "suffix: does not go together"), ({"suffix": 5}, "suffix: must be a text")])
def test_refusals(client, change: dict, part: str) -> None:
    response = client.post("/v1/completions", json={"prompt": "a", **change})
    assert response.status_code == 400 and part in response.json()["error"]["message"]


@pytest.mark.skipif(not CODER.exists(), reason=f"{CODER.name} is not there")
def test_the_middle_is_filled_in() -> None:
    before, after = "def add(a, b):\n    return", "\n\nprint(add(2, 3))\n"
    with pe.load(CODER, n_ctx=256, n_threads=1) as model:
        fim = model.tokenizer.fim
        assert [model.tokenizer.piece(i) for i in fim] == [b"<|fim_prefix|>", b"<|fim_suffix|>", b"<|fim_middle|>", b"<|repo_name|>", b"<|file_sep|>"]
        from pyengine.server.infill import laid_out

        assert laid_out(model.tokenizer, before, after, "suffix") == model.tokenize(f"<|fim_prefix|>{before}<|fim_suffix|>{after}<|fim_middle|>")
        assert fim.suffix not in laid_out(model.tokenizer, "<|fim_suffix|>", "", "suffix")[1:-2]
        assert " a + b" in model.generate(laid_out(model.tokenizer, before, after, "suffix"), max_tokens=8, temperature=0)
