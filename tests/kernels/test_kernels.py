"""CPU kernels against the NumPy reference in float64: declared cases, odd shapes, strides, threads, instruction sets.

The kernels' C files are compiled here with a small harness (tests/c/harness.c), once per instruction set that this
machine has, so that these tests need neither the extension nor the engine.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cbuild
import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import (
    bits, Block, CACHES, CArgs, check, close, copy_of, CTensor, describe, elements, GUARD, KernelError, loaded,
    make_inputs, moved, reference, rng_of, run, Runner, stored, strided_copy, Value,
)

from csrc import build_rules as rules
from pyengine.compiler import codegen
from pyengine.dtype import dtype
from pyengine.errors import ShapeError
from pyengine.graph.op import Case, REGISTRY
from pyengine.ops.rope import mixed

ROOT = Path(__file__).resolve().parents[2]
# Kernels whose weights have formats of their own are those of test_linear_kernels.py; all others are tested here.
FORMATS = {name for name, op in REGISTRY.items() if op.packed or op.any_format}
_WITH = [p for p in sorted((rules.CSRC / "cpu").glob("*.c")) if (found := codegen.kernels_of("cpu", [p])[0]) and not found & FORMATS]
SOURCES = sorted({*_WITH, *(part for p in _WITH for part in p.parent.glob(f"{p.stem}_*.c"))})
OPS = tuple(name for name in REGISTRY if name in codegen.kernels_of("cpu", SOURCES)[0])
FLAGS = rules.isas(platform.machine(), [shutil.which("cc") or "gcc"])
NEEDS = {"avx2": {"avx2", "fma", "f16c", "bmi2"},
         "avxvnni": {"avx2", "fma", "f16c", "bmi2", "avx_vnni"},
         "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}}
SANITIZER = os.environ.get("PYENGINE_SANITIZE", "")          # tests/sanitize.sh: its build's, for what is compiled here too


# ---- the fixture: one library per instruction set ------------------------------------------------------------------


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith(("flags", "Features")):
            return set(line.split(":")[1].split())
    return set()


def isas(partial: bool = False) -> list[str]:
    """Instruction sets that this machine can run; with `partial` those, too, that have some kernels of their own only, the products."""
    if platform.machine() in ("arm64", "aarch64"):
        return ["generic", "neon"]
    wanted = (isa for isa in NEEDS if isa in FLAGS and (partial or isa not in rules.PARTIAL))
    return ["generic", *(isa for isa in wanted if NEEDS[isa] <= _cpu_flags())]


class Kernels(Runner):
    """The kernels of one instruction set, and files that are compiled without it (`once`)."""

    def __init__(self, isa: str, folder: Path, sources: Sequence[Path] = SOURCES, once: Sequence[Path] = ()):
        self.isa = isa
        codegen.generate(rules.CSRC)
        table = folder / "table.c"
        table.write_text(codegen.kernels_table("cpu", sources))
        cc = shutil.which("cc") or shutil.which("gcc")
        if cc is None:
            pytest.skip("needs a C compiler: install gcc or clang")
        sanitizer = rules.sanitizer(SANITIZER)
        strict = [] if SANITIZER else ["-Werror"]             # whose -O1 does not unroll what the code asks for
        common = [*rules.C_FLAGS, *strict, f"-I{rules.CSRC}", *sanitizer]
        own = [*common, *FLAGS[isa], f"-DPE_ISA={isa}"]
        objects = [cbuild.object_of(source, f"{isa}{SANITIZER}", cc, own) for source in [*sources, ROOT / "tests" / "c" / "harness.c"]]
        objects += [cbuild.object_of(source, f"once{SANITIZER}", cc, common) for source in once]
        path = folder / f"kernels_{isa}.so"
        subprocess.run([cc, "-shared", "-o", path, *own, table, *objects, "-lm", "-lpthread", *sanitizer], check=True)
        self.lib = ctypes.CDLL(str(path))
        self.lib.harness_scratch.restype = ctypes.c_int64

    def run(self, name: str, groups: Sequence[Sequence[CTensor]], n_out: int, params: dict[str, Any], threads: int = 1,
            repeat: int = 1) -> None:
        """Run a kernel on the tensors of each argument. Scratch is filled with 0xFF (NaN) and guarded."""
        op = REGISTRY[name]
        full = {p.name: params.get(p.name, p.default) for p in op.params.values()}
        packed = ctypes.create_string_buffer(codegen.pack_params(op, full))
        held = [t for g in groups for t in g]
        pointers = (ctypes.POINTER(CTensor) * max(1, len(held)))(*map(ctypes.pointer, held))
        starts = np.cumsum([0, *map(len, groups)])[:-1].astype(np.int32)
        counts = np.array([len(g) for g in groups], np.int32)
        as_ints = lambda a: a.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))  # noqa: E731
        args = CArgs(pointers, as_ints(starts), as_ints(counts), len(groups) - n_out, n_out)
        n = self.lib.harness_scratch(name.encode(), ctypes.byref(args), packed, threads)
        assert n >= 0, f"no kernel {name}"
        scratch = np.full(n + 128 + GUARD, 0xFF, np.uint8)
        offset = -scratch.ctypes.data % 64
        message = ctypes.create_string_buffer(256)
        status = self.lib.harness_run(name.encode(), ctypes.byref(args), packed, threads,
                                      ctypes.c_void_p(scratch.ctypes.data + offset), ctypes.c_int64(n), repeat, message)
        assert (scratch[offset + n :] == 0xFF).all(), f"{name}: wrote behind its scratch"
        if status:
            raise KernelError(status, message.value.decode())


@pytest.fixture(scope="session", params=isas())
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(request.param, tmp_path_factory.mktemp(f"kernels_{request.param}"))


CASES = [(name, i) for name in OPS for i in range(len(REGISTRY[name].cases))]


@pytest.mark.parametrize("name,index", CASES, ids=[f"{n}-{i}" for n, i in CASES])
def test_declared_cases(kernels: Kernels, name: str, index: int):
    op = REGISTRY[name]
    case = op.cases[index]
    has_cache = any(spec.kind == "Cache" for spec in op.args.values())
    widths = {s[-1] for n, s in case.shapes.items() if op.args[n].kind == "Cache"}
    for cache in CACHES if has_cache else ("F32",):
        if any(w % dtype(cache).block for w in widths):
            continue
        rng = rng_of((name, index, cache))
        inputs = make_inputs(op, case, rng, cache)
        check(kernels, op, inputs, case.params, cache)
        if op.strided and not has_cache:
            moved = [strided_copy(rng, v) if n in op.strided else v for n, v in zip(op.args, inputs)]
            check(kernels, op, moved, case.params)


# ---- element by element --------------------------------------------------------------------------------------------

SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
axes = st.integers(0, 40)


@SLOW
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 31), st.integers(0, 2**32 - 1),
       st.sampled_from(["add", "sub", "mul", "div", "max", "min"]))
def test_binary_broadcasts_any_strides(kernels, shape, ones, seed, kind):
    rng = np.random.default_rng(seed)
    shape[-1] *= int(rng.integers(1, 6))
    x_shape = [1 if ones >> i & 1 else n for i, n in enumerate(shape)]
    y_shape = shape[int(rng.integers(0, len(shape))) :]
    x, y = (strided_copy(rng, rng.standard_normal(s).astype(np.float32)) for s in (x_shape, y_shape))
    check(kernels, REGISTRY["binary"], [x, y], {"kind": kind})
    check(kernels, REGISTRY["binary"], [y, x], {"kind": kind})


def test_binary_in_place_over_broadcast_rows(kernels):
    rng = rng_of("rows")
    x, y = rng.standard_normal((700, 33)).astype(np.float32), rng.standard_normal(33).astype(np.float32)
    check(kernels, REGISTRY["binary"], [x, y], {"kind": "add"})


@SLOW
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_contiguous_any_strides(kernels, shape, seed):
    rng = np.random.default_rng(seed)
    check(kernels, REGISTRY["contiguous"], [strided_copy(rng, rng.standard_normal(shape).astype(np.float32))], {})


def test_contiguous_of_a_large_transpose(kernels):
    x = rng_of("t").standard_normal((300, 170)).astype(np.float32).T
    check(kernels, REGISTRY["contiguous"], [x], {})


@SLOW
@given(st.integers(0, 3), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_concat(kernels, axis, sizes, seed):
    rng = np.random.default_rng(seed)
    shapes = [[*(3, 2, 4, 5)[:axis], n, *(3, 2, 4, 5)[axis + 1 :]] for n in sizes]
    parts = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    check(kernels, REGISTRY["concat"], [parts], {"axis": axis})


SPECIAL = np.array([0.0, -0.0, 1e-30, -1e-30, 0.5, -0.5, 3.0, -3.0, 9.5, -9.5, 30.0, -30.0, 80.0, -80.0, 87.9, -86.0,
                    1e4, -1e4, 1e30, -1e30, np.inf, -np.inf, np.nan], np.float32)
# What a value may differ by absolutely, as a share of |x|: where the function is a difference of near numbers, float32
# formulas (torch's too) lose digits of a small result.
CANCELS = {"gelu": 2e-7, "gelu_tanh": 1e-9, "silu": 1e-9, "quick_gelu": 1e-9}


@pytest.mark.parametrize("kind", REGISTRY["unary"].params["kind"].choices)
def test_unary_over_its_range(kernels, kind):
    x = np.concatenate([np.linspace(-30, 30, 20_001, dtype=np.float32), np.geomspace(1e-6, 80, 999, dtype=np.float32),
                        -np.geomspace(1e-6, 80, 998, dtype=np.float32)])
    if kind in ("log", "sqrt"):
        x = np.abs(x) + np.float32(1e-6)
    (got,) = run(kernels, REGISTRY["unary"], [x], {"kind": kind}, [x.shape])
    (want,) = reference(REGISTRY["unary"], [x], {"kind": kind})
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.abs(x.astype(np.float64)) * CANCELS.get(kind, 0.0) / 2e-6
    if kind in ("sigmoid", "silu", "quick_gelu"):
        floor += 1e-9       # the reference's 1 + tanh(x / 2) cancels, in float64 too
    wide = np.abs(x) * 1.2e-7 if kind in ("exp", "silu", "sigmoid", "quick_gelu", "gelu_tanh") else 0
    close(got, want, 2e-6, floor + 1e-37 + np.abs(want) * wide, kind)
    assert len(x) % 16 and not np.isnan(got).any()


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu", "relu", "quick_gelu", "relu2", "sigmoid", "tanh", "exp",
                                  "square"])
def test_unary_of_special_values(kernels, kind):
    (got,) = run(kernels, REGISTRY["unary"], [SPECIAL], {"kind": kind}, [SPECIAL.shape])
    finite = np.isfinite(SPECIAL)
    (want,) = reference(REGISTRY["unary"], [SPECIAL[finite]], {"kind": kind})
    with np.errstate(over="ignore"):
        want = want.astype(np.float32)
    assert np.isnan(got[-1]), "NaN is lost"
    assert not np.isnan(got[finite]).any()
    close(got[finite], want.astype(np.float64), 2e-6, np.abs(SPECIAL[finite]) * 0.1 + 1e-30, kind)


# ---- rows ----------------------------------------------------------------------------------------------------------

def test_experts_of_equal_and_bad_scores(kernels):
    """Of equals the lower number comes first; a NaN gives no expert twice, and stays in its row."""
    op, params = REGISTRY["top_experts"], {"n_used": 4, "gate": "softmax", "normed": True}
    x = np.zeros((4, 37), np.float32)
    x[1, [3, 30]] = 1
    x[2, [0, 5, 36]] = np.nan
    x[3, 7:] = -np.inf
    chosen, gates = run(kernels, op, [x, None], params, [(4, 4), (4, 4)], 2)
    assert chosen[[0, 1, 3]].tolist() == [[0, 1, 2, 3], [3, 30, 0, 1], [0, 1, 2, 3]]
    assert len(set(chosen[2])) == 4 and chosen[2].min() >= 0 and chosen[2].max() < 37
    assert (gates[0] == 0.25).all() and (gates[3] == 0.25).all() and np.isnan(gates[2]).all() and np.isfinite(gates[:2]).all()
    np.testing.assert_allclose(gates[1], np.array([np.e, np.e, 1, 1]) / (2 * np.e + 2), rtol=1e-6)


def test_experts_are_those_of_transformers(kernels):
    """The routers of Mixtral, Qwen2-MoE and DeepSeek-V3 (one group), on random scores."""
    torch = pytest.importorskip("torch", reason="pip install torch")
    scores, bias = (rng_of(n).standard_normal(s).astype(np.float32) for n, s in (("scores", (50, 24)), ("bias", (24,))))
    soft, sigmoid = torch.tensor(scores).softmax(-1), torch.tensor(scores).sigmoid()
    for normed in (False, True):
        gates, chosen = torch.topk(soft, 5)
        want = (gates / gates.sum(-1, keepdim=True) if normed else gates).numpy()
        got = run(kernels, REGISTRY["top_experts"], [scores, None], {"n_used": 5, "gate": "softmax", "normed": normed}, [(50, 5)] * 2)
        assert (got[0] == chosen.numpy()).all()
        np.testing.assert_allclose(got[1], want, rtol=1e-6)
    chosen = torch.topk(sigmoid + torch.tensor(bias), 5)[1]
    gates = sigmoid.gather(1, chosen)
    params = {"n_used": 5, "gate": "sigmoid", "normed": True, "scale": 2.5}
    got = run(kernels, REGISTRY["top_experts"], [scores, bias], params, [(50, 5)] * 2)
    assert (got[0] == chosen.numpy()).all()
    np.testing.assert_allclose(got[1], (2.5 * gates / gates.sum(-1, keepdim=True)).numpy(), rtol=1e-6)


ROW_OPS = {"rms_norm": {"eps": 1e-6}, "layer_norm": {"eps": 1e-5}, "softmax": {"scale": 0.7}, "reduce": {"kind": "sum"}}


@pytest.mark.parametrize("name", ROW_OPS)
def test_rows_of_any_width(kernels, name):
    op = REGISTRY[name]
    for d in (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 640, 1000):
        for m in (0, 1, 7):
            rng = rng_of((name, d, m))
            x = (np.round(rng.standard_normal((m, d)) * 12 + 4) / 4).astype(np.float32)    # differences are exact
            optional = {"rms_norm": [(d,), (m, d)], "layer_norm": [(d,), (d,)]}.get(name, [])
            check(kernels, op, [x, *(rng.standard_normal(s).astype(np.float32) for s in optional)], ROW_OPS[name])


@pytest.mark.parametrize("name", ROW_OPS)
def test_a_row_does_not_depend_on_its_batch(kernels, name):
    op = REGISTRY[name]
    x = rng_of(name).standard_normal((700, 133)).astype(np.float32)
    none = [None] * (len(op.args) - 1)
    shape = lambda n: (n,) if name == "reduce" else (n, 133)  # noqa: E731
    (all_rows,) = run(kernels, op, [x, *none], ROW_OPS[name], [shape(700)], 2)
    for i in (0, 1, 350, 699):
        (row,) = run(kernels, op, [x[i : i + 1].copy(), *none], ROW_OPS[name], [shape(1)])
        assert bits(row[0]) == bits(all_rows[i])


def test_softmax_of_masked_and_large_values(kernels):
    x = np.array([[-np.inf, 1e30, 0, 1e30], [1, 2, -np.inf, -np.inf], [-3e38, -3e38, -3e38, -3e38]], np.float32)
    check(kernels, REGISTRY["softmax"], [x], {})


def test_reduce_of_nan(kernels):
    x = np.array([[1, np.nan, 3], [np.nan, 1, 2], [4, 5, np.nan], [1, 2, 3]], np.float32)
    for kind in ("max", "min"):
        check(kernels, REGISTRY["reduce"], [x], {"kind": kind})


# ---- rope and caches -----------------------------------------------------------------------------------------------


def test_rope_table_of_large_angles(kernels):
    """Exact to the last place up to 2^30, and right beyond."""
    positions = np.array([[0, 1, 2, 7, 1000, 65_535, 131_071, 999_999, 1_000_000, 123_456_789, 2**31 - 1, -5]],
                         np.int32)
    inv_freq = np.array([1.0, 0.9, 0.5, 1e-3, 1.1, 1e-7, 1.5707964, 1e3, 3.1415927], np.float32)
    check(kernels, REGISTRY["rope_table"], [positions, inv_freq, None], {})
    check(kernels, REGISTRY["rope_table"], [positions, inv_freq, None], {"scale": 1.1})


def test_rope_table_refuses_an_axis_that_is_not_there(kernels):
    for axis in (-1, 2, 2**31 - 1):
        with pytest.raises(KernelError, match="axis"):
            inputs = [np.zeros((2, 3), np.int32), np.ones(2, np.float32), np.array([0, axis], np.int32)]
            run(kernels, REGISTRY["rope_table"], inputs, {}, [(3, 4)])


@SLOW
@given(m=st.integers(0, 5), h=st.integers(1, 3), e=st.integers(1, 70), part=st.floats(0, 1), interleaved=st.booleans(),
       seed=st.integers(0, 2**32 - 1))
def test_rope(kernels, m, h, e, part, interleaved, seed):
    rng = np.random.default_rng(seed)
    t = int(part * e) // 2 * 2
    x, table = rng.standard_normal((m, h, e)).astype(np.float32), rng.standard_normal((m, t)).astype(np.float32)
    check(kernels, REGISTRY["rope"], [x, table], {"interleaved": interleaved})


@SLOW
@given(m=st.integers(0, 6), g=st.integers(1, 3), blocks=st.integers(1, 4), odd=st.integers(0, 31), norm=st.booleans(),
       interleaved=st.booleans(), cache=st.sampled_from(CACHES), seed=st.integers(0, 2**32 - 1))
def test_rope_append(kernels, m, g, blocks, odd, norm, interleaved, cache, seed):
    rng = np.random.default_rng(seed)
    e, f = 32 * blocks - (odd if dtype(cache).block == 1 else 0), 32 * blocks
    t = int(rng.integers(0, e // 2 + 1)) * 2
    shapes = {"q": (m, 2 * g, e), "k": (m, g, e), "v": (m, g, f), "table": (m, t), "k_cache": (g, 9, e),
              "v_cache": (g, 9, f), "cells": (m,)}
    if norm:
        shapes |= {"q_norm": (e,), "k_norm": (e,)}
    op = REGISTRY["rope_append"]
    inputs = make_inputs(op, Case(shapes, {}, {}), rng, cache)
    cells = inputs[6]
    cells[rng.random(m) < 0.2] = -1                     # skipped rows
    check(kernels, op, inputs, {"interleaved": interleaved, "eps": 1e-6}, cache)


def test_caches_with_gaps_between_heads_and_cells(kernels):
    """A cache is a view: other bytes between its heads and cells stay as they are."""
    rng = rng_of("gaps")
    whole = np.full((3, 11, 2, 64), 7, np.float16)
    cache = whole[1:3, ::2, 1, :]                                       # [2, 6, 64]
    x, cells = rng.standard_normal((3, 2, 64)).astype(np.float32), np.array([5, 0, 2], np.int32)
    kernels.call("cache_append", [cache, x, cells, None], [cache], {}, 2)
    assert (cache[:, cells] == np.swapaxes(x.astype(np.float16), 0, 1)).all()
    cache[:, cells] = 7
    assert (whole == 7).all()


def hard_to_round(rng: np.random.Generator) -> np.ndarray:
    """Blocks of 32: ties, equal extremes of both signs, one number, zeros, tiny and huge numbers, random ones [n, 32]."""
    rows = [np.zeros(32), np.full(32, -3.0), np.full(32, 1e-30), np.r_[np.full(31, 1e-8), 7e-8], np.arange(32) - 15.5]
    rows += [sign * np.r_[first, -first, rng.standard_normal(30) / 2] for first in (1.0, -1.0) for sign in (1, 3e4)]
    for top in (127.0, -127.0, 15.0, -8.0, 8.0):                # scales of 1: halves are ties
        rows += [np.r_[top, np.round(rng.uniform(-7, 7, 31)) + 0.5], np.r_[0.0, top, np.arange(30) / 2 - 7]]
    return np.concatenate([np.array(rows), rng.standard_normal((300, 32)), rng.standard_normal((100, 32)) ** 9]).astype(np.float32)


@pytest.mark.parametrize("kind", CACHES)
def test_cells_are_written_with_the_bits_of_gguf(kernels, kind):
    """Every bit of gguf-py's quantizer, over 64 elements a cell; cells that are not written keep theirs."""
    x = hard_to_round(rng_of("round"))
    x = np.concatenate([x, x[: len(x) % 2]]).reshape(-1, 1, 64)
    if dtype(kind).block > 1:                               # mixing turns it back; 1 / sqrt(64) and few bits: without rounding
        x = mixed(x)
    with np.errstate(over="ignore", invalid="ignore"):
        want = stored(np.swapaxes(x, 0, 1), kind)
        cache = stored(np.full((1, len(x) + 1, 64), 0.25, np.float32), kind)
    kept = bits(cache)[-len(bits(cache)) // (len(x) + 1) :]
    kernels.call("cache_append", [cache, x, np.arange(len(x), dtype=np.int32), None], [cache], {}, 2)
    assert bits(cache) == bits(want) + kept


@pytest.mark.parametrize("width", [32, 64, 96, 128, 256, 160])
def test_blocks_hold_hadamard_mixed_elements(kernels, width):
    """Against Sylvester's recursion: an orthogonal matrix for each run of the largest power of two that divides the width."""
    size = width & -width
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    whole = np.kron(np.eye(width // size), h / np.sqrt(size))
    np.testing.assert_allclose(whole @ whole, np.eye(width), atol=1e-15)
    x = rng_of(width).standard_normal((7, 1, width)).astype(np.float32)
    cache = stored(np.zeros((1, 7, width), np.float32), "Q8_0")
    kernels.call("cache_append", [cache, x, np.arange(7, dtype=np.int32), None], [cache], {})
    want = x[:, 0] @ whole
    np.testing.assert_allclose(elements(cache)[0], want, atol=np.abs(want).max() / 127 * 0.51)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_one_large_channel_does_not_coarsen_a_cell(kernels, kind):
    """Keys and values with an outlier in one channel: less than half the error of rounding them as they are."""
    rng = rng_of("outlier")
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((9, 4, 64), (2, 100, 64), (2, 100, 64)))
    k[..., 3], v[..., 9] = 30, 30
    lo, hi = np.zeros(9, np.int32), np.full(9, 100, np.int32)
    rounded_ = [gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind]) for x in (k, v)]
    plain = [elements(Block(raw.view(np.uint8).reshape(2, 100, 2, -1), kind)) for raw in rounded_]
    exact, unmixed, got = (attend(kernels, [q, *kv, lo, hi, None, None, None])
                           for kv in ((k, v), plain, (stored(k, kind), stored(v, kind))))
    assert np.square(got - exact).sum() < np.square(unmixed - exact).sum() / 4


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_caches_of_whole_blocks_only(kernels, kind):
    x, cells = np.ones((1, 1, 48), np.float32), np.zeros(1, np.int32)
    cache = stored(np.ones((1, 2, 64), np.float32), kind)
    cache.shape = (1, 2, 48)
    with pytest.raises(KernelError, match="48 elements of 'cache' are no whole blocks"):
        kernels.call("cache_append", [cache, x, cells, None], [cache], {})
    with pytest.raises(KernelError, match="48 elements of 'k' are no whole blocks"):
        kernels.call("attention", [x, cache, cache, cells, cells + 1, None, None, None], [x.copy()], {"scale": 1.0})


