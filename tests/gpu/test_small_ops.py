"""CUDA's small ops in the emulator, beyond the declared cases: every format of a table, strides, NaN, ties, long rows, large angles."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

import pyengine as pe
from pyengine import ops
from pyengine.dtype import dtype
from pyengine.errors import GraphError, RequestError
from pyengine.graph.tensor import make_leaf, Tensor

from bench.blocks import Blocks

DEVICE = "cuda-emulated"
FORMATS = ("F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4 "
           "IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M").split()
PACKED = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()


def randn(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers that depend on the shape and the seed only."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def run(build: Any, **arrays: np.ndarray) -> Any:
    """Compile build(graph's inputs by name) for the emulated card and run it on these arrays; int arrays are I32 inputs."""
    g = pe.Graph()
    inputs = {name: g.input(name, a.shape, "I32" if a.dtype.kind == "i" else "F32") for name, a in arrays.items()}
    return g.compile(build(**inputs), device=DEVICE, strict=True).run(**arrays)


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits, signed zeros included; one NaN is as good as another."""
    want = np.ascontiguousarray(want, np.float32)
    assert got.shape == want.shape
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))


def close(got: np.ndarray, want: np.ndarray, share: float = 2e-6) -> None:
    """Within a share of the largest number."""
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= share * max(1.0, np.abs(want).max(initial=0))


# ---- rows -------------------------------------------------------------------------------------------------------------------


def blocks(kind: str, n: int, k: int) -> Blocks:
    """Random bytes as a matrix [n, k] of a format."""
    d = dtype(kind)
    return Blocks("table", d, np.random.default_rng(list(kind.encode())).integers(0, 256, (n, d.size(k)), np.uint8))


def leaf(b: Blocks, k: int) -> Tensor:
    return make_leaf("constant", "table", (len(b.raw), k), b.dtype, b)


def values(b: Blocks) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(b.raw, gguf.GGMLQuantizationType(b.dtype.id))


def test_formats_are_all_that_gguf_dequantizes() -> None:
    assert set(FORMATS) == {"F32", "F16"} | {t.name for t in gguf.quants._type_traits}


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_every_format(kind: str) -> None:
    b, ids = blocks(kind, 20, 1536), np.array([3, 19, 0, 3], np.int32)
    got = run(lambda ids: ops.rows(leaf(b, 1536), ids), ids=ids)
    same_bits(got, values(b)[ids])


@pytest.mark.parametrize("kind", PACKED)
def test_rows_of_a_table_that_a_product_reads_too(kind: str) -> None:
    k = 1024 if dtype(kind).block > 1 else 100
    b, ids = blocks(kind, 37, k), np.array([0, 15, 16, 36], np.int32)

    def build(ids: Tensor, x: Tensor) -> list[Tensor]:
        table = leaf(b, k)
        return [ops.rows(table, ids), ops.linear(x, [table])[0]]

    got, _ = run(build, ids=ids, x=randn(1, k))
    same_bits(got, values(b)[ids])


def test_rows_are_scaled_and_mixed_with_media() -> None:
    b, media = blocks("Q4_0", 9, 64), randn(3, 64)
    ids = np.array([8, -1, 2, -3], np.int32)
    got = run(lambda ids, media: ops.rows(leaf(b, 64), ids, media, scale=0.3), ids=ids, media=media)
    same_bits(got[[0, 2]], values(b)[[8, 2]] * np.float32(0.3))
    same_bits(got[[1, 3]], media[[0, 2]])


@pytest.mark.parametrize("bad", (9, -4, 1 << 30))
def test_rows_outside_of_the_table_are_refused_as_on_the_cpu(bad: int) -> None:
    said = []
    for device in ("cpu", DEVICE):
        g = pe.Graph()
        y = ops.rows(leaf(blocks("Q4_0", 9, 64), 64), g.input("ids", (3,), "I32"), g.input("media", (3, 64)))
        program = g.compile(y, device=device)
        with pytest.raises(RequestError) as error:
            program.run(ids=np.array([1, bad, 2], np.int32), media=randn(3, 64))
        said.append(str(error.value))
        program.run(ids=np.array([1, 8, -3], np.int32), media=randn(3, 64))       # and goes on
    assert said[0].endswith(said[1]) and str(bad) in said[1]


# ---- strides ----------------------------------------------------------------------------------------------------------------

VIEWS = {
    "transposed": lambda x: ops.transpose(x, axes=(1, 0, 2)),
    "inner axis outside": lambda x: ops.transpose(x, axes=(2, 0, 1)),
    "reversed": lambda x: ops.transpose(x, axes=(2, 1, 0)),
    "sliced": lambda x: ops.slice(x, axis=2, start=1, stop=x.shape[2] - 2),
    "sliced and turned": lambda x: ops.transpose(ops.slice(x, axis=1, start=1, stop=3), axes=(0, 2, 1)),
}
ARRAY_VIEWS = {
    "transposed": lambda x: x.transpose(1, 0, 2),
    "inner axis outside": lambda x: x.transpose(2, 0, 1),
    "reversed": lambda x: x.transpose(2, 1, 0),
    "sliced": lambda x: x[:, :, 1:-2],
    "sliced and turned": lambda x: x[:, 1:3].transpose(0, 2, 1),
}


@pytest.mark.parametrize("shape", ((3, 5, 7), (40, 33, 68)))
@pytest.mark.parametrize("view", VIEWS)
def test_contiguous_of_views(view: str, shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    same_bits(run(lambda x: ops.contiguous(VIEWS[view](x)), x=x), ARRAY_VIEWS[view](x))


@pytest.mark.parametrize("view", VIEWS)
def test_binary_of_views(view: str) -> None:
    x = randn(6, 9, 12)
    want = ARRAY_VIEWS[view](x)
    y = randn(*want.shape[1:], seed=1)
    same_bits(run(lambda x, y: ops.sub(VIEWS[view](x), y), x=x, y=y), want - y)
    same_bits(run(lambda x, y: ops.mul(y, VIEWS[view](x)), x=x, y=y), want * y)


@pytest.mark.parametrize("shapes", (((4, 1, 7), (1, 5, 1)), ((1,), (3, 8)), ((2, 3, 4, 5), (3, 1, 5)), ((70, 260), (70, 1)), ((1, 1), (1,))))
def test_broadcasting(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, y = (randn(*s, seed=i) for i, s in enumerate(shapes))
    same_bits(run(ops.add, x=x, y=y), x + y)


def test_largest_and_smallest_keep_nan() -> None:
    odd = np.array([np.nan, 1, -np.inf, np.inf, -1, 0], np.float32)
    x, y = np.repeat(odd, len(odd)), np.tile(odd, len(odd))
    for kind, f in (("max", np.maximum), ("min", np.minimum)):
        np.testing.assert_array_equal(run(lambda x, y: ops.binary(x, y, kind=kind), x=x, y=y), f(x, y))


@pytest.mark.parametrize("kind", ("relu", "relu2", "silu", "gelu", "gelu_tanh", "quick_gelu", "sigmoid", "tanh", "exp", "neg", "square", "none"))
def test_functions_keep_nan_and_ends(kind: str) -> None:
    x = np.array([np.nan, 0, 1e-30, -1e-30, 80, -80, 200, -200, 1, -1, 5], np.float32)
    got = run(lambda x: ops.unary(x, kind=kind), x=x)
    with np.errstate(over="ignore", invalid="ignore"):
        want = ops.unary.fn(x.astype(np.float64), kind=kind).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite & ~np.isnan(want)], want[~finite & ~np.isnan(want)])
    assert (np.abs(got[finite] - want[finite]) <= 3e-7 * np.maximum(1, np.abs(want[finite]))).all()


def test_logarithm_and_root() -> None:
    x = np.abs(randn(3, 37)) + 1e-3
    close(run(lambda x: ops.unary(x, kind="log"), x=x), np.log(x), 3e-7)
    same_bits(run(lambda x: ops.unary(x, kind="sqrt"), x=x), np.sqrt(x))


def test_concat_of_many_parts() -> None:
    parts = {f"p{i}": randn(3, 1 + i % 5, 4, seed=i) for i in range(20)}
    got = run(lambda **p: ops.concat(list(p.values()), axis=1), **parts)
    same_bits(got, np.concatenate(list(parts.values()), axis=1))


# ---- products ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", ((False, False), (False, True), (True, False), (True, True)))
@pytest.mark.parametrize("sizes", ((1, 1, 1), (70, 130, 40), (65, 3, 17)))
def test_matmul_of_turned_factors(sizes: tuple[int, int, int], turned: tuple[bool, bool]) -> None:
    m, n, k = sizes
    x, y = (randn(2, *(s[::-1] if t else s), seed=i) for i, (s, t) in enumerate(zip(((m, k), (n, k)), turned)))
    turn = lambda t, how: ops.transpose(t, axes=(0, 2, 1)) if how else t  # noqa: E731
    got = run(lambda x, y: ops.matmul(turn(x, turned[0]), turn(y, turned[1])), x=x, y=y)
    a, b = (v.transpose(0, 2, 1) if t else v for v, t in zip((x, y), turned))
    close(got, a.astype(np.float64) @ b.transpose(0, 2, 1).astype(np.float64), 1e-6)


def test_a_row_of_a_product_does_not_depend_on_the_others() -> None:
    x, y = randn(70, 50), randn(66, 50, seed=1)
    whole = run(ops.matmul, x=x, y=y)
    same_bits(run(ops.matmul, x=x[5:6], y=y), whole[5:6])
    same_bits(run(ops.matmul, x=x, y=y[64:]), whole[:, 64:])


# ---- rows that are summed over ----------------------------------------------------------------------------------------------

WIDTHS = (1, 4, 33, 512, 513, 640, 2048, 2052, 5000, 9000, 17000)


@pytest.mark.parametrize("d", WIDTHS)
def test_norms_of_any_width(d: int) -> None:
    x, w, b = 3 * randn(3, d) + 1, randn(d, seed=1), randn(d, seed=2)
    wide = [v.astype(np.float64) for v in (x, w, b)]
    close(run(lambda x, w: ops.rms_norm(x, w, eps=1e-6), x=x, w=w), ops.rms_norm.fn(wide[0], wide[1], eps=1e-6))
    close(run(lambda x, w, b: ops.layer_norm(x, w, b, eps=1e-6), x=x, w=w, b=b), ops.layer_norm.fn(*wide, eps=1e-6), 4e-6)


@pytest.mark.parametrize("d", WIDTHS)
def test_softmax_and_reductions_of_any_width(d: int) -> None:
    x = 4 * randn(3, d)
    close(run(lambda x: ops.softmax(x, scale=0.5), x=x), ops.softmax.fn(x.astype(np.float64), scale=0.5))
    for kind in ("sum", "mean", "max", "min"):
        want = ops.reduce.fn(x.astype(np.float64), kind=kind)
        close(run(lambda x: ops.reduce(x, kind=kind), x=x), want, 1e-6 * (1 if kind in ("max", "min") else max(1, d**0.5)))


def test_rows_do_not_depend_on_their_neighbours() -> None:
    for d in (100, 640, 3000):
        x, w = randn(9, d), randn(d, seed=1)
        for build in (lambda x, w: ops.rms_norm(x, w, eps=1e-6), lambda x, w: ops.softmax(ops.mul(x, w))):
            same_bits(run(build, x=x[4:5], w=w), run(build, x=x, w=w)[4:5])


def test_norms_and_softmax_of_rows_with_nan() -> None:
    x = randn(4, 50)
    x[1, 7], x[2, 3] = np.nan, -np.inf
    soft = run(lambda x: ops.softmax(x), x=x)
    assert np.isnan(soft[1]).all() and np.isfinite(soft[[0, 2, 3]]).all() and soft[2, 3] == 0
    for kind in ("sum", "max", "min"):
        got = run(lambda x: ops.reduce(x, kind=kind), x=x)
        assert np.isnan(got).tolist() == [False, True, False, False]
    assert np.isnan(run(lambda x: ops.rms_norm(x, eps=1e-6), x=x)[1]).all()


def test_the_largest_of_nothing_is_refused() -> None:
    with pytest.raises(GraphError):
        run(lambda x: ops.reduce(x, kind="max"), x=np.zeros((3, 0), np.float32))
    assert (run(lambda x: ops.reduce(x, kind="sum"), x=np.zeros((3, 0), np.float32)) == 0).all()


# ---- angles -----------------------------------------------------------------------------------------------------------------


def test_angles_of_a_million_positions() -> None:
    f = 32
    freq = (500000.0 ** (-np.arange(f) / f)).astype(np.float32)
    positions = np.array([[0, 1, 7, 1000, 65535, 123456, 999999, 1000000]], np.int32)
    got = run(lambda p, f: ops.rope_table(p, f), p=positions, f=freq)
    angle = (positions[0, :, None].astype(np.float32) * freq).astype(np.float64)
    assert np.abs(got - np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)).max() <= 1e-7


def test_huge_angles_and_axes() -> None:
    positions = np.array([[2**31 - 1, 5], [-3, 2**30]], np.int32)
    freq, axis = np.array([1.0, 3.5, 0.25], np.float32), np.array([0, 1, 1], np.int32)
    got = run(lambda p, f, a: ops.rope_table(p, f, a, scale=1.25), p=positions, f=freq, a=axis)
    angle = (positions[axis].T.astype(np.float32) * freq).astype(np.float64)
    close(got, 1.25 * np.concatenate([np.cos(angle), np.sin(angle)], axis=-1), 2e-7)


def test_temperatures() -> None:
    p = np.array([[-5, -1, 0, 3, 8191, 8192, 10**6, 2**31 - 1]], np.int32)
    got = run(lambda p: ops.temperature(p, floor=4, scale=0.1), p=p)
    close(got, ops.temperature.fn(p, floor=4, scale=0.1), 1e-7)
    close(run(lambda p: ops.temperature(p, floor=4, scale=0.1, offset=0), p=p), ops.temperature.fn(p, floor=4, scale=0.1, offset=0), 1e-7)


# ---- experts ----------------------------------------------------------------------------------------------------------------


def chosen(scores: np.ndarray, **params: Any) -> tuple[np.ndarray, np.ndarray]:
    return tuple(run(lambda s: list(ops.top_experts(s, **params)), s=scores))


def test_of_equal_experts_the_first_are_taken() -> None:
    scores = np.array([[1, 3, 3, 0, -0.0, 3], [0, -0.0, 0, -0.0, 0, -np.inf], [2, 2, 2, 2, 2, 2]], np.float32)
    got, gates = chosen(scores, n_used=4, gate="softmax")
    want, right = ops.top_experts.fn(scores, n_used=4, gate="softmax")
    np.testing.assert_array_equal(got, want)
    close(gates, right)


@pytest.mark.parametrize("gate", ("softmax", "sigmoid"))
@pytest.mark.parametrize("n, used", ((1, 1), (31, 31), (32, 5), (129, 8), (1600, 6)))
def test_choices_of_any_size(n: int, used: int, gate: str) -> None:
    scores = randn(6, n)
    got, gates = chosen(scores, n_used=used, gate=gate, normed=True, scale=2.5)
    want, right = ops.top_experts.fn(scores.astype(np.float64), n_used=used, gate=gate, normed=True, scale=2.5)
    np.testing.assert_array_equal(got, want)
    close(gates, right)


def test_a_row_with_nan_still_has_different_experts() -> None:
    scores = randn(3, 40)
    scores[1, 5] = np.nan
    scores[2] = np.nan
    for gate in ("softmax", "sigmoid"):
        got, gates = chosen(scores, n_used=7, gate=gate)
        assert all(len(set(row)) == 7 for row in got.tolist()) and got.min() >= 0 and got.max() < 40
        assert np.isfinite(gates[0]).all() and np.isnan(gates[2]).all()
        assert gate == "sigmoid" or np.isnan(gates[1]).all()


@pytest.mark.parametrize("n", (1, 7, 64, 1030))
def test_sums_of_experts_are_in_the_order_of_the_choice(n: int) -> None:
    y, gates, residual = randn(6, n), randn(2, 3, seed=1), randn(2, n, seed=2)
    got = run(lambda y, g, r: ops.sum_experts(y, g, r, n_used=3), y=y, g=gates, r=residual)
    close(got, ops.sum_experts.fn(y.astype(np.float64), gates, residual, n_used=3))
    plain = run(lambda y: ops.sum_experts(y, n_used=2), y=y)
    same_bits(plain, y[0::2] + y[1::2])
