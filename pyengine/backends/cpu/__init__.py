"""The CPU backend: lays a graph out, loads its weights in the form that kernels want, and replays it by one call into C."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from pyengine import hardware, ops
from pyengine.compiler import passes as fusion
from pyengine.compiler.codegen import pack_params
from pyengine.dtype import DType
from pyengine.errors import GraphError, PlanError, RequestError
from pyengine.native import engine, ffi, lib
from pyengine.compiler.arena import ALIGN, aligned, contiguous_strides, lay_out, Layout, Turns
from pyengine.graph.tensor import Axis, axis_max, axis_value, Dim, Node, Tensor
from pyengine.files.weights import DerivedRef

_NUMPY = {"F32": np.float32, "F16": np.float16, "I32": np.int32}
_STATUS = {1: GraphError, 2: GraphError, 3: RequestError, 4: PlanError, 5: GraphError}     # by pe_status


def isa() -> str:
    """The instruction set in use: the best of this machine, or the one named by $PYENGINE_ISA."""
    available = engine.isas()
    wanted = os.environ.get("PYENGINE_ISA")
    if wanted and wanted not in available:
        raise GraphError(f"PYENGINE_ISA={wanted}: this machine and build have {', '.join(available)}")
    return wanted or available[0]


@lru_cache(maxsize=4)
def pool(n_threads: int) -> Any:
    """The thread pool of that size: one for the whole process."""
    return engine.Pool(n_threads)


@dataclass(frozen=True)
class Resident:
    """A constant as it will lie in memory: packed, converted to float32, or read where the file is mapped."""

    tensor: Tensor
    dtype: DType
    form: str                    # packed | plain | mapped
    nbytes: int
    offset: int = 0


def _source_dtype(t: Tensor) -> DType:
    source = t.node.source
    return t.dtype if isinstance(source, np.ndarray) else source.dtype


_PRODUCTS = {"linear.w", "expert_linear.w"}            # arguments that may be packed
_ANY_FORMAT = _PRODUCTS | {"rows.table"}               # and those that may have a file's format


def _packed_bytes(dtype: DType, shape: Sequence[int]) -> int:
    """Bytes of a matrix [n, k] when packed, or of experts' matrices [e, n, k], each by itself; 0: there is no packed form."""
    if len(shape) not in (2, 3):
        return 0
    return math.prod(shape[:-2]) * int(lib.pe_pack_bytes(dtype.id, *shape[-2:]))


def _residents(layout: Layout) -> dict[int, Resident]:
    """Decide each constant's form from what reads it, and give it a place in one block of memory."""
    readers: dict[int, set[str]] = {}
    for node in layout.steps:
        for name, arg in zip(node.op.args, node.args):
            for t in arg if isinstance(arg, tuple) else (arg,):
                if t is not None and layout.of(t).root.node.kind == "constant":
                    role = f"{node.op.name}.{name}" if layout.of(t).root is t else "view"
                    readers.setdefault(id(layout.of(t).root.node), set()).add(role)
    out: dict[int, Resident] = {}
    offset = 0
    for node in layout.leaves:
        if node.kind != "constant":
            continue
        t, roles = node.outputs[0], readers.get(id(node), set())
        dtype = _source_dtype(t)
        if roles & _PRODUCTS and roles <= _ANY_FORMAT and t.dtype == dtype:
            nbytes = _packed_bytes(dtype, [int(a) for a in t.shape])
            if nbytes:
                out[id(node)] = Resident(t, dtype.packed, "packed", nbytes, offset)
                offset += aligned(nbytes)
                continue
        if t.dtype == dtype and not isinstance(node.source, (np.ndarray, DerivedRef)) and roles <= _ANY_FORMAT:
            out[id(node)] = Resident(t, dtype, "mapped", t.nbytes_max)
            continue
        out[id(node)] = Resident(t, t.dtype, "plain", t.nbytes_max, offset)
        offset += aligned(t.nbytes_max)
    return out


