"""Every kernel alone: its time, its share of what the machine can do, and whether its result is right.

A job is an op with shapes: the op's own cases, and the products, attentions and norms of real models. It is timed by the program
runner's own clock, on one copy of its arguments again and again (hot), and walking through so many copies that together they
exceed the last-level cache twice (cold).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyengine import ops
from pyengine.native.blocks import ensure_codebooks
from pyengine.dtype import dtype as dtype_of, GROUP
from pyengine.errors import GraphError
from pyengine.graph.op import Case, Op, REGISTRY
from pyengine.ops import recurrent
from pyengine.ops.rope import mixed
from pyengine.graph.tensor import make_leaf, Tensor

from . import limits
from .blocks import Blocks, random_blocks
from .machine import last_level_cache
from .stats import summary
from .work import listed, operations as declared, picked_by, seen, Sized, weights_of

REPEAT = 7                                                                     # samples of one job
SAMPLE_SECONDS = 0.01                                                          # each at least
MAX_COPIES, MAX_BYTES = 512, 4 << 30                                         # of a job; of a mixture a copy reads few of its bytes
CHECKED_ROWS = 64                                                              # of a large product: the reference is slow

FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
           "F16", "BF16", "F32")
# Largest squared error / squared result. Products with blocks round the activations to 8 bits; BF16 may round them to 8 bits too.
TOLERANCE = {"F32": 1e-10, "F16": 1e-6, "BF16": 1e-4, "I32": 0.0}
TOLERANCE_BLOCKS = 2e-4
SUMMING = (ops.key_sums, ops.attention_sums)
ATTENDING = (ops.attention, *SUMMING)                                          # whose queries see keys lo .. hi - 1


@dataclass(frozen=True)
class Job:
    """An op with shapes. `window`: attention sees at most this many keys."""

    op: Op
    case: Case
    label: str
    window: int | None = None

    @property
    def name(self) -> str:
        return f"{self.op.name} {self.label}"


# ---- which jobs ---------------------------------------------------------------------------------------------------------

# Layers of three small models: (what, arguments' outputs, inputs, formats, options). Gemma 3 270M, SmolLM2 135M, Qwen2.5 0.5B.
PRODUCTS = (
    ("gemma qkv", (1024, 256, 256), 640, ("Q5_0", "Q5_0", "Q8_0"), {}),
    ("gemma out", (640,), 1024, ("Q4_K",), {}),
    ("gemma gate-up", (2048, 2048), 640, ("Q5_0", "Q5_0"), {"glu": "gelu_tanh"}),
    ("gemma down", (640,), 2048, ("Q6_K",), {}),
    ("gemma head", (262144,), 640, ("Q8_0",), {}),
    ("smollm2 qkv", (576, 192, 192), 576, ("Q4_1", "Q4_1", "Q4_1"), {"norm": True}),
    ("smollm2 out", (576,), 576, ("Q4_1",), {"residual": True}),
    ("smollm2 gate-up", (1536, 1536), 576, ("Q4_1", "Q4_1"), {"glu": "silu", "norm": True}),
    ("smollm2 down", (576,), 1536, ("Q4_1",), {"residual": True}),
    ("smollm2 head", (49152,), 576, ("Q8_0",), {"norm": True}),
    ("qwen qkv", (896, 128, 128), 896, ("Q5_0", "Q5_0", "Q8_0"), {"norm": True, "bias": True}),
    ("qwen out", (896,), 896, ("Q5_0",), {"residual": True}),
    ("qwen gate-up", (4864, 4864), 896, ("Q5_0", "Q5_0"), {"glu": "silu", "norm": True}),
    ("qwen down", (896,), 4864, ("Q4_K",), {"residual": True}),
    ("qwen head", (151936,), 896, ("Q8_0",), {"norm": True}),
)
ROWS = (1, 4, 16, 512)
# Mixtures: (what, experts, experts of a row, width, units of an expert): Llama 4's and Qwen's proportions, of moderate size.
MIXTURES = (("16 top-1", 16, 1, 1024, 2048), ("64 top-4", 64, 4, 1024, 512))
ATTENTIONS = (("gemma", 4, 1, 256, 512), ("smollm2", 9, 3, 64, None), ("qwen", 14, 2, 64, None))   # heads, kv heads, width, window

# Convolutions of VGG16 and of DaViT (Florence-2): side of the picture, channels, outputs, side of the window, stride, padding, groups.
CONVOLUTIONS = (
    ("vgg 1.2", 224, 64, 64, 3, 1, 1, 1), ("vgg 3.2", 56, 256, 256, 3, 1, 1, 1), ("vgg 5", 14, 512, 512, 3, 1, 1, 1),
    ("davit 0", 768, 3, 128, 7, 4, 3, 1), ("davit 2", 96, 256, 512, 3, 2, 1, 1), ("davit depthwise", 48, 512, 512, 3, 1, 1, 512),
)


def convolution_jobs() -> Iterator[Job]:
    """Yield each convolution with a weight of floats, of halves, and where windows are whole blocks of Q8_0."""
    for what, side, c, o, k, stride, padding, groups in CONVOLUTIONS:
        columns = k * k * c // groups
        for kind in ("F32", "F16", "Q8_0"):
            if columns % dtype_of(kind).block == 0:
                shapes = {"x": (1, side, side, c), "weight": (o, columns), "bias": (o,)}
                params = {"kernel": (k,), "stride": (stride,), "padding": (padding,), "groups": groups}
                yield Job(ops.conv2d, Case(shapes, {"weight": kind}, params), f"{what} {kind} {side}x{side}x{c} {k}x{k} {o}")


def linear_job(what: str, n: Sequence[int], k: int, formats: Sequence[str], m: int, options: dict[str, Any]) -> Job:
    shapes: dict[str, Any] = {"x": (m, k), "w": [(rows, k) for rows in n]}
    params: dict[str, Any] = {"glu": options.get("glu", "none")}
    if options.get("norm"):
        shapes["norm"], params["norm_eps"] = (k,), 1e-6
    if options.get("bias"):
        shapes["bias"] = [(rows,) for rows in n]
    if options.get("residual"):
        shapes["residual"] = (m, n[0])
    label = f"{what} {'+'.join(dict.fromkeys(formats))} {'+'.join(map(str, n))}x{k} m={m}"
    return Job(ops.linear, Case(shapes, {"w": list(formats)}, params), label)


def jobs() -> Iterator[Job]:
    """Yield all jobs: the ops' own cases, then layers of real models, then one shape in every format."""
    for op in REGISTRY.values():
        for case in op.cases if not op.view else ():
            flat = [s for v in case.shapes.values() if v is not None for s in (v if isinstance(v, list) else [v])]
            if all(all(s) for s in flat):                                      # nothing to time in an empty one
                shapes = " ".join("+".join("x".join(map(str, s)) for s in (v if isinstance(v, list) else [v]))
                                  for v in case.shapes.values() if v is not None)
                params = " ".join(f"{k}={v}" for k, v in case.params.items())
                yield Job(op, case, f"case {shapes} {params}".strip())
    for what, n, k, formats, options in PRODUCTS:
        for m in ROWS if sum(n) < 40000 else (1, 4):                           # a head sees the rows whose logits are wanted
            yield linear_job(what, n, k, formats, m, options)
    for name in FORMATS:
        for m in ROWS:
            yield linear_job("format", (1024,), 4096, (name,), m, {})
    for what, experts, used, d, units in MIXTURES:
        for m in ROWS:
            for part, n, k, rows, glu in (("gate-up", units, d, m, "silu"), ("down", d, units, m * used, "none")):
                shapes = {"x": (rows, k), "w": [(experts, n, k)] * (1 + (glu != "none")), "chosen": (m, used)}
                case = Case(shapes, {"w": ["Q4_K"] * len(shapes["w"])}, {"glu": glu})
                yield Job(ops.expert_linear, case, f"{what} {part} Q4_K {n}x{k} m={m}")
            yield Job(ops.top_experts, Case({"scores": (m, experts)}, {}, {"n_used": used, "gate": "softmax"}), f"{what} m={m}")
            yield Job(ops.sum_experts, Case({"y": (m * used, d), "gates": (m, used)}, {}, {"n_used": used}), f"{what} {d} m={m}")
    for model, heads, kv_heads, width, window in ATTENTIONS:
        for kind in ("F16", "Q8_0"):
            for m, cells in ((1, 512), (1, 4096), (512, 512), (512, 4096)):
                kv = (kv_heads, cells, width)
                shapes = {"q": (m, heads, width), "k": kv, "v": kv, "lo": (m,), "hi": (m,), "cells": (1, cells), "seq": (m,)}
                for w in dict.fromkeys((None, window)):
                    label = f"{model} {heads}/{kv_heads}x{width} {kind} keys={cells}{f' window={w}' if w else ''} m={m}"
                    yield Job(ops.attention, Case(shapes, {"k": kind, "v": kind}, {"scale": width**-0.5}), label, w)
    yield from convolution_jobs()
    for m in (1, 512):
        for d in (576, 640, 896):
            yield Job(ops.rms_norm, Case({"x": (m, d), "weight": (d,)}, {}, {"eps": 1e-6}), f"real {m}x{d}")
        for model, h, g, e, _ in ATTENTIONS:
            shapes = {"q": (m, h, e), "k": (m, g, e), "v": (m, g, e), "table": (m, e), "cells": (m,), "k_cache": (g, 1024, e),
                      "v_cache": (g, 1024, e)}
            yield Job(ops.rope_append, Case(shapes, {"k_cache": "F16", "v_cache": "F16"}, {}), f"{model} {h}/{g}x{e} F16 m={m}")
        yield Job(ops.rows, Case({"table": (151936, 896), "ids": (m,)}, {"table": "Q5_0"}, {}), f"qwen Q5_0 m={m}")


