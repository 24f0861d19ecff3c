"""Memory plan of a graph: which tensors share memory, when each lives, and its fixed offset in one arena.

Pure functions: no device, no data. A step's result may take over the memory of an argument (`inplace`), a view has none of
its own, and a modified state is the state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from typing import Any

from pyengine import ops
from pyengine.compiler.rewrite import make, rebuild
from pyengine.dtype import DType
from pyengine.errors import GraphError
from pyengine.graph.graph import check_names, check_states, topological
from pyengine.graph.tensor import Axis, axis_max, Node, product, Shape, Tensor
from pyengine.records import dataclass, NamedTuple

ALIGN = 64                                                                     # bytes: one cache line, one AVX-512 vector
RED_ZONES = os.environ.get("PYENGINE_RED_ZONES") == "1"                        # a free line behind each tensor, for sanitized builds


def aligned(nbytes: int) -> int:
    """Round `nbytes` up to a multiple of ALIGN; with RED_ZONES, one more."""
    return (-(-nbytes // ALIGN) + (RED_ZONES and nbytes > 0)) * ALIGN


class Interval(NamedTuple):
    """`size` bytes that are in use from step `start` to step `end`, both included."""

    start: int
    end: int
    size: int


def place(intervals: Sequence[Interval]) -> tuple[list[int], int]:
    """Return offsets such that no two intervals that overlap in time overlap in memory, and the total; largest first, best fit.

    Source: greedy by size, Pisarchyk and Lee 2020, arXiv:2001.03288, section 5.3.
    """
    offsets = [0] * len(intervals)
    first = min((i.start for i in intervals), default=0)
    live: list[list[int]] = [[] for _ in range(max((i.end for i in intervals), default=0) - first + 1)]   # placed numbers, by step
    total = 0
    for i in sorted(range(len(intervals)), key=lambda i: (-intervals[i].size, i)):
        want = intervals[i]
        if want.size == 0:
            continue
        steps = live[want.start - first : want.end - first + 1]
        best, best_gap, cursor = None, None, 0
        for start, end in sorted((offsets[j], offsets[j] + intervals[j].size) for j in set().union(*steps)):
            gap = start - cursor
            if gap >= aligned(want.size) and (best_gap is None or gap < best_gap):
                best, best_gap = cursor, gap
            cursor = max(cursor, aligned(end))
        offsets[i] = cursor if best is None else best
        for step in steps:
            step.append(i)
        total = max(total, offsets[i] + want.size)
    return offsets, aligned(total)


class Storage(NamedTuple):
    """Where a tensor's elements are: `root` owns the memory, `offset` bytes into it, strides in bytes."""

    root: Tensor
    offset: int
    strides: tuple[Axis, ...]


def contiguous_strides(shape: Shape, dtype: DType) -> tuple[Axis, ...]:
    """Return row-major strides in bytes; the last axis of a block format steps by one block."""
    strides: list[Axis] = []
    for i in range(len(shape)):
        if i == len(shape) - 1:
            strides.append(dtype.nbytes)
            continue
        n = product(shape[i + 1 :])
        blocks = n if dtype.block == 1 else n // dtype.block
        strides.append(blocks * dtype.nbytes)
    return tuple(strides)


@dataclass(frozen=True)
class Turns:
    """A graph that runs in several turns; between them another device runs, and values are copied from outputs and into inputs.

    outputs   the turn that computes each output, not falling: 0 0 1 2 ..
    kept      whether an output is read when the last turn is over; else when its own is
    arrivals  the turn before which an input is written, by its name; the others are written before the first
    """

    outputs: tuple[int, ...]
    kept: tuple[bool, ...]
    arrivals: dict[str, int]


@dataclass
class Layout:
    """A graph ready for a backend: steps in order, storage of each tensor, arena offsets of the roots in it."""

    outputs: list[Tensor]
    leaves: list[Node]
    steps: list[Node]
    storage: dict[tuple[int, int], Storage]
    lives: dict[int, tuple[Tensor, Interval]] = field(default_factory=dict)    # id of root tensor in the arena -> when it is needed
    offsets: dict[int, int] = field(default_factory=dict)                      # id of root tensor -> arena offset
    scratch: list[tuple[int, int]] = field(default_factory=list)               # per step: (arena offset, bytes)
    arena_bytes: int = 0
    turns: list[tuple[int, int]] = field(default_factory=list)                 # (first step, first of the next turn)

    def of(self, t: Tensor) -> Storage:
        return self.storage[id(t.node), t.index]

    def entry_step(self, names: Sequence[str]) -> int:
        """Return the number of the first step that reads one of some inputs. Raises: GraphError where none does."""
        for i, node in enumerate(self.steps):
            if any(self.of(t).root.node.kind == "input" and self.of(t).root.name in names for t in node.inputs):
                return i
        raise GraphError(f"no step reads the input {' or '.join(map(repr, names))}, so no run can begin there")

    def place(self, scratch: Sequence[int]) -> tuple[list[int], int]:
        """Return offsets of the tensors of `lives`, then of each step's working memory of these sizes, and the arena's bytes."""
        return place([*(i for _, i in self.lives.values()), *(Interval(i, i, n) for i, n in enumerate(scratch))])

    def busiest(self) -> list[tuple[str, int]]:
        """Return what shares the arena at the step that needs most memory, as (name, bytes); the rest is gaps between them."""
        if not self.steps:
            return []
        need = [n for _, n in self.scratch]
        for _, i in self.lives.values():
            for step in range(max(i.start, 0), min(i.end, len(need) - 1) + 1):
                need[step] += i.size
        step = max(range(len(need)), key=lambda i: need[i])
        name = self.steps[step].op.name
        held = [(_label(t), i.size) for t, i in self.lives.values() if i.start <= step <= i.end]
        parts = [*sorted(held, key=lambda part: -part[1]), (f"working memory of {name}", self.scratch[step][1])]
        return [*((n, size) for n, size in parts if size), ("gaps and alignment", self.arena_bytes - need[step])]