class Prepared:
    """A graph with every byte counted and nothing loaded.

    arena_bytes, weight_bytes (resident), mapped_bytes (read where the file is mapped), state_bytes.
    """

    def __init__(self, outputs: Sequence[Tensor], passes: Sequence[str] | None, single: bool, n_threads: int, isa_name: str,
                 turns: Turns | None = None):
        self.isa, self.n_threads, self.single = isa_name, n_threads, single
        self._scratch: dict[Any, int] = {}                   # answers of `_scratch_bytes`: most layers ask the same
        self.layout = lay_out(fusion.apply(outputs, passes), self._scratch_bytes, turns)
        self.residents = _residents(self.layout)
        self.states = [n.outputs[0] for n in self.layout.leaves if n.kind == "state"]
        self.arena_bytes = self.layout.arena_bytes
        self.weight_bytes = sum(aligned(r.nbytes) for r in self.residents.values() if r.form != "mapped")
        self.mapped_bytes = sum(r.nbytes for r in self.residents.values() if r.form == "mapped")
        self.state_bytes = sum(aligned(t.nbytes_max) for t in self.states)

    def resized(self, states: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """(bytes of the arena, bytes of all states) if these states had these shapes: larger caches, without a graph of them."""
        layout, sizes = self.layout, [n for _, n in self.layout.scratch]
        for i in self._stateful:
            sizes[i] = self._scratch_bytes(layout.steps[i], states)
        same = sizes == [n for _, n in layout.scratch]
        total = sum(aligned(t.dtype.size(math.prod(states.get(t.name, t.shape)))) for t in self.states)
        return layout.arena_bytes if same else layout.place(sizes)[1], total

    @cached_property
    def _stateful(self) -> list[int]:
        """Numbers of the steps that read a state."""
        of = self.layout.of
        return [i for i, node in enumerate(self.layout.steps) if any(of(t).root.node.kind == "state" for t in node.inputs)]

    def _scratch_bytes(self, node: Node, states: Mapping[str, tuple[int, ...]] | None = None) -> int:
        """Working memory of a kernel at the largest shapes; with `states`, those of its caches are these."""
        tensors, ids = [], []
        for arg in (*node.args, *_result_args(node)):
            parts = arg if isinstance(arg, tuple) else () if arg is None else (arg,)
            ids.append(tuple(range(len(tensors), len(tensors) + len(parts))))
            for t in parts:
                dtype, shape = t.dtype, tuple(axis_max(a) for a in t.shape)
                if node.op in (ops.linear, ops.expert_linear) and t.node.kind == "constant" and t.dtype == _source_dtype(t):
                    dtype = dtype.packed if _packed_bytes(dtype, shape) else dtype
                if states and self.layout.of(t).root.name in states:
                    shape = states[self.layout.of(t).root.name]
                tensors.append((dtype, t.dtype, shape))
        key = node.op.name, tuple(tensors), tuple(ids), node.params
        if key not in self._scratch:
            specs = [(0, 0, d.id, [(n, -1) for n in shape], [(n, -1) for n in contiguous_strides(shape, plain)])
                     for d, plain, shape in tensors]
            self._scratch[key] = engine.scratch_bytes(self.isa, node.op.name, specs, ids, len(node.args),
                                                      pack_params(node.op, dict(node.params)), self.n_threads)
        if self._scratch[key] < 0:
            raise GraphError(f"the CPU backend has no kernel for op '{node.op.name}'; device='reference' runs it")
        return self._scratch[key]

    def load(self, progress: Callable[[int, int], None] | None = None) -> Program:
        """Allocate memory, read and pack the weights (in parallel), and return the program."""
        return Program(self, progress)


def _result_args(node: Node) -> list[Any]:
    """Results grouped as the kernel's arguments: one tensor each, or the list of a list result."""
    return [tuple(node.outputs)] if node.op.results[0].many else list(node.outputs)


class Program:
    """A compiled graph with its memory. `inputs[name]` and `outputs[i]` are arrays over the arena, largest shape first axis.

    `execute(dims)` replays it on what stands in the input arrays; `run(**arrays)` is the convenient form.
    """

    def __init__(self, prepared: Prepared, progress: Callable[[int, int], None] | None):
        layout = prepared.layout
        self.prepared, self.single = prepared, prepared.single
        self.pool = pool(prepared.n_threads)
        self.arena = engine.Buffer(max(prepared.arena_bytes, ALIGN), True)
        self.weights = engine.Buffer(prepared.weight_bytes, True)
        self.state_memory = engine.Buffer(prepared.state_bytes, False)
        self._keep: list[Any] = []
        self.dim_names = sorted({a.name for n in [*layout.leaves, *layout.steps] for t in n.outputs for a in t.shape
                                 if isinstance(a, Dim)})
        addresses = [self.arena.address]
        base_of: dict[int, int] = {}
        for r in prepared.residents.values():
            base_of[id(r.tensor.node)] = len(addresses)
            addresses.append(self._mapped_address(r) if r.form == "mapped" else self.weights.address + r.offset)
        self.state_address: dict[str, int] = {}
        offset = 0
        for t in prepared.states:
            base_of[id(t.node)] = len(addresses)
            self.state_address[t.name] = self.state_memory.address + offset
            addresses.append(self.state_memory.address + offset)
            offset += aligned(t.nbytes_max)
        self._turns = [self._build(layout, begin, end, base_of, len(addresses)) for begin, end in layout.turns]
        for program in self._turns:
            for i, address in enumerate(addresses):
                program.bind(i, address)
        self._load_weights(list(prepared.residents.values()), progress)
        arena = np.frombuffer(self.arena, np.uint8)
        self.inputs = {n.name: self._array(arena, n.outputs[0]) for n in layout.leaves if n.kind == "input"}
        self.outputs = [self._array(arena, t) for t in layout.outputs]

    def _array(self, arena: np.ndarray, t: Tensor) -> np.ndarray:
        """The array over a tensor's memory, run-time axes at their largest."""
        place = self.prepared.layout.of(t)
        if place.root.node.kind not in ("op", "input"):
            raise GraphError(f"output {t!r} is a constant or a state: it has no place in the arena")
        start = self.prepared.layout.offsets[id(place.root)] + place.offset
        shape = tuple(axis_max(a) for a in t.shape)
        return arena[start : start + t.nbytes_max].view(_NUMPY[t.dtype.name]).reshape(shape)

    def _build(self, layout: Layout, begin: int, end: int, base_of: dict[int, int], n_bases: int) -> Any:
        """The compiled program of steps begin .. end - 1."""
        dim_id = {name: i for i, name in enumerate(self.dim_names)}

        def axis(a: Axis) -> tuple[int, int]:
            return (a, -1) if isinstance(a, int) else (a.scale, dim_id[a.name])

        specs: list[Any] = []
        number: dict[tuple[int, int], int] = {}
        nodes: list[Any] = []
        for step, (scratch_offset, scratch_bytes) in zip(layout.steps[begin:end], layout.scratch[begin:end]):
            ids = []
            for arg in (*step.args, *_result_args(step)):
                parts = arg if isinstance(arg, tuple) else () if arg is None else (arg,)
                for t in parts:
                    if (id(t.node), t.index) in number:
                        continue
                    place = layout.of(t)
                    resident = self.prepared.residents.get(id(place.root.node))
                    base = base_of.get(id(place.root.node), 0)
                    offset = place.offset + (0 if base else layout.offsets[id(place.root)])
                    dtype = resident.dtype if resident else t.dtype
                    number[id(t.node), t.index] = len(specs)
                    specs.append((base, offset, dtype.id, [axis(a) for a in t.shape], [axis(a) for a in place.strides]))
                ids.append([number[id(t.node), t.index] for t in parts])
            nodes.append((step.op.name, ids, len(step.args), pack_params(step.op, dict(step.params)), scratch_offset, scratch_bytes))
        return engine.Program(self.prepared.isa, specs, nodes, n_bases, len(self.dim_names))

    def _mapped_address(self, r: Resident) -> int:
        view = r.tensor.node.source.view()
        self._keep.append(view)
        return view.ctypes.data

    def _load_weights(self, residents: list[Resident], progress: Callable[[int, int], None] | None) -> None:
        total, done = sum(r.nbytes for r in residents), 0
        memory = np.frombuffer(self.weights, np.uint8) if self.weights.nbytes else np.empty(0, np.uint8)
        for r in residents:
            source = r.tensor.node.source
            if r.form != "mapped":
                raw = source if isinstance(source, np.ndarray) else source.view()
                raw = np.ascontiguousarray(raw)
                if r.form == "packed":
                    self._pack(r, raw)
                elif isinstance(source, np.ndarray) or source.dtype == r.dtype:
                    memory[r.offset : r.offset + r.nbytes] = raw.reshape(-1).view(np.uint8)
                else:
                    self._convert(r, raw, memory)
                if not isinstance(source, np.ndarray):
                    source.drop()
            done += r.nbytes
            if progress:
                progress(done, total)

    def _pack(self, r: Resident, raw: np.ndarray) -> None:
        """Pack a matrix, or the experts' matrices one after the other: as one where no group of 16 rows holds rows of two."""
        *lead, n, k = (int(a) for a in r.tensor.shape)
        times = math.prod(lead)
        if n % 16 == 0:
            n, times = n * times, 1
        for i in range(times):
            source, target = raw.ctypes.data + i * (raw.nbytes // times), self.weights.address + r.offset + i * (r.nbytes // times)
            engine.pack(self.pool, r.dtype.unpacked.id, source, n, k, target)

    def _convert(self, r: Resident, raw: np.ndarray, memory: np.ndarray) -> None:
        """Dequantize a small tensor (norm weights in F16, say) to float32."""
        if r.dtype.name != "F32":
            raise GraphError(f"{r.tensor.name}: {r.tensor.node.source.dtype.name} cannot be converted to {r.dtype.name}")
        n = r.nbytes // 4
        target = ffi.cast("float *", self.weights.address + r.offset)
        status = lib.pe_dequantize_row(r.tensor.node.source.dtype.id, ffi.from_buffer(raw), target, n)
        if status:
            raise GraphError(f"{r.tensor.name}: cannot be converted from {r.tensor.node.source.dtype.name} (status {status})")

    def state(self, name: str) -> np.ndarray:
        """The array over a state of plain numbers."""
        t = next(t for t in self.prepared.states if t.name == name)
        start = self.state_address[name] - self.state_memory.address
        memory = np.frombuffer(self.state_memory, np.uint8)[start : start + t.nbytes_max]
        return memory.view(_NUMPY[t.dtype.name]).reshape([int(a) for a in t.shape])

    def state_bytes(self, name: str) -> np.ndarray:
        """The bytes of a state of any format: uint8 [.., bytes of a row]."""
        t = next(t for t in self.prepared.states if t.name == name)
        start = self.state_address[name] - self.state_memory.address
        shape = [int(a) for a in t.shape]
        return np.frombuffer(self.state_memory, np.uint8)[start : start + t.nbytes_max].reshape(*shape[:-1], t.dtype.size(shape[-1]))

    def first_step_reading(self, name: str) -> int:
        """Number of the first step that reads an input: where `execute` may resume when only that input has changed."""
        return next(i for i, n in enumerate(self.prepared.layout.steps) if any(t.node.kind == "input" and t.name == name for t in n.inputs))

    def execute_named(self, first_step: int = 0, turn: int | None = None, **dims: int) -> None:
        """`execute` with run-time axes by name; only one `turn`, where a layout has several."""
        self.execute([dims[n] for n in self.dim_names], first_step, turn)

    def execute(self, dims: Sequence[int], first_step: int = 0, turn: int | None = None) -> None:
        """Replay, from step `first_step`, on the contents of `inputs`; `dims` are the run-time axes in the order of `dim_names`.

        Raises: RequestError for run-time numbers out of range (ids, cells); GraphError for what kernels refuse.
        """
        turns = self.prepared.layout.turns
        for number in range(len(turns)) if turn is None else (turn,):
            begin, end = turns[number]
            if first_step >= end > begin:
                continue
            status, node, message = self._turns[number].run(self.pool, dims, max(0, first_step - begin))
            if status:
                name = self.prepared.layout.steps[begin + node].op.name if node >= 0 else "?"
                raise _STATUS[status](f"{name}: {message or 'the kernel refused its arguments'}")

    def run(self, **arrays: np.ndarray) -> Any:
        """Compute the outputs from arrays by input name; run-time axes take their values from the arrays' shapes."""
        dims: dict[str, int] = {}
        leaves = {n.name: n.outputs[0] for n in self.prepared.layout.leaves if n.kind == "input"}
        if set(arrays) != set(leaves):
            raise GraphError(f"run: inputs are {sorted(leaves)}, but {sorted(arrays)} were given")
        for name, t in leaves.items():
            shape = np.shape(arrays[name])
            if len(shape) != t.ndim:
                raise GraphError(f"run: '{name}' has shape {shape}, but must have axes {t.shape}")
            for axis, n in zip(t.shape, shape):
                if isinstance(axis, int):
                    if axis != n:
                        raise GraphError(f"run: '{name}' has shape {shape}, but must have axes {t.shape}")
                elif n % axis.scale or dims.setdefault(axis.name, n // axis.scale) * axis.scale != n or n > axis_max(axis):
                    raise GraphError(f"run: '{name}' has shape {shape}: axis {axis} is at most {axis_max(axis)}, and the same everywhere")
        for name, t in leaves.items():
            flat = self.inputs[name].reshape(-1)
            value = np.asarray(arrays[name], dtype=flat.dtype).reshape(-1)
            flat[: value.size] = value
        self.execute([dims.get(n, 0) for n in self.dim_names])
        out = []
        for t, array in zip(self.prepared.layout.outputs, self.outputs):
            shape = tuple(axis_value(a, dims) for a in t.shape)
            out.append(array.reshape(-1)[: int(np.prod(shape))].reshape(shape).copy())
        return out[0] if self.single else out

    def profile(self, on: bool) -> None:
        """Start (and reset) or stop the clock of each step."""
        for program in self._turns:
            program.profile(on)

    def seconds(self) -> list[tuple[Node, float]]:
        """Steps with the seconds spent in each since `profile(True)`."""
        return list(zip(self.prepared.layout.steps, (s for program in self._turns for s in program.seconds())))


class Backend:
    """See the module's docstring."""

    def __init__(self, n_threads: int | None = None):
        self.n_threads = n_threads or hardware.default_threads()

    def prepare(self, outputs: Sequence[Tensor], passes: Sequence[str] | None = None, single: bool = False,
                turns: Turns | None = None) -> Prepared:
        """Plan without loading."""
        return Prepared(outputs, passes, single, self.n_threads, isa(), turns)

    def compile(self, outputs: Sequence[Tensor], passes: Sequence[str] | None = None, single: bool = False) -> Program:
        """Plan and load."""
        return self.prepare(outputs, passes, single).load()
