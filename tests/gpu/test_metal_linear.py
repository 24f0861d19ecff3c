"""`linear` and `expert_linear` on Metal, emulated or on an Apple GPU: every format, odd sizes, what is fused, and the bits of a row.

The oracle is that of the CPU's kernels (tests/kernels/test_linear_kernels.py): float64 sums of gguf-py's values times x, which
formats with a packed form take as codes of 8 bits.
"""

from __future__ import annotations

import ctypes
from typing import Any

import gguf
import numpy as np
import pytest
from metal_kernels import MetalKernels
from op_cases import CTensor, KernelError, MAX_DIMS, rng_of
from test_linear_kernels import Around, array, check, check_bad_numbers, check_glu, FLOATS, Matrix, PACKED, QUANTIZED, rows_of

from pyengine.backends import backend
from pyengine.dtype import dtype
from pyengine.native import ffi, lib

# Formats that have no packed form: the byte of a block in which the exponent of its scale stands, as the upper half of a float16.
IN_FILES = {"IQ1_S": 1, "IQ1_M": 55, "IQ2_XXS": 1, "IQ2_XS": 1, "IQ2_S": 1, "IQ3_XXS": 1, "IQ3_S": 1, "TQ1_0": 53, "TQ2_0": 65,
            "NVFP4": None}


class Products:
    """`linear` and `expert_linear` of a device on arrays of the host."""

    def __init__(self, kernels: MetalKernels):
        self.kernels = kernels

    def weight(self, matrices: list[Matrix], packed: bool, experts: bool) -> tuple[CTensor, Any]:
        """A matrix, or those of experts, in memory from a multiple of 64 on."""
        m = matrices[0]
        parts = [pack(one) if packed else one.raw.ravel() for one in matrices]
        held = np.empty(sum(p.nbytes for p in parts) + 64, np.uint8)
        at = held[-held.ctypes.data % 64 :][: held.nbytes - 64]
        at[:] = np.concatenate(parts)
        strides, shape = (m.raw.nbytes, m.raw.strides[0], m.block_bytes), (len(matrices), m.n, m.k)
        skip = 0 if experts else 1
        t = CTensor(at.ctypes.data, m.id + PACKED * packed, 3 - skip, (ctypes.c_int64 * MAX_DIMS)(*shape[skip:]),
                    (ctypes.c_int64 * MAX_DIMS)(*strides[skip:]))
        return t, held

    def run(self, op: str, args: list[list[tuple[CTensor, Any]]], n_out: int, params: dict[str, Any]) -> None:
        """Run on tensors that come with the memory which they describe."""
        self.kernels.run(op, [[t for t, _ in group] for group in args], n_out, params)

    def linear(self, x: np.ndarray, w: list[Matrix], bias: list[np.ndarray] = (), norm: np.ndarray | None = None,
               residual: np.ndarray | None = None, packed: bool = True, **params: Any) -> list[np.ndarray]:
        """All results; a border of NaN around each must stay."""
        out = [np.full((len(x) + 2, m.n + 3), np.nan, np.float32) for m in w[: 1 if params.get("glu", "none") != "none" else None]]
        views = [o[1:-1, 1:-2] for o in out]
        one = lambda a: [] if a is None else [array(a)]  # noqa: E731
        self.run("linear", [[array(x)], [self.weight([m], packed, False) for m in w], [array(b) for b in bias], one(norm), one(residual),
                            [array(v) for v in views]], 1, params)
        results = [v.copy() for v in views]
        for o, v in zip(out, views):
            v[...] = np.nan
            assert np.isnan(o).all(), "wrote outside the output"
        return results

    def experts(self, x: np.ndarray, w: list[list[Matrix]], chosen: np.ndarray, packed: bool = True, **params: Any) -> np.ndarray:
        """w: a matrix for each expert, once or, with glu, twice."""
        out = np.full((chosen.size + 2, w[0][0].n + 3), np.nan, np.float32)
        view = out[1:-1, 1:-2]
        self.run("expert_linear", [[array(x)], [self.weight(m, packed, True) for m in w], [array(chosen)], [array(view)]], 1, params)
        result = view.copy()
        view[...] = np.nan
        assert np.isnan(out).all(), "wrote outside the output"
        return result


