"""Kernels on a card: results beside the NumPy reference, times beside the limits that were measured in the same run.

Jobs, arguments and references are those of `bench.kernels`. A kernel is timed in a program of copies of one job whose memory together exceeds the
card's caches, repeated until a replay takes milliseconds; nothing is sent or fetched. A replay is one graph, so times hold what lies
between launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyengine import ops
from pyengine.backends import backend
from pyengine.backends.base import check_kernels, Declared
from pyengine.backends.cuda.describe import Described
from pyengine.backends.cuda.program import Compiled
from pyengine.backends.prepared import arguments
from pyengine.compiler.codegen import pack_params
from pyengine.graph.op import Case
from pyengine.graph.tensor import Tensor
from pyengine.native import ffi

from .. import kernels
from ..blocks import Blocks
from ..kernels import Copy, Job, linear_job
from ..stats import summary
from .speeds import Speeds

CACHES = 256 << 20                                           # bytes that no card's caches hold (H200: 50 MB, RTX 4090: 72 MB)
SECONDS, REPEAT = 3e-3, 9                                    # of one replay at least, and how many are timed
MOST_STEPS = 512                                             # of a graph


# ---- which jobs -----------------------------------------------------------------------------------------------------------------

FORMATS = ("Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q4_0", "Q5_0", "Q2_K", "Q3_K", "IQ4_XS", "MXFP4", "BF16", "F16")
EXACT_KEYS = 2048                                            # of any cache are attended in float32 (csrc/cuda/attention.cu)
UP, DOWN = (14336, 4096), (4096, 14336)                      # of a feed-forward part: outputs, inputs


def attention(label: str, m: int, keys: int, kind: str, heads: tuple[int, int, int] = (32, 8, 128)) -> Job:
    """Return attention of the last m of `keys` rows; heads: of queries, of keys, width."""
    h, g, e = heads
    shapes = {"q": (m, h, e), "k": (g, keys, e), "v": (g, keys, e), "lo": (m,), "hi": (m,), "cells": (1, keys), "seq": (m,)}
    return Job(ops.attention, Case(shapes, {"k": kind, "v": kind}, {"scale": e**-0.5}), f"{label} {h}/{g}x{e} {kind} keys={keys} m={m}")


def mixture(m: int, part: str, n: int, k: int) -> Job:
    """Return a product with the weights of 8 of 128 experts."""
    glu = part == "gate-up"
    shapes = {"x": (m if glu else 8 * m, k), "w": [(128, n, k)] * (1 + glu), "chosen": (m, 8)}
    return Job(ops.expert_linear, Case(shapes, {"w": ["Q4_K"] * (1 + glu)}, {"glu": "silu" if glu else "none"}), f"128 top-8 {part} Q4_K {n}x{k} m={m}")


def hot() -> Iterator[Job]:
    """Yield the jobs whose times matter: products, attention, what stands between them."""
    for kind in FORMATS:
        for n, k in (UP, DOWN):
            yield linear_job("generate", (n,), k, (kind,), 1, {})
    for m in (2, 4, 8, 16, 32, 64):
        yield linear_job("few", (UP[0],), UP[1], ("Q4_K",), m, {})
        yield linear_job("few", (UP[0],), UP[1], ("Q8_0",), m, {})
    yield linear_job("gate-up", (14336, 14336), 4096, ("Q4_K", "Q4_K"), 1, {"glu": "silu", "norm": True})
    yield linear_job("head", (128256,), 4096, ("Q6_K",), 1, {"norm": True})
    for kind in ("BF16", "F16", "Q4_K", "Q6_K", "Q8_0", "Q4_0"):
        for m in (512, 4096):
            yield linear_job("prompt", (14336,), 4096, (kind,), m, {})
    for keys, m in ((8192, 8192), (512, 512)):
        yield attention("prompt", m, keys, "F16")
    for kind in ("F16", "Q8_0", "Q4_0"):
        yield attention("generate", 1, 32768, kind)
    yield attention("generate", 1, 1024, "F16")
    for m in (1, 512):
        yield mixture(m, "gate-up", 768, 2048)
        yield mixture(m, "down", 2048, 768)
        yield Job(ops.top_experts, Case({"scores": (m, 128)}, {}, {"n_used": 8, "gate": "softmax", "normed": True}), f"128 top-8 m={m}")
        yield Job(ops.rms_norm, Case({"x": (m, 4096), "weight": (4096,)}, {}, {"eps": 1e-6}), f"4096 m={m}")
        yield Job(ops.rows, Case({"table": (128256, 4096), "ids": (m,)}, {"table": "Q4_K"}, {}), f"Q4_K 128256x4096 m={m}")
        shapes = {"q": (m, 32, 128), "k": (m, 8, 128), "v": (m, 8, 128), "table": (m, 128), "cells": (m,), "k_cache": (8, 4096, 128),
                  "v_cache": (8, 4096, 128)}
        yield Job(ops.rope_append, Case(shapes, {"k_cache": "F16", "v_cache": "F16"}, {}), f"32/8x128 F16 m={m}")
    yield Job(ops.binary, Case({"x": (512, 14336), "y": (512, 14336)}, {}, {"kind": "add"}), "512x14336")
    yield Job(ops.matmul, Case({"x": (1024, 1024), "y": (1024, 1024)}, {}, {}), "1024x1024x1024")


def tiny() -> Iterator[Job]:
    """Yield jobs of every kind that the emulator does in a moment."""
    for kind in ("Q4_K", "Q6_K", "Q8_0", "BF16", "F32"):
        for m in (1, 5, 33):
            yield linear_job("tiny", (48,), 512, (kind,), m, {})
    yield linear_job("tiny gate-up", (32, 32), 256, ("Q4_K", "Q4_K"), 1, {"glu": "silu", "norm": True})
    for m, kind in ((1, "F16"), (1, "Q8_0"), (20, "F16")):
        yield attention("tiny", m, 80, kind, (4, 2, 64))
    yield Job(ops.rms_norm, Case({"x": (3, 640), "weight": (640,)}, {}, {"eps": 1e-6}), "640 m=3")
    shapes = {"q": (2, 4, 64), "k": (2, 2, 64), "v": (2, 2, 64), "table": (2, 64), "cells": (2,), "k_cache": (2, 64, 64), "v_cache": (2, 64, 64)}
    yield Job(ops.rope_append, Case(shapes, {"k_cache": "F16", "v_cache": "F16"}, {}), "4/2x64 F16 m=2")


def named(job: Job) -> dict[str, Any]:
    """Return what PyTorch needs to do the same: shapes and formats."""
    return {"op": job.op.name, "shapes": job.case.shapes, "dtypes": job.case.dtypes}


# ---- on the device ----------------------------------------------------------------------------------------------------------------


class Loaded:
    """`n` copies of a job as a program in a device's memory."""

    def __init__(self, job: Job, copy: Copy, n: int, device: str):
        self.job, self.copy = job, copy
        outputs: list[Tensor] = []
        arrays: dict[str, np.ndarray] = {}
        states: dict[str, np.ndarray] = {}
        for i in range(n):
            results, new_inputs, new_states = copy.bind(i)
            arrays |= new_inputs
            states |= new_states
            specs = kernels.result_specs(job, len(results))
            own = [t for t, spec in zip(results, specs) if spec.kind != "Same"] or [kernels.corner(results[0])]
            if i == 0:
                self.specs = specs
            # Inputs are outputs too, so that their memory is not given to a later step: a replay does not send them again.
            outputs += own + [t for t in results[0].node.inputs if t.node.kind == "input"]
        own_backend = backend(device)
        prepared = own_backend.prepare(Declared(outputs), passes=())
        check_kernels(prepared, device, strict=True)
        self.program: Any = prepared.load()
        for name, array in arrays.items():
            self.program.inputs[name].reshape(-1)[:] = array.reshape(-1)
        for name, array in states.items():
            state = self.program.states[name]
            state.scatter(np.arange(state.shape[1]), np.ascontiguousarray(array).view(np.uint8).reshape(state.shape[0], state.shape[1], -1))
        self.program.execute()

    def results(self) -> list[np.ndarray]:
        """Return what copy 0 has computed."""
        own = iter(self.program.outputs)
        return [self._state(spec.axes[0]) if spec.kind == "Same" else next(own) for spec in self.specs]

    def _state(self, name: str) -> np.ndarray:
        state, value = self.program.states[f"{name}.0"], self.copy.values[name]
        raw = state.gather(np.arange(state.shape[1]))
        if isinstance(value, Blocks):
            return Blocks(name, value.dtype, raw.reshape(-1, raw.shape[-1])).values().reshape(state.shape)
        return raw.reshape(-1).view(value.dtype).reshape(state.shape)

    def replayed(self, times: int) -> Callable[[], float]:
        """Return what runs the job's steps `times` times on the device, in one graph, and returns the seconds."""
        program, layout = self.program, self.program.prepared.layout
        made, number = Described({}), {}
        own = [(step, place) for step, place in zip(layout.steps, layout.scratch) if step.op is self.job.op] * times
        for step, (scratch, scratch_bytes) in own:
            inputs, outputs = arguments(step)
            for t in (t for parts in (*inputs, *outputs) for t in parts if (id(t.node), t.index) not in number):
                number[id(t.node), t.index] = made.tensor(program.address_of(t), program.dtype_of(t).id, t.shape, layout.of(t).strides)
            ids = [[[number[id(t.node), t.index] for t in parts] for parts in args] for args in (inputs, outputs)]
            made.node(step.op.name, *ids, pack_params(step.op, dict(step.params)), program.arena.address + scratch, scratch_bytes)
        compiled = Compiled(program.queue, made, len(own), made.transfers([]), made.transfers([]), [])
        dims = ffi.new("int64_t[1]")

        def run() -> float:
            start = time.perf_counter()
            status, said = compiled.run(dims, 0)
            seconds = time.perf_counter() - start
            if status:
                raise RuntimeError(f"{self.job.name}: {ffi.string(said.message).decode()}")
            return seconds

        return run

    def samples(self, copies: int, repeat: int) -> list[float]:
        """Time the job: seconds of one kernel, several times."""
        run = self.replayed(1)
        run()
        run()                                                # the second is recorded, the third replayed
        times = max(1, min(MOST_STEPS // copies, int(SECONDS / max(run(), 1e-6))))
        if times > 1:
            run = self.replayed(times)
            run()
            run()
        return [run() / times / copies for _ in range(repeat)]


def checked(job: Job, device: str) -> dict[str, Any]:
    """Run a job once and compare it with the reference."""
    copy = Copy.make(job, np.random.default_rng(0))
    nmse = kernels.error(Loaded(job, copy, 1, device).results(), *kernels.expected(job, copy))
    return {"name": job.name, "nmse": nmse, "correct": bool(nmse <= kernels.tolerance(job))}


@dataclass(frozen=True)
class Bound:
    """What limits a job: bytes that it must move, operations and on which units; passes: how often a card's units do each."""

    bytes: float
    operations: float
    unit: str
    passes: int = 1

    @classmethod
    def of(cls, job: Job, copy: Copy) -> Bound:
        kinds = [w.dtype for name in kernels.weights_of(job.op) for w in kernels.listed(copy.values[name]) if isinstance(w, Blocks)]
        unit = "s8" if any(d.block > 1 for d in kinds) else "bf16" if any(d.name == "BF16" for d in kinds) else "f16" if kinds else "f32"
        if job.op is ops.attention:
            unit = "f32" if job.case.dtypes.get("k", "F32") == "F32" or job.case.shapes["k"][1] <= EXACT_KEYS else "f16"
        passes = 2 if job.op is ops.attention and unit == "f16" else 1         # csrc/cuda/attention.cu: queries and probabilities are two halves
        return cls(kernels.traffic(job, copy), kernels.operations(job, copy) or 0.0, unit, passes)

    def seconds(self, speeds: Speeds) -> tuple[float, str]:
        """Return the least time that the device's own limits allow, and which of them it is."""
        memory, products = self.bytes / speeds.read, self.passes * self.operations / getattr(speeds, self.unit)
        return (products, self.unit) if products > memory else (memory, "read")


def measured(job: Job, device: str, speeds: Speeds, repeat: int = REPEAT) -> dict[str, Any]:
    """Check and time a job, and compare it with the limits."""
    copy = Copy.make(job, np.random.default_rng(0))
    bound = Bound.of(job, copy)
    least, limit = bound.seconds(speeds)
    copies = 1 if limit != "read" else int(max(1, min(64, -(-CACHES // max(1, bound.bytes)))))
    loaded = Loaded(job, copy, copies, device)
    nmse = kernels.error(loaded.results(), *kernels.expected(job, copy))
    seconds = summary(loaded.samples(copies, repeat))
    return {"name": job.name, **named(job), "seconds": seconds, "bytes": bound.bytes, "operations": bound.operations, "copies": copies,
            "limit": limit, "share": least / seconds["median"], "gbps": bound.bytes / seconds["median"] / 1e9,
            "tops": bound.operations / seconds["median"] / 1e12, "nmse": nmse, "correct": bool(nmse <= kernels.tolerance(job))}
