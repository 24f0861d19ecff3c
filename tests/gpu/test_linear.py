"""`linear` and `expert_linear` on CUDA: every format, against float64 sums over the activations as the kernels round them.

The same oracles as tests/kernels/test_linear_kernels.py. A row has the same bits alone, beside others and in a prompt, whichever kernel
multiplies it: few rows (1, 2, 4 tiles of 8) or many.
"""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
from linear_on_device import LinearOnDevice
from op_cases import KernelError
from test_kernels import rng_of
from test_linear_kernels import Around, as_int8, check_bad_numbers, check_glu, FLOATS, Matrix, MIXTURES, QUANTIZED, rows_of

from pyengine.backends import backend
from pyengine.dtype import dtype

OF_FILE = ["NVFP4", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]     # no packed form
SOME = ["Q4_K", "Q6_K", "Q8_0", "F16", "F32"]                                        # formats of the default run, where all take long


@pytest.fixture(scope="session")
def kernels(cuda_device: str) -> LinearOnDevice:
    """Kernels of the device that is tested."""
    own = backend(cuda_device)
    return LinearOnDevice(own.own, own.index)


def matrix(rng: np.random.Generator, name: str, n: int, k: int) -> Matrix:
    """Random weights whose scales are moderate, whatever the format."""
    with np.errstate(invalid="ignore"):                                             # scales that are not numbers, replaced below
        w = Matrix(rng, name, n, k)
    if name in OF_FILE and name != "NVFP4":
        blocks = w.raw.reshape(-1, w.block_bytes)
        bits = rng.uniform(0.01, 0.1, len(blocks)).astype(np.float16).view(np.uint16)
        if name == "IQ1_M":                                                         # four bits in each of four words
            blocks[:, 49:56:2] = blocks[:, 49:56:2] & 15 | (bits[:, None] >> np.arange(0, 16, 4) & 15).astype(np.uint8) << 4
        else:
            at = {"TQ1_0": 52, "TQ2_0": 64}.get(name, 0)
            blocks[:, at : at + 2] = bits.view(np.uint8).reshape(-1, 2)
        w.values = gguf.quants.dequantize(w.raw, gguf.GGMLQuantizationType[name]).astype(np.float32).reshape(n, k)
    return w


def width(name: str, blocks: int) -> int:
    """k of some blocks; an odd one where any goes."""
    return 37 * blocks if name in FLOATS else max(dtype(name).block, 32) * blocks


def bf16(x: np.ndarray) -> np.ndarray:
    """x to the nearest bf16, in float32."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def rounded(x: np.ndarray, name: str) -> np.ndarray:
    """x as products with weights of this format read it, in float64."""
    if name in QUANTIZED:
        return as_int8(x)
    if name == "BF16":                                                               # two of them
        high = bf16(x)
        return high.astype(np.float64) + bf16(x - high)
    if name == "F16":
        most = np.abs(x).max(-1, keepdims=True)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(most, 1e-29))) - 14)
        return (x / unit).astype(np.float16).astype(np.float64) * unit
    return x.astype(np.float64)


def check(got: np.ndarray, x: np.ndarray, w: Matrix) -> None:
    """|got - x w^T| within float32's rounding of a sum of these magnitudes."""
    h, values = rounded(x, w.name), w.values.astype(np.float64)
    worst = np.max(np.abs(got - h @ values.T) / np.maximum(np.abs(h) @ np.abs(values).T, 1e-30))
    assert worst < 1e-6, f"{w.name} [{w.n}, {w.k}], {len(x)} rows: error {worst:.2e} of the sum of magnitudes"


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
def test_values(kernels: LinearOnDevice, name: str) -> None:
    """Odd sizes, from one block of one row on; rows for every kernel."""
    rng = rng_of(("values", name))
    for n, blocks in ((1, 1), (33, 3), (100, 5)):
        w = Matrix(rng, name, n, width(name, blocks))
        for m in (1, 2, 5, 8, 9, 17, 33, 64, 70):
            x = rows_of(rng, m, w.k)
            check(kernels.linear(x, [w])[0], x, w)


@pytest.mark.parametrize("name", [*OF_FILE, *QUANTIZED, *FLOATS])
def test_file_layout(kernels: LinearOnDevice, name: str) -> None:
    """Weights in the file's layout are read as float32, and x stays float32."""
    rng = rng_of(("file", name))
    for n, m in ((1, 1), (35, 5), (70, 20), (35, 40)):
        w = matrix(rng, name, n, width(name, 2))
        x = rows_of(rng, m, w.k)
        got = kernels.linear(x, [w], packed=False)[0]
        h, values = x.astype(np.float64), w.values.astype(np.float64)
        assert np.max(np.abs(got - h @ values.T) / np.maximum(np.abs(h) @ np.abs(values).T, 1e-30)) < 1e-6
        glu = kernels.linear(x, [w, w], packed=False, glu="relu")[0]
        assert glu.tobytes() == (np.maximum(got, 0) * got).tobytes()


def bits_of_any_rows(kernels: LinearOnDevice, name: str, k: int, n: int, glu: str = "none", packed: bool = True) -> None:
    rng = rng_of(("bits", name, k))
    w = [matrix(rng, name, n, k) for _ in range(1 + (glu != "none"))]
    x = rows_of(rng, 140, k)
    whole = kernels.linear(x, w, glu=glu, packed=packed)[0]
    for begin, end in ((0, 1), (3, 5), (7, 15), (100, 109), (100, 125), (60, 124), (9, 79)):
        assert kernels.linear(x[begin:end], w, glu=glu, packed=packed)[0].tobytes() == whole[begin:end].tobytes(), (begin, end)