@pytest.mark.parametrize("cell", [4, 2**31 - 1])
def test_a_cell_outside_the_cache_is_refused(kernels, cell):
    cache, x = np.zeros((1, 4, 8), np.float32), np.ones((2, 1, 8), np.float32)
    cells = np.array([0, cell], np.int32)
    with pytest.raises(KernelError, match=f"cell {cell} of 4"):
        kernels.call("cache_append", [cache, x, cells, None], [cache], {})
    assert (cache == 0).all()


# ---- states of a fixed size ------------------------------------------------------------------------------------------


STATES = {"causal_conv": {"x": (24, 40), "weight": (4, 40), "state": (3, 8, 40)},
          "gated_delta_rule": {"q": (24, 2, 24), "k": (24, 2, 24), "v": (24, 4, 40), "log_decay": (24, 4), "beta": (24, 4), "state": (4, 8, 960)}}


@pytest.mark.parametrize("name", STATES)
def test_a_state_goes_on_in_another_step_with_the_same_bits(kernels, name):
    """Rows of two conversations in one step, and cut into three, between which states pass through other cells."""
    op = REGISTRY[name]
    values = dict(zip(op.args, make_inputs(op, Case({**STATES[name], "before": (24,), "after": (24,)}, {}, {}), rng_of(name))))
    values["before"], values["after"] = np.full(24, -2, np.int32), np.full(24, -1, np.int32)
    values["before"][[0, 10]], values["after"][[9, 23]] = (-1, 2), (3, 4)
    rows = [n for n, spec in op.args.items() if spec.axes[0] == "m"]
    shape = lambda n: (n, *STATES[name]["v" if "v" in values else "x"][1:])  # noqa: E731

    def step(begin: int, end: int, state: np.ndarray, **cells: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
        part = {n: v[begin:end].copy() if n in rows else v for n, v in values.items()} | {"state": state}
        for n, places in cells.items():
            for at, cell in places.items():
                part[n][at - begin] = cell
        return tuple(run(kernels, op, list(part.values()), {}, [shape(end - begin), state.shape], 2))

    whole, states = step(0, 24, values["state"])
    first, state = step(0, 4, values["state"], after={3: 5})
    second, state = step(4, 13, state, before={4: 5}, after={12: 6})
    third, state = step(13, 24, state, before={13: 6})
    assert bits(np.concatenate([first, second, third])) == bits(whole)
    assert bits(state[:, 3:5]) == bits(states[:, 3:5])


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("argument,row,cell", [("before", 1, 8), ("after", 2, 9), ("before", 0, -2), ("before", 1, -3)])
def test_a_state_outside_the_cells_is_refused(kernels, name, argument, row, cell):
    op = REGISTRY[name]
    values = dict(zip(op.args, make_inputs(op, Case({**STATES[name], "before": (24,), "after": (24,)}, {}, {}), rng_of(name))))
    values[argument][row] = cell
    out = np.zeros(STATES[name]["v" if "v" in values else "x"], np.float32)
    with pytest.raises(KernelError, match=f"cell {cell} of 8"):
        kernels.call(name, list(values.values()), [out, values["state"]], {})


# ---- matmul --------------------------------------------------------------------------------------------------------


@SLOW
@given(m=st.integers(0, 140), n=st.integers(0, 140), k=st.integers(0, 40),
       batch=st.lists(st.integers(0, 2), max_size=2), seed=st.integers(0, 2**32 - 1))
def test_matmul_any_shape_and_strides(kernels, m, n, k, batch, seed):
    rng = np.random.default_rng(seed)
    x, y = (strided_copy(rng, rng.standard_normal((*batch, rows, k)).astype(np.float32)) for rows in (m, n))
    check(kernels, REGISTRY["matmul"], [x, y], {})


def test_matmul_rows_do_not_depend_on_the_batch(kernels):
    rng = rng_of("matmul")
    x, y = rng.standard_normal((300, 700)).astype(np.float32), rng.standard_normal((130, 700)).astype(np.float32)
    (whole,) = check(kernels, REGISTRY["matmul"], [x, y], {})
    for rows in (np.s_[:1], np.s_[17:24], np.s_[125:133], np.s_[299:]):
        (part,) = run(kernels, REGISTRY["matmul"], [x[rows].copy(), y], {}, [whole[rows].shape])
        assert bits(part) == bits(np.ascontiguousarray(whole[rows]))


# ---- attention -----------------------------------------------------------------------------------------------------

ATTENTION = REGISTRY["attention"]


def attend(kernels: Kernels, inputs: Sequence[Value], threads: int = 1, **params: Any) -> np.ndarray:
    q, _, v = inputs[:3]
    (out,) = run(kernels, ATTENTION, inputs, {"scale": 0.1, **params}, [(q.shape[0], q.shape[1] * v.shape[2])], threads)
    return out


@st.composite
def attention_cases(draw) -> tuple[list[Value], dict[str, float]]:
    """Any shape, interval, cell map, mixture of sequences; any dtypes of keys and of values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    g, group, m = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(0, 20))
    s, kinds = draw(st.integers(1, 700)), [draw(st.sampled_from(CACHES)) for _ in range(2)]
    e, f = (draw(st.integers(1, 85)) if dtype(kind).block == 1 else draw(st.integers(1, 3)) * 32 for kind in kinds)
    q = rng.standard_normal((m, g * group, e)).astype(np.float32) * draw(st.sampled_from([0.1, 1.0, 20.0]))
    k, v = (stored(rng.standard_normal((g, s, n)), kind) for n, kind in zip((e, f), kinds))
    if draw(st.booleans()):
        k, v = (moved(rng, c) for c in (k, v))
    if draw(st.booleans()):
        q = strided_copy(rng, q)
    sinks = rng.standard_normal(g * group).astype(np.float32) if draw(st.booleans()) else None
    cells = seq = None
    first = 0
    l = s
    if draw(st.booleans()):
        b, l = draw(st.integers(1, 3)), draw(st.integers(1, s))
        cells = np.stack([rng.permutation(s)[:l] for _ in range(b)]).astype(np.int32)
        first = draw(st.sampled_from([0, 0, 5, 1000, 2**31 - 2000]))
        if draw(st.booleans()):
            seq = np.sort(rng.integers(0, b, m)).astype(np.int32)
    shape = draw(st.sampled_from(["causal", "window", "all", "any", "spans"]))
    i = np.arange(m)
    if shape == "causal":
        hi = np.minimum(l, l - m + i + 1)
        lo = 0 * i
    elif shape == "window":
        hi = np.minimum(l, l - m + i + 1)
        lo = np.maximum(0, hi - draw(st.integers(1, 300)))
    elif shape == "all":
        lo, hi = 0 * i, 0 * i + l
    else:
        lo, hi = np.sort(rng.integers(0, l + 1, (2, m)), axis=0)
        if shape == "spans":
            lo, hi = lo[i // 4 * 4], hi[i // 4 * 4]
    lo, hi = (lo + first).astype(np.int32), (hi + first).astype(np.int32)
    params = {"scale": draw(st.sampled_from([0.125, 1.0])), "softcap": draw(st.sampled_from([0.0, 0.0, 30.0]))}
    return [q, k, v, lo, hi, cells, seq, sinks], params


def alone_and_together(kernels: Kernels, inputs: Sequence[Value], got: np.ndarray, **params: Any) -> None:
    """The same bits over threads, and for each row alone, in other company, in another order."""
    q, k, v, lo, hi, cells, seq, sinks = inputs
    m = len(q)
    for threads in (2, 3, 7):
        assert bits(attend(kernels, inputs, threads, **params)) == bits(got), f"{threads} threads give other bits"
    rng = rng_of(got.shape)
    for rows in [[i] for i in range(min(m, 3))] + [rng.permutation(m)[: m // 2 + 1]]:
        own = None if seq is None else seq[rows]
        part = [np.ascontiguousarray(q[rows]), k, v, lo[rows], hi[rows], cells, own, sinks]
        for threads in (1, 2):
            again = attend(kernels, part, threads, **params)
            assert bits(again) == bits(got[rows]), f"rows {rows} differ in other company"


@settings(SLOW, max_examples=120)
@given(attention_cases())
def test_attention(kernels, case):
    """Against the reference; bit for bit over threads, and for each row alone, in other company, in another order."""
    inputs, params = case
    q, _, v = inputs[:3]
    (want,) = reference(ATTENTION, inputs, params)
    got = attend(kernels, inputs, **params)
    # a score's error is that of its sum; it enters the result through exp, times the spread of the values
    spread = 1 + np.abs(params["scale"]) * np.abs(q).max(initial=0) * np.sqrt(q.shape[2]) * 4
    close(got, want, 3e-7 * spread, np.abs(loaded(v)[np.isfinite(loaded(v))]).max(initial=0), "attention")
    alone_and_together(kernels, inputs, got, **params)


@settings(SLOW, max_examples=40)
@given(attention_cases(), st.sampled_from([0.0, 30.0]))
def test_attention_of_bytes(kernels, case, common):
    """The same cases without cells, sinks and soft cap; what keys or values have in common costs nothing."""
    (q, k, v, lo, hi, *_), _ = case
    lo, hi = lo % 1000, np.minimum(hi - lo + lo % 1000, min(k.shape[1], v.shape[1])).astype(np.int32)   # of cells, without a map
    q, k, v = map(np.ascontiguousarray, (np.clip(q, -1, 1), *(loaded(c).astype(np.float32) + np.float32(common) for c in (k, v))))
    inputs, params = [q, k, v, lo, hi, None, None, None], {"scale": q.shape[2] ** -0.5, "products": "int8"}
    (want,) = reference(ATTENTION, inputs, params)
    got = attend(kernels, inputs, **params)
    close(got, want, 5e-3, np.abs(v - common).max(initial=0), "bytes")
    alone_and_together(kernels, inputs, got, **params)


def test_attention_of_bytes_is_nearly_that_of_floats(kernels):
    """An encoder's shape: error of 8-bit codes of queries, keys, probabilities and values, also where keys share a large part."""
    rng = rng_of("bytes")
    m, h, e = 300, 2, 72
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((m, h, e), (h, m, e), (h, m, e)))
    lo, hi = np.zeros(m, np.int32), np.full(m, m, np.int32)
    for shift in (np.zeros(e, np.float32), 20 * rng.standard_normal(e).astype(np.float32)):
        inputs = [q, k + shift, v + shift, lo, hi, None, None, None]
        exact, got = (attend(kernels, inputs, scale=e**-0.5, products=p) for p in ("float", "int8"))
        assert 1e-3 < np.sqrt(np.mean((got - exact) ** 2) / np.mean((exact - np.tile(shift, h)) ** 2)) < 1.5e-2


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("window", [None, 100])
def test_prefill_in_any_chunks_is_one_pass(kernels, cache, window):
    """A simulated cache that fills: the outputs are the same bits for every way to cut the prompt."""
    rng = rng_of(("prefill", cache, window))
    n, g, h, e = 400, 2, 6, 64
    q = rng.standard_normal((n, h, e)).astype(np.float32)
    k, v = (stored(rng.standard_normal((g, n, e)), cache) for _ in range(2))
    hi = np.arange(1, n + 1, dtype=np.int32)
    lo = np.maximum(0, hi - window).astype(np.int32) if window else np.zeros(n, np.int32)
    cells = rng.permutation(n).astype(np.int32)[None]
    order = np.argsort(cells[0])
    place = lambda c: Block(c.raw[:, order], cache) if isinstance(c, Block) else c[:, order]  # noqa: E731
    whole = attend(kernels, [q, place(k), place(v), lo, hi, cells, None, None], 2)
    assert bits(attend(kernels, [q, k, v, lo, hi, None, None, None], 3)) == bits(whole), "the order of cells matters"
    for cuts in ([1, 2, 3, 50, 51, 200], [128, 256, 384], [399]):
        at = 0
        for end in [*cuts, n]:
            future = np.s_[:, cells[0][end:]]
            kc, vc = copy_of(place(k)), copy_of(place(v))
            for c in (kc, vc):                              # what is not written yet may hold anything
                (c.raw if isinstance(c, Block) else c.view(np.uint8))[future] = 0xFF
            rows = np.s_[at:end]
            part = attend(kernels, [q[rows].copy(), kc, vc, lo[rows], hi[rows], cells, None, None], 2)
            assert bits(part) == bits(whole[rows]), f"rows {at} to {end} of {cuts} differ"
            at = end


