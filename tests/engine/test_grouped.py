"""Caches whose keys are quantized by channel, in groups of tokens: an independent computation of the rule, and all that conversations do."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cases
import pyengine as pe
from answers import told
from groups import ask, fewer_in_full, IDS, KINDS as COMMON, path, R, SETTINGS  # noqa: F401  fixtures among them
from op_cases import elements, loaded, stored
from pyengine.cache import policy, sessions
from pyengine.dtype import dtype as dtype_of
from pyengine.errors import RequestError, SessionError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("fewer_in_full")
KINDS = {**COMMON, "kivi2/q8_0": ("Q2_1_CHANNELS", "Q8_0")}


def attention_in_groups(kinds: tuple[str, str]) -> Any:
    """Attention by the rule, token after token, as transformers calls it: q, k, v of float32 [1, heads, n, e]."""
    import torch

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **more: Any) -> tuple[Any, None]:
        q, k, v = (x[0].double().numpy() for x in (q, k.half().float(), v.half().float()))
        (h, n, e), whole = q.shape, k.shape[1] // 32 * 32
        packed = [loaded(stored(x[:, :whole].astype(np.float32), kind)).astype(np.float64) for x, kind in zip((k, v), kinds)]
        out = np.zeros((n, h, e))
        for i in range(n):
            end = max(0, i + 1 - R) // 32 * 32               # groups that are whole R tokens before
            keys, values = (np.concatenate([x[:, :min(end, 32)], y[:, min(end, 32) : end], x[:, end : i + 1]], 1) for x, y in zip((k, v), packed))
            keys, values = (np.repeat(x, h // len(x), 0) for x in (keys, values))
            s = np.einsum("he,hke->hk", q[:, i], keys) * scaling
            p = np.exp(s - s.max(1, keepdims=True))
            out[i] = np.einsum("hk,hke->he", p / p.sum(1, keepdims=True), values)
        return torch.tensor(out, dtype=torch.float32)[None], None

    return attend


@pytest.mark.parametrize("kv_dtype", KINDS)
def test_logits_are_those_of_an_independent_computation(tiny_gguf, kv_dtype: str) -> None:
    """transformers, one layer of it, with an attention of NumPy: a value near the middle of two codes may become either, so few rows differ by more."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    path, folder = tiny_gguf("llama", head_dim=32, num_hidden_layers=1)
    AttentionInterface.register("groups", attention_in_groups(KINDS[kv_dtype]))
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="groups", dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs(torch.tensor([IDS])).logits[0].numpy()
    got = pe.load(path, kv_dtype=kv_dtype, **SETTINGS).logits(IDS)
    full = pe.load(path, **SETTINGS).logits(IDS)
    span = np.ptp(want)
    error, lost = np.abs(got - want).max(1) / span, np.abs(full - want).max(1) / span
    assert np.median(error) < 2e-6 and error.max() < 1e-4, (np.median(error), error.max())
    assert np.median(lost[96:]) > 0.01                       # what the rule changes is far more
    assert np.array_equal(got[:63], full[:63])                                 # none of these reads a group


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("kv_dtype", ["kivi4", "kivi2"])
def test_results_do_not_depend_on_cuts_and_threads(tiny_gguf, kind: str, kv_dtype: str) -> None:
    path = tiny_gguf(kind, **({"head_dim": 32} if kind == "llama" else {}))[0]
    seen = [Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8))] if cases.find(kind).sees else []
    prompt = [*IDS[:90], *seen, *IDS[90:180]]
    want = told(ask(pe.load(path, kv_dtype=kv_dtype, **SETTINGS), prompt))
    for other in ({"n_batch": 7}, {"n_batch": 256}, {"n_batch": 33, "n_threads": 3}, {"n_threads": 1, "n_seq": 3}):
        assert told(ask(pe.load(path, kv_dtype=kv_dtype, **{**SETTINGS, **other}), prompt)) == want, other


def test_one_token_after_the_other_is_the_same_as_a_prompt(path) -> None:
    model = pe.load(path, kv_dtype="kivi2", **{**SETTINGS, "n_batch": 1})
    assert np.array_equal(model.logits(IDS[:150]), pe.load(path, kv_dtype="kivi2", **SETTINGS).logits(IDS[:150]))


