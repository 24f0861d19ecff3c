"""The kernels for 64-bit Arm (NEON with dot products, i8mm, SVE, SME), cross-compiled and run under qemu.

Every declared case of every op, every weight format of `linear` and `rows`, and hostile run-time values, against the
NumPy reference; and the same bits as this machine's own kernels. The tests imported from test_kernels are collected
here again: they run on this module's `kernels`, one emulated process a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import crossbuild
import gguf
import numpy as np
import pytest
import test_dequant
from crossbuild import Call, Memory, Outcome
from op_cases import Block, CACHES, close, describe, KernelError, make_inputs, rng_of, Runner, Value
from test_kernels import (  # noqa: F401
    OPS, test_a_cell_outside_the_cache_is_refused, test_a_masked_key_contributes_nothing_whatever_it_holds,
    test_a_nan_of_a_query_or_value_stays_there, test_attention_of_bytes_is_nearly_that_of_floats, test_bytes_take_no_cells_sinks_or_cap,
    test_caches_with_gaps_between_heads_and_cells, test_declared_cases, test_empty_intervals_give_zeros,
    test_experts_of_equal_and_bad_scores,
    test_hostile_numbers_are_refused, test_prefill_in_any_chunks_is_one_pass, test_reduce_of_nan,
    test_rope_table_of_large_angles, test_rope_table_refuses_an_axis_that_is_not_there, test_rows_of_any_width,
    test_sequences_do_not_see_each_other, test_sinks_take_probability, test_softmax_of_masked_and_large_values,
    test_unary_of_special_values, test_unary_over_its_range,
)
from test_linear_kernels import FLOATS, QUANTIZED, Matrix, check as check_product, rows_of

from csrc import build_rules as rules
from pyengine import ops
from pyengine.compiler import codegen
from pyengine.compiler.codegen import pack_params
from pyengine.dtype import dtype
from pyengine.graph.op import REGISTRY

OK, BAD_SHAPE, BAD_VALUE, NO_KERNEL = 0, 1, 3, 5


@pytest.fixture(scope="session", params=["linux-aarch64", pytest.param("linux-aarch64-gcc", marks=pytest.mark.slow)])
def arm(request: pytest.FixtureRequest) -> str:
    """The target, built: clang's code, and gcc's in the slow tests. Skips where the tools are missing."""
    try:
        crossbuild.emulator(crossbuild.TARGETS[request.param])
        crossbuild.build(request.param)
    except crossbuild.ToolMissing as missing:
        pytest.skip(str(missing))
    return request.param


@pytest.fixture(params=["neon", "i8mm", "sve256", "sme"])
def isa(arm: str, request: pytest.FixtureRequest) -> str:
    """An instruction set whose products are a text of their own."""
    needs_instruction_set(arm, request.param)
    return request.param


def needs_instruction_set(arm: str, isa: str) -> None:
    """Skip the test where the compiler did not build one, or the emulator has none or multiplies wrongly."""
    target = crossbuild.TARGETS[arm]
    if isa in rules.left_out(target.machine, target.compiler()):
        pytest.skip(f"{target.compiler()[0]} does not build {isa}")
    if isa == "sme" and () < crossbuild.emulator_version(target) < (9, 0):
        pytest.skip("needs QEMU 9 or newer: earlier ones multiply the bytes of SME wrongly; PYENGINE_QEMU names another one")
    if isa not in crossbuild.instruction_sets(arm):
        pytest.skip(f"the emulator has no {isa}: needs QEMU 6.1 or newer")


# ---- arrays to the runner and back -------------------------------------------------------------------------------


def memory_of(a: np.ndarray | Block) -> Memory:
    """An array's memory from its first element to its last, gaps included."""
    t = describe(a)
    shape, strides = tuple(t.shape[: t.ndim]), tuple(t.stride[: t.ndim])
    raw = a.raw if isinstance(a, Block) else a
    extent = 0 if raw.size == 0 else sum((n - 1) * s for n, s in zip(raw.shape, raw.strides)) + raw.itemsize
    return Memory(t.dtype, shape, strides, ctypes.string_at(raw.ctypes.data, extent))


