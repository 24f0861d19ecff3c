"""`linear`, `rows` and `expert_linear` over packed weights, against float64 sums of gguf-py's values and exactly emulated int8 activations.

The C files are compiled here with tests/c/harness.c, once per instruction set that this machine has.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import test_kernels
from op_cases import CTensor, KernelError, MAX_DIMS, rng_of
from test_kernels import isas

from bench.blocks import SCALES
from csrc import build_rules as rules
from pyengine.dtype import dtype

CPU = rules.CSRC / "cpu"
SOURCES = sorted([*CPU.glob("linear*.c"), *(CPU / f"{n}.c" for n in ("rows", "experts", "norm"))])
PACKED = 256
QUANTIZED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
FLOATS = ["F32", "F16", "BF16"]


class Matrix:
    """Random weights of a format in the file's layout, and their values as gguf-py reads them. fill: every byte but the scales of a block."""

    def __init__(self, rng: np.random.Generator, name: str, n: int, k: int, fill: int | None = None):
        self.name, self.n, self.k = name, n, k
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if name in FLOATS:
            raw = (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
            raw = (raw.view(np.uint32) >> 16).astype(np.uint16) if name == "BF16" else raw.astype(name.replace("F", "float"))
            self.raw = raw.view(np.uint8).reshape(n, -1)
        else:
            low, end = (0, 256) if fill is None else (fill, fill + 1)
            self.raw = rng.integers(low, end, (n, k // block * size), np.uint8)
            blocks = self.raw.reshape(-1, size)
            for at in SCALES.get(name, ()):
                blocks[:, at : at + 2] = rng.uniform(-0.1, 0.1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
            if name == "MXFP4":
                blocks[:, 0] = rng.integers(118, 130, len(blocks))
                blocks[:: max(1, len(blocks) // 3), 0] = len(blocks) % 3                # 2^-128 and 2^-127 are denormal
        self.values = gguf.quants.dequantize(self.raw, kind).astype(np.float32).reshape(n, k)
        self.block_bytes, self.id = size, dtype(name).id


class Kernels(test_kernels.Kernels):
    """linear and rows of one instruction set, and the packer."""

    def __init__(self, isa: str, folder: Path):
        super().__init__(isa, folder, SOURCES, [CPU / "pack.c", rules.CSRC / "host" / "dequant.c"])
        self.lib.pe_pack_bytes.restype = ctypes.c_int64

    def pack(self, m: Matrix, parts: int = 1) -> np.ndarray:
        """The packed matrix, inside guard bytes."""
        n, k = ctypes.c_int64(m.n), ctypes.c_int64(m.k)
        size = self.lib.pe_pack_bytes(m.id, n, k)
        held = np.full(size + 192, 0xA5, np.uint8)
        at = 64 + -held.ctypes.data % 64
        groups = -(-m.n // 16)
        for p in range(parts):
            begin, end = (ctypes.c_int64(groups * (p + i) // parts) for i in (0, 1))
            source, target = ctypes.c_void_p(m.raw.ctypes.data), ctypes.c_void_p(held.ctypes.data + at)
            assert self.lib.pe_pack_groups(m.id, source, n, k, begin, end, target) == 0
        assert (held[:at] == 0xA5).all() and (held[at + size :] == 0xA5).all()
        return held[at : at + size]

    def weight(self, m: Matrix, packed: bool = True) -> tuple[CTensor, Any]:
        data = self.pack(m) if packed else m.raw
        strides = (m.raw.strides[0], m.block_bytes)
        t = CTensor(data.ctypes.data, m.id + PACKED * packed, 2, (ctypes.c_int64 * MAX_DIMS)(m.n, m.k),
                    (ctypes.c_int64 * MAX_DIMS)(*strides))
        return t, data

    def run_on(self, name: str, args: list[list[tuple[CTensor, Any]]], n_out: int, params: dict[str, Any], threads: int = 1) -> None:
        """Run a kernel on tensors that come with the memory which they describe."""
        self.run(name, [[t for t, _ in group] for group in args], n_out, params, threads)

    def linear(self, x: np.ndarray, w: list[Matrix], bias: list[np.ndarray] = (), norm: np.ndarray | None = None,
               residual: np.ndarray | None = None, threads: int = 1, packed: bool = True, **params: Any) -> list[np.ndarray]:
        glu = params.get("glu", "none") != "none"
        out = [np.full((len(x) + 2, m.n + 3), np.nan, np.float32) for m in w[: 1 if glu else None]]  # a border of NaN
        views = [o[1:-1, 1:-2] for o in out]
        one = lambda a: [] if a is None else [array(a)]  # noqa: E731
        self.run_on("linear", [[array(x)], [self.weight(m, packed) for m in w], [array(b) for b in bias], one(norm), one(residual),
                             [array(v) for v in views]], 1, params, threads)
        results = [v.copy() for v in views]
        for o, v in zip(out, views):
            v[...] = np.nan
            assert np.isnan(o).all(), "wrote outside the output"
        return results

    def experts(self, x: np.ndarray, w: list[list[Matrix]], chosen: np.ndarray, threads: int = 1, packed: bool = True,
                **params: Any) -> np.ndarray:
        """w: a matrix for each expert, once or, with glu, twice."""
        weights = []
        for matrices in w:
            m = matrices[0]
            data = np.concatenate([self.pack(one) if packed else one.raw.ravel() for one in matrices])
            held = np.empty(data.nbytes + 64, np.uint8)
            at = held[-held.ctypes.data % 64 :][: data.nbytes]
            at[:] = data
            strides = (m.raw.nbytes, m.raw.strides[0], m.block_bytes)
            shape = (len(matrices), m.n, m.k)
            weights.append((CTensor(at.ctypes.data, m.id + PACKED * packed, 3, (ctypes.c_int64 * MAX_DIMS)(*shape),
                                    (ctypes.c_int64 * MAX_DIMS)(*strides)), at))
        out = np.full((chosen.size + 2, w[0][0].n + 3), np.nan, np.float32)          # a border of NaN
        view = out[1:-1, 1:-2]
        self.run_on("expert_linear", [[array(x)], weights, [array(chosen)], [array(view)]], 1, params, threads)
        result = view.copy()
        view[...] = np.nan
        assert np.isnan(out).all(), "wrote outside the output"
        return result


def array(a: np.ndarray) -> tuple[CTensor, np.ndarray]:
    kind = {"float32": 0, "int32": 26}[a.dtype.name]
    return CTensor(a.ctypes.data, kind, a.ndim, (ctypes.c_int64 * MAX_DIMS)(*a.shape), (ctypes.c_int64 * MAX_DIMS)(*a.strides)), a


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kernels]:
    """Kernels by instruction set, each compiled once."""
    return functools.cache(lambda isa: Kernels(isa, tmp_path_factory.mktemp(f"linear_{isa}")))


@pytest.fixture(params=isas(partial=True))
def kernels(request: pytest.FixtureRequest, build: Callable[[str], Kernels]) -> Kernels:
    return build(request.param)


@pytest.fixture
def every_isa(build: Callable[[str], Kernels]) -> list[Kernels]:
    return [build(isa) for isa in isas(partial=True)]


def as_int8(x: np.ndarray) -> np.ndarray:
    """x after symmetric int8 quantization in blocks of 32, in the kernel's float32 steps."""
    b = x.reshape(len(x), -1, 32)
    amax = np.abs(b).max(-1, keepdims=True)
    d, inverse = amax / np.float32(127), np.where(amax > 0, np.float32(127) / np.where(amax > 0, amax, 1), 0)
    return (np.rint(b * inverse.astype(np.float32)) * d.astype(np.float64)).reshape(x.shape)


def rows_of(rng: np.random.Generator, m: int, k: int) -> np.ndarray:
    x = rng.standard_normal((m, k)).astype(np.float32)
    if m > 1:
        x[1, : k // 2] = 0
    x[-1] *= 1e-3
    return x


def check(got: np.ndarray, x: np.ndarray, w: np.ndarray, int8: bool) -> None:
    """|got - x w^T| within float32's rounding of a sum of these magnitudes."""
    h = as_int8(x) if int8 else x.astype(np.float64)
    w = w.astype(np.float64)
    error, scale = np.abs(got - h @ w.T), np.abs(h) @ np.abs(w).T
    worst = np.max(error / np.maximum(scale, 1e-30))
    assert worst < 1e-6, f"error {worst:.2e} of the sum of magnitudes"


ROWS = (1, 2, 3, 4, 5, 8, 13, 19)


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
def test_values(kernels: Kernels, name: str) -> None:
    rng = rng_of(("values", name))
    unit = 256 if gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0] == 256 else 32
    for n, blocks in ((1, 1), (16, 2), (33, 3), (100, 5)):
        w = Matrix(rng, name, n, unit * blocks if name in QUANTIZED else 37 * blocks)
        for m in ROWS:
            x = rows_of(rng, m, w.k)
            check(kernels.linear(x, [w])[0], x, w.values, name in QUANTIZED)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_largest_codes(kernels: Kernels, name: str) -> None:
    """Sums of codes that are all at an end, with rows that are too: nothing wraps on its way."""
    rng = rng_of(("ends", name))
    x = np.ones((20, 512), np.float32)
    x[1::4] = -1
    x[2::4] = rng.choice([-1, 1], (5, 512))
    x[3::4, ::2] = -1
    for fill in (0, 0x7F, 0x80, 0xFF):
        w = Matrix(rng, name, 33, 512, fill)
        for m in (3, 20):
            check(kernels.linear(x[:m], [w])[0], x[:m], w.values, True)


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS, "TQ2_0"])
def test_file_layout(kernels: Kernels, name: str) -> None:
    """Weights in the file's layout give the bits of packed ones; without a packed form they are read as float32, and x stays float32."""
    rng = rng_of(("file", name))
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]
    for n, m in ((1, 1), (35, 1), (35, 5), (230, 9), (35, 40), (230, 300)):
        w = Matrix(rng, name, n, max(block, 32) * 2 + (32 if block <= 32 else 0))
        x = rows_of(rng, m, w.k)
        for threads, glu in ((1, "none"), (3, "silu")):
            pair = [w] * (1 + (glu != "none"))
            got = kernels.linear(x, pair, packed=False, threads=threads, glu=glu)[0]
            if name != "TQ2_0":
                assert got.tobytes() == kernels.linear(x, pair, glu=glu)[0].tobytes(), (n, m)
            elif glu == "none":
                check(got, x, w.values, False)


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
def test_same_bits_for_any_rows_and_threads(kernels: Kernels, name: str) -> None:
    rng = rng_of(("bits", name))
    k = 1280 if name in QUANTIZED else 333
    w = [Matrix(rng, name, 83, k), Matrix(rng, "Q8_0" if name in QUANTIZED else "F16", 16, k)]
    x = rows_of(rng, 512, k)
    whole = kernels.linear(x, w)
    for threads, m in ((2, 512), (3, 512), (1, 7), (3, 7), (2, 1), (1, 4), (2, 5)):
        for a, b in zip(whole, kernels.linear(x[100 : 100 + m] if m < 512 else x, w, threads=threads)):
            assert a[100 : 100 + m].tobytes() == b.tobytes() if m < 512 else a.tobytes() == b.tobytes(), (threads, m)


def test_same_bits_on_fused_machines(every_isa: list[Kernels]) -> None:
    """Where multiply-add is fused (not `generic`) all instruction sets give the same bits."""
    fused = [k for k in every_isa if k.isa != "generic"]
    rng = rng_of("isas")
    for name, m in itertools.product([*QUANTIZED, *FLOATS], (2, 9)):
        w = [Matrix(rng, name, 40, 512), Matrix(rng, name, 40, 512)]
        x, norm = rows_of(rng, m, 512), rng.standard_normal(512).astype(np.float32)
        results = [k.linear(x, w, norm=norm, norm_eps=1e-6, glu="gelu", softcap=20.0)[0].tobytes() for k in fused]
        assert len(set(results)) <= 1, (name, m)


Product = Callable[..., list[np.ndarray]]                     # `linear` of a library


class Around:
    """Norm, bias, residual and cap around products of one kernel, on any device: what each adds, in float64 or bit for bit."""

    def __init__(self, linear: Product, rng: np.random.Generator, m: int, formats: Sequence[str]):
        self.linear, self.rng, k = linear, rng, 96
        eye = Matrix(rng, "F32", k, k)
        eye.raw[:] = np.eye(k, dtype=np.float32).view(np.uint8)
        self.x, self.gain = rows_of(rng, m, k), rng.standard_normal(k).astype(np.float32)
        self.w = [Matrix(rng, name, n, k) for name, n in zip(formats, (33, 17, 16, 5))]
        self.bias = [rng.standard_normal(t.n).astype(np.float32) for t in self.w]
        self.h = linear(self.x, [eye], norm=self.gain, norm_eps=1e-3)[0]        # products with the unit matrix are exact

    def check(self, **how: Any) -> None:
        """Check all of it. how: arguments of a product with a norm besides."""
        x, h, w, linear = self.x, self.h, self.w, self.linear
        wide = x.astype(np.float64)
        np.testing.assert_allclose(h, wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * self.gain, rtol=1e-6, atol=1e-7)
        plain = linear(h, w)
        for a, b in zip(linear(x, w, norm=self.gain, norm_eps=1e-3, **how), plain):
            assert a.tobytes() == b.tobytes()
        for a, b, c in zip(linear(h, w, bias=self.bias), plain, self.bias):
            assert a.tobytes() == (b + c).tobytes()
        residual = self.rng.standard_normal((len(x), 33)).astype(np.float32)
        assert linear(h, w[:1], residual=residual)[0].tobytes() == (plain[0] + residual).tobytes()
        capped = linear(h, w[:1], softcap=1.5)[0]
        np.testing.assert_allclose(capped, 1.5 * np.tanh(plain[0].astype(np.float64) / 1.5), rtol=1e-6, atol=1e-7)


def check_glu(linear: Product, h: np.ndarray, pair: list[Matrix], biases: list[np.ndarray], **how: Any) -> None:
    """Check every activation of a gate beside the plain products. how: arguments of a product with it besides."""
    gate, up = (y.astype(np.float64) for y in linear(h, pair, bias=biases))
    acts = {"silu": gate / (1 + np.exp(-gate)),
            "gelu_tanh": gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))),
            "gelu": gate / 2 * (1 + np.vectorize(math.erf)(gate / np.sqrt(2))), "relu": np.maximum(gate, 0)}
    for glu, act in acts.items():
        got = linear(h, pair, bias=biases, glu=glu, **how)[0]
        np.testing.assert_allclose(got, act * up, rtol=1e-6, atol=1e-6 * np.abs(up).max() * (1 + np.abs(gate).max()))


def check_bad_numbers(linear: Product, rng: np.random.Generator, rows: Sequence[int]) -> None:
    """Check that a NaN or infinity in a row makes that row not finite and leaves the others alone, and that no rows are none."""
    w = Matrix(rng, "Q4_K", 40, 256)
    for m, bad in itertools.product(rows, (np.nan, np.inf)):
        x = rows_of(rng, m, 256)
        clean = linear(x, [w])[0]
        x[0, 77] = bad
        got = linear(x, [w])[0]
        assert not np.isfinite(got[0]).any() and got[1:].tobytes() == clean[1:].tobytes()
    assert linear(np.empty((0, 256), np.float32), [w])[0].shape == (0, 40)


@pytest.mark.parametrize("m", [1, 3, 6, 33])
def test_everything_around_the_product(kernels: Kernels, m: int) -> None:
    rng = rng_of(("around", m))
    around = Around(kernels.linear, rng, m, ("Q4_0", "F16", "Q8_0", "Q5_1"))
    around.check(threads=2)
    pair = [around.w[0], Matrix(rng, "Q8_0", 33, 96)]
    check_glu(kernels.linear, around.h, pair, [around.bias[0], rng.standard_normal(33).astype(np.float32)], threads=2)


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
def test_a_fused_norm_has_the_bits_of_rms_norm(kernels: Kernels, name: str) -> None:
    """linear(x, norm) is linear(rms_norm(x)) bit for bit: any width, any number of rows, weights packed or as in the file."""
    rng = rng_of(("fused norm", name))
    block = dtype(name).block
    widths = (5, 16, 37, 64, 77, 333, 640) if name in FLOATS else [block * n for n in ((1, 3) if block == 256 else (1, 2, 3, 5, 19))]
    for k, m in itertools.product(widths, (1, 3, 5, 20)):
        w, x, gain = Matrix(rng, name, 21, k), rows_of(rng, m, k), rng.standard_normal(k).astype(np.float32)
        h = np.empty_like(x)
        kernels.run_on("rms_norm", [[array(x)], [array(gain)], [], [array(h)]], 1, {"eps": 1e-5}, 2)
        for packed in (True, False):
            fused = kernels.linear(x, [w], norm=gain, norm_eps=1e-5, threads=2, packed=packed)[0]
            assert fused.tobytes() == kernels.linear(h, [w], packed=packed)[0].tobytes(), (k, m, packed)


def test_output_may_be_the_residual(kernels: Kernels) -> None:
    rng = rng_of("in place")
    w, x = Matrix(rng, "Q4_1", 64, 64), rows_of(rng, 6, 64)
    y = rng.standard_normal((6, 64)).astype(np.float32)
    want = kernels.linear(x, [w], residual=y)[0]
    kernels.run_on("linear", [[array(x)], [kernels.weight(w)], [], [], [array(y)], [array(y)]], 1, {}, 2)
    assert y.tobytes() == want.tobytes()


def test_bad_numbers_show(kernels: Kernels) -> None:
    rng = rng_of("nan")
    check_bad_numbers(kernels.linear, rng, (2, 9))
    w = Matrix(rng, "Q4_K", 40, 256)
    tiny = np.full((2, 256), 1e-44, np.float32)
    assert np.isfinite(kernels.linear(tiny, [w])[0]).all()


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS, "TQ2_0"])
def test_rows(kernels: Kernels, name: str) -> None:
    rng = rng_of(("rows", name))
    w = Matrix(rng, name, 37, 1280 if name not in FLOATS else 37)
    ids = np.array([36, 0, 16, 15, 0], np.int32)
    for packed, scale in itertools.product((False, True), (1.0, 25.25)):
        if packed and name == "TQ2_0":
            continue
        out = np.full((5, w.k + 1), np.nan, np.float32)
        kernels.run_on("rows", [[kernels.weight(w, packed)], [array(ids)], [], [array(out[:, :-1])]], 1, {"scale": scale}, 2)
        assert out[:, :-1].tobytes() == (w.values[ids] * np.float32(scale)).tobytes() and np.isnan(out[:, -1]).all()
    for bad in (-1, 37, -(2**31), 2**31 - 1):
        ids[2] = bad
        with pytest.raises(KernelError, match=f"id {bad} of 37"):
            kernels.run_on("rows", [[kernels.weight(w, False)], [array(ids)], [], [array(out[:, :-1])]], 1, {}, 1)