def pack(m: Matrix) -> np.ndarray:
    """The packed matrix."""
    held = np.empty(int(lib.pe_pack_bytes(m.id, m.n, m.k)), np.uint8)
    at = [ffi.cast("void *", a.ctypes.data) for a in (m.raw, held)]
    assert lib.pe_pack_groups(m.id, at[0], m.n, m.k, 0, -(-m.n // 16), at[1]) == 0
    return held


def in_file(rng: np.random.Generator, name: str, n: int, k: int) -> Matrix:
    """A random matrix of any format."""
    with np.errstate(invalid="ignore"):                                         # before it has its scales
        m = Matrix(rng, name, n, k)
    at = IN_FILES.get(name)
    if at is not None:
        blocks = m.raw.reshape(-1, m.block_bytes)
        blocks[:, at] = 0x20 | blocks[:, at] & 0x0F                              # 2^-7 .. 2^-4
        m.values = gguf.quants.dequantize(m.raw, gguf.GGMLQuantizationType[name]).astype(np.float32).reshape(n, k)
    return m


@pytest.fixture(scope="session")
def products(metal_device: str) -> Products:
    """Products of the device that is tested."""
    return Products(MetalKernels(backend(metal_device).device))


# ---- linear --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
def test_values(products: Products, name: str) -> None:
    """Few rows and many, fewer columns than a group and more than a tile, k of one block and of several parts."""
    rng = rng_of(("metal values", name))
    unit = 256 if dtype(name).block == 256 else 32
    for n, blocks, rows in ((1, 1, (1,)), (33, 3, (2, 5)), (100, 5, (8, 13)), (65, 40, (1, 35))):
        w = Matrix(rng, name, n, unit * min(blocks, 5 if unit == 256 else blocks) if name in QUANTIZED else 37 * blocks)
        for m in rows:
            x = rows_of(rng, m, w.k)
            check(products.linear(x, [w])[0], x, w.values, name in QUANTIZED)


@pytest.mark.parametrize("name", [*FLOATS, *IN_FILES, "Q4_0", "Q6_K"])
def test_weights_in_the_file_layout(products: Products, name: str) -> None:
    """They become floats, and x stays one, whether the format has a packed form or not."""
    rng = rng_of(("metal file", name))
    for n, m in ((35, 1), (70, 3), (20, 18)):
        w = in_file(rng, name, n, 77 if name in FLOATS else 512)
        x = rows_of(rng, m, w.k)
        check(products.linear(x, [w], packed=False)[0], x, w.values, False)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "Q2_K", "F16", "TQ2_0"])
def test_a_row_has_the_same_bits_however_it_comes(products: Products, name: str) -> None:
    """Alone, beside others, and in a prompt that is cut anywhere: any number of rows, few or many."""
    rng = rng_of(("metal bits", name))
    packed = name in QUANTIZED or name in FLOATS
    w = [Matrix(rng, name, 40, 1280 if dtype(name).block > 1 else 333), Matrix(rng, name, 18, 1280 if dtype(name).block > 1 else 333)]
    x = rows_of(rng, 41, w[0].k)
    whole = products.linear(x, w, packed=packed)
    for first, end in ((0, 41), (7, 8), (7, 9), (3, 6), (5, 13), (5, 20), (3, 36)):
        for a, b in zip(whole, products.linear(x[first:end], w, packed=packed)):
            assert a[first:end].tobytes() == b.tobytes(), (first, end)


@pytest.mark.parametrize("m", [1, 6, 33])
def test_everything_around_the_product(products: Products, m: int) -> None:
    Around(products.linear, rng_of(("metal around", m)), m, ("Q4_0", "F16", "Q4_0", "Q5_1")).check()


