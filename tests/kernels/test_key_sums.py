"""Sums over queries of what attention gives a key: the CPU's kernel, attention's second result, and the state in a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import bits, Block, CACHES, check, close, copy_of, in_blocks, KernelError, loaded, moved, reference, rng_of, run, stored, Value
from test_kernels import ATTENTION, attention_cases, isas, Kernels, SLOW

from csrc import build_rules as rules
from pyengine.graph.op import REGISTRY

SOURCES = [rules.CSRC / "cpu" / name for name in ("attention.c", "attention_int8.c", "key_sums.c")]
SUMS = REGISTRY["key_sums"]
ALL = (0, 1, 2, 3)


@pytest.fixture(scope="module", params=isas())
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(request.param, tmp_path_factory.mktemp(f"sums_{request.param}"), SOURCES)


def attend(kernels: Any, inputs: list[Value], threads: int = 1, stats: bool = True, **params: Any) -> list[np.ndarray]:
    (m, h, _), f = inputs[0].shape, inputs[2].shape[2]
    shapes = [(m, h * f), (m, h, 2)] if stats else [(m, h * f)]
    return run(kernels, ATTENTION, inputs, {"stats": stats, **params}, shapes, threads)


@settings(SLOW, max_examples=60)
@given(attention_cases())
def test_what_attention_says_of_its_softmax(kernels: Kernels, case: Any) -> None:
    """Largest logit and total as in float64, the same bits for each row alone; the first result has the bits that it has alone."""
    inputs, params = case
    (plain,), (out, stats) = attend(kernels, inputs, stats=False, **params), attend(kernels, inputs, **params)
    assert bits(plain) == bits(out)
    if len(stats):
        _, want = reference(ATTENTION, inputs, {**params, "stats": True})
        q = inputs[0]
        error = 3e-7 * (1 + abs(params["scale"]) * np.abs(q).max(initial=0) * np.sqrt(q.shape[2]) * 4)
        close(stats[..., 0], want[..., 0], error, 1.0, "largest")
        close(stats[..., 1], want[..., 1], error, 0.0, "total")
    assert bits(attend(kernels, inputs, 3, **params)[1]) == bits(stats)
    for i in range(min(2, len(q := inputs[0]))):
        row = [q[i : i + 1], *inputs[1:3], *(None if a is None else a[i : i + 1] for a in inputs[3:5]), inputs[5],
               None if inputs[6] is None else inputs[6][i : i + 1], inputs[7]]
        assert bits(attend(kernels, row, 2, **params)[1]) == bits(stats[i : i + 1])


@st.composite
def sums_cases(draw: Any) -> tuple[list[Value], dict[str, Any]]:
    """Any shape; keys that go round in their cells; mixed sequences; rows that count nothing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    g, group, m, kind = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(0, 40)), draw(st.sampled_from(CACHES))
    e = 32 * draw(st.integers(1, 3)) if kind[0] == "Q" else draw(st.integers(1, 70))
    b, l = draw(st.integers(1, 3)), draw(st.integers(1, 200))
    s = b * l + draw(st.integers(0, 9))
    k = stored(rng.standard_normal((g, s, e)), kind)
    cells = rng.permutation(s)[: b * l].reshape(b, l).astype(np.int32)
    seq = rng.integers(0, b, m).astype(np.int32) if draw(st.booleans()) else None
    hi = (rng.integers(0, 3 * l + 1, m) + draw(st.sampled_from([0, 2**31 - 1000]))).astype(np.int32)
    lo = np.maximum(0, hi - rng.integers(0, l + 1, m)).astype(np.int32)
    q = rng.standard_normal((m, g * group, e)).astype(np.float32)
    if draw(st.booleans()):
        k, q = moved(rng, k), moved(rng, q)
    kinds = tuple(draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=5)))
    weights = np.where(rng.random((m, 1)) < 0.6, rng.standard_normal((m, len(kinds))), 0).astype(np.float32)
    params = {"scale": e**-0.5, "softcap": draw(st.sampled_from([0.0, 20.0]))}
    inputs = [q, k, k, lo, hi, cells, seq]
    shape = (m, g * group, 2)
    stats = reference(ATTENTION, inputs, {**params, "stats": True})[1].astype(np.float32) if m else np.zeros(shape, np.float32)
    sums = rng.standard_normal((g, b * l, len(kinds))).astype(np.float32)
    return [sums, q, k, lo, hi, cells, seq, stats, weights], {**params, "kinds": kinds}


