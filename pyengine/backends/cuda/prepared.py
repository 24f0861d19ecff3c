"""A program counted for a card: every weight in its memory, packed where kernels read it so, and the working memory that they ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pyengine.backends.base import Declared, Prepared as BasePrepared, Progress
from pyengine.backends.cuda.codebooks import BOOKS, BYTES
from pyengine.backends.cuda.describe import Described
from pyengine.backends.cuda.program import Program
from pyengine.backends.prepared import arguments, Counted, Resident, States
from pyengine.compiler.arena import aligned, contiguous_strides, is_changed_state, Turns
from pyengine.compiler.codegen import pack_params
from pyengine.dtype import DType
from pyengine.graph.tensor import axis_max, Node
from pyengine.native import lib


class Prepared(Counted):
    """See `base.Prepared`. own: the backend."""

    def __init__(self, declared: Declared, turns: Turns | None, passes: Sequence[str] | None, own: Any):
        self.own, self.turns, self.n_threads, self.isa = own, turns, own.n_threads, own.name
        self.asked = declared.asked
        self.taken, self.kept = set[str](), set[int]()       # inputs that come from other devices, outputs that only those read
        self._scratch: dict[Any, int] = {}                   # answers of `scratch_bytes`: most layers ask the same
        super().__init__(declared, turns, passes, own.kernels)
        self.codebooks = aligned(BYTES) if any(r.dtype.name in BOOKS for r in self.residents.values()) else 0
        self.weight_bytes += self.codebooks                  # behind the weights

    @property
    def host_bytes(self) -> int:
        """Bytes of the host: inputs, outputs and tables, which are copied to and from the device; tables twice, to see what changed."""
        inputs = [n.outputs[0] for n in self.layout.leaves if n.kind == "input"]
        outputs = [t for t in self.layout.outputs if not is_changed_state(t)]
        return sum(aligned(t.nbytes_max) for t in [*inputs, *outputs, *self.tables, *self.tables])

    def _residents(self, nodes: Sequence[Node]) -> dict[int, Resident]:
        """Decide each constant's form; what the CPU would read where its file is mapped is copied as it is."""
        out, offset = {}, 0
        for key, r in super()._residents(nodes).items():
            out[key] = replace(r, form="plain" if r.form == "mapped" else r.form, offset=offset)
            offset += aligned(r.nbytes)
        return out

    def packed_bytes(self, dtype: DType, shape: Sequence[int]) -> int:
        """Return the bytes of a matrix, or of experts' matrices, each by itself, with 16 rows interleaved; 0: no packed form."""
        if len(shape) not in (2, 3):
            return 0
        return math.prod(shape[:-2]) * int(lib.pe_pack_bytes(dtype.id, *shape[-2:]))

    def scratch_bytes(self, node: Node, states: States | None = None) -> int:
        """Return the working memory of a kernel at the largest shapes; with `states`, those of its caches are these."""
        if not self.has_kernel(node):
            return 0
        specs: list[Any] = []
        ids: tuple[list[Any], list[Any]] = ([], [])
        for side, args in zip(ids, arguments(node)):
            for parts in args:
                side.append(tuple(range(len(specs), len(specs) + len(parts))))
                for t in parts:
                    resident, shape = self.residents.get(id(t.node)), tuple(axis_max(a) for a in t.shape)
                    if states and self.layout.of(t).root.name in states:
                        shape = states[self.layout.of(t).root.name]
                    specs.append((resident.dtype if resident else t.dtype, t.dtype, shape))
        key = node.op.name, tuple(specs), *map(tuple, ids), node.params
        if key not in self._scratch:
            made = Described({})
            for dtype, plain, shape in specs:
                made.tensor(0, dtype.id, shape, contiguous_strides(shape, plain))
            made.node(node.op.name, *ids, pack_params(node.op, dict(node.params)), 0, 0)
            tensors, nodes = made.arrays()
            self._scratch[key] = int(self.own.own.flat.pe_card_scratch(tensors, len(specs), nodes))
        return self._scratch[key]

    def linked(self, name: str, giver: BasePrepared) -> bool:
        """Say whether both are of one library: its devices copy to each other."""
        if not isinstance(giver, Prepared) or giver.own.own is not self.own.own:
            return False
        self.taken.add(name)
        return True

    def keep(self, output: int) -> None:
        """Fetch this output never."""
        self.kept.add(output)

    def load(self, progress: Progress | None = None) -> Program:
        """Allocate memory, send the weights, and return the program."""
        return Program(self, progress)