def test_neighbours_do_not_matter(path) -> None:
    alone = pe.load(path, kv_dtype="kivi4", **SETTINGS)
    want = []
    for start in (0, 20, 40):
        alone.reset()
        want.append(told(ask(alone, IDS[start : start + 150], 40)))
    model = pe.load(path, kv_dtype="kivi4", n_seq=3, **SETTINGS)
    streams = [model.stream(IDS[start : start + 150], max_tokens=40, temperature=0.7, seed=1,
                            logit_bias=tuple((i, -1e9) for i in model.tokenizer.eog_ids)) for start in (0, 20, 40)]
    assert [told(s.answer()) for s in streams] == want


@pytest.mark.parametrize("n_seq", [1, 3])
def test_a_prompt_goes_on_from_another_one(path, n_seq: int) -> None:
    """Longer, cut back within a group, and shared: what is not there any more is computed anew, and results are a new conversation's."""
    fresh = pe.load(path, kv_dtype="kivi2", **SETTINGS)
    prompts = [IDS[:150], IDS[:200], [*IDS[:185], 7, 8, 9], [*IDS[:40], 5], IDS[:210], [*IDS[:150], 4, 4, *IDS[150:200]]]
    want = []
    for prompt in prompts:
        fresh.reset()
        want.append(told(ask(fresh, prompt, 12)))
    model, cached = pe.load(path, kv_dtype="kivi2", n_seq=n_seq, **SETTINGS), []
    for prompt, own in zip(prompts, want):
        answer = ask(model, prompt, 12)
        cached.append(answer.n_cached)
        assert told(answer) == own
    assert cached[1] == 150 and cached[2] == 185 and cached[3] == 0            # 40 of 200: not in the ring any more
    assert [told(ask(model, prompt, 12)) for prompt in reversed(prompts)] == want[::-1]


def test_a_shared_page_is_written_by_nobody_else(path) -> None:
    """Two go on from one beginning that ends within a group; each has its own end, and the first one its own again."""
    model = pe.load(path, kv_dtype="kivi4", n_seq=3, **{**SETTINGS, "n_batch": 128})
    ask(model, IDS[:112], 1)
    ends = [IDS[120:200], IDS[140:220], IDS[120:200]]
    got = [ask(model, [*IDS[:112], *end], 20) for end in ends]
    assert all(answer.n_cached >= 112 for answer in got)
    fresh = pe.load(path, kv_dtype="kivi4", **SETTINGS)
    for end, answer in zip(ends, got):
        fresh.reset()
        assert told(ask(fresh, [*IDS[:112], *end], 20)) == told(answer)


@pytest.mark.parametrize(("kind", "kv_dtype"), [("llama", "kivi2"), ("gemma3", "kivi4"), ("gemma3_text", "kivi4/q4_0")])
def test_sessions(tiny_gguf, tmp_path, kind: str, kv_dtype: str) -> None:
    path = tiny_gguf(kind, **({"head_dim": 32} if kind == "llama" else {}))[0]
    model = pe.load(path, kv_dtype=kv_dtype, **SETTINGS)
    first = ask(model, IDS[:150])
    assert model.save(tmp_path / "a", first) == (tmp_path / "a").stat().st_size
    longer = [*IDS[:150], *first.tokens, *IDS[150:200]]
    on = ask(model, longer)
    for settings in ({}, {"n_ctx": 300, "n_batch": 7, "n_seq": 2}):
        other = pe.load(path, kv_dtype=kv_dtype, **{**SETTINGS, **settings})
        n = other.restore(tmp_path / "a")
        again = ask(other, longer)
        assert again.n_cached == on.n_cached == n == 157 and told(again) == told(on)