def test_rows_of_media(kernels: Kernels) -> None:
    """Negative ids take rows of the second table, unscaled and bit for bit; those beyond it are refused."""
    rng = rng_of("rows of media")
    w, media = Matrix(rng, "F16", 9, 64), rng.standard_normal((3, 64)).astype(np.float32)
    ids, out = np.array([8, -1, -3, 0, -2], np.int32), np.full((5, 64), np.nan, np.float32)
    kernels.run_on("rows", [[kernels.weight(w, True)], [array(ids)], [array(media)], [array(out)]], 1, {"scale": 2.0}, 2)
    assert out.tobytes() == np.stack([2 * w.values[8], media[0], media[2], 2 * w.values[0], media[1]]).astype(np.float32).tobytes()
    ids[1] = -4
    with pytest.raises(KernelError, match="id -4 of 9"):
        kernels.run_on("rows", [[kernels.weight(w, True)], [array(ids)], [array(media)], [array(out)]], 1, {}, 1)


# rows, experts, experts of a row
MIXTURES = ((1, 5, 1), (1, 6, 5), (3, 5, 2), (40, 4, 1), (65, 3, 3), (300, 2, 1))


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
def test_experts_have_the_bits_of_linear(kernels: Kernels, name: str) -> None:
    """Every pair of a row and an expert, by itself through `linear`, is the oracle: for any number of rows and threads."""
    rng = rng_of(("experts", name))
    k = 256 if name in QUANTIZED else 45
    for n, glu in ((33, "silu"), (64, "none")):
        w = [[Matrix(rng, name, n, k) for _ in range(6)] for _ in range(1 + (glu != "none"))]
        for m, experts, used in MIXTURES:
            some = [matrices[:experts] for matrices in w]
            chosen = np.stack([rng.permutation(experts)[:used] for _ in range(m)]).astype(np.int32)
            own = glu == "none"                                                 # a row for each expert, or one for all
            x = rows_of(rng, m * used if own else m, k)
            pairs = x if own else np.repeat(x, used, axis=0)
            want = np.empty((m * used, n), np.float32)
            for e in np.unique(chosen):
                at = np.flatnonzero(chosen.ravel() == e)
                want[at] = kernels.linear(pairs[at], [matrices[e] for matrices in some], glu=glu)[0]
            for threads in (1, 3):
                assert kernels.experts(x, some, chosen, threads, glu=glu).tobytes() == want.tobytes(), (n, m, experts, threads)
        alone = kernels.experts(x[7:8], some, chosen[7:8], 2, glu=glu)              # one row of the last mixture
        assert alone.tobytes() == want[7 * used : 8 * used].tobytes()


