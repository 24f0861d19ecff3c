"""Text models against transformers, on tiny random checkpoints in float32, at every position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyengine as pe
import tiny

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias-head_dim-tied": ("llama", {"attention_bias": True, "head_dim": 32, "tie_word_embeddings": True}),
    **{f"llama-{rope}": ("llama", {"rope_parameters": dict(tiny.ROPES[rope])}) for rope in tiny.ROPES},
    "mistral-sliding": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-untied-sliding": ("qwen2", {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "gemma3": ("gemma3_text", {}),
    "gemma3-softcap": ("gemma3_text", {"final_logit_softcapping": 5.0}),
    "gemma3-scale": ("gemma3_text", {"query_pre_attn_scalar": 50}),
}
N = 100


@pytest.fixture(scope="module", params=CASES)
def case(request, tiny_gguf):
    kind, config = CASES[request.param]
    path, folder = tiny_gguf(kind, **config)
    ids = np.random.default_rng(0).integers(0, 512, N).tolist()
    return path, ids, tiny.hf_logits(folder, ids)


def assert_close(got: np.ndarray, want: np.ndarray, share: float) -> None:
    worst = np.abs(got - want).max() / (want.max() - want.min())
    assert worst <= share, f"worst difference is {worst:.2e} of the logits' range"


def test_logits_at_every_position(case) -> None:
    path, ids, want = case
    got = pe.load(path, n_ctx=128, kv_dtype="f32").logits(ids)
    assert_close(got, want, 1e-5)
    assert (got.argmax(-1) == want.argmax(-1)).all()


def test_f16_cache(case) -> None:
    path, ids, want = case
    assert_close(pe.load(path, n_ctx=128).logits(ids), want, 2e-3)


@pytest.mark.parametrize("n_batch", [1, 7, 32])
def test_any_cut_of_the_prompt_gives_the_same_bits(case, n_batch: int) -> None:
    path, ids, _ = case
    whole = pe.load(path, n_ctx=128).logits(ids)
    assert np.array_equal(pe.load(path, n_ctx=128, n_batch=n_batch).logits(ids), whole)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(case, n_threads: int) -> None:
    path, ids, _ = case
    assert np.array_equal(pe.load(path, n_ctx=128, n_threads=n_threads).logits(ids), pe.load(path, n_ctx=128, n_threads=2).logits(ids))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_other_weight_formats(kind: str, outtype: str, tiny_gguf) -> None:
    path, folder = tiny_gguf(kind, outtype)
    ids = np.random.default_rng(0).integers(0, 512, 40).tolist()
    got, want = pe.load(path, n_ctx=64, kv_dtype="f32").logits(ids), tiny.hf_logits(folder, ids)
    assert_close(got, want, {"f16": 2e-3, "bf16": 2e-2, "q8_0": 3e-2}[outtype])


def test_greedy_text_equals_transformers(tiny_gguf) -> None:
    path, folder = tiny_gguf("llama")
    model = pe.load(path, n_ctx=128, kv_dtype="f32")
    ids = np.random.default_rng(3).integers(0, 512, 20).tolist()
    answer = model.generate(ids, max_tokens=24, temperature=0)
    want = list(ids)
    for _ in range(len(answer.tokens)):
        want.append(int(tiny.hf_logits(folder, want)[-1].argmax()))
    assert answer.tokens == want[20:]
