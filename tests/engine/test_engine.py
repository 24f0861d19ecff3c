"""The engine's own promises: cache reuse, stops, errors, plans; on tiny random models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyengine as pe
from pyengine.errors import ContextOverflowError, ModelNotFoundError, RequestError, UnsupportedModelError

IDS = np.random.default_rng(5).integers(0, 512, 60).tolist()


@pytest.fixture(scope="module")
def model(tiny_gguf):
    return pe.load(tiny_gguf("llama")[0], n_ctx=128)


@pytest.fixture(scope="module")
def sliding(tiny_gguf):
    return pe.load(tiny_gguf("gemma3_text")[0], n_ctx=128, n_batch=8)


def test_a_second_turn_reuses_the_prefix(model) -> None:
    model.reset()
    fresh = model.generate(IDS[:50], max_tokens=8, temperature=0)
    model.reset()
    model.generate(IDS[:30], max_tokens=1, temperature=0)
    again = model.generate(IDS[:50], max_tokens=8, temperature=0)
    assert (fresh.n_cached, again.n_cached) == (0, 30)
    assert again.tokens == fresh.tokens


def test_a_sliding_cache_goes_back_only_as_far_as_it_remembers(sliding) -> None:
    sliding.reset()
    sliding.generate(IDS[:50], max_tokens=1, temperature=0)
    near = sliding.generate([*IDS[:46], 7, 7], max_tokens=6, temperature=0)
    assert near.n_cached == 46                                     # 14 cells hold what a window of 6 needs
    far = sliding.generate([*IDS[:20], 7, 7], max_tokens=6, temperature=0)
    assert far.n_cached == 0                                       # long overwritten: computed anew, not guessed
    sliding.reset()
    assert sliding.generate([*IDS[:20], 7, 7], max_tokens=6, temperature=0).tokens == far.tokens
    sliding.reset()
    assert sliding.generate([*IDS[:46], 7, 7], max_tokens=6, temperature=0).tokens == near.tokens


def test_context_overflow_is_an_error_that_says_so(tiny_gguf) -> None:
    small = pe.load(tiny_gguf("llama")[0], n_ctx=32)
    with pytest.raises(ContextOverflowError, match="prompt has 60 tokens, but the context holds 32"):
        small.generate(IDS)
    with pytest.raises(ContextOverflowError, match="prompt has 60 tokens"):
        small.logits(IDS)
    pieces = small.stream(IDS[:30], max_tokens=None, temperature=0, logit_bias=((small.tokenizer.eos_id, -1e9),))
    full = pieces.answer()                                   # what fits is the answer, not an error
    assert full.finish == "length" and len(full.tokens) == 3 and full == small.detokenize(full.tokens)
    assert len(small.generate(IDS[:30], max_tokens=2, temperature=0).tokens) <= 2


def test_stop_strings_end_the_text_and_are_not_part_of_it(model) -> None:
    text = model.generate(IDS[:20], max_tokens=40, temperature=0)
    stop = text[10:13]
    cut = model.generate(IDS[:20], max_tokens=40, temperature=0, stop=[stop])
    assert cut == text[: text.find(stop)] and cut.finish == "stop"
    assert "".join(model.stream(IDS[:20], max_tokens=40, temperature=0, stop=stop)) == cut
    assert model.generate(IDS[:20], max_tokens=40, temperature=0, stop=["\0never"]) == text


def test_the_same_seed_gives_the_same_text(model) -> None:
    a, b, c = (model.generate(IDS[:20], max_tokens=30, temperature=1.5, seed=s).tokens for s in (1, 1, 2))
    assert a == b != c


def test_bad_requests_are_named(model) -> None:
    for call, text in [
        (lambda: model.generate([]), "prompt is empty"),
        (lambda: model.generate([1, 99999]), "token id 99999"),
        (lambda: model.generate([1, -1]), "token id -1"),
        (lambda: model.generate([1, 2.5]), "float"),
        (lambda: model.generate([True]), "bool"),
        (lambda: model.generate("x", images=["a.png"]), "takes no pictures"),
        (lambda: model.generate("x", stop=[""]), "stop"),
        (lambda: model.generate("x", temperature=-1), "temperature"),
        (lambda: model.generate("x", max_tokens=-1), "max_tokens"),
    ]:
        with pytest.raises(RequestError, match=text):
            call()
    with pytest.raises(UnsupportedModelError, match="no image encoder"):
        model.encode_image(None)


def test_parts_are_taken_as_they_are(model) -> None:
    ids = model.tokenize("hello there", add_special=False)
    assert np.array_equal(model.logits([1, "hello there", 2]), model.logits([1, *ids, 2]))


def test_load_refuses_bad_settings(tiny_gguf, tmp_path) -> None:
    path = tiny_gguf("llama")[0]
    for settings, text in [({"kv_dtype": "q3"}, "kv_dtype"), ({"n_ctx": 0}, "n_ctx"), ({"n_batch": 0}, "n_batch"), ({"device": "tpu"}, "device")]:
        with pytest.raises(RequestError, match=text):
            pe.load(path, **settings)
    with pytest.raises(ModelNotFoundError):
        pe.load(tmp_path / "none.gguf")


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "q8_0"])
def test_the_plan_counts_what_is_allocated(tiny_gguf, kv_dtype: str) -> None:
    path = tiny_gguf("gemma3_text")[0]
    before = pe.plan(path, n_ctx=100, kv_dtype=kv_dtype, n_batch=8)
    model = pe.load(path, n_ctx=100, kv_dtype=kv_dtype, n_batch=8)
    p = model.program
    assert before.items == model.plan.items
    assert before.of("weights") == p.weights.nbytes and before.of("arena") == p.arena.nbytes
    assert before.of("kv") == p.state_memory.nbytes
    per_cell = {"f32": 4 * 32, "f16": 2 * 32, "q8_0": 34}[kv_dtype] * 2 * 2        # keys and values of 2 heads of 32
    cells = [i.nbytes // per_cell for i in before.items if i.purpose == "kv" and i.factors]
    assert cells == [14, 14, 14, 14, 14, 100, 14]                                  # window 6 + batch 8; the global layer in full


def test_q8_0_cache_stays_close(tiny_gguf) -> None:
    path = tiny_gguf("llama", head_dim=32)[0]
    want = pe.load(path, n_ctx=64, kv_dtype="f32").logits(IDS)
    got = pe.load(path, n_ctx=64, kv_dtype="q8_0").logits(IDS)
    assert 0 < np.abs(got - want).max() < 0.03 * (want.max() - want.min())


def test_cpu_graph_equals_the_reference() -> None:
    rng = np.random.default_rng(0)
    m = pe.Dim("m", 9)

    def build(g: pe.Graph):
        rng = np.random.default_rng(1)
        x = g.input("x", (m, 32))
        h = pe.ops.linear(x, [rng.standard_normal((48, 32)).astype(np.float32)])[0]
        t = pe.ops.transpose(h.reshape(-1, 4, 12), axes=(1, 0, 2))
        u = pe.ops.transpose(g.constant(rng.standard_normal((7, 4, 12)).astype(np.float32)), axes=(1, 0, 2))
        return pe.ops.softmax(pe.ops.matmul(t, u), scale=0.2)

    for n in (1, 9, 0):
        x = rng.standard_normal((n, 32)).astype(np.float32)
        g1, g2 = pe.Graph(), pe.Graph()
        got = g1.compile(build(g1), device="cpu").run(x=x)
        want = g2.compile(build(g2), device="reference").run(x=x)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("wrong, part", [(5, "a mapping of names"), ({1: 2}, "a mapping of names"), ({"tools": []}, "'tools' is not set here")])
def test_options_of_a_template_are_checked(wrong: Any, part: str, tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64, n_threads=1)
    for ask in (lambda: model.chat([{"role": "user", "content": "a"}], max_tokens=1, template_options=wrong),
                lambda: model.submit(messages=[{"role": "user", "content": "a"}], max_tokens=1, template_options=wrong)):
        with pytest.raises(RequestError, match=part):
            ask()