def test_sequences_do_not_see_each_other(kernels):
    """Rows of three sequences in one batch, interleaved; each as if alone."""
    rng = rng_of("sequences")
    m, g, h, e, s = 30, 1, 4, 80, 300
    q = rng.standard_normal((m, h, e)).astype(np.float32)
    k, v = (rng.standard_normal((g, s, e)).astype(np.float16) for _ in range(2))
    cells = rng.permutation(s).reshape(3, 100).astype(np.int32)
    seq = rng.integers(0, 3, m).astype(np.int32)
    hi = rng.integers(1, 101, m).astype(np.int32)
    lo = np.maximum(0, hi - 60).astype(np.int32)
    inputs = [q, k, v, lo, hi, cells, seq, None]
    got = attend(kernels, inputs, 2)
    (want,) = reference(ATTENTION, inputs, {"scale": 0.1})
    close(got, want, 2e-6, 1.0)
    for n in range(3):
        rows = seq == n
        foreign = np.ones(s, bool)
        foreign[cells[n]] = False
        kc, vc = k.copy(), v.copy()
        kc[:, foreign], vc[:, foreign] = np.nan, np.inf
        alone = attend(kernels, [q[rows], kc, vc, lo[rows], hi[rows], cells[n : n + 1], None, None])
        assert bits(alone) == bits(got[rows])