@pytest.mark.parametrize("name", SOME)
def test_same_bits_for_any_rows(kernels: LinearOnDevice, name: str) -> None:
    bits_of_any_rows(kernels, name, 1280, 83)
    bits_of_any_rows(kernels, name, 768, 40, "silu")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS, *OF_FILE])
def test_same_bits_for_any_rows_everywhere(kernels: LinearOnDevice, name: str) -> None:
    """Slices of one and of several blocks, and of unequal lengths; blocks of 128 x 128, which take many rows of weights."""
    packed = name not in OF_FILE
    for k in (5376, 256 * 17, 333 if name in FLOATS else 256):
        bits_of_any_rows(kernels, name, k, 83, packed=packed)
    bits_of_any_rows(kernels, name, 512, 4000, packed=packed)


@pytest.mark.parametrize("m", [1, 6, 33])
def test_everything_around_the_product(kernels: LinearOnDevice, m: int) -> None:
    """Norm, bias, glu, residual, cap; formats side by side, which are launches of their own."""
    rng = rng_of(("around", m))
    around = Around(kernels.linear, rng, m, ("Q4_0", "F16", "Q8_0", "Q4_0"))
    around.check()
    for other in ("Q4_0", "Q8_0"):                                                  # the second is combined by a launch of its own
        pair = [around.w[0], Matrix(rng, other, 33, 96)]
        check_glu(kernels.linear, around.h, pair, [around.bias[0], rng.standard_normal(33).astype(np.float32)])


def test_bad_numbers_show(kernels: LinearOnDevice) -> None:
    rng = rng_of("nan")
    check_bad_numbers(kernels.linear, rng, (2, 40))
    for name in ("Q4_K", "F16", "BF16"):
        for size in (1e-44, 1e30):
            w = Matrix(rng, name, 40, 256)
            assert np.isfinite(kernels.linear(np.full((2, 256), size, np.float32), [w])[0]).all()
    with pytest.raises(KernelError, match="x has 256 columns, weight 0"):
        kernels.linear(np.zeros((2, 256), np.float32), [Matrix(rng, "Q4_K", 40, 512)])


def experts_are_linear(kernels: LinearOnDevice, name: str) -> None:
    """Every pair of a row and an expert, by itself through `linear`, is the oracle."""
    rng = rng_of(("experts", name))
    packed, k = name not in OF_FILE, 45 if name in FLOATS else 256
    for n, glu in ((33, "silu"), (64, "none")):
        w = [[matrix(rng, name, n, k) for _ in range(6)] for _ in range(1 + (glu != "none"))]
        for m, experts, used in MIXTURES:
            some = [matrices[:experts] for matrices in w]
            chosen = np.stack([rng.permutation(experts)[:used] for _ in range(m)]).astype(np.int32)
            own = glu == "none"                                                     # a row for each expert, or one for all
            x = rows_of(rng, m * used if own else m, k)
            pairs = x if own else np.repeat(x, used, axis=0)
            want = np.empty((m * used, n), np.float32)
            for e in np.unique(chosen):
                at = np.flatnonzero(chosen.ravel() == e)
                want[at] = kernels.linear(pairs[at], [matrices[e] for matrices in some], glu=glu, packed=packed)[0]
            assert kernels.experts(x, some, chosen, packed=packed, glu=glu).tobytes() == want.tobytes(), (n, m, experts)


@pytest.mark.parametrize("name", ["Q4_K", "F16", "TQ2_0"])
def test_experts_have_the_bits_of_linear(kernels: LinearOnDevice, name: str) -> None:
    experts_are_linear(kernels, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS, *OF_FILE])
def test_experts_have_the_bits_of_linear_everywhere(kernels: LinearOnDevice, name: str) -> None:
    experts_are_linear(kernels, name)


def test_experts_in_two_formats(kernels: LinearOnDevice) -> None:
    """The gate in int8, the other matrix in 16 bits; an expert chosen twice by a row; others by no row."""
    rng = rng_of("mixed experts")
    gate, up = [Matrix(rng, "Q8_0", 40, 64) for _ in range(9)], [Matrix(rng, "F16", 40, 64) for _ in range(9)]
    x, chosen = rows_of(rng, 20, 64), np.full((20, 2), 5, np.int32)
    chosen[3] = 8, 0
    for m in (20, 1):
        got = kernels.experts(x[:m], [gate, up], chosen[:m], glu="relu")
        for i, e in enumerate(chosen[:m].ravel()):
            assert got[i].tobytes() == kernels.linear(x[i // 2 : i // 2 + 1], [gate[e], up[e]], glu="relu")[0][0].tobytes()


def test_bad_experts_are_refused(kernels: LinearOnDevice) -> None:
    rng = rng_of("bad experts")
    w, x = [Matrix(rng, "Q4_0", 16, 64) for _ in range(3)], rows_of(rng, 30, 64)
    for bad, m in itertools.product((-1, 3, -(2**31), 2**31 - 1), (1, 30)):
        chosen = np.zeros((m, 1), np.int32)
        chosen[m // 2] = bad
        with pytest.raises(KernelError, match=f"expert {bad} of 3") as failed:
            kernels.experts(x[:m], [w], chosen)
        assert failed.value.status == 3                                             # PE_BAD_VALUE
    for wrong in (x[:7], x[:, :32].copy()):
        with pytest.raises(KernelError, match="expert_linear: "):
            kernels.experts(wrong, [w], np.zeros((30, 1), np.int32))
    x[4, 3] = np.nan
    got = kernels.experts(x, [w], np.zeros((30, 1), np.int32))
    assert not np.isfinite(got[4]).any() and np.isfinite(np.delete(got, 4, 0)).all()
