"""Keys in groups of tokens, by channel, together with compression: an independent computation of both, and all that conversations do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cases
import groups
import pyengine as pe
from groups import fewer_in_full, IDS, KINDS, path, R, SETTINGS  # noqa: F401  fixtures among them
from op_cases import elements, loaded, mixed, stored
from pyengine.cache import eviction, policy, regroup
from pyengine.cache.compression.base import Compression
from pyengine.dtype import dtype
from pyengine.engine.quantizer import quantized
from test_compressed import IDS as SHORT, picture, told

pytestmark = pytest.mark.usefixtures("fewer_in_full")
POLICIES = (pe.H2O(ratio=0.4), pe.LookM(ratio=0.5), pe.StreamingLLM(ratio=0.6), pe.SnapKV(budget=90, when="always", merge="averaged"))


def ask(model: Any, parts: list[Any], n: int, **more: Any) -> Any:
    return groups.ask(model, parts, n, speculate=False, **more)


# -- the rule -------------------------------------------------------------------------------------------------------------


def whole_groups(n: int) -> int:
    """How many cells row n reads in groups."""
    return max(0, n + 1 - R) // 32 * 32


class Cells:
    """Cells of one layer: in full as float16 holds them, and in groups, where `numbers` go that stand for their codes."""

    def __init__(self, heads: int, e: int, kinds: tuple[str, str]):
        self.full = [np.zeros((heads, 0, e)) for _ in kinds]
        self.packed = [np.zeros((heads, 0, e)) for _ in kinds]
        self.kinds, self.tokens, self.sums = kinds, np.zeros((heads, 0), int), np.zeros((heads, 0))

    def add(self, token: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Add one token, and make the group that its row is the first to read."""
        self.full = [np.concatenate([x, y[:, None]], 1) for x, y in zip(self.full, (keys, values))]
        self.tokens = np.concatenate([self.tokens, np.full((len(keys), 1), token)], 1)
        self.sums = np.concatenate([self.sums, np.zeros((len(keys), 1))], 1)
        while (start := self.packed[0].shape[1]) < whole_groups(self.tokens.shape[1] - 1):
            fresh = [loaded(stored(x[:, start : start + 32].astype(np.float32), kind)) for x, kind in zip(self.full, self.kinds)]
            self.packed = [np.concatenate([x, y], 1) for x, y in zip(self.packed, fresh)]

    def read(self) -> list[np.ndarray]:
        """Return keys and values as the last row reads them."""
        end = self.packed[0].shape[1]
        return [np.concatenate([f[:, : min(32, end)], p[:, 32:end], f[:, end:]], 1) for f, p in zip(self.full, self.packed)]

    def compress(self, kept: np.ndarray) -> None:
        """Keep some cells of each head: those that are in groups then are quantized once more, values only where they were in full."""
        end, n = self.packed[0].shape[1], kept.shape[1]
        new = whole_groups(n - 1)
        was = np.zeros(self.tokens.shape[1], bool)
        was[32:end] = True
        left = [np.take_along_axis(x, kept[..., None], 1) for x in self.read()]
        packed = [loaded(stored(x[:, :new].astype(np.float32), kind)) if new else x[:, :0] for x, kind in zip(left, self.kinds)]
        packed[1] = np.where(was[kept[:, :new], None], left[1][:, :new], packed[1])
        self.packed = packed
        self.full = [x.astype(np.float16).astype(np.float64) for x in left]
        self.tokens, self.sums = (np.take_along_axis(x, kept, 1) for x in (self.tokens, self.sums))


def h2o(sums: np.ndarray, budget: int) -> list[int]:
    """Choose one head's cells: half of them the last ones, then what was attended to."""
    n, m = len(sums), budget // 2
    best = sorted(range(n - m), key=lambda j: (-sums[j], j))[: budget - m]
    return sorted([*best, *range(n - m, n)])