@pytest.mark.parametrize("second", ["Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("m", [1, 9])
def test_glu_of_one_format_or_two(products: Products, second: str, m: int) -> None:
    rng = rng_of(("metal glu", second, m))
    pair = [Matrix(rng, "Q4_0", 33, 96), Matrix(rng, second, 33, 96)]
    x, biases = rows_of(rng, m, 96), [rng.standard_normal(33).astype(np.float32) for _ in pair]
    check_glu(products.linear, x, pair, biases)


@pytest.mark.parametrize("name,k", [("Q4_0", 96), ("F16", 77), ("F32", 1500), ("Q8_0", 1088)])
def test_a_fused_norm_has_the_bits_of_rms_norm(products: Products, name: str, k: int) -> None:
    rng = rng_of(("metal norm", name, k))
    for m in (1, 11):
        w, x, gain = Matrix(rng, name, 21, k), rows_of(rng, m, k), rng.standard_normal(k).astype(np.float32)
        h = np.empty_like(x)
        products.run("rms_norm", [[array(x)], [array(gain)], [], [array(h)]], 1, {"eps": 1e-5})
        assert products.linear(x, [w], norm=gain, norm_eps=1e-5)[0].tobytes() == products.linear(h, [w])[0].tobytes()


def test_output_may_be_the_residual(products: Products) -> None:
    rng = rng_of("metal in place")
    w, x = Matrix(rng, "Q4_1", 64, 64), rows_of(rng, 6, 64)
    y = rng.standard_normal((6, 64)).astype(np.float32)
    want = products.linear(x, [w], residual=y)[0]
    products.run("linear", [[array(x)], [products.weight([w], True, False)], [], [], [array(y)], [array(y)]], 1, {})
    assert y.tobytes() == want.tobytes()


def test_bad_numbers_show(products: Products) -> None:
    rng = rng_of("metal nan")
    check_bad_numbers(products.linear, rng, (2, 9))
    w = Matrix(rng, "Q4_K", 40, 256)
    tiny = np.full((2, 256), 1e-44, np.float32)
    assert np.isfinite(products.linear(tiny, [w])[0]).all()


# ---- expert_linear -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,glu", [("Q4_K", "silu"), ("Q8_0", "none"), ("F16", "silu"), ("TQ2_0", "none")])
def test_experts_have_the_bits_of_linear(products: Products, name: str, glu: str) -> None:
    """Every pair of a row and an expert, by itself through `linear`, is the oracle: experts of one row and of many, and of none."""
    rng = rng_of(("metal experts", name))
    k, packed, n = 256 if dtype(name).block > 1 else 45, name != "TQ2_0", 33
    w = [[Matrix(rng, name, n, k) for _ in range(6)] for _ in range(1 + (glu != "none"))]
    for m, experts, used in ((1, 6, 3), (3, 5, 2), (20, 6, 1), (40, 4, 1), (65, 2, 2)):
        some = [matrices[:experts] for matrices in w]
        chosen = np.stack([rng.permutation(experts)[:used] for _ in range(m)]).astype(np.int32)
        own = glu == "none"                                                 # a row for each expert, or one for all
        x = rows_of(rng, m * used if own else m, k)
        pairs = x if own else np.repeat(x, used, axis=0)
        want = np.empty((m * used, n), np.float32)
        for e in np.unique(chosen):
            at = np.flatnonzero(chosen.ravel() == e)
            want[at] = products.linear(pairs[at], [matrices[e] for matrices in some], glu=glu, packed=packed)[0]
        assert products.experts(x, some, chosen, packed, glu=glu).tobytes() == want.tobytes(), (m, experts, used)


def test_experts_in_two_formats(products: Products) -> None:
    """The gate in codes, the other matrix in floats; an expert chosen twice by a row; others by no row."""
    rng = rng_of("metal mixed experts")
    gate, up = [Matrix(rng, "Q8_0", 40, 64) for _ in range(9)], [Matrix(rng, "F16", 40, 64) for _ in range(9)]
    x, chosen = rows_of(rng, 12, 64), np.full((12, 2), 5, np.int32)
    chosen[3] = 8, 0
    got = products.experts(x, [gate, up], chosen, glu="relu")
    want = {e: products.linear(x, [gate[e], up[e]], glu="relu")[0] for e in (5, 8, 0)}
    for i, e in enumerate(chosen.ravel()):
        assert got[i].tobytes() == want[e][i // 2].tobytes()


def test_bad_experts_are_refused(products: Products) -> None:
    rng = rng_of("metal bad experts")
    w, x = [Matrix(rng, "Q4_0", 16, 64) for _ in range(3)], rows_of(rng, 30, 64)
    for bad in (-1, 3, -(2**31), 2**31 - 1):
        chosen = np.zeros((30, 1), np.int32)
        chosen[17] = bad
        with pytest.raises(KernelError, match=f"expert {bad} of 3") as failed:
            products.experts(x, [w], chosen)
        assert failed.value.status == 3                                            # PE_BAD_VALUE
    x[4, 3] = np.nan
    got = products.experts(x, [w], np.zeros((30, 1), np.int32))
    assert not np.isfinite(got[4]).any() and np.isfinite(np.delete(got, 4, 0)).all()