def params_of(name: str, params: dict[str, Any]) -> bytes:
    op = REGISTRY[name]
    return pack_params(op, {p.name: params.get(p.name, p.default) for p in op.params.values()})


def call_of(name: str, inputs: Sequence[Value], outputs: Sequence[Value], params: dict[str, Any]) -> Call:
    """Arguments that begin at the same address are the same memory; those that are missing at the end are absent."""
    inputs = [*inputs, *[None] * (len(REGISTRY[name].args) - len(inputs))]
    outputs = [*outputs, *[None] * (len(REGISTRY[name].results) - len(outputs))]
    known: dict[int, Memory] = {}
    groups: list[list[Memory]] = []
    for value in [*inputs, *outputs]:
        group = []
        for a in [] if value is None else value if isinstance(value, list) else [value]:
            m, address = memory_of(a), (a.raw if isinstance(a, Block) else a).ctypes.data
            if m.raw and known.setdefault(address, m) is not m:
                assert known[address].strides == m.strides
                m.same = known[address]
            group.append(m)
        groups.append(group)
    return Call(name, params_of(name, params), groups, len(outputs))


class Kernels:
    """What test_kernels' tests call: NEON's kernels, in a process of the runner."""

    isa = "neon"
    tolerance = Runner.tolerance

    def __init__(self, target: str):
        self.target = target

    def call(self, name: str, inputs: Sequence[Value], outputs: Sequence[Value], params: dict[str, Any],
             threads: int = 1) -> None:
        (done,) = crossbuild.run(self.target, self.isa, threads, [call_of(name, inputs, outputs, params)])
        flat = [a for o in outputs for a in (o if isinstance(o, list) else [o])]
        for a, data in zip(flat, done.outputs):
            ctypes.memmove((a.raw if isinstance(a, Block) else a).ctypes.data, data, len(data))
        if done.status:
            raise KernelError(done.status, done.message)


@pytest.fixture(scope="session")
def kernels(arm: str) -> Kernels:
    return Kernels(arm)


def test_every_kernel_is_tested_here() -> None:
    kernels, _ = codegen.kernels_of("cpu", codegen.backends(crossbuild.CSRC)["cpu"])
    assert kernels == {*OPS, "linear", "rows", "expert_linear", "conv2d"}


# ---- linear and rows ---------------------------------------------------------------------------------------------


