"""Merging beside the equations of LOOK-M, written again here as loops over float64, and the search for the nearest key beside NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyengine as pe
from pyengine.cache.compression import merging
from pyengine.errors import RequestError
from pyengine.native import ffi, lib

RULES = ("averaged", "pivotal", "weighted", "attention")


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    lengths = float(np.sqrt((x * x).sum()) * np.sqrt((y * y).sum()))
    return float((x * y).sum()) / lengths if lengths else 0.0


def papers(rule: str, kept: np.ndarray, keys: np.ndarray, values: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The equations for one head: keys and values [n, e] to [b, e]."""
    homes: dict[int, list[tuple[int, float]]] = {int(c): [] for c in kept}
    for e in sorted(set(range(len(keys))) - set(homes)):
        scores = [cosine(keys[e], keys[c]) for c in homes]
        c = list(homes)[int(np.argmax(scores))]
        homes[c].append((e, max(scores)))
    out = []
    for x in (keys, values):
        rows = []
        for c, came in homes.items():
            if rule == "attention":
                rows.append((sums[c] * x[c] + sum(sums[e] * x[e] for e, _ in came)) / (sums[c] + sum(sums[e] for e, _ in came)))
                continue
            added = [{"averaged": x[e], "pivotal": (x[e] + x[c]) / 2, "weighted": s * x[e]}[rule] for e, s in came]
            rows.append((x[c] + sum(added)) / (1 + len(came)))
        out.append(np.array(rows))
    return out[0], out[1]


def policy(rule: str) -> Any:
    return pe.LookM(merge=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("heads", "n", "e", "f", "ratio"), [(1, 9, 4, 4, 0.5), (3, 60, 16, 8, 0.2), (2, 130, 33, 64, 0.6), (2, 150, 128, 128, 0.01)])
def test_merged_is_the_papers(rule: str, heads: int, n: int, e: int, f: int, ratio: float) -> None:
    rng = np.random.default_rng(n)
    keys, values, sums = rng.normal(size=(heads, n, e)), rng.normal(size=(heads, n, f)), rng.random((heads, n))
    kept = pe.LookM(ratio=ratio).select(sums, rng.random(n) < 0.5)
    found = policy(rule).merge(kept, keys, values, sums=sums)
    for h in range(heads):
        for got, expected in zip(found, papers(rule, kept[h], keys[h], values[h], sums[h])):
            assert got.dtype == np.float64 and got[h].shape == expected.shape
            np.testing.assert_allclose(got[h], expected, rtol=1e-12, atol=1e-13)


def test_a_small_example_by_hand() -> None:
    keys = np.array([[[1.0, 0], [0, 2], [4, 0], [2, 0.2], [0, -3], [0.1, 6]]])
    values = np.array([[[1.0], [10], [3], [5], [7], [100]]])
    kept = np.array([[0, 1]])                                # 2 and 3 go to 0; 4 to 0 too: 0 is above -1; 5 to 1
    k, v = policy("averaged").merge(kept, keys, values)
    assert np.allclose(k, [[[7 / 4, -2.8 / 4], [0.05, 4]]], atol=1e-15) and np.allclose(v, [[[16 / 4], [55]]])
    k, v = policy("pivotal").merge(kept, keys, values)
    assert np.allclose(k, [[[(1 + 2.5 + 1.5 + 0.5) / 4, (0 + 0 + 0.1 - 1.5) / 4], [0.025, 3]]]) and np.allclose(v, [[[(1 + 2 + 3 + 4) / 4], [32.5]]])
    s = 2 / np.hypot(2, 0.2), 6 / np.hypot(0.1, 6)
    k, v = policy("weighted").merge(kept, keys, values)
    assert np.allclose(k, [[[(1 + 4 + 2 * s[0]) / 4, 0.2 * s[0] / 4], [0.1 * s[1] / 2, (2 + 6 * s[1]) / 2]]])
    assert np.allclose(v, [[[(1 + 3 + 5 * s[0]) / 4], [(10 + 100 * s[1]) / 2]]])
    k, v = policy("attention").merge(kept, keys, values, sums=np.array([[0.5, 0, 0, 0.25, 0.25, 0]]))
    assert np.allclose(k, [[[1, -0.7], [0, 2]]]) and np.allclose(v, [[[3.5], [10]]])           # without any attention a key stays
    for merge in (policy("none"), pe.H2O()):
        k, v = merge.merge(kept, keys, values)
        assert (k == keys[:, :2]).all() and (v == values[:, :2]).all()


