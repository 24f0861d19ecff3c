"""Ops on arrays, for tests of kernels anywhere: random arguments from a declared case, guarded outputs, the reference in float64, tolerances."""

from __future__ import annotations

import ctypes
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np

from pyengine.dtype import BY_CHANNEL, dtype, GROUP
from pyengine.graph.op import Case, Op, REGISTRY
from pyengine.ops.rope import mixed

GUARD = 64
MAX_DIMS = 6


class CTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("ndim", ctypes.c_int32),
                ("shape", ctypes.c_int64 * MAX_DIMS), ("stride", ctypes.c_int64 * MAX_DIMS)]


class CArgs(ctypes.Structure):
    _fields_ = [("t", ctypes.POINTER(ctypes.POINTER(CTensor))), ("start", ctypes.POINTER(ctypes.c_int32)),
                ("count", ctypes.POINTER(ctypes.c_int32)), ("n_in", ctypes.c_int32), ("n_out", ctypes.c_int32)]


class KernelError(Exception):
    """A kernel returned a status other than PE_OK; `status` and its message."""

    def __init__(self, status: int, message: str):
        super().__init__(f"status {status}: {message}")
        self.status = status


class Block:
    """A tensor whose elements are no NumPy type: BF16 or blocks, over raw bytes [..., blocks, bytes of one]."""

    def __init__(self, raw: np.ndarray, kind: str):
        self.raw, self.kind, self.shape = raw, kind, (*raw.shape[:-2], raw.shape[-2] * dtype(kind).block)


Value = Any      # np.ndarray | Block | None | list[np.ndarray]


def describe(a: np.ndarray | Block) -> CTensor:
    """The descriptor of an array; its strides are the array's own."""
    if isinstance(a, Block):
        raw, t = a.raw, dtype(a.kind).id
        strides, shape = raw.strides[:-1], a.shape
    else:
        raw, t = a, {"float32": 0, "float16": 1, "int32": 26}[a.dtype.name]
        strides, shape = a.strides, a.shape
    pad = [0] * (MAX_DIMS - len(shape))
    return CTensor(raw.ctypes.data, t, len(shape), (ctypes.c_int64 * MAX_DIMS)(*shape, *pad),
                   (ctypes.c_int64 * MAX_DIMS)(*strides, *pad))


class Runner(ABC):
    """What runs single kernels."""

    @abstractmethod
    def run(self, name: str, groups: Sequence[Sequence[CTensor]], n_out: int, params: dict[str, Any], threads: int = 1,
            repeat: int = 1) -> None:
        """Run a kernel on the tensors of each argument. Raises: KernelError."""

    def call(self, name: str, inputs: Sequence[Value], outputs: Sequence[np.ndarray | Block], params: dict[str, Any],
             threads: int = 1, repeat: int = 1) -> None:
        """Run a kernel on these very arrays; inputs and outputs that are missing at the end are absent."""
        inputs = [*inputs, *[None] * (len(REGISTRY[name].args) - len(inputs))]
        outputs = [*outputs, *[None] * (len(REGISTRY[name].results) - len(outputs))]
        groups = [[] if v is None else v if isinstance(v, list) else [v] for v in [*inputs, *outputs]]
        self.run(name, [[describe(a) for a in g] for g in groups], len(outputs), params, threads, repeat)

    def tolerance(self, name: str, params: dict[str, Any], cache: str) -> tuple[float, float]:
        """Return the error allowed of an op's results, relative to |result| + the second number. cache: the dtype of its caches."""
        del cache
        return TOLERANCE_INT8 if params.get("products") == "int8" else TOLERANCE[name]


# ---- arrays --------------------------------------------------------------------------------------------------------


def guarded(shape: tuple[int, ...], fill: float = np.nan, kind: str = "F32") -> np.ndarray:
    """A float32 array (or int32, of -1) inside guard bytes; `check_guard` looks at them."""
    raw = np.full(int(np.prod(shape)) * 4 + 2 * GUARD, 0xA5, np.uint8)
    a = raw[GUARD:-GUARD].view(dtype(kind).numpy).reshape(shape)
    a[...] = fill if kind == "F32" else -1
    return a


