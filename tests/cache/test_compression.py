"""Policies of compression beside the papers' equations, written again here as loops over float64; edge cases, and policies as values."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyengine as pe
from pyengine.cache.compression.layers import apportioned
from pyengine.errors import RequestError

ALL = (pe.LookM, pe.H2O, pe.SnapKV, pe.RoCo, pe.StreamingLLM, pe.VLCache, pe.MEDA, pe.Diverse)


# -- attention with heads that share keys, and its statistics ----------------------------------------------------------------


def attention(rng: np.random.Generator, heads: int, group: int, n: int, e: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [heads, group, n, n], causal, and keys and values [heads, n, e]."""
    q, k, v = rng.normal(size=(heads, group, n, e)) * 2, rng.normal(size=(heads, n, e)), rng.normal(size=(heads, n, e))
    logits = np.einsum("hgie,hje->hgij", q, k) / math.sqrt(e)
    logits[..., np.triu_indices(n, 1)[0], np.triu_indices(n, 1)[1]] = -np.inf
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True), k, v


def statistics(policy: Any, p: np.ndarray, is_text: np.ndarray) -> np.ndarray:
    """[heads, n, c] by `channels` and `weights`, one probability after the other."""
    heads, group, n, _ = p.shape
    weights, out = policy.weights(is_text, n), np.zeros((heads, n, len(policy.channels)))
    for c, (_, kind) in enumerate(policy.channels):
        for h, g, i in np.ndindex(heads, group, n):
            row, top = p[h, g, i], p[h, g, i].max()
            for j in range(i + 1):
                out[h, j, c] += weights[i, c] * {"sum": row[j], "square": row[j] ** 2, "large": float(row[j] >= 0.01 * top),
                                                 "entropy": -row[j] * math.log(row[j]) if row[j] > 0 else 0.0}[kind]
    return out


def best(scores: list[float], k: int, among: list[int]) -> list[int]:
    return sorted(among, key=lambda j: (-scores[j], j))[:k]