def test_what_is_kept_whole_is_not_changed() -> None:
    rng = np.random.default_rng(1)
    keys, values = rng.normal(size=(2, 7, 4)), rng.normal(size=(2, 7, 4))
    for rule in RULES:
        k, v = policy(rule).merge(np.arange(7)[None].repeat(2, 0), keys, values, sums=np.ones((2, 7)))
        assert (k == keys).all() and (v == values).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_keep_their_dtype_and_are_not_written(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    keys, values = rng.normal(size=(2, 50, 8)).astype(dtype), rng.normal(size=(2, 50, 8)).astype(dtype)
    before, kept = (keys.copy(), values.copy()), np.arange(0, 50, 5)[None].repeat(2, 0)
    exact = policy("pivotal").merge(kept, keys.astype(np.float64), values.astype(np.float64))
    for threads in (1, 2, 3):
        for got, expected in zip(policy("pivotal").merge(kept, keys, values, n_threads=threads), exact):
            assert got.dtype == dtype and (got == expected.astype(dtype)).all()
    assert (keys == before[0]).all() and (values == before[1]).all()


# -- the nearest key ------------------------------------------------------------------------------------------------------


def argmax(keys: np.ndarray, kept: np.ndarray, evicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = np.sqrt((keys * keys).sum(1, keepdims=True))
    units = np.divide(keys, length, out=np.zeros_like(keys), where=length > 0)
    scores = units[evicted] @ units[kept].T
    return scores.argmax(1), scores.max(1)


def isas() -> list[str]:
    keys = np.eye(2)
    there = []
    for isa in ("avx512", "avxvnni", "avx2", "sme", "sve256", "i8mm", "neon", "generic"):
        if search(keys, np.array([0]), np.array([1]), isa)[2] == 0:
            there.append(isa)
    return there


def search(keys: np.ndarray, kept: np.ndarray, evicted: np.ndarray, isa: str | None) -> tuple[np.ndarray, np.ndarray, int]:
    """The C function with an instruction set that is named."""
    keys = np.ascontiguousarray(keys, np.float64)
    kept, evicted = np.ascontiguousarray(kept, np.int64), np.ascontiguousarray(evicted, np.int64)
    at, near = np.full(len(evicted), -1, np.int32), np.zeros(len(evicted))
    memory = np.full(lib.pe_nearest_scratch(len(kept), keys.shape[1]) + 8, 255, np.uint8)      # NaN in what it has not written
    asked = ffi.new("pe_nearest_input *")
    asked.width, asked.n_kept, asked.n_evicted = keys.shape[1], len(kept), len(evicted)
    asked.keys = ffi.cast("double *", keys.ctypes.data)
    asked.kept, asked.evicted = ffi.cast("int64_t *", kept.ctypes.data), ffi.cast("int64_t *", evicted.ctypes.data)
    status = lib.pe_nearest(isa.encode() if isa else ffi.NULL, asked, ffi.cast("void *", memory.ctypes.data),
                            ffi.cast("int32_t *", at.ctypes.data), ffi.cast("double *", near.ctypes.data))
    assert (memory[-8:] == 255).all()
    return at, near, status


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("n", "width", "n_kept"), [(2, 1, 1), (70, 3, 5), (200, 64, 63), (300, 80, 64), (400, 128, 65), (500, 256, 130), (90, 127, 1)])
def test_the_nearest_is_numpys(isa: str, n: int, width: int, n_kept: int) -> None:
    rng = np.random.default_rng(n)
    close = rng.normal(size=width) * 30 + rng.normal(size=(n, width)) * 1e-3                   # cosines that float32 cannot tell apart
    for keys in (rng.normal(size=(n, width)), close, -np.abs(rng.normal(size=(n, width))) * rng.choice([1, -1], (n, 1))):
        there = rng.permutation(n)
        kept, evicted = np.sort(there[:n_kept]), np.sort(there[n_kept:])
        at, near, status = search(keys, kept, evicted, isa)
        expected, highest = argmax(keys, kept, evicted)
        assert status == 0 and np.allclose(near, highest, rtol=0, atol=1e-13)
        far = at != expected                                 # but for the last bit of a double
        assert width == 1 or far.mean() < 0.05 and np.allclose(near[far], highest[far], rtol=0, atol=4e-16)
        best, same, _ = search(keys, kept, evicted, None)
        assert (at == best).all() and (near == same).all()


def test_of_equal_keys_the_first_is_nearest() -> None:
    keys = np.array([[0.0, 0], [1, 2], [-1, 0], [1, 2], [1, 2], [0, 0], [3, 5], [0, 0], [-2, -4]])
    at, near = merging.nearest(keys, np.array([0, 2, 3, 4]), np.array([1, 5, 6, 7, 8]))
    assert at.tolist() == [2, 0, 2, 0, 1]                    # a key of zeros has the cosine 0 to all, and [-2, -4] points most as [-1, 0]
    assert near[0] == pytest.approx(1) and near[1] == near[3] == 0
    assert merging.nearest(np.zeros((3, 2)), np.array([1, 2]), np.array([0]))[0].tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 200), width=st.integers(2, 70), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_any_shape(n: int, width: int, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(n, width)) * 10.0 ** rng.uniform(-30, 30, (n, 1))
    there = rng.permutation(n)
    n_kept = data.draw(st.integers(1, n - 1))
    kept, evicted = np.sort(there[:n_kept]), np.sort(there[n_kept:])
    at, near = merging.nearest(keys, kept, evicted)
    assert (at == argmax(keys, kept, evicted)[0]).all()
    again, _ = merging.nearest(keys, kept, evicted[::-1])
    assert (again[::-1] == at).all()                         # none depends on which others are asked for


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e200])
@pytest.mark.parametrize("row", [0, 3])
def test_keys_that_have_no_length_are_refused(wrong: float, row: int) -> None:
    keys = np.ones((5, 4))
    keys[row, 2] = wrong
    with pytest.raises(RequestError, match="finite"):
        merging.nearest(keys, np.array([0, 1]), np.array([2, 3, 4]))


