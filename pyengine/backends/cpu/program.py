"""A program in the host's memory: runs of steps with kernels are one call into C each; steps without one go to the reference."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from pyengine.backends import base
from pyengine.backends.cpu import weights
from pyengine.backends.cpu.fallback import Fallback
from pyengine.backends.host import HostState, NO_NUMBERS, NUMPY
from pyengine.backends.prepared import arguments, Resident
from pyengine.compiler.arena import ALIGN, is_changed_state
from pyengine.compiler.codegen import pack_params
from pyengine.errors import GraphError, PlanError, RequestError
from pyengine.files.weights import files_of
from pyengine.graph.tensor import Axis, axis_max, Dim, Node, Tensor
from pyengine.hardware.pages import resident
from pyengine.native import engine
from pyengine.records import NamedTuple

_STATUS = {1: GraphError, 2: GraphError, 3: RequestError, 4: PlanError, 5: GraphError}     # by pe_status


@lru_cache(maxsize=4)
def pool(n_threads: int) -> Any:
    """Return the thread pool of that size: one for the whole process."""
    return engine.Pool(n_threads)


class Run(NamedTuple):
    """Steps begin .. end - 1 as one compiled program, or one step that the reference computes."""

    begin: int
    end: int
    compiled: Any            # engine.Program, or a Fallback


class Program(base.Program):
    """A compiled graph with its memory: see `base.Program`. Made by `cpu.prepared.Prepared.load`."""

    def __init__(self, prepared: Any, progress: base.Progress | None):
        layout = prepared.layout
        self.prepared = prepared
        self.pool = pool(prepared.n_threads)
        self.arena = engine.Buffer(max(prepared.arena_bytes, ALIGN), True)
        self.weights = engine.Buffer(prepared.weight_bytes, True)
        self.state_memory = engine.Buffer(prepared.state_bytes, False)
        self.dim_names = sorted({a.name for n in [*layout.leaves, *layout.steps] for t in n.outputs for a in t.shape
                                 if isinstance(a, Dim)})
        self._addresses, self._base_of = [self.arena.address], {}
        self._keep: dict[int, np.ndarray] = {}               # mapped constants, by the id of their nodes
        self._files = files_of(r.tensor.node.source for r in prepared.residents.values() if r.form == "mapped")
        for r in prepared.residents.values():
            self._place(r.tensor.node, self._mapped_address(r) if r.form == "mapped" else self.weights.address + r.offset)
        lasting = np.frombuffer(self.state_memory, np.uint8) if prepared.state_bytes else np.empty(0, np.uint8)
        self.states, self.tables = {}, {}
        for t in prepared.lasting:
            offset = prepared.places[t.name]
            self._place(t.node, self.state_memory.address + offset)
            memory = lasting[offset : offset + t.nbytes_max]
            if t.node.kind == "state":
                self.states[t.name] = HostState(t, memory)
            else:
                self.tables[t.name] = memory.view(np.int32).reshape([int(a) for a in t.shape])
        self._turns = [self._runs(begin, end) for begin, end in layout.turns]
        weights.load(list(prepared.residents.values()), self.weights, self.pool, progress)
        arena = np.frombuffer(self.arena, np.uint8)
        self.inputs = {n.name: self._array(arena, n.outputs[0]) for n in layout.leaves if n.kind == "input"}
        self.outputs = [self._array(arena, t) for t in layout.outputs]

    def _place(self, node: Node, address: int) -> None:
        self._base_of[id(node)] = len(self._addresses)
        self._addresses.append(address)

    def _mapped_address(self, r: Resident) -> int:
        view = self._keep[id(r.tensor.node)] = weights.mapped_view(r)
        return view.ctypes.data

    def _array(self, arena: np.ndarray, t: Tensor) -> np.ndarray:
        """Return the array over a tensor's memory, run-time axes at their largest."""
        if is_changed_state(t):
            return NO_NUMBERS
        place = self.prepared.layout.of(t)
        if place.root.node.kind not in ("op", "input"):
            raise GraphError(f"output {t!r} is a constant or a state: it has no place in the arena")
        start = self.prepared.layout.offsets[id(place.root)] + place.offset
        return arena[start : start + t.nbytes_max].view(NUMPY[t.dtype.name]).reshape([axis_max(a) for a in t.shape])

    # -- building -----------------------------------------------------------------------------------------------------

    def _runs(self, begin: int, end: int) -> list[Run]:
        """Divide the steps begin .. end - 1 into runs, cut at each step without a kernel."""
        runs, first = [], begin
        for i in range(begin, end):
            if not self.prepared.has_kernel(self.prepared.layout.steps[i]):
                runs += [self._compiled(first, i)] if first < i else []
                runs.append(Run(i, i + 1, Fallback(self, self.prepared.layout.steps[i])))
                first = i + 1
        return runs + ([self._compiled(first, end)] if first < end or not runs else [])

    def _compiled(self, begin: int, end: int) -> Run:
        """Compile steps begin .. end - 1 into a program bound to the memory."""
        layout, dim_id = self.prepared.layout, {name: i for i, name in enumerate(self.dim_names)}

        def axis(a: Axis) -> tuple[int, int]:
            return (a, -1) if isinstance(a, int) else (a.scale, dim_id[a.name])

        specs: list[Any] = []
        number: dict[tuple[int, int], int] = {}
        nodes: list[Any] = []
        for step, (scratch_offset, scratch_bytes) in zip(layout.steps[begin:end], layout.scratch[begin:end]):
            inputs, outputs = arguments(step)
            for t in (t for parts in (*inputs, *outputs) for t in parts if (id(t.node), t.index) not in number):
                base_, offset, dtype = self.place_of(t)
                number[id(t.node), t.index] = len(specs)
                specs.append({"base": base_, "offset": offset, "dtype": dtype.id, "shape": [axis(a) for a in t.shape],
                              "strides": [axis(a) for a in layout.of(t).strides]})
            ids = [[[number[id(t.node), t.index] for t in parts] for parts in args] for args in (inputs, outputs)]
            nodes.append({"op": step.op.name, "inputs": ids[0], "outputs": ids[1], "params": pack_params(step.op, dict(step.params)),
                          "scratch_offset": scratch_offset, "scratch_bytes": scratch_bytes})
        program = engine.Program(self.prepared.isa, specs, nodes, len(self._addresses), len(self.dim_names))
        for i, address in enumerate(self._addresses):
            program.bind(i, address)
        return Run(begin, end, program)

    def place_of(self, t: Tensor) -> tuple[int, int, Any]:
        """Return (number of the memory, offset in it, format) of a tensor."""
        place = self.prepared.layout.of(t)
        resident = self.prepared.residents.get(id(place.root.node))
        number = self._base_of.get(id(place.root.node), 0)
        offset = place.offset + (0 if number else self.prepared.layout.offsets[id(place.root)])
        return number, offset, resident.dtype if resident else t.dtype

    def memory_of(self, t: Tensor) -> np.ndarray:
        """Return the bytes of the memory that holds a tensor: arena, weights, what lasts, or a mapped constant."""
        node = self.prepared.layout.of(t).root.node
        if node.kind in ("op", "input"):
            return np.frombuffer(self.arena, np.uint8)
        if node.kind != "constant":
            start = self._addresses[self._base_of[id(node)]] - self.state_memory.address
            return np.frombuffer(self.state_memory, np.uint8)[start:]
        r = self.prepared.residents[id(node)]
        return self._keep[id(node)] if r.form == "mapped" else np.frombuffer(self.weights, np.uint8)[r.offset : r.offset + r.nbytes]

    # -- running ------------------------------------------------------------------------------------------------------

    def execute(self, entry: str | None = None, turn: int | None = None, **dims: int) -> None:
        """Replay on what stands in the inputs, from the beginning or an entry; only one `turn`, where a layout has several.

        Raises: RequestError for run-time numbers out of range (ids, cells); GraphError for what kernels refuse; InvalidModelError
        where weights are read in a file that was cut or written to.
        """
        values, first = [dims[n] for n in self.dim_names], 0 if entry is None else self.prepared.entry_step(entry)
        for runs in self._turns if turn is None else (self._turns[turn],):
            for begin, end, compiled in runs:
                if first >= end > begin:
                    continue
                status, node, message = compiled.run(self.pool, values, max(0, first - begin))
                if status:
                    name = self.prepared.layout.steps[begin + node].op.name if node >= 0 else "?"
                    raise _STATUS[status](f"{name}: {message or 'the kernel refused its arguments'}")
        for file in self._files:
            file.check()

    def resident(self) -> int:
        """Return the bytes of its memory that are there already."""
        return sum(resident(b.address, b.nbytes) for b in (self.arena, self.weights, self.state_memory))

    def profile(self, on: bool) -> None:
        """Start (and reset) or stop the clock of each step."""
        for runs in self._turns:
            for run in runs:
                run.compiled.profile(on)

    def seconds(self) -> list[tuple[Node, float]]:
        """Return steps with the seconds spent in each since `profile(True)`."""
        spent = (s for runs in self._turns for run in runs for s in run.compiled.seconds())
        return list(zip(self.prepared.layout.steps, spent))
