"""A program in a card's memory: turns that are one call into C each, replayed as graphs; steps without a kernel go to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyengine.backends import base, faults
from pyengine.backends.cpu.program import pool
from pyengine.backends.cuda import codebooks, weights
from pyengine.backends.cuda.describe import Described
from pyengine.backends.cuda.fallback import Fallback
from pyengine.backends.cuda.library import Memory, Queue
from pyengine.backends.cuda.states import DeviceState
from pyengine.backends.host import NO_NUMBERS, NUMPY
from pyengine.backends.prepared import arguments
from pyengine.compiler.arena import ALIGN, is_changed_state
from pyengine.compiler.codegen import pack_params
from pyengine.errors import GraphError, PlanError, RequestError
from pyengine.graph.tensor import Axis, axis_max, axis_value, Dim, Node, product, Tensor
from pyengine.native import ffi

_STATUS = {1: GraphError, 2: GraphError, 3: RequestError, 4: PlanError, 5: GraphError}     # by pe_status

Transfer = tuple[int, int, int, Sequence[Axis], int]         # see `Described.transfers`


class Compiled:
    """Some steps of a program as C has them, with what a run sends before and fetches after them. memories: kept while it lives."""

    def __init__(self, queue: Queue, described: Described, n_steps: int, sends: Any, fetches: Any, memories: Sequence[Memory]):
        self.queue, self.n_steps = queue, n_steps
        tensors, nodes = described.arrays()
        fault_bytes = int(queue.own.flat.pe_card_fault_bytes(max(1, n_steps)))
        self._faults = Memory(queue.own, queue.device, fault_bytes, pinned=True)
        self._memories, self._outcome, out = list(memories), ffi.new("pe_card_outcome *"), ffi.new("pe_card_program **")
        queue.own("program_new", queue.handle, tensors, len(tensors), nodes, len(nodes), len(described.dims), sends, len(sends),
                  fetches, len(fetches), self._faults.address, out)
        self.handle = out[0]

    def run(self, dims: Any, first: int) -> tuple[int, Any]:
        """Do the steps from `first` on; returns (status, what it says)."""
        return int(self.queue.own.flat.pe_card_program_run(self.handle, dims, first, self._outcome)), self._outcome

    def profile(self, on: bool) -> None:
        """Start (and reset) or stop the clock of each step."""
        self.queue.own("program_profile", self.handle, int(on))

    def seconds(self) -> list[float]:
        """Return the seconds spent in each step since `profile(True)`."""
        out = ffi.new("double[]", max(1, self.n_steps))
        self.queue.own("program_seconds", self.handle, out)
        return list(out)[: self.n_steps]

    def graphs(self) -> tuple[int, int]:
        """Return how many runs were replayed, and how many graphs are held."""
        replayed, held = ffi.new("int64_t *"), ffi.new("int32_t *")
        self.queue.own("program_graphs", self.handle, replayed, held)
        return int(replayed[0]), int(held[0])

    def __del__(self) -> None:
        handle, self.handle = getattr(self, "handle", None), None
        if handle is not None:
            self.queue.own.flat.pe_card_program_free(handle)


class Run(NamedTuple):
    """Steps begin .. end - 1 in C, or one step that the reference computes; without steps, what is sent or fetched around them."""

    begin: int
    end: int
    does: Compiled | Fallback


class Program(base.Program):
    """A compiled graph with its memory: see `base.Program`. Made by `cuda.prepared.Prepared.load`.

    Inputs and outputs are pinned arrays of the host, each with a place in the arena that a run copies it to or from. A table is an array
    of the host; what of it changed since the last run is sent before the next.
    """

    def __init__(self, prepared: Any, progress: base.Progress | None):
        layout, backend = prepared.layout, prepared.own
        self.prepared, self.own = prepared, backend.own
        self.queue = Queue(self.own, backend.index)
        self.arena, self.weights, self.state_memory = (
            Memory(self.own, backend.index, n) for n in (max(prepared.arena_bytes, ALIGN), prepared.weight_bytes, prepared.state_bytes))
        self.dim_names = sorted({a.name for n in [*layout.leaves, *layout.steps] for t in n.outputs for a in t.shape
                                 if isinstance(a, Dim)})
        self._dims = ffi.new("int64_t[]", max(1, len(self.dim_names)))
        self.states, self.tables, self._places = {}, {}, {}
        self._shadows: list[tuple[int, np.ndarray, np.ndarray]] = []           # address of a table, the table, what was sent of it
        for t in prepared.lasting:
            offset = prepared.places[t.name]
            self._places[id(t.node)] = self.state_memory.address + offset
            if t.node.kind == "state":
                self.states[t.name] = DeviceState(t, self.state_memory, offset, self.queue)
            else:
                self.tables[t.name] = np.zeros([int(a) for a in t.shape], np.int32)
                shadow = self._pinned(t.nbytes_max).array()
                self.queue.copy(self._places[id(t.node)], shadow.ctypes.data, t.nbytes_max)
                self._shadows.append((self.state_memory.address + offset, self.tables[t.name], shadow))
        self._load(progress)
        inputs = [n.outputs[0] for n in layout.leaves if n.kind == "input"]
        self.inputs = {t.name: self._host_array(t) for t in inputs}
        self._leaves, self._met = {t.name: t for t in inputs}, {self.queue.device}
        self.outputs = [self._host_array(t) for t in layout.outputs]
        self._turns = [self._runs(number, begin, end) for number, (begin, end) in enumerate(layout.turns)]

    def _pinned(self, nbytes: int) -> Memory:
        return Memory(self.own, self.queue.device, max(nbytes, ALIGN), pinned=True)

    def _host_array(self, t: Tensor) -> np.ndarray:
        """Return a pinned array for a tensor, run-time axes at their largest."""
        if is_changed_state(t):
            return NO_NUMBERS
        if self.prepared.layout.of(t).root.node.kind not in ("op", "input"):
            raise GraphError(f"output {t!r} is a constant or a state: it has no place in the arena")
        return self._pinned(t.nbytes_max).array()[: t.nbytes_max].view(NUMPY[t.dtype.name]).reshape([axis_max(a) for a in t.shape])

    def _load(self, progress: base.Progress | None) -> None:
        """Send the weights, and the grids of formats that have some."""
        prepared = self.prepared
        weights.load(list(prepared.residents.values()), self.weights.address, self.queue, pool(prepared.own.n_threads), progress)
        if prepared.codebooks:
            grids, place = codebooks.block(), self.weights.address + prepared.weight_bytes - prepared.codebooks
            self.queue.copy(place, grids.ctypes.data, grids.nbytes)
            self.queue.wait()
            self.own("set_codebooks", self.queue.handle, place)

    # -- building -----------------------------------------------------------------------------------------------------

    def _runs(self, turn: int, begin: int, end: int) -> list[Run]:
        """Divide the steps of a turn into runs, cut at each step without a kernel; the first one sends, and the last one fetches."""
        steps, cuts = self.prepared.layout.steps, []
        for i in range(begin, end):
            if not self.prepared.has_kernel(steps[i]):
                cuts.append(i)
        sends, fetches = self._sends(turn, begin), self._fetches(turn, begin)
        if not cuts:
            return [Run(begin, end, self._compiled(begin, end, sends, fetches))]
        runs, first = [Run(begin, begin, self._compiled(begin, begin, sends, []))], begin
        for i in cuts:
            runs += [Run(first, i, self._compiled(first, i, [], []))] if first < i else []
            runs.append(Run(i, i + 1, Fallback(self, steps[i])))
            first = i + 1
        runs += [Run(first, end, self._compiled(first, end, [], []))] if first < end else []
        return [*runs, Run(begin, begin, self._compiled(begin, begin, [], fetches))]

    def _sends(self, turn: int, begin: int) -> list[Transfer]:
        """List the inputs that have arrived when a turn begins and that it or a later one reads: their memory is theirs till then."""
        layout, turns, last = self.prepared.layout, self.prepared.turns, {}
        for i, node in enumerate(layout.steps):
            last |= {id(layout.of(t).root): i + 1 for t in node.inputs}
        last |= {id(layout.of(t).root): len(layout.steps) + 1 for t in layout.outputs}
        out = []
        for node in layout.leaves:
            t = node.outputs[0]
            if t.name in self.prepared.taken:
                continue                                                       # comes once, by `take`, and stays until it has been read
            if node.kind == "input" and last.get(id(t), 0) > begin and (turns.arrivals.get(t.name, 0) if turns else 0) <= turn:
                out.append((self.inputs[t.name].ctypes.data, self.address_of(t), t.dtype.nbytes, t.shape, last[id(t)] - begin))
        return out

    def _fetches(self, turn: int, begin: int) -> list[Transfer]:
        """List the outputs of a turn, but for those that are asked for or that only other devices read."""
        layout, turns = self.prepared.layout, self.prepared.turns
        number = {id(node): i for i, node in enumerate(layout.steps)}
        stay, out = self.prepared.asked | self.prepared.kept, []
        for i, (t, array) in enumerate(zip(layout.outputs, self.outputs)):
            if (turns.outputs[i] if turns else 0) == turn and i not in stay and not is_changed_state(t):
                maker = t
                while maker.node.op is not None and maker.node.op.view:
                    maker = maker.node.args[0]
                made = number.get(id(maker.node), len(layout.steps))
                out.append((array.ctypes.data, self.address_of(t), t.dtype.nbytes, t.shape, made + 1 - begin))
        return out

    def _compiled(self, begin: int, end: int, sends: list[Transfer], fetches: list[Transfer]) -> Compiled:
        """Describe steps begin .. end - 1 to C."""
        layout = self.prepared.layout
        made = Described({name: i for i, name in enumerate(self.dim_names)})
        number: dict[tuple[int, int], int] = {}
        for step, (scratch, scratch_bytes) in zip(layout.steps[begin:end], layout.scratch[begin:end]):
            inputs, outputs = arguments(step)
            for t in (t for parts in (*inputs, *outputs) for t in parts if (id(t.node), t.index) not in number):
                number[id(t.node), t.index] = made.tensor(self.address_of(t), self.dtype_of(t).id, t.shape, layout.of(t).strides)
            ids = [[[number[id(t.node), t.index] for t in parts] for parts in args] for args in (inputs, outputs)]
            made.node(step.op.name, *ids, pack_params(step.op, dict(step.params)), self.arena.address + scratch, scratch_bytes)
        return Compiled(self.queue, made, end - begin, made.transfers(sends), made.transfers(fetches),
                        [self.arena, self.weights, self.state_memory])

    def part(self, begin: int, end: int) -> Compiled:
        """Return steps begin .. end - 1 by themselves, with nothing sent or fetched: what a benchmark replays."""
        return self._compiled(begin, end, [], [])

    def address_of(self, t: Tensor) -> int:
        """Return where a tensor lies on the device."""
        place = self.prepared.layout.of(t)
        node, resident = place.root.node, self.prepared.residents.get(id(place.root.node))
        if resident:
            return self.weights.address + resident.offset + place.offset
        lasting = self._places.get(id(node))
        return place.offset + (lasting if lasting is not None else self.arena.address + self.prepared.layout.offsets[id(place.root)])

    def dtype_of(self, t: Tensor) -> Any:
        """Return the format of a tensor as it lies there."""
        resident = self.prepared.residents.get(id(self.prepared.layout.of(t).root.node))
        return resident.dtype if resident else t.dtype

    # -- running ------------------------------------------------------------------------------------------------------

    def execute(self, entry: str | None = None, turn: int | None = None, **dims: int) -> None:
        """Replay on what stands in the inputs, from the beginning or an entry; only one `turn`, where a layout has several.

        Raises: RequestError for run-time numbers out of range (ids, cells); GraphError for what kernels refuse; PyEngineError for what
        the driver says.
        """
        for i, name in enumerate(self.dim_names):
            self._dims[i] = dims[name]
        first = 0 if entry is None else self.prepared.entry_step(entry)
        for address, table, shadow in self._shadows:
            self.own("send_changes", self.queue.handle, address, ffi.cast("void *", table.ctypes.data),
                     ffi.cast("void *", shadow.ctypes.data), table.nbytes)
        for runs in self._turns if turn is None else (self._turns[turn],):
            for begin, end, does in runs:
                if first >= end > begin:
                    continue
                status, said = does.run(self._dims, max(0, first - begin))
                if status:
                    raise self._error(status, begin, said)

    def take(self, name: str, giver: base.Program, output: int, dims: dict[str, int]) -> None:
        """Copy an input from where another device's program, which has run, has an output; it is there on return."""
        if not isinstance(giver, Program) or name not in self._leaves:
            raise GraphError(f"{self!r} takes no '{name}' from {giver!r}")
        if giver.queue.device not in self._met:
            self.own("meet", self.queue.device, giver.queue.device)
            self._met.add(giver.queue.device)
        t = self._leaves[name]
        nbytes = axis_value(product(t.shape), dims) * t.dtype.nbytes
        self.queue.copy(self.address_of(t), giver.address_of(giver.prepared.layout.outputs[output]), nbytes)
        self.queue.wait()                                                      # the giver's next turn may write there

    def read(self, output: int, first: int, n: int) -> np.ndarray:
        """Return rows of an output of the last run, which come now if they were declared to be asked for."""
        rows = self.outputs[output][first : first + n]
        if output in self.prepared.asked and rows.size:
            t = self.prepared.layout.outputs[output]
            step = int(self.prepared.layout.of(t).strides[0])
            self.queue.copy(rows.ctypes.data, self.address_of(t) + first * step, rows.nbytes)
            self.queue.wait()
        return rows

    def _error(self, status: int, begin: int, said: Any) -> Exception:
        if status not in _STATUS:
            return self.own.error(status)
        name = self.prepared.layout.steps[begin + said.node].op.name if said.node >= 0 else "?"
        if said.seen:
            return _STATUS[status](faults.said(name, said.value, said.limit))
        text = ffi.string(said.message).decode("utf-8", "replace")
        return _STATUS[status](f"{name}: {text or 'the kernel refused its arguments'}")

    def resident(self) -> int:
        """Return the bytes of main memory that are taken: inputs, outputs and tables."""
        return int(self.prepared.host_bytes)

    def graphs(self) -> tuple[int, int]:
        """Return how many runs were replayed as graphs, and how many graphs are held."""
        found = [run.does.graphs() for runs in self._turns for run in runs if isinstance(run.does, Compiled)]
        return sum(n for n, _ in found), sum(n for _, n in found)

    def profile(self, on: bool) -> None:
        """Start (and reset) or stop the clock of each step."""
        for runs in self._turns:
            for run in runs:
                run.does.profile(on)

    def seconds(self) -> list[tuple[Node, float]]:
        """Return steps with the seconds spent in each since `profile(True)`."""
        spent = (s for runs in self._turns for run in runs for s in run.does.seconds())
        return list(zip(self.prepared.layout.steps, spent))