def pictures(rng: np.random.Generator, n: int) -> np.ndarray:
    is_text = np.ones(n, bool)
    for _ in range(2):
        at = int(rng.integers(1, max(2, n - 3)))
        is_text[at:at + n // 4] = False
    is_text[-2:] = True
    return is_text


@pytest.fixture(params=[(40, 1, 1), (61, 2, 3), (100, 3, 2)], ids=str)
def case(request: pytest.FixtureRequest) -> Any:
    n, heads, group = request.param
    rng = np.random.default_rng(n)
    return (n, *attention(rng, heads, group, n), pictures(rng, n))


# -- the papers' equations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5])
def test_look_m_is_the_papers(case: Any, ratio: float) -> None:
    n, p, _, _, is_text = case
    kept = pe.LookM(ratio=ratio).select(p.sum((1, 2)).astype(np.float32), is_text)
    budget = max(1, int(Fraction(str(ratio)) * n))
    recent = max(1, budget // 2)
    for h in range(len(p)):
        a = [float(np.float32(x)) for x in p[h].sum((0, 1))]
        raised = [x + (max(a) if is_text[j] else 0.0) for j, x in enumerate(a)]
        expected = sorted(best(raised, budget - recent, list(range(n - recent))) + list(range(n - recent, n)))
        assert kept[h].tolist() == expected


def test_look_m_leaves_cells_to_pictures_where_it_is_told() -> None:
    is_text = np.array([True] * 12 + [False] * 12 + [True] * 4)
    sums = np.arange(28, dtype=np.float32)[None]
    assert (~is_text[pe.LookM(budget=8).select(sums, is_text)]).sum() == 0
    kept = pe.LookM(budget=8, pictures=0.5).select(sums, is_text)[0]
    assert kept.tolist() == [10, 11, 22, 23, 24, 25, 26, 27]                   # 4 recent, 2 of 4 the best patches, 2 the best text
    assert pe.LookM(budget=8, pictures=1.0).select(sums, is_text)[0].tolist() == [20, 21, 22, 23, 24, 25, 26, 27]
    assert pe.LookM(budget=8, pictures=1.0).select(sums, np.ones(28, bool))[0].tolist() == list(range(20, 28))


def test_h2o_is_the_papers(case: Any) -> None:
    n, p, _, _, is_text = case
    kept = pe.H2O(budget=n // 3, recent=5).select(p.sum((1, 2)), is_text)
    for h in range(len(p)):
        a = p[h].sum((0, 1)).tolist()
        assert kept[h].tolist() == sorted(best(a, n // 3 - 5, list(range(n - 5))) + list(range(n - 5, n)))


@pytest.mark.parametrize(("pooling", "kernel", "window", "budget"), [("max", 7, 8, 20), ("avg", 5, 4, 15), ("max", 1, 8, 20), ("avg", 3, 32, 9), ("peak", 3, 4, 12), ("max", 3, 4, 1)])
def test_snapkv_is_the_papers(case: Any, pooling: str, kernel: int, window: int, budget: int) -> None:
    n, p, _, _, is_text = case
    policy = pe.SnapKV(budget=budget, window=window, kernel=kernel, pooling=pooling)
    found = statistics(policy, p, is_text)
    np.testing.assert_allclose(found[..., 0], p[:, :, max(0, n - window):].sum((1, 2)), rtol=1e-12)
    kept, recent = policy.choose(found, is_text), min(window, budget // 2)
    for h in range(len(p)):
        pooled = []
        for j in range(n - recent):
            near = [found[h, i, 0] if 0 <= i < n - recent else None for i in range(j - kernel // 2, j + kernel // 2 + 1)]
            pooled.append(max(x for x in near if x is not None) if pooling != "avg" else sum(x or 0.0 for x in near) / kernel)
            pooled[-1] += found[h, j, 0] / 2 if pooling == "peak" else 0.0
        expected = sorted(best(pooled, budget - recent, list(range(n - recent))) + list(range(n - recent, n)))
        assert kept[h].tolist() == expected


@pytest.mark.parametrize(("budget", "robust", "recent"), [(20, 0.3, None), (24, 0.75, 4), (6, 0.3, None), (20, 0.0, 3)])
def test_roco_is_the_papers(case: Any, budget: int, robust: float, recent: int | None) -> None:
    n, p, _, _, is_text = case
    policy = pe.RoCo(budget=budget, robust=robust, recent=recent)
    found = statistics(policy, p, is_text)
    kept = policy.choose(found, is_text, counts=p.shape[1] * np.arange(n, 0, -1))
    last = min(10, budget // 2) if recent is None else recent
    for h in range(len(p)):
        mean, std = [], []
        for j in range(n):
            seen = p[h, :, j:, j].ravel()
            mean.append(float(seen.mean()))
            std.append(float(seen.std()))
        before = list(range(n - last))
        chosen = best(std, max(0, math.floor(robust * budget) - last), before)
        chosen += best(mean, budget - last - len(chosen), [j for j in before if j not in chosen])
        assert kept[h].tolist() == sorted(chosen + list(range(n - last, n)))


def test_roco_without_squares_goes_by_means_of_counts() -> None:
    sums, text = np.array([[4.0, 3.0, 3.0, 1.0]]), np.ones(4, bool)
    assert pe.RoCo(budget=2, recent=0).select(sums, text).tolist() == [[0, 2]]                 # means 1, 1, 1.5, 1
    assert pe.RoCo(budget=2, recent=0).select(sums, text, counts=np.ones(4)).tolist() == [[0, 1]]


def test_streaming_llm_keeps_both_ends() -> None:
    text = np.ones(50, bool)
    for budget, first in ((20, 4), (8, 4), (5, 2), (1, 0)):
        kept = pe.StreamingLLM(budget=budget).select(np.zeros((2, 50)), text)
        assert kept.tolist() == [[*range(first), *range(50 - budget + first, 50)]] * 2


def test_vl_cache_is_the_papers(case: Any) -> None:
    n, p, _, _, is_text = case
    policy = pe.VLCache(ratio=0.25)
    after = [i for i in range(n) if i > max(np.flatnonzero(~is_text))]
    found = statistics(policy, p, is_text)
    np.testing.assert_allclose(found[..., 0], p[:, :, after].sum((1, 2)), rtol=1e-12)
    kept, budget = policy.choose(found, is_text), n // 4
    recent = max(1, budget // 10)
    for h in range(len(p)):
        a = p[h][:, after].sum((0, 1)).tolist()
        assert kept[h].tolist() == sorted(best(a, budget - recent, list(range(n - recent))) + list(range(n - recent, n)))


def density(p: np.ndarray, rows: list[int]) -> float:
    """1 - sparsity of VL-Cache's equations, the mean over heads."""
    shares = []
    for h, g in np.ndindex(p.shape[:2]):
        large = sum(p[h, g, i, j] >= 0.01 * p[h, g, i].max() for i in rows for j in range(i + 1))
        shares.append(large / sum(i + 1 for i in rows))
    return float(np.mean(shares))


def cross_entropy(p: np.ndarray, is_text: np.ndarray) -> float:
    """MEDA's E of one layer, the mean over heads."""
    total, (heads, group, n, _) = 0.0, p.shape
    for h, g in np.ndindex(heads, group):
        for of, over in ((True, False), (False, True)):
            rows = [i for i in range(n) if is_text[i] == of]
            total += sum(-p[h, g, i, j] * math.log(p[h, g, i, j]) for i in rows for j in range(i + 1) if is_text[j] == over) / len(rows)
    return total / (heads * group)


@pytest.mark.parametrize("kind", [pe.VLCache, pe.MEDA])
def test_budgets_of_layers_are_the_papers_where_nothing_is_clipped(kind: Any) -> None:
    rng = np.random.default_rng(5)
    n, layers = 60, 4
    is_text = pictures(rng, n)
    maps = [attention(rng, 2, 2, n, e)[0] for e in (2, 4, 16, 64)]
    policy = kind(ratio=0.3)
    found = policy.budgets([statistics(policy, p, is_text) for p in maps], is_text, group=2)
    rows = [i for i in range(n) if i > max(np.flatnonzero(~is_text))]
    level = [density(p, rows) if kind is pe.VLCache else math.exp(cross_entropy(p, is_text)) for p in maps]
    exact = [x / sum(level) * layers * 18 for x in level]
    assert sum(found) == layers * 18 and all(abs(a - b) < 1 for a, b in zip(found, exact)) and len(set(found)) > 1


def test_look_m_spends_by_entropy_where_it_is_told() -> None:
    n, is_text = 50, np.ones(50, bool)
    alike = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]            # each row sees all keys alike
    single, policy = np.eye(n), pe.LookM(ratio=0.4, least=0.25)
    found = [statistics(policy, np.broadcast_to(p, (2, 3, n, n)), is_text) for p in (alike, single)]
    assert policy.budgets(found, is_text, group=3) in ([20, 5], [19, 5])       # rounded down from 20
    assert pe.LookM(ratio=0.4).budgets(found, is_text) == [20, 20]
    rng = np.random.default_rng(0)
    p = attention(rng, 2, 3, n)[0]
    h = np.mean([[-(row[row > 0] * np.log(row[row > 0])).sum() for row in p[i, j]] for i in range(2) for j in range(3)])
    expected = 5 + int(h * n / sum(math.log(i) for i in range(1, n + 1)) * 15)
    assert policy.budgets([statistics(policy, p, is_text)], is_text, group=3) == [expected]


def test_diverse_is_the_papers(case: Any) -> None:
    n, p, keys, values, is_text = case
    keys = keys + 1.5 * np.arange(1, len(keys) + 1)[:, None, None]             # heads of different redundancy
    policy, budget, recent = pe.Diverse(budget=16, window=6, kernel=3, pooling="avg"), 16, 6
    found = statistics(policy, p, is_text)
    kept = policy.choose(found, is_text, keys=keys, values=values)

    def scaled(x: list[float], level: float) -> list[float]:
        unit = [(y - min(x)) / (max(x) - min(x)) for y in x]
        return [y * level / (sum(unit) / len(unit)) for y in unit]

    for h in range(len(p)):
        m = n - recent
        a = [sum(found[h, i, 0] for i in range(j - 1, j + 2) if 0 <= i < m) / 3 for j in range(m)]
        units = [keys[h, j] / np.linalg.norm(keys[h, j]) for j in range(m)]
        cosines = [float(units[i] @ units[j]) for i in range(m) for j in range(m) if i != j]
        r, level = sum(cosines) / len(cosines), sum(a) / m
        centre = sum(units) / m
        important = scaled([float(np.linalg.norm(values[h, j])) for j in range(m)], level)
        unlike = scaled([-float(u @ centre) for u in units], level)
        mixed = [r * d + (1 - r) * (x + y) for d, x, y in zip(unlike, a, important)]
        assert kept[h].tolist() == sorted(best(mixed, budget - recent, list(range(m))) + list(range(m, n)))
    without = policy.choose(found, is_text)
    assert (without == pe.SnapKV(budget=16, window=6, kernel=3, pooling="avg").choose(found, is_text)).all()


# -- by hand --------------------------------------------------------------------------------------------------------------


def test_a_small_example_by_hand() -> None:
    #                 text  picture -------------  text  recent
    sums = np.array([[0.5, 2.0, 0.1, 3.0, 0.2, 0.3, 0.05, 0.1], [0.5, 0.1, 2.0, 0.2, 3.0, 0.3, 0.05, 0.1]], np.float32)
    is_text = np.array([1, 0, 0, 0, 0, 1, 1, 1], bool)
    assert pe.LookM(budget=5, recent=2).select(sums, is_text).tolist() == [[0, 3, 5, 6, 7], [0, 4, 5, 6, 7]]
    assert pe.H2O(budget=4, recent=1).select(sums, is_text).tolist() == [[0, 1, 3, 7], [0, 2, 4, 7]]
    assert pe.VLCache(budget=4, recent=1).select(sums, is_text).tolist() == [[0, 1, 3, 7], [0, 2, 4, 7]]


def test_of_few_cells_the_key_itself_gets_one_before_its_neighbours() -> None:
    sums, text = np.array([[0.1, 0.2, 3.0, 0.1, 0.0, 2.0, 0.0, 0.3]]), np.ones(8, bool)
    assert pe.SnapKV(budget=2, recent=1, window=2, kernel=3).select(sums, text).tolist() == [[1, 7]]                 # before the one that is meant
    assert pe.SnapKV(budget=2, recent=1, window=2, kernel=3, pooling="peak").select(sums, text).tolist() == [[2, 7]]
    assert pe.SnapKV(budget=5, recent=1, window=2, kernel=3, pooling="peak").select(sums, text).tolist() == [[1, 2, 3, 5, 7]]
    assert pe.SnapKV(budget=1, window=2, kernel=3, pooling="peak").select(sums, text).tolist() == [[2]]                # half of one is none


def test_of_equal_scores_the_first_is_kept() -> None:
    for policy in (pe.H2O(budget=4, recent=1), pe.SnapKV(budget=4, recent=1), pe.VLCache(budget=4, recent=1)):
        assert policy.select(np.ones((1, 9)), np.ones(9, bool)).tolist() == [[0, 1, 2, 8]]
    is_text = np.array([0, 1, 0, 1, 1, 0, 1], bool)
    assert pe.LookM(budget=4, recent=1).select(np.ones((1, 7)), is_text).tolist() == [[1, 3, 4, 6]]
    assert pe.LookM(budget=6, recent=1).select(np.ones((1, 7)), is_text).tolist() == [[0, 1, 2, 3, 4, 6]]


def test_heads_may_hold_different_tokens() -> None:
    rng = np.random.default_rng(3)
    sums, is_text = rng.random((3, 40)), rng.random((3, 40)) < 0.4
    for policy in (pe.LookM(budget=12, pictures=0.3), pe.MEDA(), pe.H2O(), pe.Diverse(budget=9), pe.RoCo(), pe.StreamingLLM()):
        kept = policy.select(sums, is_text)
        assert all((policy.select(sums[h:h + 1], is_text[h])[0] == kept[h]).all() for h in range(3))
    with pytest.raises(RequestError, match="is_text must be"):
        pe.LookM().select(sums, is_text[:2])
    with pytest.raises(RequestError, match="is_text must be"):
        pe.LookM().weights(is_text)


def test_layers_may_hold_different_tokens() -> None:
    rng = np.random.default_rng(4)
    policy, sizes = pe.MEDA(), (40, 31, 40)
    found, texts = [rng.random((2, n, 3)) for n in sizes], [rng.random((2, n)) < 0.5 for n in sizes]
    level = []
    for s, text in zip(found, texts):
        heads = [(s[h, ~text[h], 1].sum(), s[h, text[h], 2].sum()) for h in range(2)]
        level.append(sum(a for a, _ in heads) / text.sum() + sum(b for _, b in heads) / (~text).sum())
    share = np.exp(level) / np.exp(level).sum()
    cells = policy.budgets(found, texts, budget=20)
    assert sum(cells) == 60 and all(abs(a - b) < 1 for a, b in zip(cells, 60 * share))
    assert sum(pe.VLCache().budgets(found, texts, budget=20)) == 60 and pe.H2O().budgets(found, texts, budget=20) == [20] * 3


# -- what it costs --------------------------------------------------------------------------------------------------------


def test_extreme_ratios_degrade_gently() -> None:
    """Outputs of attention for later queries, on keys in clusters as patches of pictures are: merging keeps more of them, and never
    makes them worse than nothing."""
    rng = np.random.default_rng(7)
    heads, n, e = 2, 240, 24
    is_text = np.ones(n, bool)
    is_text[20:200] = False
    p, keys, values = attention(rng, heads, 1, n, e)
    for x in (keys, values):
        x[:, ~is_text] = np.repeat(rng.normal(size=(heads, 9, e)) * 1.5, 20, axis=1) + rng.normal(size=(heads, 180, e)) * 0.3
    queries = rng.normal(size=(heads, 60, e)) + 0.7 * keys[:, rng.integers(20, 200, 60)]

    def outputs(k: np.ndarray, v: np.ndarray) -> np.ndarray:
        weights = np.exp(np.einsum("hie,hje->hij", queries, k) / math.sqrt(e))
        return np.einsum("hij,hje->hie", weights / weights.sum(-1, keepdims=True), v)

    full = outputs(keys, values)
    for kind in (pe.LookM, pe.H2O, pe.VLCache, pe.Diverse):
        error: dict[tuple[str, float], float] = {}
        found = statistics(kind(merge="attention"), p, is_text)
        for rule in ("none", "attention"):
            for ratio in (0.2, 0.05, 0.01):
                policy = kind(ratio=ratio, merge=rule)
                kept = policy.choose(found, is_text, keys=keys, values=values)
                got = outputs(*policy.merge(kept, keys, values, sums=policy.shares(found)))
                error[rule, ratio] = float(np.linalg.norm(got - full) / np.linalg.norm(full))
        assert error["attention", 0.2] < error["attention", 0.05] < error["attention", 0.01] < 1, (kind, error)
        assert all(error["attention", ratio] < error["none", ratio] for ratio in (0.05, 0.01)), (kind, error)


# -- budgets --------------------------------------------------------------------------------------------------------------


def test_a_ratio_is_rounded_down_as_it_is_written() -> None:
    for ratio, n, cells in ((0.2, 100, 20), (0.29, 100, 29), (0.2, 104, 20), (0.01, 50, 1), (0.05, 399, 19), (1.0, 7, 7), (1, 7, 7)):
        assert pe.LookM(ratio=ratio).budget_of(n) == cells
    assert pe.H2O(budget=10).budget_of(7) == 7 and pe.H2O(budget=10).budget_of(11) == 10 and pe.H2O().budget_of(0) == 0


counts = st.integers(1, 90)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), n=counts, heads=st.integers(1, 3), kind=st.sampled_from(ALL))
def test_budgets_are_exact_whatever_is_selected(data: st.DataObject, n: int, heads: int, kind: Any) -> None:
    size = data.draw(st.one_of(st.builds(lambda r: {"ratio": r}, st.floats(0.001, 1)), st.builds(lambda b: {"budget": b}, st.integers(1, 120))))
    if kind is not pe.StreamingLLM:
        size["recent"] = data.draw(st.one_of(st.integers(0, 100), st.floats(0, 1)))
    policy = kind(**size)
    values = st.floats(0, 4, width=32) if data.draw(st.booleans()) else st.integers(0, 2)      # many equal ones
    sums = np.array(data.draw(st.lists(st.lists(values, min_size=n, max_size=n), min_size=heads, max_size=heads)), np.float32)
    is_text = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool)
    kept, budget = policy.select(sums, is_text), policy.budget_of(n)
    assert kept.shape == (heads, budget) and kept.dtype == np.int64 and 1 <= budget <= n
    assert (np.diff(kept, axis=1) > 0).all() and kept.min() >= 0 and kept.max() < n
    for h in range(heads):                                                      # heads are independent
        assert (policy.select(sums[h:h + 1], is_text)[0] == kept[h]).all()
    last = policy.recents_of(budget)
    assert (kept[:, budget - last:] == np.arange(n - last, n)).all() or kind is pe.StreamingLLM
    asked = data.draw(st.integers(1, 120))
    assert policy.select(sums, is_text, budget=asked).shape == (heads, min(asked, n))
    if kind is pe.LookM:                                                        # text goes before pictures
        before = np.arange(n - last)
        for row, row_sums in zip(kept, sums):
            out = np.setdiff1d(before, row)
            if (~is_text[row[row < n - last]]).any() and (row_sums[is_text] > 0).all():
                assert not is_text[out].any()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), k=st.integers(1, 12), low=st.integers(0, 5), span=st.integers(0, 40))
def test_cells_are_divided_exactly(data: st.DataObject, k: int, low: int, span: int) -> None:
    weights = data.draw(st.lists(st.one_of(st.floats(0, 1e6), st.just(0.0), st.floats(1e-300, 1e300), st.just(math.nan)), min_size=k, max_size=k))
    total = data.draw(st.integers(low * k, (low + span) * k))
    cells = apportioned(weights, total, low, low + span)
    assert sum(cells) == total and min(cells) >= low and max(cells) <= low + span
    order = [(w if math.isfinite(w) else 0.0, c) for w, c in zip(weights, cells)]
    assert all(c1 <= c2 + 1 for w1, c1 in order for w2, c2 in order if w1 <= w2)


def test_cells_divided_by_hand() -> None:
    assert apportioned([1, 1, 2], 8, 1, 8) == [2, 2, 4]
    assert apportioned([1, 1, 1], 10, 1, 8) == [4, 3, 3]
    assert apportioned([1, 100], 10, 1, 6) == [4, 6]                            # what clipping takes goes to the others
    assert apportioned([0, 0, 5], 9, 1, 9) == [1, 1, 7]
    assert apportioned([0, 0], 9, 0, 9) == [5, 4] and apportioned([], 0, 0, 3) == []


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("n", [1, 2, 7, 333])
def test_layers_together_have_their_budget(kind: Any, n: int) -> None:
    rng = np.random.default_rng(n)
    policy, is_text = kind(ratio=0.07), rng.random(n) < 0.6
    for spread in (0, 1, 40):
        found = [rng.random((2, n, len(policy.channels))) * math.exp(spread * rng.random()) for _ in range(5)]
        cells = policy.budgets(found, is_text)
        assert sum(cells) == 5 * policy.budget_of(n) and min(cells) >= 1 and max(cells) <= n


# -- rows -----------------------------------------------------------------------------------------------------------------


def test_which_rows_count() -> None:
    is_text = np.array([1, 0, 0, 1, 0, 1, 1], bool)
    every, text = np.ones(7), is_text.astype(float)
    expected = {
        pe.LookM(): [every], pe.LookM(least=0.5): [every, every], pe.LookM(merge="attention"): [every, text], pe.H2O(): [every],
        pe.LookM(rows="text"): [text], pe.LookM(rows="after", least=0.5): [[0, 0, 0, 0, 0, 1, 1], every],
        pe.SnapKV(window=2): [[0, 0, 0, 0, 0, 1, 1]], pe.SnapKV(): [every], pe.RoCo(): [every, every], pe.StreamingLLM(): [],
        pe.VLCache(): [[0, 0, 0, 0, 0, 1, 1]] * 2, pe.VLCache(window=1): [[0, 0, 0, 0, 0, 0, 1]] * 2, pe.MEDA(): [every, text, 1 - text],
    }
    for policy, columns in expected.items():
        weights = policy.weights(is_text, 7)
        assert weights.dtype == np.float32 and weights.shape == (7, len(policy.channels)) == (7, len(columns))
        assert all((weights[:, c] == column).all() for c, column in enumerate(columns)), policy
    assert pe.VLCache().weights(np.ones(3, bool)).tolist() == [[1, 1]] * 3                     # no picture: all rows
    assert pe.VLCache().weights(np.array([1, 0, 0], bool)).tolist() == [[0, 0], [0, 0], [1, 1]]        # none behind it: the last
    assert pe.LookM(merge="attention").shares(np.arange(6.0).reshape(1, 3, 2)).tolist() == [[1, 3, 5]]
    assert pe.LookM(least=0.5, merge="attention").channels == (("all", "sum"), ("all", "entropy"), ("text", "sum"))
    assert pe.LookM().shares(np.zeros((1, 3, 1))) is None


# -- values ---------------------------------------------------------------------------------------------------------------

MADE = (pe.LookM(), pe.LookM(ratio=0.05, merge="averaged", pictures=0.25, least=0.5), pe.LookM(budget=512, recent=64, when="always"), pe.LookM(rows="after"),
        pe.H2O(recent=1), pe.H2O(recent=1.0), pe.SnapKV(window=16, kernel=5, pooling="avg"), pe.SnapKV(window=6, pooling="peak"), pe.RoCo(robust=0.5, budget=9), pe.StreamingLLM(sinks=8),
        pe.VLCache(ratio=0.1, window=50), pe.MEDA(merge="none"), pe.Diverse(budget=64), pe.RoCo(recent=0.25))


@pytest.mark.parametrize("policy", MADE, ids=repr)
def test_a_policy_is_a_value(policy: Any) -> None:
    names = {name: getattr(pe, name) for name in dir(pe) if name[0].isupper()}
    same = eval(repr(policy), names)
    assert same == policy and hash(same) == hash(policy) and pickle.loads(pickle.dumps(policy)) == policy
    assert pe.compression_of(policy.text) == policy and pe.compression_of(policy) is policy
    assert pe.compression_of({"policy": policy.word, **policy.parameters}) == policy
    assert sum(policy == other for other in MADE) == 1 and len(set(MADE)) == len(MADE)
    with pytest.raises(AttributeError):
        policy.ratio = 0.5
    with pytest.raises(AttributeError):
        del policy.when


def test_policies_as_text() -> None:
    assert pe.compression_of("look-m:ratio=0.2,merge=pivotal") == pe.LookM(ratio=0.2, merge="pivotal") == pe.LookM()
    assert pe.compression_of(" LookM : budget = 64 , recent=16 , when=always ") == pe.LookM(budget=64, recent=16, when="always")
    assert pe.compression_of("streamingllm:sinks=2,merge=none") == pe.StreamingLLM(sinks=2)
    assert pe.compression_of("h2o:recent=1.0") == pe.H2O(recent=1.0) != pe.H2O(recent=1)
    assert pe.compression_of("h2o") == pe.compression_of({"policy": "H2O"}) == pe.H2O()
    assert pe.compression_of(None) is pe.compression_of("none") is pe.compression_of("off") is None
    assert repr(pe.LookM(0.2, merge="averaged")) == "LookM(ratio=0.2, merge='averaged')"
    assert pe.LookM(budget=64).text == "look-m:budget=64"


@pytest.mark.parametrize(("make", "says"), [
    (lambda: pe.LookM(ratio=0), "ratio must be above 0"), (lambda: pe.LookM(ratio=1.5), "ratio must be a finite number in 0..1, got 1.5"),
    (lambda: pe.LookM(ratio="0.2"), "got '0.2'"), (lambda: pe.LookM(ratio=True), "got True"), (lambda: pe.LookM(budget=0), "budget must be an integer"),
    (lambda: pe.LookM(budget=2.0), "budget must be an integer"), (lambda: pe.LookM(ratio=0.2, budget=5), "not both"),
    (lambda: pe.LookM(merge="pivot"), "merge must be one of none, averaged, pivotal, weighted, attention, got 'pivot'"),
    (lambda: pe.LookM(recent=-1), "recent must be"), (lambda: pe.LookM(recent=1.5), "a share in 0..1"), (lambda: pe.LookM(recent=True), "got True"),
    (lambda: pe.LookM(when="always"), "needs a budget"), (lambda: pe.LookM(when="later"), "prompt, always"), (lambda: pe.LookM(rate=0.2), "'rate' is no argument"),
    (lambda: pe.SnapKV(kernel=4), "odd"), (lambda: pe.SnapKV(window=0), "window"), (lambda: pe.SnapKV(pooling="mean"), "max, avg, peak"),
    (lambda: pe.RoCo(robust=2), "robust"), (lambda: pe.LookM(pictures=-1), "pictures"), (lambda: pe.StreamingLLM(recent=3), "'recent' is no argument"),
    (lambda: pe.compression_of("lookm2"), "there is no compression 'lookm2'; there are look-m, h2o"), (lambda: pe.compression_of("h2o:ratio"), "no name=value"),
    (lambda: pe.compression_of("h2o:ratio=0.1,ratio=0.2"), "twice"), (lambda: pe.compression_of({"ratio": 0.2}), "\"policy\" must be one of"),
    (lambda: pe.compression_of(0.2), "must be a policy"), (lambda: pe.compression_of("h2o:window=3"), "'window' is no argument"),
    (lambda: pe.compression_of("none:ratio=1"), "there is no compression"), (lambda: pe.H2O().select(np.ones(3), np.ones(3, bool)), "sums must be"),
    (lambda: pe.H2O().select(np.ones((2, 3)), np.ones(4, bool)), "is_text must be bool"), (lambda: pe.H2O().select(np.ones((2, 3)), np.array([0, 1, 2])), "is_text"),
    (lambda: pe.H2O().select(np.ones((2, 3)), np.ones(3, bool), budget=0), "budget"), (lambda: pe.H2O().weights(np.ones(3, bool), 4), "is_text"),
    (lambda: pe.Diverse().select(np.ones((1, 9)), np.ones(9, bool), keys=np.ones((1, 8, 2)), values=np.ones((1, 9, 2))), "keys and values must be"),
])
def test_what_is_wrong_is_said(make: Any, says: str) -> None:
    with pytest.raises(RequestError) as error:
        make()
    assert says in str(error.value)


def test_a_nan_is_kept_last() -> None:
    assert pe.H2O(budget=2, recent=0).select(np.array([[np.nan, 0.0, 1.0]]), np.ones(3, bool)).tolist() == [[1, 2]]
