"""Every text architecture against transformers, on tiny random checkpoints in float32, at every position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cases
import oracle
import pyengine as pe
import tiny
from devices import on_card
from pyengine import ops
from pyengine.errors import RequestError
from pyengine.models import model_class

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (case.kind, config) for case in cases.select(sees=False) for name, config in case.compared.items()}
PLAIN = cases.kinds(sees=False, own_cache=True)
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
    got = pe.load(path, n_ctx=128).logits(ids)
    if on_card():                                            # queries are rounded as well: a router may choose another expert for a row
        errors = np.abs(got - want).max(1) / np.ptp(want)
        assert np.median(errors) <= 2e-3 and np.mean(errors > 2e-3) <= 0.1, errors
    else:
        assert_close(got, want, 2e-3)


@pytest.mark.parametrize("n_batch", [1, 7, 32])
def test_any_cut_of_the_prompt_gives_the_same_bits(case, n_batch: int) -> None:
    path, ids, _ = case
    whole = pe.load(path, n_ctx=128).logits(ids)
    assert np.array_equal(pe.load(path, n_ctx=128, n_batch=n_batch).logits(ids), whole)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(case, n_threads: int) -> None:
    path, ids, _ = case
    assert np.array_equal(pe.load(path, n_ctx=128, n_threads=n_threads).logits(ids), pe.load(path, n_ctx=128, n_threads=2).logits(ids))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("outtype", ["f16", "bf16"])
def test_half_precision_weights_are_used_exactly(kind: str, outtype: str, tiny_gguf) -> None:
    """The reference backend, which equals transformers on the float32 file, gets the same 16-bit weights."""
    path, _ = tiny_gguf(kind, outtype)
    ids = np.random.default_rng(0).integers(0, 512, 40).tolist()
    share = 1e-5 if not on_card() else {"f16": 2e-3, "bf16": 5e-5}[outtype]                  # where activations are rounded too
    assert_close(pe.load(path, n_ctx=64, kv_dtype="f32").logits(ids), oracle.logits(path, ids), share)


@pytest.mark.parametrize("kind", PLAIN)
def test_quantized_weights_cost_int8_activations_and_no_more(kind: str, tiny_gguf, monkeypatch) -> None:
    """Equal to the reference with activations rounded in blocks of 32. A value between two codes may round either way, and that
    row then differs by as much as rounding does: so the median row must agree, not the last."""
    path, _ = tiny_gguf(kind, "q8_0", **cases.find(kind).shallow)
    ids = np.random.default_rng(0).integers(0, 512, 40).tolist()
    got = pe.load(path, n_ctx=64, kv_dtype="f32").logits(ids)
    exact = oracle.logits(path, ids)
    monkeypatch.setattr(ops.linear, "fn", oracle.int8_activations)
    rounded = oracle.logits(path, ids)
    error = np.sqrt(np.mean((got - rounded) ** 2, axis=1)) / np.sqrt(np.mean((exact - rounded) ** 2))
    assert np.median(error) < 1e-4, error


def test_greedy_text_equals_transformers(tiny_gguf) -> None:
    path, folder = tiny_gguf("llama")
    model = pe.load(path, n_ctx=128, kv_dtype="f32")
    ids = np.random.default_rng(3).integers(0, 512, 20).tolist()
    answer = model.generate(ids, max_tokens=24, temperature=0)
    want = list(ids)
    for _ in range(len(answer.tokens)):
        want.append(int(tiny.hf_logits(folder, want)[-1].argmax()))
    assert answer.tokens == want[20:]


@pytest.mark.parametrize("kind", [c.kind for c in cases.select(sees=False) if c.converted and model_class(c.arch).absolute])
def test_positions_that_are_added_end_where_the_file_says(kind: str, tiny_gguf) -> None:
    path, _ = tiny_gguf(kind)
    with pytest.raises(RequestError, match="embeddings of 256 positions"):
        pe.load(path, n_ctx=300)
    model = pe.load(path, n_ctx=256)
    model.feed(list(range(20)))
    with pytest.raises(RequestError, match="positions are added to embeddings"):
        model.shift(4, 8)