def renamed(path: Path, *formats: str) -> tuple[int, ...]:
    """Write a saved conversation with other formats in its header, or its own again; return ggml's numbers of those that it had."""
    head, body = path.read_bytes()[32 : 32 + sessions.HEADER.size], path.read_bytes()[32 + sessions.HEADER.size :]
    values = list(sessions.HEADER.unpack(head))
    old = tuple(values[6:8])
    values[6:8] = [dtype_of(name).id for name in formats] or old
    head = sessions.HEADER.pack(*values)
    path.write_bytes(sha256(head).digest() + head + body)
    return old


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_sessions_name_the_format_of_groups(tiny_gguf, tmp_path, kind: str) -> None:
    """Whose keys they are: early files named that of the tokens in full, and come back too; no other kind of cache reads them."""
    path = tiny_gguf(kind, **({"head_dim": 32} if kind == "llama" else {}))[0]
    models = {kv: pe.load(path, kv_dtype=kv, **SETTINGS) for kv in ("kivi4", "kivi2", "f16")}
    for kv, model in models.items():
        model.save(tmp_path / kv, ask(model, IDS[:150]))
    want = told(ask(models["kivi4"], IDS[:200]))
    assert renamed(tmp_path / "kivi4", "F16", "F16") == tuple(dtype_of(name).id for name in KINDS["kivi4"])
    models["kivi4"].reset()
    assert models["kivi4"].restore(tmp_path / "kivi4") == 157 and told(ask(models["kivi4"], IDS[:200])) == want
    for kv, file, why in (("kivi2", "kivi4", "formats F16/F16, this model's Q2_1_CHANNELS/Q2_1"), ("kivi4", "f16", "formats F16/F16, this model's Q4_1_CHANNELS"),
                          ("kivi4", "kivi2", "formats Q2_1_CHANNELS/Q2_1, this model's"), ("f16", "kivi2", "formats Q2_1_CHANNELS/Q2_1"),
                          ("f16", "kivi4", "cut off or damaged")):
        with pytest.raises(SessionError, match=why):
            models[kv].restore(tmp_path / file)


@pytest.mark.parametrize(("kv_dtype", "key", "value"), [("kivi4", 20, 20), ("kivi2", 12, 12), ("kivi4/q4_0", 20, 18)])
@pytest.mark.parametrize("n_seq", [1, 3])
def test_the_plan_counts_what_is_allocated(tiny_gguf, kv_dtype: str, key: int, value: int, n_seq: int) -> None:
    """Of one layer: a cell for each token, of 32 elements in one block; the window of the last ones, and the first ones, in f16."""
    settings = {"n_ctx": 400, "kv_dtype": kv_dtype, "n_batch": 8, "n_seq": n_seq}
    path = tiny_gguf("gemma3_text")[0]
    before = pe.plan(path, **settings)
    model = pe.load(path, **settings)
    assert before.items == model.plan.items and before.of("kv") == model.program.state_memory.nbytes
    sizes = [i.nbytes for i in before.items if i.purpose == "kv" and i.factors and "window" not in i.detail]
    cells, ring, heads = 448 if n_seq > 1 else 416, 96, 2
    assert sizes == [heads * n_seq * n for n in (cells * (key + value), ring * 2 * 64, 32 * 2 * 64)]


def test_what_is_refused(tiny_gguf, path) -> None:
    for wrong, why in (("q8_0/kivi4", "go with keys of kivi4 or kivi2"), ("kivi3", "kivi4"), ("f16/kivi2", "last tokens are in full")):
        with pytest.raises(RequestError, match=why):
            pe.load(path, kv_dtype=wrong)
    with pytest.raises(UnsupportedModelError, match="do not divide a head of 16"):
        pe.load(tiny_gguf("llama")[0], kv_dtype="kivi4", **SETTINGS)
    model = pe.load(path, kv_dtype="kivi4", **SETTINGS)
    ask(model, IDS[:100])
    with pytest.raises(RequestError, match="removed from the middle"):
        model._runner.shift(model._runner.cells.conversations[0], 10, 20)


def test_what_a_query_reads_follows_from_its_number() -> None:
    index = np.arange(300)
    parts = [p.visible(index) for p in (policy.Pinned(R), policy.Grouped(recent=R), policy.Recent(recent=R))]
    for i in index:
        (a, b), (c, d), (e, f) = ((int(lo[i]), int(hi[i])) for lo, hi in parts)
        assert a == 0 and f == i + 1 and (b == c or c == d) and d == e and e % 32 == 0
        assert [*range(a, b), *range(c, d), *range(e, f)] == list(range(i + 1)) and (e == 0 or R <= i + 1 - e < R + 32)


def test_elements_of_a_group_are_seen() -> None:
    x = np.random.default_rng(0).standard_normal((1, 32, 32)).astype(np.float32)
    assert np.abs(elements(stored(x, "Q4_1_CHANNELS")) - x).max() < 0.3