# ---- arguments ----------------------------------------------------------------------------------------------------------


def integers(job: Job, name: str, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Make numbers that suit an integer argument: cells within the cache, queries after their keys ..."""
    shapes = job.case.shapes
    if name == "cells" and job.op in ATTENDING:
        values = np.stack([rng.permutation(shapes["k"][1])[: shape[1]] for _ in range(shape[0])])
    elif name == "cells":
        values = rng.permutation(shapes["cache" if "cache" in shapes else "k_cache"][1])[: shape[0]]
    elif name == "chosen":
        values = np.stack([rng.permutation(shapes["w"][0][0])[: shape[1]] for _ in range(shape[0])])
    elif name in ("lo", "hi", "at"):
        n = shapes["x"][0] if job.op is ops.mean_rows else shapes["cells"][1] if job.op in SUMMING else shapes["k"][1]
        hi = np.maximum(n - shape[0] + np.arange(shape[0]) + 1, 1)
        values = hi if name == "hi" else hi - 1 if name == "at" else np.maximum(hi - (job.window or n), 0)
    elif name in ("source", "target"):                                         # where groups begin
        values = GROUP * rng.permutation(shapes["k_full" if name == "source" else "k"][1] // GROUP)[: shape[0]]
    elif name == "before":                                                     # one conversation, from a state that was left
        values = np.where(np.arange(shape[0]) == 0, 0, recurrent.FOLLOWS)
    elif name == "after":
        values = np.where(np.arange(shape[0]) == shape[0] - 1, 1, -1)
    else:
        ends = {"ids": lambda: shapes["table"][0], "seq": lambda: shapes["cells"][0], "axis": lambda: shapes["positions"][0],
                "positions": lambda: 4096}
        values = rng.integers(0, ends[name](), shape)
    return values.astype(np.int32)


# of floats that are not any number: keys of length 1, which keep a state bounded; a query's largest logit and a sum of at least 1
FLOATS: dict[tuple[Any, str], Callable[[np.ndarray], np.ndarray]] = {
    (ops.gated_delta_rule, "k"): lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6),
    (ops.gated_delta_rule, "log_decay"): lambda x: -np.abs(x),
    (ops.gated_delta_rule, "beta"): lambda x: 1 / (1 + np.exp(-x)),
    (ops.key_sums, "stats"): lambda x: np.abs(x) + [3, 1],
    (ops.merge_attention, "stats"): lambda x: np.abs(x) + [0, 1]}


def changed_in_place(op: Any, name: str) -> bool:
    """Say whether an argument is a state: a cache, or what the op gives back changed."""
    return op.args[name].kind == "Cache" or any(r.kind == "Same" and r.axes[0] == name for r in op.results)


@dataclass
class Copy:
    """Arguments of one copy of a job: what the program reads, by argument: an array, Blocks, None, or a list of them."""

    job: Job
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, job: Job, rng: np.random.Generator) -> Copy:
        copy = cls(job)
        for name, spec in job.op.args.items():
            shape = job.case.shapes.get(name)
            kinds = job.case.dtypes.get(name, "I32" if spec.kind == "I32" else "F32")
            if shape is None:
                copy.values[name] = None
                continue
            many = shape if isinstance(shape, list) else [shape]
            kinds = kinds if isinstance(kinds, list) else [kinds] * len(many)
            suited = FLOATS.get((job.op, name), lambda x: x)
            made = [integers(job, name, s, rng) if kind == "I32" else
                    suited(rng.standard_normal(s, np.float32)).astype(np.float32) if kind == "F32" else
                    random_blocks(dtype_of(kind), s, rng) for s, kind in zip(many, kinds)]
            copy.values[name] = made if isinstance(shape, list) else made[0]
        return copy

    def bind(self, i: int) -> tuple[tuple[Tensor, ...], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Bind copy number i in a graph: return the op's results, and arrays for inputs and states by name."""
        inputs: dict[str, np.ndarray] = {}
        states: dict[str, np.ndarray] = {}

        def leaf(name: str, shape: Sequence[int], value: Any, kind: str) -> Tensor:
            dtype = value.dtype if isinstance(value, Blocks) else dtype_of({"i": "I32", "f": "F32"}[value.dtype.kind])
            if kind == "Cache":
                states[name] = value.raw if isinstance(value, Blocks) else value
                return make_leaf("state", name, shape, dtype)
            if isinstance(value, Blocks) or kind == "Weight":
                return make_leaf("constant", name, shape, dtype, value.copy() if isinstance(value, np.ndarray) else value)
            inputs[name] = value
            return make_leaf("input", name, shape, dtype)

        args: dict[str, Any] = {}
        for name, spec in self.job.op.args.items():
            value, shape = self.values[name], self.job.case.shapes.get(name)
            kind = "Cache" if changed_in_place(self.job.op, name) else spec.kind
            if isinstance(value, list):
                args[name] = [leaf(f"{name}{j}.{i}", s, v, kind) for j, (s, v) in enumerate(zip(shape, value))]
            else:
                args[name] = None if value is None else leaf(f"{name}.{i}", shape, value, kind)
        result = self.job.op(**args, **self.job.case.params)
        return result if isinstance(result, tuple) else (result,), inputs, states


def _flat(values: dict[str, Any]) -> list[Any]:
    return [a for v in values.values() for a in listed(v)]


def reads(job: Job, copy: Copy) -> dict[str, int]:
    """Count the bytes of each argument that one run must read: all of it, of caches and tables the used part."""
    out: dict[str, int] = {}
    for name, value in copy.values.items():
        spec = job.op.args[name]
        by, shape = picked_by(job.op, name), job.case.shapes.get(name)
        out[name] = 0
        for a in listed(value):
            nbytes = a.raw.nbytes if isinstance(a, Blocks) else a.nbytes
            if job.op in ATTENDING and spec.kind == "Cache":
                span = int(copy.values["hi"].max() - copy.values["lo"].min())
                nbytes = nbytes * span // shape[1]
            elif by:
                nbytes = nbytes * len(np.unique(copy.values[by])) // (shape[0] if isinstance(shape, list) else shape)[0]
            elif spec.kind == "Cache":
                used = GROUP * len(copy.values["target"]) if job.op is ops.cache_groups else len(copy.values["cells"])
                nbytes = nbytes * used // shape[1]
            out[name] += int(nbytes)
    return out


def traffic(job: Job, copy: Copy) -> int:
    """Count the bytes that one run must move: what it must read, and every result written."""
    results, _, _ = copy.bind(0)
    written = sum(t.nbytes_max for t, spec in zip(results, result_specs(job, len(results))) if spec.kind != "Same")
    return sum(reads(job, copy).values()) + written


def result_specs(job: Job, n: int) -> Sequence[Any]:
    """Return the declarations of an op's n results."""
    return job.op.results * n if job.op.results[0].many else job.op.results[:n]


def operations(job: Job, copy: Copy) -> float | None:
    """Count operations by the op's own declaration; of attention only those on keys that are seen. None where it has none."""
    if job.op.flops is None:
        return None
    shapes = {n: job.case.shapes.get(n) for n in job.op.args}
    args = {n: [Sized(part) for part in s] if isinstance(s, list) else None if s is None else Sized(s) for n, s in shapes.items()}
    total = declared(job.op, args, {p.name: p.default for p in job.op.params.values()} | job.case.params)
    return total * seen(copy.values["lo"], copy.values["hi"], shapes["k"][1]) if job.op in ATTENDING else total


# ---- the reference ------------------------------------------------------------------------------------------------------


def expected(job: Job, copy: Copy) -> tuple[Any, Any]:
    """Compute the reference in float64 on the same values, and its part of each result (an index): large ones are sampled."""
    wide = lambda a: a.values() if isinstance(a, Blocks) else a.astype(np.float64) if a.dtype.kind == "f" else a  # noqa: E731
    values, part = dict(copy.values), np.s_[:]
    if job.op is ops.linear and max(s[0] for s in job.case.shapes["w"]) > CHECKED_ROWS:
        pick = [np.linspace(0, s[0] - 1, CHECKED_ROWS).astype(int) for s in job.case.shapes["w"]]
        values["w"] = [w.values(p) if isinstance(w, Blocks) else w[p] for w, p in zip(values["w"], pick)]
        if values["bias"] is not None:
            values["bias"] = [b[p] for b, p in zip(values["bias"], pick)]
        if values["residual"] is not None:
            values["residual"] = values["residual"][:, pick[0]]
        part = [np.s_[:, p] for p in pick]
    elif job.op is ops.expert_linear:
        pick = np.linspace(0, len(values["chosen"]) - 1, 4).astype(int)
        own = len(values["x"]) != len(values["chosen"])                        # a row for each expert of a row
        used = values["chosen"].shape[1]
        pairs = (used * pick[:, None] + np.arange(used)).reshape(-1)
        kept, chosen = np.unique(values["chosen"][pick], return_inverse=True)
        values["x"], values["chosen"], part = values["x"][pairs if own else pick], chosen.reshape(len(pick), used), pairs
        _, n, k = job.case.shapes["w"][0]
        rows = (n * kept[:, None] + np.arange(n)).reshape(-1)                      # of their matrices
        values["w"] = [w.values(rows).reshape(-1, n, k) if isinstance(w, Blocks) else w[kept] for w in values["w"]]
    elif job.op is ops.attention:
        rows = np.unique(np.linspace(0, job.case.shapes["q"][0] - 1, 4).astype(int))
        for name in ("q", "lo", "hi", "seq", "at"):
            if values[name] is not None:
                values[name] = values[name][rows]
        part = rows
    elif job.op is ops.rows and isinstance(values["table"], Blocks):
        values["table"], values["ids"] = values["table"].values(values["ids"]), np.arange(len(values["ids"]))
    args = []
    for name in job.op.args:
        v = values[name]
        if isinstance(v, Blocks) and job.op.args[name].kind == "Cache":
            v = v.values().reshape(job.case.shapes[name])
            v = mixed(v) if values[name].dtype.block > 1 else v
        args.append([wide(a) for a in v] if isinstance(v, list) else None if v is None else wide(v))
    defaults = {p.name: p.default for p in job.op.params.values() if p.name not in job.case.params}
    result = job.op.fn(*args, **defaults, **job.case.params)
    return result, part


def error(got: Sequence[np.ndarray], want: Any, part: Any) -> float:
    """Return the largest normalised squared error of an op's results."""
    want = list(want) if isinstance(want, (tuple, list)) else [want]
    if len(got) != len(want):
        raise RuntimeError(f"{len(got)} results, but the reference has {len(want)}")
    worst = 0.0
    for i, (a, b) in enumerate(zip(got, want)):
        a = a[part[i] if isinstance(part, list) else part].astype(np.float64)
        if a.shape != b.shape:
            raise RuntimeError(f"result {i} has shape {a.shape}, but the reference {b.shape}")
        scale, difference = float(np.sum(np.square(b))), float(np.sum(np.square(a - b)))
        if not np.isfinite(difference):
            return float("inf")
        worst = max(worst, difference / scale if scale else difference)
    return worst


def tolerance(job: Job) -> float:
    """Return the largest error that a job's formats explain."""
    kinds = [k for v in job.case.dtypes.values() for k in (v if isinstance(v, list) else [v])] or ["F32"]
    if job.case.params.get("products") == "int8":            # rounded to bytes, as products with blocks are
        kinds.append("I8")
    return max(TOLERANCE.get(k, TOLERANCE_BLOCKS) for k in kinds)


def corner(t: Tensor) -> Tensor:
    """Return one element of a state that an op changes in place, to be a program's output where the op gives nothing else."""
    for axis in range(t.ndim):
        t = ops.slice(t, axis=axis, start=0, stop=1)
    return ops.contiguous(t)


# ---- timing -------------------------------------------------------------------------------------------------------------


class Timed:
    """A compiled program of `n` copies of a job."""

    def __init__(self, job: Job, copy: Copy, n: int, isa: str, n_threads: int):
        from pyengine.backends.base import check_kernels, Declared
        from pyengine.backends.cpu import kernels_of, Prepared

        outputs: list[Tensor] = []
        arrays: dict[str, np.ndarray] = {}
        states: dict[str, np.ndarray] = {}
        self.job, self.copy, self.n = job, copy, n
        for i in range(n):
            results, new_inputs, new_states = copy.bind(i)
            arrays |= new_inputs
            states |= new_states
            specs = result_specs(job, len(results))
            own = [t for t, spec in zip(results, specs) if spec.kind != "Same"] or [corner(results[0])]
            if i == 0:
                self.specs = specs
            # Inputs are outputs too: their memory must not be given to a later step, as they are set only once.
            outputs += own + [t for node in [results[0].node] for t in node.inputs if t.node.kind == "input"]
        prepared = Prepared(Declared(outputs), None, (), kernels_of(isa), isa, n_threads)
        check_kernels(prepared, isa, strict=True)                              # the NumPy reference is not what is timed
        self.program = prepared.load()
        for name, array in arrays.items():
            self.program.inputs[name].reshape(-1)[:] = array.reshape(-1)
        self.states = states
        self.begin()

    def begin(self) -> None:
        """Give the states the values that the job's copies have."""
        for name, array in self.states.items():
            raw = np.ascontiguousarray(array)
            ctypes.memmove(self.program.states[name].memory.ctypes.data, raw.ctypes.data, raw.nbytes)

    def results(self) -> list[np.ndarray]:
        """Run once from the beginning and return what copy 0 has computed: arrays of the program, and states as they are then."""
        self.begin()
        self.program.execute()
        own = iter(self.program.outputs)
        return [self._state(spec.axes[0]) if spec.kind == "Same" else next(own) for spec in self.specs]

    def _state(self, name: str) -> np.ndarray:
        raw = np.empty_like(self.states[f"{name}.0"])
        ctypes.memmove(raw.ctypes.data, self.program.states[f"{name}.0"].memory.ctypes.data, raw.nbytes)
        value = self.copy.values[name]
        values = Blocks(name, value.dtype, raw).values() if isinstance(value, Blocks) else raw
        return values.reshape(self.job.case.shapes[name])

    def run(self, times: int) -> float:
        """Run the program `times` times and return the mean seconds of one copy."""
        self.program.profile(True)
        for _ in range(times):
            self.program.execute()
        total = sum(s for node, s in self.program.seconds() if node.op is self.job.op)
        self.program.profile(False)
        return total / times / self.n

    def samples(self) -> list[float]:
        once = self.run(1)
        times = max(1, int(SAMPLE_SECONDS / max(once * self.n, 1e-7)))
        times = min(times, 20000)
        return [self.run(times) for _ in range(REPEAT)]


def measure(job: Job, isa: str, n_threads: int) -> list[dict[str, Any]]:
    """Measure a job hot and cold and check its result: one record each. Raises GraphError where there is no kernel for it."""
    copy = Copy.make(job, np.random.default_rng(0))
    ensure_codebooks(a.dtype for a in _flat(copy.values) if isinstance(a, Blocks))
    nbytes, count, cache = traffic(job, copy), operations(job, copy), last_level_cache()
    factors = [w for name in weights_of(job.op) for w in listed(copy.values[name])] if count else []
    blocks = any(isinstance(w, Blocks) and w.dtype.block > 1 for w in factors)
    n_cold = -(-2 * cache // nbytes)
    variants = [("hot", 1)] if nbytes < cache // 2 else []
    held = sum(a.raw.nbytes if isinstance(a, Blocks) else a.nbytes for a in _flat(copy.values))
    variants += [("cold", n_cold)] if n_cold <= MAX_COPIES and n_cold * held <= MAX_BYTES else []
    want = expected(job, copy)
    records = []
    for state, n in variants:
        timed = Timed(job, copy, n, isa, n_threads)
        seconds = summary(timed.samples())
        nmse = error(timed.results(), *want)
        records.append({
            "name": f"{job.name} {isa} t={n_threads} {state}", "op": job.op.name, "isa": isa, "cache": state, "seconds": seconds,
            "bytes": nbytes, "operations": count, "peak": "int8" if blocks else "fp32", "gbps": nbytes / seconds["median"] / 1e9,
            "gops": count / seconds["median"] / 1e9 if count else None, "nmse": nmse, "correct": bool(nmse <= tolerance(job)),
        })
    return records


def judge(record: dict[str, Any], bound: limits.Limits) -> dict[str, Any]:
    """Add what a record is of the limits: `limit` (the one that binds), `share`, and `score`, the same for each sample.

    A hot kernel is not bound by memory. One that declares no operations either has no share; its score is then its bytes/s as a
    part of the read bandwidth, which may exceed 1.
    """
    memory, compute = record["bytes"] / bound.read, (record["operations"] or 0.0) / getattr(bound, record["peak"])
    limit, ideal = (record["peak"], compute) if record["cache"] == "hot" or compute > memory else ("read", memory)
    seconds = record["seconds"]
    return {**record, "limit": limit if ideal else None, "share": ideal / seconds["median"] if ideal else None,
            "score": summary([(ideal or memory) / s for s in seconds["samples"]])}


def run(isas: Sequence[str], n_threads: int, only: str | None = None) -> dict[str, Any]:
    """Measure all jobs whose name matches `only` on each instruction set."""
    selected = [j for j in jobs() if not only or re.search(only, j.name)]
    results, bounds, missing = [], [], []
    for isa in isas:
        bound, records = limits.measure(isa, n_threads), []
        print(f"{isa}, {n_threads} threads: read {bound.read / 1e9:.1f} GB/s, int8 {bound.int8 / 1e9:.0f} GOP/s, "
              f"fp32 {bound.fp32 / 1e9:.0f} GOP/s\n{'':72} {'us':>10} {'GB/s':>7} {'GOP/s':>8} {'share':>6}         error")
        for i, job in enumerate(selected):
            if i % 10 == 9:                                                    # limits are maxima over the whole run
                bound = limits.best(bound, limits.measure(isa, n_threads, repeat=3))
            try:
                new = measure(job, isa, n_threads)
            except GraphError as e:
                missing.append({"name": f"{job.name} {isa}", "reason": str(e)})
                print(f"{job.name:72} {e}", flush=True)
                continue
            records += new
            for r in (judge(r, bound) for r in new):
                gops = f"{r['gops']:8.1f}" if r["gops"] else " " * 8
                share = f"{r['share']:6.1%} {r['limit']:4}" if r["share"] else " " * 11
                wrong = "" if r["correct"] else "  WRONG"
                print(f"{job.name[:66]:66} {r['cache']:5} {r['seconds']['median'] * 1e6:10.1f} {r['gbps']:7.1f} {gops} {share}  "
                      f"{r['nmse']:8.1e}{wrong}", flush=True)
        results += [judge(r, bound) for r in records]
        bounds.append(bound.to_json())
    return {"suite": "kernels", "limits": bounds, "results": results, "missing": missing}
