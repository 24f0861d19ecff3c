"""A program on a Metal device. Its launches are recorded once for each set of run-time axes and then replayed; memory is the host's too."""

from __future__ import annotations

import time
from collections import OrderedDict
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pyengine.backends import base
from pyengine.backends.cpu import weights
from pyengine.backends.cpu.fallback import Fallback
from pyengine.backends.cuda import codebooks
from pyengine.backends.faults import said
from pyengine.backends.host import HostState, NO_NUMBERS, NUMPY
from pyengine.backends.metal.device import bind, Bound, Memory, Recording
from pyengine.backends.metal.launch import Launch, LAUNCHERS, params_of, Step, View
from pyengine.backends.prepared import arguments, Resident
from pyengine.compiler.arena import ALIGN, is_changed_state
from pyengine.dtype import DType, I8
from pyengine.errors import GraphError, RequestError
from pyengine.files.weights import files_of
from pyengine.graph.tensor import axis_max, axis_value, Dim, Node, Tensor
from pyengine.hardware.pages import resident
from pyengine.native import engine

FAULT = np.dtype([("status", "<i4"), ("reserved", "<i4"), ("value", "<i8"), ("limit", "<i8")])      # pe_fault of csrc/metal/common.h
RECORDINGS = 128                         # kept; a set of run-time axes and a first step is one. Generation comes back to a few
ARENA, WEIGHTS, LASTING, FAULTS = range(4)


@lru_cache(maxsize=4)
def packers(n_threads: int) -> Any:
    """Return the thread pool that packs weights."""
    return engine.Pool(n_threads)