PRODUCTS = pytest.mark.parametrize("products", ["float", "int8"])


@PRODUCTS
def test_a_masked_key_contributes_nothing_whatever_it_holds(kernels, products):
    """Keys that one row sees and another does not: infinities stay with the rows that see them."""
    rng = rng_of("masked")
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((3, 2, 32), (1, 64, 32), (1, 64, 32)))
    lo, hi = np.array([0, 20, 50], np.int32), np.array([20, 50, 64], np.int32)
    clean = attend(kernels, [q, k, v, lo, hi, None, None, None], products=products)
    k[:, 20:50], v[:, 20:50] = np.nan, np.inf
    got = attend(kernels, [q, k, v, lo, hi, None, None, None], products=products)
    assert bits(got[[0, 2]]) == bits(clean[[0, 2]])
    assert np.isnan(got[1]).all()


@PRODUCTS
def test_empty_intervals_give_zeros(kernels, products):
    q, k = np.ones((4, 2, 16), np.float32), np.full((1, 40, 16), np.nan, np.float32)
    lo, hi = np.array([0, 5, 39, -7], np.int32), np.array([0, 4, 39, -9], np.int32)
    for sinks in (None, np.ones(2, np.float32)) if products == "float" else (None,):
        assert (attend(kernels, [q, k, k, lo, hi, None, None, sinks], 2, products=products) == 0).all()