def _label(t: Tensor) -> str:
    shape = " x ".join(str(axis_max(a)) for a in t.shape)
    return f"{t.name if t.node.op is None else 'result of ' + t.node.op.name} [{shape}]"


def _view(t: Tensor, source: Storage, x: Tensor, params: dict[str, Any]) -> Storage | None:
    """Return the storage of a view of x, or None when it needs a copy (a reshape of something that is not contiguous)."""
    kind = t.node.op.view
    if kind == "reshape":
        if source.strides != contiguous_strides(x.shape, x.dtype):
            return None
        return Storage(source.root, source.offset, contiguous_strides(t.shape, t.dtype))
    if kind == "transpose":
        return Storage(source.root, source.offset, tuple(source.strides[a] for a in params["axes"]))
    step = source.strides[params["axis"]]
    if params["start"] and not isinstance(step, int):
        raise GraphError(f"slice: axis {params['axis']} of {x.shape} has a step that is known only at run time; copy it first")
    return Storage(source.root, source.offset + (params["start"] * step if params["start"] else 0), source.strides)


def lay_out(outputs: Sequence[Tensor], scratch_bytes: Callable[[Node], int], turns: Turns | None = None,
            entries: Iterable[Sequence[str]] = ()) -> Layout:
    """Order the graph, resolve views and reuse of memory, and give everything its place in the arena.

    `scratch_bytes(node)`: working memory of a kernel at the largest shapes. Tensors that must be contiguous for their
    reader and are not get a `contiguous` step. Changed states among the outputs, which no op may read, are computed as soon as they
    can be: before the other outputs. `turns`: the graph runs in pieces; one that runs at once is a single turn. `entries`: of each, names of inputs at whose first reader a run may begin again, on what all steps before it left.
    Raises: GraphError for an entry that no step reads, and for graphs that cannot be laid out.
    """
    outputs = _with_copies(outputs)
    turn_of = turns.outputs if turns else (0,) * len(outputs)
    nodes = topological([outputs[i] for i in sorted(range(len(outputs)), key=lambda i: (turn_of[i], not is_changed_state(outputs[i])))])
    check_names(nodes)
    check_states(nodes)
    leaves = [n for n in nodes if n.op is None]
    steps = [n for n in nodes if n.op is not None and not n.op.view]
    number = {id(n): i for i, n in enumerate(steps)}
    layout = Layout(list(outputs), leaves, steps, _storage(nodes))
    turns = turns or Turns((0,) * len(outputs), (True,) * len(outputs), {})
    layout.turns = _turns(layout, number, turns)
    last = _last_reads(layout, turns)
    _keep(layout, number, last, entries)
    _reuse(layout, number, last)
    for node in nodes:
        for t in node.outputs:
            root = layout.of(t).root
            if root.node.kind in ("op", "input") and id(root) not in layout.lives:
                arrival = turns.arrivals.get(root.name, 0) if root.node.kind == "input" else 0
                first = number.get(id(root.node), layout.turns[arrival][0] if arrival else -1)
                layout.lives[id(root)] = root, Interval(first, max(last.get(id(root), first), first), root.nbytes_max)
    sizes = [scratch_bytes(n) for n in steps]
    offsets, layout.arena_bytes = layout.place(sizes)
    layout.offsets = dict(zip(layout.lives, offsets))
    layout.scratch = list(zip(offsets[len(layout.lives) :], sizes))
    return layout


def is_changed_state(t: Tensor) -> bool:
    """Say whether a tensor is the result of an op that changes a state in place; as an output it stays where it is."""
    return t.node.op is not None and not t.node.op.results[0].many and t.node.op.results[t.index].kind == "Same"