def extent(shape: tuple[int, ...], strides: tuple[int, ...], dtype: DType) -> int:
    """Return the bytes from a tensor's first element to its last."""
    if 0 in shape:
        return 0
    counts = (*shape[:-1], shape[-1] // dtype.block) if shape else ()
    return dtype.nbytes + sum((n - 1) * s for n, s in zip(counts, strides))


class Part(NamedTuple):
    """Steps begin .. end - 1: one recording with the step of each of its launches, or one step that the reference computes."""

    begin: int
    end: int
    recording: Recording | None
    steps: list[int]
    fallback: Fallback | None


class Program(base.Program):
    """See `base.Program`. Made by `metal.prepared.Prepared.load`."""

    def __init__(self, prepared: Any, progress: base.Progress | None):
        layout, device = prepared.layout, prepared.device
        self.prepared, self.device = prepared, device
        self.dim_names = sorted({a.name for n in [*layout.leaves, *layout.steps] for t in n.outputs for a in t.shape if isinstance(a, Dim)})
        self.memories: list[Memory] = [device.allocate(n) for n in (max(prepared.arena_bytes, ALIGN), prepared.weight_bytes,
                                                                    prepared.state_bytes, max(1, len(layout.steps)) * FAULT.itemsize)]
        self._faults = self.memories[FAULTS].array.view(FAULT)
        self._books = self._codebooks()
        self._base: dict[int, tuple[int, int]] = {}          # id of a constant's or lasting node -> (memory, offset)
        self._files = files_of(r.tensor.node.source for r in prepared.residents.values() if r.form == "mapped")
        for r in prepared.residents.values():
            self._base[id(r.tensor.node)] = self._mapped(r) if r.form == "mapped" else (WEIGHTS, r.offset)
        self._place_lasting()
        weights.load(list(prepared.residents.values()), self.memories[WEIGHTS].array, packers(prepared.n_threads), progress)
        self.inputs = {n.name: self._array(n.outputs[0]) for n in layout.leaves if n.kind == "input"}
        self.outputs = [self._array(t) for t in layout.outputs]
        self._recorded: OrderedDict[Any, list[Part]] = OrderedDict()
        self._fixed: dict[tuple[int, int], View] = {}
        self._fallbacks = {i: Fallback(self, n) for i, n in enumerate(layout.steps) if not prepared.has_kernel(n)}
        self._timed, self._seconds = False, [0.0] * len(layout.steps)

    # -- memory -------------------------------------------------------------------------------------------------------

    def _mapped(self, r: Resident) -> tuple[int, int]:
        """Return where a constant of a mapped file lies: the file's own pages, or a copy where the device cannot read those."""
        view = weights.mapped_view(r).reshape(-1).view(np.uint8)
        memory = self.device.mapped(view)
        if memory is None:
            memory = self.device.allocate(view.nbytes)
            memory.array[:] = view
        self.memories.append(memory)
        return len(self.memories) - 1, 0

    def _codebooks(self) -> tuple[Memory, int, int] | None:
        """Return the grids that weights of IQ1 to IQ3 are looked up in, if there are such weights."""
        if not any(r.dtype.name in codebooks.BOOKS for r in self.prepared.residents.values()):
            return None
        grids = codebooks.block()
        memory = self.device.allocate(grids.nbytes)
        memory.array[:] = grids
        return memory, 0, grids.nbytes

    def _place_lasting(self) -> None:
        """Give states and tables their places."""
        self.states, self.tables = {}, {}
        for t in self.prepared.lasting:
            offset = self.prepared.places[t.name]
            self._base[id(t.node)] = LASTING, offset
            memory = self.memories[LASTING].array[offset : offset + t.nbytes_max]
            if t.node.kind == "state":
                self.states[t.name] = HostState(t, memory)
            else:
                self.tables[t.name] = memory.view(np.int32).reshape([int(a) for a in t.shape])

    def _root(self, t: Tensor) -> tuple[int, int]:
        """Return (memory, offset) of the tensor that owns this one's memory."""
        root = self.prepared.layout.of(t).root
        return self._base.get(id(root.node)) or (ARENA, self.prepared.layout.offsets[id(root)])

    def place_of(self, t: Tensor) -> tuple[int, int, Any]:
        """Return (number of the memory, offset in `memory_of`, format) of a tensor."""
        place = self.prepared.layout.of(t)
        resident = self.prepared.residents.get(id(place.root.node))
        return self._root(t)[0], place.offset, resident.dtype if resident else t.dtype

    def memory_of(self, t: Tensor) -> np.ndarray:
        """Return the bytes from the start of the tensor that owns this one's memory."""
        number, start = self._root(t)
        return self.memories[number].array[start:]

    def _array(self, t: Tensor) -> np.ndarray:
        """Return the array over a tensor's memory, run-time axes at their largest."""
        if is_changed_state(t):
            return NO_NUMBERS
        place = self.prepared.layout.of(t)
        if place.root.node.kind not in ("op", "input"):
            raise GraphError(f"output {t!r} is a constant or a state: it has no place in the arena")
        memory = self.memory_of(t)[place.offset : place.offset + t.nbytes_max]
        return memory.view(NUMPY[t.dtype.name]).reshape([axis_max(a) for a in t.shape])

    # -- recording ----------------------------------------------------------------------------------------------------

    def _view(self, t: Tensor, dims: dict[str, int]) -> View:
        """Return where a tensor lies when the run-time axes have these values; those without such axes are kept."""
        key = id(t.node), t.index
        if key in self._fixed:
            return self._fixed[key]
        place = self.prepared.layout.of(t)
        number, start = self._root(t)
        held = self.prepared.residents.get(id(place.root.node))
        shape, strides = (tuple(axis_value(a, dims) for a in axes) for axes in (t.shape, place.strides))
        nbytes = held.nbytes if held and held.dtype.is_packed else extent(shape, strides, t.dtype)
        found = View(number, start + place.offset, held.dtype if held else t.dtype, shape, strides, nbytes)
        if not any(isinstance(a, Dim) for a in (*t.shape, *place.strides)):
            self._fixed[key] = found
        return found

    def _step(self, number: int, dims: dict[str, int]) -> list[Launch]:
        node, (offset, nbytes) = self.prepared.layout.steps[number], self.prepared.layout.scratch[number]
        inputs, outputs = arguments(node)
        scratch = View(ARENA, offset, I8, (nbytes,), (1,), nbytes) if nbytes else None
        views = {name: [self._view(t, dims) for t in parts] for name, parts in zip(node.op.args, inputs)}
        results = [self._view(t, dims) for parts in outputs for t in parts]
        return LAUNCHERS[node.op.name](Step(node.op.name, views, results, params_of(node.op, dict(node.params)), scratch))

    def _parts(self, begin: int, end: int, dims: dict[str, int]) -> list[Part]:
        """Record steps begin .. end - 1, cut at each step without a kernel."""
        parts: list[Part] = []
        bound: list[Bound] = []
        steps: list[int] = []
        first = begin

        def close(until: int) -> None:
            nonlocal bound, steps, first
            if bound:
                parts.append(Part(first, until, self.device.record(bound), steps, None))
            bound, steps, first = [], [], until

        for i in range(begin, end):
            if i in self._fallbacks:
                close(i)
                parts.append(Part(i, i + 1, None, [i], self._fallbacks[i]))
                first = i + 1
                continue
            extra = {"fault": (self.memories[FAULTS], i * FAULT.itemsize, FAULT.itemsize), "books": self._books}
            found = [bind(one, self.memories, extra) for one in self._step(i, dims)]
            bound += found
            steps += [i] * len(found)
        close(end)
        return parts

    def _recording(self, begin: int, end: int, dims: dict[str, int]) -> list[Part]:
        key = (begin, end, *dims.values())
        if key not in self._recorded:
            self._recorded[key] = self._parts(begin, end, dims)
            while len(self._recorded) > RECORDINGS:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        return self._recorded[key]

    # -- running ------------------------------------------------------------------------------------------------------

    def execute(self, entry: str | None = None, turn: int | None = None, **dims: int) -> None:
        """Replay on what stands in the inputs, from the beginning or an entry; only one `turn`, where a layout has several.

        Raises: RequestError for run-time numbers out of range (ids, cells); GraphError for what kernels refuse; InvalidModelError
        where weights are read in a file that was cut or written to.
        """
        values = {n: dims[n] for n in self.dim_names}
        first, turns = 0 if entry is None else self.prepared.entry_step(entry), self.prepared.layout.turns
        for begin, end in turns if turn is None else [turns[turn]]:
            if first < end:
                for part in self._recording(max(begin, first), end, values):
                    self._run(part, values)
        for file in self._files:
            file.check()

    def _run(self, part: Part, values: dict[str, int]) -> None:
        if part.fallback is not None:
            started = time.perf_counter()
            part.fallback.run(None, list(values.values()), 0)
            if self._timed:
                self._seconds[part.begin] += time.perf_counter() - started
            return
        part.recording.run(self._timed)
        self._check_faults(part.begin, part.end)
        if self._timed:
            for number, seconds in zip(part.steps, part.recording.seconds()):
                self._seconds[number] += seconds

    def _check_faults(self, begin: int, end: int) -> None:
        """Raise what the first step of these found wrong, and forget it."""
        bad = np.flatnonzero(self._faults["status"][begin:end])
        if bad.size:
            number = begin + int(bad[0])
            value, limit = int(self._faults["value"][number]), int(self._faults["limit"][number])
            self._faults[begin:end] = 0
            raise RequestError(said(self.prepared.layout.steps[number].op.name, value, limit))

    def resident(self) -> int:
        """Return the bytes of its memory that are there already."""
        return sum(resident(m.array.ctypes.data, m.array.nbytes) for m in self.memories[:FAULTS])

    def profile(self, on: bool) -> None:
        """Start (and reset) or stop the clock of each step."""
        self._timed, self._seconds = on, [0.0] * len(self._seconds)

    def seconds(self) -> list[tuple[Node, float]]:
        """Return steps with the seconds spent in each since `profile(True)`."""
        return list(zip(self.prepared.layout.steps, self._seconds))