@pytest.mark.parametrize("name", ["Q4_K", "F16", "TQ2_0"])
def test_experts_in_the_file_layout(kernels: Kernels, name: str) -> None:
    rng = rng_of(("experts, file", name))
    w = [Matrix(rng, name, 35, 256) for _ in range(3)]
    for m in (1, 9):
        x, chosen = rows_of(rng, m, 256), rng.integers(0, 3, (m, 1)).astype(np.int32)
        got = kernels.experts(x, [w], chosen, 2, packed=False)
        if name != "TQ2_0":
            assert got.tobytes() == kernels.experts(x, [w], chosen, 2).tobytes()
            continue
        for i in range(m):
            check(got[i : i + 1], x[i : i + 1], w[chosen[i, 0]].values, False)


def test_experts_in_two_formats(kernels: Kernels) -> None:
    """The gate in int8, the other matrix in float32; an expert chosen twice by a row; others by no row."""
    rng = rng_of("mixed experts")
    gate, up = [Matrix(rng, "Q8_0", 40, 64) for _ in range(9)], [Matrix(rng, "F16", 40, 64) for _ in range(9)]
    x, chosen = rows_of(rng, 20, 64), np.full((20, 2), 5, np.int32)
    chosen[3] = 8, 0
    got = kernels.experts(x, [gate, up], chosen, 2, glu="relu")
    for i, e in enumerate(chosen.ravel()):
        assert got[i].tobytes() == kernels.linear(x[i // 2 : i // 2 + 1], [gate[e], up[e]], glu="relu")[0][0].tobytes()


def test_bad_experts_are_refused(kernels: Kernels) -> None:
    rng = rng_of("bad experts")
    w, x = [Matrix(rng, "Q4_0", 16, 64) for _ in range(3)], rows_of(rng, 30, 64)
    for bad, threads in itertools.product((-1, 3, -(2**31), 2**31 - 1), (1, 3)):
        chosen = np.zeros((30, 1), np.int32)
        chosen[17] = bad
        with pytest.raises(KernelError, match=f"expert {bad} of 3") as failed:
            kernels.experts(x, [w], chosen, threads)
        assert failed.value.status == 3                                            # PE_BAD_VALUE
    for wrong in (x[:7], x[:, :32].copy()):
        with pytest.raises(KernelError, match="expert_linear: "):
            kernels.experts(wrong, [w], np.zeros((30, 1), np.int32))
    x[4, 3] = np.nan
    got = kernels.experts(x, [w], np.zeros((30, 1), np.int32))
    assert not np.isfinite(got[4]).any() and np.isfinite(np.delete(got, 4, 0)).all()


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
def test_pack_is_small_and_can_be_cut(every_isa: list[Kernels], name: str) -> None:
    rng = rng_of(("pack", name))
    w = Matrix(rng, name, 80, 1280)
    packed = every_isa[0].pack(w)
    assert packed.tobytes() == every_isa[0].pack(w, parts=3).tobytes()
    assert w.raw.nbytes <= packed.nbytes <= 1.01 * w.raw.nbytes
    lib = every_isa[0].lib
    sizes = [(0, 1280), (80, 0), (-1, 1280), (80, -256), (2**62, 2**40)] + ([(80, 100)] if name in QUANTIZED else [])
    for n, k in sizes:
        assert lib.pe_pack_bytes(w.id, ctypes.c_int64(n), ctypes.c_int64(k)) == 0