@pytest.mark.parametrize(("kept", "keys", "values", "says"), [
    ([[0, 1]], (1, 3, 2), (1, 4, 2), "of the same heads and n"), ([[0, 1]], (3, 2), (3, 2), "heads, n, e"), ([0, 1], (1, 3, 2), (1, 3, 2), "kept must be positions"),
    ([[1, 0]], (1, 3, 2), (1, 3, 2), "ascending"), ([[1, 1]], (1, 3, 2), (1, 3, 2), "ascending"), ([[0, 3]], (1, 3, 2), (1, 3, 2), "below 3"),
    ([[-1, 0]], (1, 3, 2), (1, 3, 2), "below 3"), ([[0.0]], (1, 3, 2), (1, 3, 2), "float64"), ([[0], [1]], (1, 3, 2), (1, 3, 2), "[1, budget]"),
])
def test_arrays_that_do_not_fit_are_refused(kept: Any, keys: Any, values: Any, says: str) -> None:
    with pytest.raises(RequestError) as error:
        policy("averaged").merge(np.array(kept), np.ones(keys), np.ones(values))
    assert says in str(error.value)


def test_attention_must_be_there_to_weigh_with() -> None:
    with pytest.raises(RequestError, match="needs text's attention"):
        policy("attention").merge(np.array([[0]]), np.ones((1, 3, 2)), np.ones((1, 3, 2)))
