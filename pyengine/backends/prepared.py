"""What is counted alike for every device: the fused graph laid out, where constants lie, states, and steps without a kernel."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from pyengine.backends.base import Declared, Prepared
from pyengine.compiler import passes as fusion
from pyengine.compiler.arena import aligned, lay_out, Layout, Turns
from pyengine.dtype import DType
from pyengine.errors import GraphError
from pyengine.files.weights import DerivedRef
from pyengine.graph.graph import topological
from pyengine.graph.tensor import Node, Tensor
from pyengine.records import dataclass

States = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Resident:
    """A constant as it will lie in memory: packed, converted to float32, or read where the file is mapped."""

    tensor: Tensor
    dtype: DType
    form: str                    # packed | plain | mapped
    nbytes: int
    offset: int = 0
    sparse: bool = False         # matrices of experts, of which a row reads some

    @property
    def name(self) -> str:
        """The tensor's name in the file; "" for a constant of the graph."""
        return self.tensor.name or ""

    @property
    def held(self) -> int:
        """Bytes that it takes on the device; none where it is read from the mapped file."""
        return 0 if self.form == "mapped" else aligned(self.nbytes)


def source_dtype(t: Tensor) -> DType:
    """Return the format in which a constant's numbers are given."""
    source = t.node.source
    return t.dtype if isinstance(source, np.ndarray) else source.dtype


def arguments(node: Node) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Return a kernel's inputs and its outputs, the tensors of each: one, none for what is left out, or those of a list."""
    inputs = [arg if isinstance(arg, tuple) else () if arg is None else (arg,) for arg in node.args]
    if node.op.results[0].many:
        return inputs, [tuple(node.outputs)]
    left_out: list[tuple[Tensor, ...]] = [()] * (len(node.op.results) - len(node.outputs))
    return inputs, [*((t,) for t in node.outputs), *left_out]


def placed(lasting: Sequence[Tensor], shapes: States = {}) -> tuple[dict[str, int], int]:
    """Return where each of these lies in memory, by name, and all bytes, if some had these shapes; states that share memory have one place."""
    places, shared, total = dict[str, int](), dict[str, int](), 0
    for t in lasting:
        memory = t.node.source if t.node.kind == "state" else None
        if memory in shared:
            places[t.name] = shared[memory]
            continue
        places[t.name] = total
        if memory is not None:
            shared[memory] = total
        total += aligned(t.dtype.size(math.prod(shapes.get(t.name, t.shape))))
    return places, total