def check_guard(a: np.ndarray) -> None:
    raw = a
    while raw.base is not None and isinstance(raw.base, np.ndarray):
        raw = raw.base
    assert (raw[:GUARD] == 0xA5).all() and (raw[-GUARD:] == 0xA5).all(), "wrote outside the output"


def rng_of(name: Any) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(name).encode()))


CACHES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def in_blocks(c: Value) -> bool:
    return isinstance(c, Block) and dtype(c.kind).block > 1 and c.kind not in BY_CHANNEL


def rounded(q: np.ndarray, scale: float) -> np.ndarray:
    """Queries as attention over keys in blocks takes them: scaled, mixed, codes of 8 bits times one d a head; turned back."""
    x = mixed(q.astype(np.float32) * np.float32(scale))
    d = np.abs(x).max(axis=-1, keepdims=True, initial=0) / np.float32(127)
    codes = np.rint(x * np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0))
    return mixed(codes.astype(np.float64) * d) / scale


def q2_1(x: np.ndarray) -> np.ndarray:
    """Blocks of Q2_1 of float32 x [..., 32], uint8 [..., 12], bit for bit as csrc/cpu/cells.h searches for them."""
    f = np.float32

    def summed(a: np.ndarray) -> np.ndarray:                 # 32 to 1, in the kernels' order
        a = a[..., :16] + a[..., 16:]
        for n in (8, 4, 2, 1):
            a = a[..., :n] + a[..., n:]
        return a

    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    middle, mean = (low + high) * f(0.5), summed(x) * f(1 / 32)
    best, found = np.full_like(low, np.inf), np.zeros((*x.shape[:-1], 12), np.uint8)
    for share in (0.5, 0.375):
        reach = (high - low) * f(share)
        m, d, active = middle - reach, reach * (f(2) / f(3)), np.ones(low.shape, bool)
        for _ in range(3):
            dh, mh = d.astype(np.float16).astype(f), m.astype(np.float16).astype(f)
            q = np.floor(np.clip((x - mh) * np.divide(f(1), dh, out=np.zeros_like(dh), where=dh != 0) + f(0.5), 0, 3))
            off = q * dh + mh - x
            error = summed(off * off)
            better = active & (error < best)
            best = np.where(better, error, best)
            words = (q.astype(np.uint32).reshape(*x.shape[:-1], 2, 16) << (2 * np.arange(16, dtype=np.uint32))).sum(-1, dtype=np.uint32)
            block = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in (np.concatenate([dh, mh], -1).astype(np.float16), words)], -1)
            found = np.where(better, block, found)
            p = q - summed(q) * f(1 / 32)
            spread = summed(p * p)
            active &= spread > 0
            d = np.divide(summed(p * (x - mean)), spread, out=np.zeros_like(d), where=spread > 0)
            m = mean - d * summed(q) * f(1 / 32)
    return found