def test_a_nan_of_a_query_or_value_stays_there(kernels):
    rng = rng_of("nan")
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((5, 1, 20), (1, 70, 20), (1, 70, 20)))
    q[2, 0, 3], v[0, 69, 7] = np.nan, np.nan
    lo, hi = np.zeros(5, np.int32), np.array([70, 70, 70, 60, 70], np.int32)
    for products in ("float", "int8"):
        got = attend(kernels, [q, k, v, lo, hi, None, None, None], products=products)
        want = np.zeros((5, 20), bool)
        want[2], want[[0, 1, 4], 7] = True, True
        assert (np.isnan(got) == want).all(), products


def test_bytes_take_no_cells_sinks_or_cap(kernels):
    q, k, one, i = np.ones((1, 1, 16), np.float32), np.ones((1, 4, 16), np.float32), np.ones(1, np.int32), np.zeros(1, np.int32)
    plain = {"scale": 1.0, "products": "int8"}
    for extra, params in (([np.zeros((1, 4), np.int32), None, None], {}), ([None, i, None], {}),
                          ([None, None, np.ones(1, np.float32)], {}), ([None, None, None], {"softcap": 3.0})):
        with pytest.raises(KernelError, match="int8 take neither"):
            attend(kernels, [q, k, k, i, one, *extra], **plain, **params)
        with pytest.raises(ShapeError, match="int8 take neither"):
            ATTENTION(q, k, k, i, one, *extra, **plain, **params)
    wide, blocks = np.ones((1, 1, 32), np.float32), stored(np.ones((1, 4, 32), np.float32), "Q8_0")
    with pytest.raises(KernelError, match="int8 take neither"):
        attend(kernels, [wide, blocks, blocks, i, one, None, None, None], **plain)