class Blocks:
    """Random bytes as a matrix [n, k] of any format, in its file's layout; blocks of wild numbers become zero bytes."""

    def __init__(self, rng: np.random.Generator, name: str, n: int, k: int):
        block, self.block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        self.name, self.n, self.k, self.id = name, n, k, dtype(name).id
        self.raw = rng.integers(0, 256, (n, k // block * self.block_bytes), np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(self.raw, gguf.GGMLQuantizationType[name])
            wild = ~(np.abs(values.reshape(-1, block)).max(-1) < 1e3)
        self.raw.reshape(-1, self.block_bytes)[wild] = 0
        self.values = gguf.quants.dequantize(self.raw, gguf.GGMLQuantizationType[name]).astype(np.float32).reshape(n, k)


def weight(w: Matrix | Blocks, packed: bool) -> Memory:
    return Memory(w.id, (w.n, w.k), (w.raw.strides[0], w.block_bytes), w.raw.tobytes(), pack=packed)


def linear_call(x: np.ndarray, w: Sequence[Matrix | Blocks], packed: bool = True, bias: Sequence[np.ndarray] = (),
                norm: np.ndarray | None = None, residual: np.ndarray | None = None, **params: Any) -> Call:
    """The outputs have a border of three NaN columns between rows."""
    glu = params.get("glu", "none") != "none"
    one = lambda a: [] if a is None else [memory_of(a)]  # noqa: E731
    out = [memory_of(np.full((len(x), t.n + 3), np.nan, np.float32)[:, : t.n]) for t in w[: 1 if glu else None]]
    return Call("linear", params_of("linear", params),
                [one(x), [weight(t, packed) for t in w], [memory_of(b) for b in bias], one(norm), one(residual), out])


def results_of(call: Call, done: Outcome) -> list[np.ndarray]:
    """The float32 matrices [m, n] of a call's last argument; looks at the border."""
    assert done.status == OK, done.message
    out = []
    for m, data in zip(call.arguments[-1], done.outputs):
        if m.shape[0] == 0:
            out.append(np.empty(m.shape, np.float32))
            continue
        flat, ld = np.frombuffer(data, np.float32), m.strides[0] // 4
        whole = np.concatenate([flat, np.full(m.shape[0] * ld - len(flat), np.nan, np.float32)]).reshape(m.shape[0], ld)
        assert np.isnan(whole[:, m.shape[1] :]).all(), "wrote between rows"
        out.append(whole[:, : m.shape[1]].copy())
    return out


UNPACKED = [name for name in test_dequant.FORMATS if name not in FLOATS]
ROWS = (1, 2, 3, 4, 5, 8, 17, 33)


def codebooks(names: Sequence[str]) -> dict[int, np.ndarray]:
    """gguf-py's tables for those formats that need one, by dtype."""
    out = {}
    for name in names:
        if name in test_dequant.CODEBOOKS:
            quant = getattr(gguf.quants, name)
            quant.init_grid()
            out[dtype(name).id] = np.ascontiguousarray(quant.grid, np.int8)
    return out


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
def test_linear_packed(arm: str, isa: str, name: str) -> None:
    """Values; and one row's bits, whatever rows and threads there are."""
    rng = rng_of(("neon", name))
    unit = 0 if name in FLOATS else 256 if dtype(name).block == 256 else 32
    for n, k in ((1, unit or 5), (49, 3 * unit or 77), (33, 1024 if unit else 333)):
        w, x = Matrix(rng, name, n, k), rows_of(rng, max(ROWS), k)
        calls = [linear_call(x[:m], [w]) for m in ROWS]
        once, again = (crossbuild.run(arm, isa, threads, calls) for threads in (1, 3))
        whole = results_of(calls[-1], once[-1])[0]
        check_product(whole, x, w.values, name in QUANTIZED)
        for m, call, a, b in zip(ROWS, calls, once, again):
            assert results_of(call, a)[0].tobytes() == whole[:m].tobytes(), f"{m} rows give other bits"
            assert a == b, f"{m} rows: 3 threads give other bits"


@pytest.mark.parametrize("name", UNPACKED + FLOATS)
def test_linear_from_the_file(arm: str, isa: str, name: str) -> None:
    """Formats with a packed form take rows as int8 here too; the others are read as float32, and x stays float32."""
    rng = rng_of(("neon file", name))
    w = Matrix(rng, name, 35, 96) if name in FLOATS else Blocks(rng, name, 35, 2 * max(64, dtype(name).block))
    x = rows_of(rng, 9, w.k)
    calls = [linear_call(x[:m], [w], packed=False) for m in (1, 9)]
    for threads in (1, 3):
        for m, call, done in zip((1, 9), calls, crossbuild.run(arm, isa, threads, calls, codebooks([name]))):
            check_product(results_of(call, done)[0], x[:m], w.values, name in QUANTIZED)


@pytest.mark.parametrize("index", range(len(REGISTRY["linear"].cases)))
def test_linear_declared_cases(arm: str, isa: str, index: int) -> None:
    """Everything around the product, in float32 weights."""
    op, case = REGISTRY["linear"], REGISTRY["linear"].cases[index]
    rng = rng_of(("neon linear", index))
    of = lambda s: rng.standard_normal(s).astype(np.float32)  # noqa: E731
    x, shapes = of(case.shapes["x"]), case.shapes
    w = [Matrix(rng, "F32", *s) for s in shapes["w"]]
    bias = [of(s) for s in shapes.get("bias", ())]
    norm, residual = (of(shapes[n]) if n in shapes else None for n in ("norm", "residual"))
    wide = lambda a: None if a is None else a.astype(np.float64)  # noqa: E731
    want = op.fn(wide(x), [wide(t.values) for t in w], [wide(b) for b in bias] or None, wide(norm), wide(residual),
                 **{p.name: case.params.get(p.name, p.default) for p in op.params.values()})
    for packed in (True, False):
        call = linear_call(x, w, packed, bias, norm, residual, **case.params)
        one, three = (crossbuild.run(arm, isa, threads, [call])[0] for threads in (1, 3))
        assert one == three
        for got, right in zip(results_of(call, one), want, strict=True):
            close(got, right, 1e-6, 3.0, f"linear {index}")


def rows_call(w: Matrix | Blocks, ids: np.ndarray, packed: bool, scale: float = 1.0) -> Call:
    out = memory_of(np.full((len(ids), w.k), np.nan, np.float32))
    return Call("rows", params_of("rows", {"scale": scale}), [[weight(w, packed)], [memory_of(ids)], [], [out]])


@pytest.mark.parametrize("name", [*FLOATS, "Q8_0"])
def test_conv2d(arm: str, isa: str, name: str) -> None:
    """Every declared case, weights packed where channels are not apart from each other; the same bits on three threads."""
    rng = rng_of(("neon conv2d", name))
    for case in REGISTRY["conv2d"].cases:
        (n, k), groups = case.shapes["weight"], case.params.get("groups", 1)
        if name == "Q8_0" and (k % 32 or groups > 1 and n // groups % 16):
            continue
        w, x = Matrix(rng, name, n, k), rng.standard_normal(case.shapes["x"]).astype(np.float32)
        bias = rng.standard_normal(n).astype(np.float32) if case.shapes.get("bias") else None
        want = np.asarray(ops.conv2d(x, w.values, bias, **case.params))
        out = np.full(want.shape, np.nan, np.float32)
        packed = groups == 1 or n // groups % 16 == 0
        call = Call("conv2d", params_of("conv2d", case.params),
                    [[memory_of(x)], [weight(w, packed)], [] if bias is None else [memory_of(bias)], [memory_of(out)]])
        ((one,), (three,)) = (crossbuild.run(arm, isa, threads, [call]) for threads in (1, 3))
        assert one.status == OK, one.message
        got = np.frombuffer(one.outputs[0], np.float32).reshape(want.shape) if want.size else want
        limit = 2e-2 if name == "Q8_0" else 1e-5                     # activations are rounded to 8 bits beside blocks
        assert np.abs(got - want).max(initial=0) <= limit * max(1.0, np.abs(want).max(initial=0)) and one == three


@pytest.mark.parametrize("name", UNPACKED + FLOATS)
def test_rows(arm: str, name: str) -> None:
    """gguf-py's values, bit for bit; ids outside the table are refused. `rows`' declared shapes are among these."""
    rng = rng_of(("neon rows", name))
    declared = [(c.shapes["table"], c.shapes["ids"][0]) for c in REGISTRY["rows"].cases]
    sizes = [*declared, ((37, 101), 5)] if name in FLOATS else [((37, 2 * max(64, dtype(name).block)), 5)]
    for (n, k), m in sizes:
        w = Matrix(rng, name, n, k) if name in FLOATS else Blocks(rng, name, n, k)
        ids = rng.integers(0, n, m).astype(np.int32)
        bad = [np.array([0, wrong], np.int32) for wrong in (-1, n, 2**31 - 1, -(2**31))]
        for packed in (False, True)[: 1 + (name in QUANTIZED + FLOATS)]:
            calls = [*(rows_call(w, ids, packed, s) for s in (1.0, 25.25)), *(rows_call(w, b, packed) for b in bad)]
            for threads in (1, 3):
                done = crossbuild.run(arm, "neon", threads, calls, codebooks([name]))
                for call, outcome, scale in zip(calls, done, (1.0, 25.25)):
                    want = w.values[ids] * np.float32(scale)
                    test_dequant.assert_same_bits(results_of(call, outcome)[0].ravel(), want)
                for b, outcome in zip(bad, done[2:]):
                    assert outcome.status == BAD_VALUE and outcome.message == f"rows: id {b[1]} of {n}"


def test_linear_refuses_what_does_not_fit(arm: str, isa: str) -> None:
    """Shapes and formats that no graph makes give a status and no crash. NaN and infinity stay in their row."""
    rng = rng_of("neon hostile")
    w, x = Matrix(rng, "Q4_K", 40, 256), rows_of(rng, 9, 256)
    narrow, no_such = Matrix(rng, "Q4_K", 40, 512), weight(w, False)
    no_such.dtype = 99
    unpacked = linear_call(x, [w])
    unpacked.arguments[1] = [no_such]
    refused = [(linear_call(x, [narrow]), BAD_SHAPE), (unpacked, NO_KERNEL),
               (linear_call(x, [w], residual=x[:, :40].copy(), bias=[x[0, :40].copy()] * 2), BAD_SHAPE)]
    spoiled = x.copy()
    spoiled[0, 77], spoiled[3, 0] = np.nan, np.inf
    calls = [*(c for c, _ in refused), linear_call(x, [w]), linear_call(spoiled, [w]), linear_call(x[:0], [w])]
    for threads in (1, 3):
        done = crossbuild.run(arm, isa, threads, calls)
        for (_, status), outcome in zip(refused, done):
            assert outcome.status == status and outcome.message.startswith("linear: ")
        clean, got = results_of(calls[3], done[3])[0], results_of(calls[4], done[4])[0]
        assert not np.isfinite(got[[0, 3]]).any()
        kept = [1, 2, *range(4, 9)]
        assert got[kept].tobytes() == clean[kept].tobytes()
        assert results_of(calls[5], done[5])[0].shape == (0, 40)


def experts_call(x: np.ndarray, w: Sequence[Matrix], chosen: np.ndarray, packed: bool, **params: Any) -> Call:
    """w: all experts' matrices as one, n rows each, once or twice."""
    weights = []
    for t in w:
        one = weight(t, packed)
        one.shape, one.strides = (t.n // 48, 48, t.k), (48 * t.raw.strides[0], *one.strides)
        weights.append(one)
    out = memory_of(np.full((chosen.size, 51), np.nan, np.float32)[:, :48])
    return Call("expert_linear", params_of("expert_linear", params), [[memory_of(x)], weights, [memory_of(chosen)], [out]])


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F16"])
def test_experts_have_the_bits_of_linear(arm: str, isa: str, name: str) -> None:
    """48 rows for each of 5 experts; packed and from the file; a bad expert is refused."""
    rng = rng_of(("neon experts", name))
    w = Matrix(rng, name, 5 * 48, 256)
    for m, used in ((1, 3), (50, 1), (9, 2)):
        x = rows_of(rng, m, 256)
        chosen = np.stack([rng.permutation(5)[:used] for _ in range(m)]).astype(np.int32)
        for packed in (True, False):
            calls = [linear_call(x, [w], packed), experts_call(x, [w], chosen, packed)]
            (whole,), (got,) = map(results_of, calls, crossbuild.run(arm, isa, 3, calls))
            want = np.stack([whole[i, 48 * e : 48 * e + 48] for i in range(m) for e in chosen[i]])
            assert got.tobytes() == want.tobytes(), (m, used, packed)
    chosen[8, 1] = 5
    for threads in (1, 3):
        (refused,) = crossbuild.run(arm, isa, threads, [experts_call(x, [w], chosen, True)])
        assert refused.status == BAD_VALUE and refused.message == "expert_linear: expert 5 of 5"


# ---- the same bits as other instruction sets ---------------------------------------------------------------------


def _same(a: Outcome, b: Outcome, call: Call) -> bool:
    """Equal status and bytes; a NaN may have any sign and payload, which machines choose differently."""
    if (a.status, a.message) != (b.status, b.message):
        return False
    for m, x, y in zip([m for group in call.arguments[-call.n_out :] for m in group], a.outputs, b.outputs):
        if m.dtype == dtype("F32").id:
            x, y = (np.where(np.isnan(f), np.float32(0), f).tobytes() + np.isnan(f).tobytes()
                    for f in (np.frombuffer(x, np.float32), np.frombuffer(y, np.float32)))
        if x != y:
            return False
    return True


def every_call() -> list[tuple[str, Call]]:
    """All declared cases, each with all formats of caches, and all weight formats; each with what it is called in a message."""
    calls: list[tuple[str, Call]] = []
    for name in OPS:
        op = REGISTRY[name]
        for i, case in enumerate(op.cases):
            widths = [s[-1] for n, s in case.shapes.items() if op.args[n].kind == "Cache"]
            for cache in CACHES if widths else ("F32",):
                if any(width % dtype(cache).block for width in widths):
                    continue
                inputs = make_inputs(op, case, rng_of(("bits", name, i)), cache)
                shapes = [t.shape for t in _declared_results(op, case)]
                same = lambda spec: inputs[list(op.args).index(spec.axes[0])]  # noqa: B023, E731  used at once
                empty = {"I32": (-1, np.int32)}
                outputs = [same(spec) if spec.kind == "Same" else np.full(shape, *empty.get(spec.kind, (np.nan, np.float32)))
                           for spec, shape in zip(op.results, shapes)]
                calls.append((f"{name}-{i} {cache}", call_of(name, inputs, outputs, case.params)))
    rng = rng_of("neon bits")
    for name in [*QUANTIZED, *FLOATS]:
        pair = [Matrix(rng, name, 40, 512), Matrix(rng, name, 40, 512)]
        for m in (1, 4, 9, 21):
            x, norm = rows_of(rng, m, 512), rng.standard_normal(512).astype(np.float32)
            for glu in ("silu", "gelu", "gelu_tanh"):
                call = linear_call(x, pair, norm=norm, norm_eps=1e-6, glu=glu, softcap=20.0)
                calls.append((f"linear {name} {m} rows {glu}", call))
            calls.append((f"linear {name} {m} rows, file", linear_call(x, pair, packed=False)))
    return calls


def differing(calls: Sequence[tuple[str, Call]], here: tuple[str, str], there: tuple[str, str]) -> list[str]:
    """The calls that give other bits on one (target, instruction set) than on another."""
    only = [c for _, c in calls]
    one, other = (crossbuild.run(target, isa, threads, only) for (target, isa), threads in ((here, 3), (there, 2)))
    return [what for (what, c), a, b in zip(calls, one, other, strict=True) if not _same(a, b, c)]


def test_same_bits_as_this_machine(arm: str, isa: str) -> None:
    """csrc/cpu/simd.h promises the same bits wherever multiply-add is fused: all declared cases, all weight formats."""
    crossbuild.build("native")
    fused = [name for name in crossbuild.instruction_sets("native") if name != "generic"]
    if not fused:
        pytest.skip("needs a processor with AVX2 and FMA to compare with")
    calls = every_call()
    for here in fused:
        assert not (different := differing(calls, (arm, isa), ("native", here))), f"{isa} and {here} differ in {different}"


def _declared_results(op: Any, case: Any) -> Sequence[Any]:
    """Tensors with the shapes of a case's results."""
    from pyengine.graph.tensor import make_leaf

    def leaf(name: str, shape: tuple[int, ...]) -> Any:
        kind = "I32" if op.args[name].kind == "I32" else "F32"
        return make_leaf("input", name, shape, dtype(kind), None)

    args = [None if (s := case.shapes.get(n)) is None else [leaf(n, p) for p in s] if spec.many else leaf(n, s)
            for n, spec in op.args.items()]
    out = op(*args, **case.params)
    return out if isinstance(out, tuple) else (out,)