def attention_and_eviction(kinds: tuple[str, str], budget: int, limit: int, chosen: list[np.ndarray]) -> Any:
    """Attention by the rule, token after token, as transformers calls it; `chosen`: the tokens that stay, one entry a compression."""
    import torch

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **more: Any) -> tuple[Any, None]:
        q, k, v = (x[0].double().numpy() for x in (q, k.half().float(), v.half().float()))
        h, n, e = q.shape
        cells, out = Cells(len(k), e, kinds), np.zeros((n, h, e))
        for i in range(n):
            if cells.tokens.shape[1] == limit:
                cells.compress(np.array([h2o(s, budget) for s in cells.sums]))
                chosen.append(cells.tokens.copy())
            cells.add(i, k[:, i], v[:, i])
            keys, values = (np.repeat(x, h // len(x), 0) for x in cells.read())
            s = np.einsum("he,hke->hk", q[:, i], keys) * scaling
            p = np.exp(s - s.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            cells.sums += p.reshape(len(k), -1, p.shape[1]).sum(1)
            out[i] = np.einsum("hk,hke->he", p, values)
        return torch.tensor(out, dtype=torch.float32)[None], None

    return attend


@pytest.mark.parametrize("kv_dtype", KINDS)
def test_what_stays_and_logits_are_those_of_an_independent_computation(tiny_gguf, monkeypatch, kv_dtype: str) -> None:
    """transformers, one layer of it, with an attention of NumPy that evicts by H2O whenever the cells are taken."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    path, folder = tiny_gguf("llama", head_dim=32, num_hidden_layers=1)
    chosen: list[np.ndarray] = []
    AttentionInterface.register("forgetting", attention_and_eviction(KINDS[kv_dtype], 120, 144, chosen))
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="forgetting", dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs(torch.tensor([IDS])).logits[0].numpy()
    found: list[np.ndarray] = []
    compress = eviction.Content.compress

    def note(content: eviction.Content, new: np.ndarray, n_threads: int) -> None:
        compress(content, new, n_threads)
        found.append(content.s.kept[content.layer.number])

    monkeypatch.setattr(eviction.Content, "compress", note)
    budget = pe.H2O(budget=120, when="always")
    got = pe.load(path, kv_dtype=kv_dtype, compress=budget, **SETTINGS).logits(IDS)
    assert len(found) == len(chosen) == 4 and all((a == b).all() for a, b in zip(found, chosen))
    assert any((a[0] != a[1]).any() for a in found)                            # heads choose for themselves
    full = pe.load(path, kv_dtype=kv_dtype, **SETTINGS).logits(IDS)
    span = np.ptp(want)
    error, lost = np.abs(got - want).max(1) / span, np.abs(full - want).max(1) / span
    assert np.median(error) < 2e-6 and error.max() < 1e-4, (np.median(error), error.max())
    assert np.median(lost[150:]) > 1e-3 and np.array_equal(got[:144], full[:144])


@pytest.mark.parametrize("k", ["Q4_1_CHANNELS", "Q2_1_CHANNELS"])
@pytest.mark.parametrize("v", ["Q4_1", "Q2_1", "Q4_0", "Q8_0"])
def test_groups_are_made_as_in_a_step(k: str, v: str) -> None:
    """The bytes of gguf-py's quantizer, and of `q2_1`; and numbers of bytes are those that they stand for."""
    rng = np.random.default_rng(3)
    keys = rng.standard_normal((2, 40 * 32, 64)).astype(np.float32) * np.exp(rng.standard_normal(64).astype(np.float32))
    values = rng.standard_normal((2, 40 * 32, 32)).astype(np.float32)
    for n in (32, 512, 1280):
        made = quantized(keys[:, :n], values[:, :n], dtype(k), dtype(v))
        assert (made[0] == stored(keys[:, :n], k).raw.reshape(made[0].shape)).all()
        assert (made[1] == stored(values[:, :n], v).raw.reshape(made[1].shape)).mean() > 0.999          # sums of mixed values may round otherwise
        np.testing.assert_allclose(regroup.numbers_of(made[0], dtype(k)), elements(stored(keys[:, :n], k)), rtol=1e-6, atol=1e-6)
        want = mixed(elements(stored(values[:, :n], v)).astype(np.float64))
        assert np.isclose(regroup.numbers_of(made[1], dtype(v)), want, rtol=1e-5, atol=1e-5).mean() > 0.999


# -- what conversations do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "kv_dtype", "compress"), [
    ("llama", "kivi4", pe.H2O(ratio=0.4)), ("llama", "kivi2", pe.Diverse(budget=90, window=8)), ("llama", "kivi2", pe.H2O(budget=90, when="always")),
    ("llama", "kivi4", pe.VLCache(ratio=0.5)), ("llama", "kivi4", pe.VLCache(budget=90, when="always")),
    ("gemma3", "kivi4", pe.LookM(ratio=0.5)), ("gemma3", "kivi4", pe.SnapKV(budget=120, when="always", merge="averaged"))], ids=str)
def test_results_do_not_depend_on_cuts_threads_and_neighbours(tiny_gguf, kind: str, kv_dtype: str, compress: Compression) -> None:
    path = tiny_gguf(kind, **({"head_dim": 32} if kind == "llama" else {}))[0]
    prompts = [[*IDS[k : k + 100], *([picture(1)] if cases.find(kind).sees else []), *IDS[k + 100 : k + 130]] for k in (0, 50)]
    found = []
    for settings in ({}, {"n_batch": 7, "n_threads": 1}, {"n_batch": 256, "n_threads": 2}):
        model = pe.load(path, kv_dtype=kv_dtype, compress=compress, **{**SETTINGS, **settings})
        found.append([])
        for prompt in prompts:
            model.reset()
            found[-1].append(told(ask(model, prompt, 30)))
    assert all(one == found[0] for one in found)
    model = pe.load(path, kv_dtype=kv_dtype, compress=compress, n_seq=3, **SETTINGS)
    never = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
    streams = [model.stream(prompt, max_tokens=30, temperature=0.7, seed=1, logit_bias=never) for prompt in prompts]
    assert [told(s.answer()) for s in streams] == found[0]


@pytest.mark.parametrize("compress", POLICIES, ids=lambda p: p.text)
def test_budgets_are_exact_and_plans_are_what_is_allocated(path, compress: Compression) -> None:
    for n_seq in (1, 3):
        settings = {**SETTINGS, "kv_dtype": "kivi2", "n_seq": n_seq, "compress": compress}
        before, model = pe.plan(path, **settings), pe.load(path, **settings)
        assert before.items == model.plan.items and before.of("kv") == model.program.state_memory.nbytes
        n = len(SHORT[:150])
        ask(model, SHORT[:150], 1)
        held = model.cells_held()
        budget = compress.budget_of(n)
        assert held.n_tokens == n and (held.n_cells == budget if compress.when == "prompt" else budget <= held.n_cells <= budget + budget // 5)


@pytest.mark.parametrize("compress", POLICIES, ids=lambda p: p.text)
def test_a_conversation_goes_on_and_is_saved(path, tmp_path, compress: Compression) -> None:
    """The next turn goes on from what stayed, by itself and from a file."""
    model = pe.load(path, kv_dtype="kivi4", compress=compress, **SETTINGS)
    first = ask(model, IDS[:120], 20)
    model.save(tmp_path / "a", first)
    longer = [*IDS[:120], *first.tokens, *IDS[150:190]]
    on = ask(model, longer, 20)
    assert on.n_cached >= 139
    for settings in ({}, {"n_ctx": 300, "n_batch": 7, "n_seq": 2}):
        other = pe.load(path, kv_dtype="kivi4", compress=compress, **{**SETTINGS, **settings})
        other.restore(tmp_path / "a")
        again = ask(other, longer, 20)
        assert again.n_cached == on.n_cached and told(again) == told(on)


def test_two_go_on_from_one(path) -> None:
    """Pages of groups are shared until one of them is compressed; rings are copied. The first one is at work meanwhile."""
    compress = pe.H2O(ratio=0.6)
    model = pe.load(path, kv_dtype="kivi4", compress=compress, n_seq=3, **SETTINGS)
    never = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
    settings = {"temperature": 0.7, "seed": 1, "logit_bias": never, "speculate": False}
    want = ask(pe.load(path, kv_dtype="kivi4", compress=compress, **SETTINGS), IDS[:120], 40)
    ends = [[*IDS[:120], *want.tokens[:8], *IDS[a : a + 30]] for a in (150, 190)]
    first = model.stream(IDS[:120], max_tokens=40, **settings)
    for _ in range(10):
        next(first)
    together = [ask(model, end, 20) for end in ends]
    assert [one.n_cached for one in together] == [128, 128] and told(first.answer()) == told(want)
    for end, one in zip(ends, together):
        alone = pe.load(path, kv_dtype="kivi4", compress=compress, **SETTINGS)
        assert ask(alone, IDS[:120], 9).tokens == want.tokens[:9]
        assert told(ask(alone, end, 20)) == told(one)


def test_another_policy_for_a_request(path) -> None:
    model = pe.load(path, kv_dtype="kivi4", compress=pe.H2O(ratio=0.4), **SETTINGS)
    half, none = ask(model, IDS[:150], 5, compress=pe.H2O(ratio=0.5)), ask(model, IDS[:150], 5, compress=False)
    assert told(half) == told(ask(pe.load(path, kv_dtype="kivi4", compress=pe.H2O(ratio=0.5), **SETTINGS), IDS[:150], 5))
    assert told(none) == told(ask(pe.load(path, kv_dtype="kivi4", **SETTINGS), IDS[:150], 5))