def test_sinks_take_probability(kernels):
    """One key with score 0 and a sink of 0: half of the value."""
    q, k, v = np.zeros((1, 1, 16), np.float32), np.ones((1, 1, 16), np.float32), np.full((1, 1, 16), 3, np.float32)
    one = np.array([1], np.int32)
    out = attend(kernels, [q, k, v, one - 1, one, None, None, np.zeros(1, np.float32)])
    assert (out == 1.5).all()


HOSTILE = [
    ("keys -1 to 3", {"lo": -1, "hi": 3}), ("keys 0 to 41", {"lo": 0, "hi": 41}), ("to 2147483647", {"hi": 2**31 - 1}),
    ("keys -2147483648", {"lo": -(2**31)}),
    ("cell 40 of 40", {"cell": 40}), ("cell -1 of 40", {"cell": -1}), ("cell 2147483647", {"cell": 2**31 - 1}),
    ("sequence 2 of 2", {"seq": 2}), ("sequence -1 of 2", {"seq": -1}),
    ("reads 11 keys, but a sequence has 10", {"l": 10, "hi": 11}),
]


@pytest.mark.parametrize("message,change", HOSTILE, ids=[m for m, _ in HOSTILE])
def test_hostile_numbers_are_refused(kernels, message, change):
    q, k = np.ones((2, 2, 16), np.float32), np.ones((1, 40, 16), np.float32)
    lo, hi = np.array([0, change.get("lo", 0)], np.int32), np.array([1, change.get("hi", 3)], np.int32)
    cells = seq = None
    if {"cell", "seq", "l"} & set(change):
        cells = np.tile(np.arange(change.get("l", 40), dtype=np.int32), (2, 1))
        cells[1, 2] = change.get("cell", 2)
        seq = np.array([0, change.get("seq", 1)], np.int32)
    for products in ("float", "int8") if cells is None else ("float",):
        for threads in (1, 3):
            with pytest.raises(KernelError, match=message):
                attend(kernels, [q, k, k, lo, hi, cells, seq, None], threads, products=products)


