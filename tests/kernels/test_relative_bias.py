"""Biases by distance: T5's buckets, and attention that adds them, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from op_cases import rng_of
from test_convolution import run
from test_kernels import isas

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.errors import ShapeError
from pyengine.graph.tensor import make_leaf
from pyengine.nn.relative_bias import relative_buckets

torch = pytest.importorskip("torch", reason="pip install torch")


@pytest.mark.parametrize("bidirectional", (True, False))
@pytest.mark.parametrize("n, far", ((32, 128), (32, 20), (8, 20), (64, 1000)))
def test_buckets_are_those_of_t5(n: int, far: int, bidirectional: bool) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="pip install transformers").T5Attention
    distance = np.arange(-3000, 3001)
    want = t5._relative_position_bucket(torch.tensor(distance), bidirectional, n, far).numpy()
    np.testing.assert_array_equal(relative_buckets(distance, n, far, bidirectional), want)
    ends = want[np.clip(distance, -far, far) + 3000]
    np.testing.assert_array_equal(ends, want)                # so a table of 2 far + 1 distances holds all


@pytest.mark.parametrize("causal", (False, True))
def test_scores_are_added_to_by_distance(causal: bool) -> None:
    """Rows of a whole sequence, longer than the table, against softmax over the matrix that nobody makes."""
    rng, (m, h, e, reach) = rng_of(causal), (150, 4, 32, 40)
    q, k, v = (rng.standard_normal((m, h, e)).astype(np.float32) for _ in range(3))
    table = rng.standard_normal((h, 2 * reach + 1)).astype(np.float32)
    i = np.arange(m)
    scores = np.einsum("ihe,jhe->hij", q.astype(np.float64), k) + table[:, np.clip(i[None, :] - i[:, None], -reach, reach) + reach]
    scores[:, (i[None, :] > i[:, None]) & causal] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("hij,jhe->ihe", p / p.sum(-1, keepdims=True), v).reshape(m, h * e)
    lo, hi = np.zeros(m, np.int32), (i + 1 if causal else np.full(m, m)).astype(np.int32)
    keys, values = (np.ascontiguousarray(a.transpose(1, 0, 2)) for a in (k, v))
    build = lambda t: ops.attention(t, keys, values, lo, hi, bias=table, at=None if causal else i.astype(np.int32), scale=1.0)  # noqa: E731
    assert np.abs(build(q) - want).max() < 1e-4
    for isa in isas():
        got = run(build, q, isa)
        assert np.abs(got - want).max() < 2e-5, isa
        assert got.tobytes() == run(build, q, isa, 1).tobytes()


def test_what_does_not_fit_is_said() -> None:
    leaf = lambda name, shape, kind="F32": make_leaf("input", name, shape, dtype(kind))  # noqa: E731
    q, k, i = leaf("q", (5, 2, 8)), leaf("k", (2, 5, 8)), leaf("i", (5,), "I32")
    with pytest.raises(ShapeError, match="odd number"):
        ops.attention(q, k, k, i, i, bias=leaf("b", (2, 6)), scale=1.0)
    with pytest.raises(ShapeError, match="'at'"):
        ops.attention(q, k, k, i, i, at=i, scale=1.0)