class Counted(Prepared):
    """A prepared program whose backend says how weights are packed, and what its kernels need besides their arguments.

    kernels   names of the ops that the backend has; None: all
    in_place  weights in a packed form stay where their files are mapped, and are packed by each run
    """

    in_place: bool = False

    def __init__(self, declared: Declared, turns: Turns | None, passes: Sequence[str] | None, kernels: frozenset[str] | None):
        self.kernels = kernels
        self.fallbacks: dict[str, int] = {}
        fused = fusion.apply(declared.outputs, passes, kernels)
        self.residents = self._residents(topological(fused))
        self.layout: Layout = lay_out(fused, self.scratch_bytes, turns, declared.entries.values())
        self._first = {entry: self.layout.entry_step(names) for entry, names in declared.entries.items()}
        for node in self.layout.steps:
            if not self.has_kernel(node):
                self.fallbacks[node.op.name] = self.fallbacks.get(node.op.name, 0) + 1
        self.states = [n.outputs[0] for n in self.layout.leaves if n.kind == "state"]
        self.tables = [n.outputs[0] for n in self.layout.leaves if n.kind == "table"]
        self.arena_bytes = self.layout.arena_bytes
        self.weight_bytes = sum(r.held for r in self.residents.values())
        self.mapped_bytes = sum(r.nbytes for r in self.residents.values() if r.form == "mapped")
        self.places, self.state_bytes = placed(self.lasting)

    def __repr__(self) -> str:
        sizes = (("weights", self.weight_bytes), ("states", self.state_bytes), ("arena", self.arena_bytes))
        said = ", ".join(f"{n:,} bytes of {name}" for name, n in sizes if n)
        return f"Plan({len(self.layout.steps)} steps; {said or 'no memory'}; {self.operations:,} operations)"

    @property
    def operations(self) -> int:
        """Operations of the largest run, as ops declare them: a product and a sum are two; what only moves numbers has none."""
        return sum(int(node.op.flops(*node.args, **dict(node.params))) for node in self.layout.steps if node.op.flops)

    @abstractmethod
    def packed_bytes(self, dtype: DType, shape: Sequence[int]) -> int:
        """Return the bytes of a matrix [n, k] when packed, or of experts' matrices [e, n, k]; 0 where there is no packed form."""

    @abstractmethod
    def scratch_bytes(self, node: Node, states: States | None = None) -> int:
        """Return the working memory of a kernel at the largest shapes; with `states`, those of its caches are these."""

    def has_kernel(self, node: Node) -> bool:
        """Say whether the backend computes a step itself."""
        return self.kernels is None or node.op.name in self.kernels

    @property
    def lasting(self) -> list[Tensor]:
        """What outlives a run, in the order in which it lies in memory: states and tables."""
        return [n.outputs[0] for n in self.layout.leaves if n.kind in ("state", "table")]

    def entry_step(self, entry: str) -> int:
        """Return the number of the step at which an entry begins. Raises: GraphError for an entry that was not declared."""
        if entry not in self._first:
            raise GraphError(f"there is no entry {entry!r}; declared are {', '.join(self._first) or 'none'}")
        return self._first[entry]

    def resized(self, states: States) -> tuple[int, int]:
        """Return (bytes of the arena, bytes of all states and tables) if these had these shapes."""
        layout, sizes = self.layout, [n for _, n in self.layout.scratch]
        for i in self._stateful:
            sizes[i] = self.scratch_bytes(layout.steps[i], states)
        same = sizes == [n for _, n in layout.scratch]
        return layout.arena_bytes if same else layout.place(sizes)[1], placed(self.lasting, states)[1]

    @cached_property
    def _stateful(self) -> list[int]:
        """Numbers of the steps that read a state or table."""
        of = self.layout.of
        return [i for i, node in enumerate(self.layout.steps) if any(of(t).root.node.kind in ("state", "table") for t in node.inputs)]

    def _readers(self, nodes: Sequence[Node]) -> dict[int, set[str]]:
        """Return how each constant is read, by the id of its node: "packed", in "any" format, or as "plain" numbers (views always
        are); also "sparse" where a row reads some of its matrices."""
        readers: dict[int, set[str]] = {}
        for node in nodes:
            for name, arg in zip(node.op.args, node.args) if node.op is not None and not node.op.view else ():
                for t in arg if isinstance(arg, tuple) else (arg,):
                    root = t
                    while root is not None and root.node.op is not None and root.node.op.view:
                        root = root.node.args[0]
                    if root is None or root.node.kind != "constant":
                        continue
                    how = "packed" if name in node.op.packed else "any" if name in node.op.any_format else "plain"
                    if how != "plain" and not self.has_kernel(node):
                        how = "unpacked"                     # the reference dequantizes, but knows of no packed form
                    readers.setdefault(id(root.node), set()).add(how if root is t else "plain")
                    if name in node.op.sparse:
                        readers[id(root.node)].add("sparse")
        return readers

    def _residents(self, nodes: Sequence[Node]) -> dict[int, Resident]:
        """Decide each constant's form from what reads it, and give it a place in one block of memory."""
        out: dict[int, Resident] = {}
        offset, readers = 0, self._readers(nodes)
        for node in nodes:
            if node.kind != "constant":
                continue
            t, how = node.outputs[0], readers.get(id(node), set())
            dtype, sparse = source_dtype(t), "sparse" in how
            how = how - {"sparse"}
            in_file = not isinstance(node.source, (np.ndarray, DerivedRef))
            if "packed" in how and how <= {"packed", "any"} and t.dtype == dtype and not (self.in_place and in_file):
                nbytes = self.packed_bytes(dtype, [int(a) for a in t.shape])
                if nbytes:
                    out[id(node)] = Resident(t, dtype.packed, "packed", nbytes, offset, sparse)
                    offset += aligned(nbytes)
                    continue
            if t.dtype == dtype and in_file and "plain" not in how:
                out[id(node)] = Resident(t, dtype, "mapped", t.nbytes_max, sparse=sparse)
                continue
            out[id(node)] = Resident(t, t.dtype, "plain", t.nbytes_max, offset, sparse)
            offset += aligned(t.nbytes_max)
        return out