def test_cells_that_no_row_needs_may_be_unset(kernels):
    """Rows far apart in one sequence: the map between them is not read."""
    rng = rng_of("unset")
    q, k = rng.standard_normal((2, 2, 16)).astype(np.float32), rng.standard_normal((1, 10, 16)).astype(np.float32)
    cells = np.full((1, 1000), -1, np.int32)
    cells[0, :3], cells[0, 990:993] = [3, 1, 2], [7, 0, 9]
    inputs = [q, k, k, np.array([0, 990], np.int32), np.array([3, 993], np.int32), cells, None, None]
    (want,) = reference(ATTENTION, inputs, {"scale": 0.1})
    close(attend(kernels, inputs), want, 1e-6, 1.0)


@PRODUCTS
def test_attention_scratch_is_bounded(kernels, products):
    """A plan for a long context takes a few MiB, not the size of the context."""
    op = ATTENTION
    q = np.zeros((512, 16, 128), np.float32)
    k = np.lib.stride_tricks.as_strided(np.zeros(1, np.float16), (4, 131_072, 128), (0, 0, 0))
    lo = np.zeros(512, np.int32)
    held = [describe(a) for a in (q, k, k, lo, lo, q)]
    pointers = (ctypes.POINTER(CTensor) * 6)(*map(ctypes.pointer, held))
    start, count = np.array([0, 1, 2, 3, 4, 5, 5, 5, 5], np.int32), np.array([1, 1, 1, 1, 1, 0, 0, 0, 1], np.int32)
    ints = lambda a: a.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))  # noqa: E731
    args = CArgs(pointers, ints(start), ints(count), len(op.args), 1)
    params = ctypes.create_string_buffer(codegen.pack_params(op, {"scale": 1.0, "softcap": 0.0, "products": products, "stats": False}))
    n = kernels.lib.harness_scratch(b"attention", ctypes.byref(args), params, 2)
    assert 0 < n < 8 << 20