def add(kernels: Any, inputs: list[Value], params: dict[str, Any], threads: int = 1) -> np.ndarray:
    return run(kernels, SUMS, inputs, params, [inputs[0].shape], threads)[0]


@settings(SLOW, max_examples=100)
@given(sums_cases())
def test_sums(kernels: Kernels, case: Any) -> None:
    """Against the reference; bit for bit over threads, and with the rows given in pieces."""
    inputs, params = case
    got = check(kernels, SUMS, inputs, params)[0]
    m, parts = len(inputs[1]), inputs[0]
    for begin, end in ((0, m // 3), (m // 3, m // 3 + 1), (m // 3 + 1, m)):
        rows = np.s_[begin:end]
        sums, q, k, lo, hi, cells, seq, stats, weights = inputs
        parts = add(kernels, [parts, copy_of(q)[rows], k, lo[rows], hi[rows], cells, None if seq is None else seq[rows], stats[rows], weights[rows]],
                    params, 2)
    assert bits(parts) == bits(got)


@pytest.mark.parametrize("cache", CACHES)
def test_a_prompt_in_pieces_has_the_sums_of_one(kernels: Kernels, cache: str) -> None:
    """With attention before it, as a step has; what is not written yet may hold anything. The sums of p are the number of queries."""
    rng = rng_of(("sums", cache))
    n, g, h, e = 200, 2, 6, 64
    q = rng.standard_normal((n, h, e)).astype(np.float32)
    k = stored(rng.standard_normal((g, n, e)), cache)
    hi, lo, cells = np.arange(1, n + 1, dtype=np.int32), np.zeros(n, np.int32), rng.permutation(n).astype(np.int32)[None]
    weights, params = np.ones((n, 2), np.float32), {"scale": 0.1, "softcap": 0.0}
    whole = None
    for cuts in ([], [1, 2, 3, 50, 51, 150], [64, 128], [199]):
        at, sums = 0, np.zeros((g, n, 2), np.float32)
        for end in [*cuts, n]:
            rows, written = np.s_[at:end], copy_of(k)
            (written.raw if isinstance(written, Block) else written.view(np.uint8))[:, cells[0][end:]] = 0xFF
            stats = attend(kernels, [q[rows], written, written, lo[rows], hi[rows], cells], 2, **params)[1]
            sums = add(kernels, [sums, q[rows], written, lo[rows], hi[rows], cells, None, stats, weights[rows]], {**params, "kinds": (0, 3)}, 2)
            at = end
        whole = sums if whole is None else whole
        assert bits(sums) == bits(whole), f"{cuts} give other sums"
    np.testing.assert_allclose(whole[..., 0].sum(1), n * h / g, rtol=1e-4)
    p, j = np.zeros((h, n)), cells[0]
    keys = np.repeat(loaded(k), h // g, axis=0).astype(np.float64)
    if not in_blocks(k):
        for i in range(n):
            s = np.exp(0.1 * np.einsum("he,hke->hk", q[i].astype(np.float64), keys[:, j[: i + 1]]))
            p[:, : i + 1] += s / s.sum(1, keepdims=True)
        np.testing.assert_allclose(whole[..., 0], p.reshape(g, h // g, n).sum(1), rtol=3e-5)


def test_wrong_numbers_are_refused(kernels: Kernels) -> None:
    sums, q, k = np.zeros((1, 20, 1), np.float32), np.ones((2, 2, 32), np.float32), np.ones((1, 20, 32), np.float32)
    cells, stats, weights = np.arange(20, dtype=np.int32).reshape(2, 10), np.ones((2, 2, 2), np.float32), np.ones((2, 1), np.float32)
    zero, five, params = np.zeros(2, np.int32), np.full(2, 5, np.int32), {"scale": 1.0, "kinds": (0,)}
    for lo, hi, seq, table, words in ((zero - 1, five, None, cells, "-1 (to 5|of 10)"), (zero, five + 9, None, cells, "14 (keys|of 10)"),
                                      (zero, five, zero + 2, cells, "sequence 2 of 2"), (zero, five, None, cells + 18, "2[012] of 20")):
        with pytest.raises(KernelError, match=words):
            add(kernels, [sums, q, k, lo, hi, table.astype(np.int32), seq, stats, weights], params, 2)