def channels_of(cells: np.ndarray) -> np.ndarray:
    """Numbers [g, s, e] as a cache by channel has them: [g, s / 32, e, 32]; and back, what such a one has as [g, s, e]."""
    g, s, e = cells.shape
    return cells.reshape(g, s // GROUP, GROUP, e).swapaxes(2, 3)


def stored(x: np.ndarray, kind: str) -> np.ndarray | Block:
    """x as a cache of this dtype holds it: mixed where it is in blocks, gguf-py's rounding; for Q2_1 that of `q2_1`."""
    if kind in BY_CHANNEL:
        blocks = channels_of(np.ascontiguousarray(x, np.float32))
        raw = q2_1(blocks) if kind == "Q2_1_CHANNELS" else gguf.quants.quantize(blocks, gguf.GGMLQuantizationType.Q4_1).view(np.uint8)
        return Block(raw.reshape(*x.shape[:-1], -1, dtype(kind).nbytes), kind)
    if kind == "Q2_1":
        return Block(q2_1(mixed(np.ascontiguousarray(x, np.float32)).reshape(*x.shape[:-1], -1, 32)), kind)
    if dtype(kind).numpy in (np.float32, np.float16):
        return x.astype(dtype(kind).numpy)
    x = np.ascontiguousarray(x, np.float32)
    raw = gguf.quants.quantize(mixed(x) if dtype(kind).block > 1 else x, gguf.GGMLQuantizationType[kind])
    return Block(raw.view(np.uint8).reshape(*x.shape[:-1], -1, dtype(kind).nbytes), kind)


def elements(c: np.ndarray | Block) -> np.ndarray:
    """What stands in a cache, as float32."""
    if not isinstance(c, Block):
        return c
    if c.kind in BY_CHANNEL:
        g, s, e = c.shape
        plain = elements(Block(np.ascontiguousarray(c.raw).reshape(g, s // GROUP * e, 1, -1), BY_CHANNEL[c.kind]))
        return plain.reshape(g, s // GROUP, e, GROUP).swapaxes(2, 3).reshape(g, s, e)
    if c.kind == "Q2_1":
        raw = np.ascontiguousarray(c.raw)
        d, m = np.moveaxis(np.ascontiguousarray(raw[..., :4]).view(np.float16).astype(np.float32), -1, 0)[..., None]
        words = np.ascontiguousarray(raw[..., 4:]).view(np.uint32)[..., None]
        codes = (words >> (2 * np.arange(16, dtype=np.uint32)) & 3).reshape(*raw.shape[:-1], 32)
        return (codes.astype(np.float32) * d + m).reshape(c.shape)
    raw = np.ascontiguousarray(c.raw).reshape(*c.raw.shape[:-2], -1)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[c.kind]).reshape(c.shape)


def loaded(c: np.ndarray | Block) -> np.ndarray:
    """The keys or values that a cache stands for."""
    return mixed(elements(c).astype(np.float64)) if in_blocks(c) else elements(c)


def bits(a: np.ndarray | Block) -> bytes:
    return (a.raw if isinstance(a, Block) else a).tobytes()


def close(got: np.ndarray, want: np.ndarray, rel: float, floor: float | np.ndarray = 0.0, what: str = "") -> None:
    """|got - want| <= rel * (|want| + floor), element by element; NaNs must agree."""
    assert got.shape == want.shape
    if got.size == 0:
        return
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(got.astype(np.float64) - want)
        right = (error <= rel * (np.abs(want) + floor)) | (got == want.astype(np.float32))
    bad = ~right & ~(np.isnan(got) & np.isnan(want))
    if bad.any():
        worst = np.unravel_index(np.argmax(np.where(bad, np.nan_to_num(error, nan=np.inf), -1)), error.shape)
        wrong = f"{bad.sum()} of {bad.size} wrong; worst at {worst}: {got[worst]!r}, not {want[worst]!r}"
        raise AssertionError(f"{what}: {wrong}")


def strided_copy(rng: np.random.Generator, a: np.ndarray) -> np.ndarray:
    """The same values behind other strides: a random order of axes in memory, and gaps."""
    order = rng.permutation(a.ndim)
    padded = np.full([a.shape[i] * 2 + 1 for i in order], np.nan, a.dtype)
    pick = lambda n: np.s_[1 : 2 * n + 1 : 2] if rng.random() < 0.5 else np.s_[:n]  # noqa: E731
    view = padded[tuple(pick(a.shape[i]) for i in order)]
    view = view.transpose(np.argsort(order))
    view[...] = a
    return view


def moved(rng: np.random.Generator, c: np.ndarray | Block) -> np.ndarray | Block:
    """A cache behind other strides; blocks stay side by side."""
    if not isinstance(c, Block):
        return strided_copy(rng, c)
    g, s, blocks, nbytes = c.raw.shape
    whole = np.full((s + 1, 2 * g, blocks * nbytes + int(rng.integers(0, 9))), 0xFF, np.uint8)
    view = np.lib.stride_tricks.as_strided(whole, c.raw.shape, (2 * whole.strides[1], whole.strides[0], nbytes, 1))
    view[...] = c.raw
    return Block(view, c.kind)


# ---- arguments from a declared case --------------------------------------------------------------------------------

SUMMING = ("key_sums", "attention_sums")
INTEGERS = {  # value range of I32 arguments by (op, argument); `case` gives the shapes
    ("rope_table", "positions"): lambda rng, s, shapes: rng.integers(0, 100_000, s),
    ("temperature", "positions"): lambda rng, s, shapes: rng.integers(-2, 100_000, s),
    ("rope_table", "axis"): lambda rng, s, shapes: rng.integers(0, shapes["positions"][0], s),
    ("cache_append", "cells"): lambda rng, s, shapes: rng.permutation(shapes["cache"][1])[: s[0]],
    ("rope_append", "cells"): lambda rng, s, shapes: rng.permutation(shapes["k_cache"][1])[: s[0]],
    ("attention", "lo"): lambda rng, s, shapes: rng.integers(0, shapes["k"][1] // 2, s),
    ("attention", "hi"): lambda rng, s, shapes: rng.integers(shapes["k"][1] // 2, shapes["k"][1] + 1, s),
    ("cache_groups", "source"): lambda rng, s, shapes: 32 * rng.integers(0, shapes["k_full"][1] // 32, s),
    ("cache_groups", "target"): lambda rng, s, shapes: 32 * rng.permutation(shapes["k"][1] // 32)[: s[0]],
    ("mean_rows", "lo"): lambda rng, s, shapes: rng.integers(0, shapes["x"][0] // 2 + 1, s),
    ("mean_rows", "hi"): lambda rng, s, shapes: rng.integers(shapes["x"][0] // 2, shapes["x"][0] + 1, s),
    ("attention", "seq"): lambda rng, s, shapes: rng.integers(0, shapes["cells"][0], s),
    ("attention", "at"): lambda rng, s, shapes: rng.integers(0, shapes["k"][1], s),
    ("attention", "cells"): lambda rng, s, shapes: np.stack(
        [rng.permutation(shapes["k"][1])[: s[1]] for _ in range(s[0])]),
    **{(name, "lo"): lambda rng, s, shapes: rng.integers(0, shapes["cells"][1] // 2, s) for name in SUMMING},
    **{(name, "hi"): lambda rng, s, shapes: rng.integers(shapes["cells"][1] // 2, shapes["cells"][1] + 1, s) for name in SUMMING},
    **{(name, "seq"): lambda rng, s, shapes: rng.integers(0, shapes["cells"][0], s) for name in SUMMING},
    **{(name, "cells"): lambda rng, s, shapes: np.stack([rng.permutation(shapes["k"][1])[: s[1]] for _ in range(s[0])]) for name in SUMMING},
    **{(name, "before"): lambda rng, s, shapes: np.where(rng.random(s) < 0.3, rng.integers(-1, shapes["state"][1] // 2, s),
                                                         np.where(np.arange(s[0]) == 0, -1, -2))
       for name in ("causal_conv", "gated_delta_rule")},
    **{(name, "after"): lambda rng, s, shapes: np.where(
        (np.arange(s[0]) % 4 == 3) & (np.arange(s[0]) < 2 * shapes["state"][1]), shapes["state"][1] // 2 + np.arange(s[0]) // 4, -1)
       for name in ("causal_conv", "gated_delta_rule")},
}
FLOATS = {  # and of floats that are not any number
    ("gated_delta_rule", "k"): lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6),
    ("gated_delta_rule", "log_decay"): lambda x: -np.abs(x),
    ("merge_attention", "stats"): lambda x: np.stack([x[..., 0], np.maximum(0, x[..., 1])], -1),
    ("key_sums", "stats"): lambda x: np.abs(x) + [3, 1],
    **{(name, "weights"): lambda x: np.where(x[:, :1] > 0, x, 0) for name in SUMMING},
    ("gated_delta_rule", "beta"): lambda x: 1 / (1 + np.exp(-x)),
}


def make_inputs(op: Op, case: Case, rng: np.random.Generator, cache: str = "F32") -> list[Value]:
    """Random arguments: normal floats, integers in range, caches in the dtype `cache`."""
    values: list[Value] = []
    for name, spec in op.args.items():
        shape = case.shapes.get(name)
        if shape is None:
            values.append(None)
        elif spec.many:
            values.append([FLOATS.get((op.name, name), lambda x: x)(rng.standard_normal(s)).astype(np.float32) for s in shape])
        elif spec.kind == "I32":
            values.append(INTEGERS[op.name, name](rng, shape, case.shapes).astype(np.int32))
        elif spec.kind == "Cache":
            values.append(stored(rng.standard_normal(shape), "F16" if name.endswith("_full") and dtype(cache).block > 1 else cache))
        elif name == "inv_freq":
            values.append((10_000.0 ** -(np.arange(shape[0]) / max(1, shape[0]))).astype(np.float32))
        else:
            x = rng.standard_normal(shape)
            values.append(FLOATS.get((op.name, name), lambda x: x)(x).astype(np.float32))
    return values


def reference(op: Op, inputs: Sequence[Value], params: dict[str, Any]) -> list[np.ndarray]:
    """The declared function in float64, on copies."""
    wide = lambda a: a.astype(np.float64) if a.dtype != np.int32 else a.copy()  # noqa: E731
    if op.name in ("attention", "attention_sums") and len(inputs[0]) == 0:
        return [np.zeros((0, inputs[0].shape[1] * inputs[2].shape[2])), *(inputs[8:9] if op.name == "attention_sums" else [])]
    at_k = list(op.args).index("k") if "k" in op.args else 0             # queries stand before it
    args = [[wide(p) for p in v] if isinstance(v, list) else None if v is None else wide(loaded(v)) for v in inputs]
    if op.name in ("attention", *SUMMING) and in_blocks(inputs[at_k]) and len(inputs[at_k - 1]):
        args[at_k - 1] = rounded(inputs[at_k - 1], params["scale"])
    with np.errstate(all="ignore"):
        out = op.fn(*args, **{p.name: params.get(p.name, p.default) for p in op.params.values()})
    return list(out) if isinstance(out, tuple) else [out]


def run(kernels: Runner, op: Op, inputs: Sequence[Value], params: dict[str, Any], shapes: Sequence[tuple[int, ...]],
        threads: int = 1, inplace: bool = False) -> list[Value]:
    """Run on copies; outputs are NaN before and guarded. Caches are changed in place and returned."""
    copies = [copy_of(v) for v in inputs]
    outputs: list[Value] = []
    for i, (spec, shape) in enumerate(zip(op.results, shapes)):
        if spec.kind == "Same":
            outputs.append(copies[list(op.args).index(spec.axes[0])])
        elif i == 0 and inplace:
            at = list(op.args).index(op.inplace)
            copies[at] = guarded(shape, 0)
            copies[at][...] = inputs[at]
            outputs.append(copies[at])
        else:
            outputs.append(guarded(shape, kind=spec.kind))
    kernels.call(op.name, copies, outputs, params, threads)
    for spec, out in zip(op.results, outputs):
        if spec.kind != "Same":
            check_guard(out)
    return outputs


def copy_of(v: Value) -> Value:
    """A copy that keeps strides."""
    if v is None:
        return None
    if isinstance(v, list):
        return [copy_of(a) for a in v]
    if isinstance(v, Block):
        return Block(v.raw.copy(), v.kind)
    base = v
    while isinstance(base.base, np.ndarray):
        base = base.base
    if v.flags.c_contiguous:
        return v.copy()
    whole = base.copy(order="K")
    offset = v.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    return np.ndarray(v.shape, v.dtype, whole, offset, v.strides)


# Error allowed, relative to |result| + floor: a few units in the last place of float32 (1.2e-7), of the result or of
# the largest intermediate where there is cancellation.
TOLERANCE = {
    "binary": (1e-7, 0.0), "unary": (6e-7, 0.5), "scale": (2e-7, 1.0), "softcap": (6e-7, 0.0), "contiguous": (0.0, 0.0),
    "concat": (0.0, 0.0), "rms_norm": (8e-7, 1.0), "layer_norm": (8e-7, 1.0), "softmax": (2e-6, 0.0),
    "reduce": (1e-6, 10.0), "mean_rows": (1e-6, 10.0),
    "rope_table": (1.2e-7, 0.0), "temperature": (1.2e-7, 0.0), "rope": (3e-7, 2.0), "cache_append": (0.0, 0.0), "rope_append": (8e-7, 2.0),
    "matmul": (5e-7, 0.0), "attention": (2e-6, 1.0), "key_sums": (2e-6, 1.0), "attention_sums": (2e-6, 1.0), "cache_groups": (0.0, 0.0), "merge_attention": (1e-6, 1.0),
    "top_experts": (6e-7, 0.1), "top_k": (2e-6, 0.0), "sum_experts": (5e-7, 3.0),
    "causal_conv": (5e-7, 3.0), "gated_delta_rule": (2e-6, 8.0),
    "conv2d": (2e-6, 20.0), "pool2d": (4e-7, 1.0), "adaptive_pool2d": (4e-7, 1.0), "resize2d": (1e-6, 2.0), "group_norm": (2e-6, 1.0),
    "l2_norm": (6e-7, 0.0),
}
# Attention by bytes: a float that lies near the middle of two codes may become either.
TOLERANCE_INT8 = (5e-3, 1.0)
# Rounding of a cache, relative to its largest element. Q4_0 has 8 steps on one side and 7 on the other.
STEP = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127, "Q4_0": 1.001 / 8, "Q4_1": 1.001 / 15,
        "Q4_1_CHANNELS": 1.001 / 15, "Q2_1_CHANNELS": 1.001 / 3, "Q2_1": 1.001 / 3}


def terms(op: Op, inputs: Sequence[Value], params: dict[str, Any], want: np.ndarray) -> np.ndarray:
    """What rounding is relative to: the result, or for sums of keys what it would be if nothing cancelled."""
    if op.name not in SUMMING:
        return want
    at = [list(op.args).index(name) for name in ("sums", "weights")]
    return reference(op, [np.abs(v) if i in at else v for i, v in enumerate(inputs)], params)[-1]


def check(kernels: Runner, op: Op, inputs: list[Value], params: dict[str, Any], cache: str = "F32") -> list[Value]:
    """Compare with the reference, for 1 to 3 threads, in place and not."""
    want = reference(op, inputs, params)
    shapes = [w.shape for w in want]
    got = run(kernels, op, inputs, params, shapes)
    rel, floor = kernels.tolerance(op.name, params, cache)
    if op.name == "matmul":
        floor = 8 * np.sqrt(inputs[0].shape[-1])         # the largest of the partial sums of k normal products
    for spec, g, w in zip(op.results, got, want):
        if spec.kind == "Same":
            kind = g.kind if isinstance(g, Block) else {"float32": "F32", "float16": "F16"}[g.dtype.name]
            step, w = STEP[kind] * 1.01 + rel, mixed(w) if in_blocks(g) else w
            close(elements(g).astype(np.float32), w, step, np.abs(terms(op, inputs, params, w)).max(initial=0.0), f"{op.name} {cache}")
        else:
            close(g, w, rel, floor, op.name)
    for threads in (2, 3):
        again = run(kernels, op, inputs, params, shapes, threads)
        assert list(map(bits, again)) == list(map(bits, got)), f"{op.name}: {threads} threads give other bits"
    first = inputs[list(op.args).index(op.inplace)] if op.inplace else None
    if first is not None and first.shape == shapes[0] and first.flags.c_contiguous:
        again = run(kernels, op, inputs, params, shapes, 2, inplace=True)
        assert list(map(bits, again)) == list(map(bits, got)), f"{op.name}: in place gives other bits"
    return got