def _with_copies(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Insert copies: of strided views where an op, or whoever reads an output, wants contiguous ones."""
    strided_views: dict[tuple[int, int], bool] = {}

    def needs_copy(node: Node, args: tuple[Any, ...]) -> Any:
        strides = node.op.view in ("transpose", "slice")
        if not strided_views and not strides:
            return None
        names = list(node.op.args)
        fixed = []
        for name, arg in zip(names, args):
            parts = arg if isinstance(arg, tuple) else (arg,)
            parts = tuple(
                make(ops.contiguous, (t,), {})[0]
                if t is not None and strided_views.get((id(t.node), t.index)) and name not in node.op.strided else t
                for t in parts
            )
            fixed.append(parts if isinstance(arg, tuple) else parts[0])
        changed = any(a is not b for a, b in zip(fixed, args)) or tuple(fixed) != node.args
        out = node.with_args(tuple(fixed)).outputs if changed else node.outputs
        if strides:
            strided_views[id(out[0].node), 0] = True
        return out

    outputs = rebuild(outputs, needs_copy)
    return [make(ops.contiguous, (t,), {})[0] if strided_views.get((id(t.node), t.index)) else t for t in outputs]


def _storage(nodes: Sequence[Node]) -> dict[tuple[int, int], Storage]:
    """Return where each tensor's elements are before any memory is reused: views in their sources, changed states in the states."""
    storage: dict[tuple[int, int], Storage] = {}
    for node in nodes:
        if node.op is not None and node.op.view:
            x, t = node.args[0], node.outputs[0]
            view = _view(t, storage[id(x.node), x.index], x, dict(node.params))
            if view is None:
                raise GraphError(f"reshape: {x.shape} is a strided view that cannot be reshaped without a copy")
            storage[id(node), 0] = view
            continue
        for t in node.outputs:
            storage[id(node), t.index] = Storage(t, 0, contiguous_strides(t.shape, t.dtype))
        for spec, t in zip(node.op.results if node.op else (), node.outputs):
            if spec.kind == "Same":
                source = node.op.argument(node.args, spec.axes[0])
                storage[id(node), t.index] = storage[id(source.node), source.index]
    return storage


def _last_reads(layout: Layout, turns: Turns) -> dict[int, int]:
    """Return the last step that reads each root's memory, by its id; for outputs, the one after the last step or their turn's."""
    last = {id(layout.of(t).root): i for i, node in enumerate(layout.steps) for t in node.inputs}
    for t, turn, kept in zip(layout.outputs, turns.outputs, turns.kept):
        root = id(layout.of(t).root)
        last[root] = max(last.get(root, 0), len(layout.steps) if kept else layout.turns[turn][1])
    return last


def _keep(layout: Layout, number: dict[int, int], last: dict[int, int], entries: Iterable[Sequence[str]]) -> None:
    """Keep until the end what steps from an entry on read of those before it; its own inputs are written again."""
    for names in entries:
        begin = layout.entry_step(names)
        for node in layout.steps[begin:]:
            for t in node.inputs:
                root = layout.of(t).root
                if root.name not in names and number.get(id(root.node), -1) < begin:
                    last[id(root)] = len(layout.steps)


def _turns(layout: Layout, number: dict[int, int], turns: Turns) -> list[tuple[int, int]]:
    """Return the first step of each turn, and of the next. Steps are in the order that outputs need, so a turn's are adjacent."""
    ends = [0] * (max(turns.outputs, default=0) + 1)
    for t, turn in zip(layout.outputs, turns.outputs):
        while t.node.op is not None and t.node.op.view:
            t = t.node.args[0]
        ends[turn] = max(ends[turn], ends[turn - 1] if turn else 0, number.get(id(t.node), -1) + 1)
    return list(zip([0, *ends], ends))


def _reuse(layout: Layout, number: dict[int, int], last: dict[int, int]) -> None:
    """Let results take over the memory of arguments that nobody reads afterwards."""
    moved: dict[int, Tensor] = {}                                              # id of old root -> its new root
    views: dict[int, list[tuple[int, int]]] = {}                               # id of root -> tensors in its memory
    for key, s in layout.storage.items():
        views.setdefault(id(s.root), []).append(key)

    for node in layout.steps:
        name = node.op.inplace
        if name is None or any(t.index == 0 and layout.of(t).root is not t for t in node.outputs[:1]):
            continue
        arg, t = node.op.argument(node.args, name), node.outputs[0]
        if arg is None or isinstance(arg, tuple) or arg.shape != t.shape or arg.dtype != t.dtype:
            continue
        place_ = layout.of(arg)
        root = moved.get(id(place_.root), place_.root)
        if root.node.kind != "op" or place_.offset or place_.strides != contiguous_strides(t.shape, t.dtype):
            continue
        if root.nbytes_max != t.nbytes_max or last[id(root)] != number[id(node)]:
            continue
        same = [u for u in node.inputs if moved.get(id(layout.of(u).root), layout.of(u).root) is root]
        if len(same) > 1:
            continue
        moved[id(t)] = root
        last[id(root)] = last.get(id(t), number[id(node)])
        for key in views[id(t)]:
            s = layout.storage[key]
            layout.storage[key] = Storage(root, s.offset, s.strides)
        views[id(root)] += views.pop(id(t))
