"""The contracts of a backend: what it must offer so that everything above it runs.

    declared -> Backend.prepare -> Prepared (every byte counted, nothing loaded) -> load -> Program (memory, weights) -> execute

Inputs, tables and outputs are host arrays: a program sends what changed before a run and fetches the outputs after it. Of memory that
stays on the device, states, nobody above this package sees more than the three verbs of `State`.
"""

from __future__ import annotations

import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar

import numpy as np

from pyengine.compiler.arena import is_changed_state, Layout, Turns
from pyengine.dtype import DType
from pyengine.errors import GraphError
from pyengine.graph.tensor import axis_max, axis_value, described, Node, Tensor
from pyengine.records import dataclass

Progress = Callable[[int, int], None]                    # (bytes done, all bytes)


@dataclass(frozen=True)
class Declared:
    """A program as a model declares it: outputs of a graph, and where a run may begin.

    outputs  changed states among them are there to be changed, though nobody reads them; their place among the others does not matter
    entries  name of an entry -> the inputs whose first reader it begins at: what may change while all before it stays
    asked    numbers of outputs that stay on a device with memory of its own until `Program.read` asks for rows of them
    """

    outputs: list[Tensor]
    entries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    asked: frozenset[int] = frozenset()


class State(ABC):
    """Memory of the device that outlives a run: cells [heads, cells, elements] of a cache, in any format.

    Cells are numbered along the second axis; `cells` are int arrays [n]. Bytes are those of the format: uint8 [heads, n, bytes].
    """

    shape: tuple[int, ...]
    dtype: DType
    nbytes: int

    @abstractmethod
    def gather(self, cells: np.ndarray) -> np.ndarray:
        """Return a copy of these cells' bytes."""

    @abstractmethod
    def scatter(self, cells: np.ndarray, data: np.ndarray) -> None:
        """Write bytes into these cells."""

    @abstractmethod
    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy cells to others of the same state; none is both."""


class Program(ABC):
    """A compiled graph with its memory, ready to be replayed.

    inputs   host array of each input, run-time axes at their largest; what is written there counts at the next run
    tables   host array of each table: written where something changes, read by every later run
    outputs  host array of each output, valid until the next run; those that were declared to be asked for by `read` only, and an empty
             array for a changed state, which stays where `states` has it
    states   by name
    """

    prepared: Any
    single: bool = False                                 # `run` returns one array, not a list
    inputs: dict[str, np.ndarray]
    tables: dict[str, np.ndarray]
    outputs: list[np.ndarray]
    states: Mapping[str, State]
    _running: threading.Lock

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make one with a lock: threads that call `run` wait for each other."""
        made = super().__new__(cls)
        made._running = threading.Lock()
        return made

    def __repr__(self) -> str:
        layout = self.prepared.layout
        inputs, outputs = [n.outputs[0] for n in layout.leaves if n.kind == "input"], layout.outputs
        return f"Program({', '.join(map(described, inputs))} -> {', '.join(map(described, outputs))}; {len(layout.steps)} steps)"

    @abstractmethod
    def execute(self, entry: str | None = None, turn: int | None = None, **dims: int) -> None:
        """Replay on what stands in the inputs, from the beginning or from an entry; only one `turn`, where there are several.

        dims: values of the run-time axes.
        Raises: RequestError for run-time numbers out of range (ids, cells); GraphError for what kernels refuse.
        """

    def read(self, output: int, first: int, n: int) -> np.ndarray:
        """Return rows first .. first + n - 1 of an output of the last run, valid until the next one."""
        return self.outputs[output][first : first + n]

    def run(self, **arrays: np.ndarray) -> Any:
        """Compute the outputs from arrays by input name; run-time axes take their values from the arrays' shapes. Threads take turns.

        Raises: GraphError for missing and unknown names, and for shapes that do not fit.
        """
        leaves = {n.name: n.outputs[0] for n in self.prepared.layout.leaves if n.kind == "input"}
        given = {}
        for name, array in arrays.items():
            try:
                given[name] = np.asarray(array, dtype=self.inputs[name].dtype if name in leaves else None)
            except Exception as error:                       # texts, lists of unequal lengths, a stranger's __array__
                raise GraphError(f"run: '{name}' is no array of numbers: {error}") from None
        dims = dims_of(leaves, given)
        out = []
        with self._running:
            for name in leaves:
                flat, value = self.inputs[name].reshape(-1), given[name].reshape(-1)
                flat[: value.size] = value
            self.execute(**dims)
            for t, array in zip(self.prepared.layout.outputs, self.outputs):
                if is_changed_state(t):
                    out.append(array)
                    continue
                shape = tuple(axis_value(a, dims) for a in t.shape)
                out.append(array.reshape(-1)[: math.prod(shape)].reshape(shape).copy())
        return out[0] if self.single else out

    def take(self, name: str, giver: Program, output: int, dims: dict[str, int]) -> None:
        """Copy an input from an output of another device's program, without the host. Raises: GraphError where `Prepared.linked` says no."""
        raise GraphError(f"{self!r} takes no inputs from other devices")

    def resident(self) -> int:
        """Return how many bytes of what it has in main memory are there already: a page is when it is first written.

        Where that cannot be found out, fewer: 0.
        """
        return 0

    @abstractmethod
    def profile(self, on: bool) -> None:
        """Start (and reset) or stop the clock of each step."""

    @abstractmethod
    def seconds(self) -> list[tuple[Node, float]]:
        """Return steps with the seconds spent in each since `profile(True)`."""


class Prepared(ABC):
    """A graph with every byte counted and nothing loaded.

    weight_bytes are copied to the device, mapped_bytes are read where the file is mapped.
    fallbacks  ops without a kernel here, which the NumPy reference computes -> number of steps
    host_bytes of a device with memory of its own: what it takes of the host's besides
    """

    layout: Layout
    arena_bytes: int
    weight_bytes: int
    mapped_bytes: int
    state_bytes: int
    fallbacks: dict[str, int]
    host_bytes: int = 0

    def linked(self, name: str, giver: Prepared) -> bool:
        """Say whether an input can come from another device's program by `Program.take`; if so, the loaded program never sends it."""
        return False

    def keep(self, output: int) -> None:
        """Note that nobody reads an output on the host: other devices take it. The loaded program need not fetch it."""

    @abstractmethod
    def resized(self, states: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Return (bytes of the arena, bytes of all states and tables) if these had these shapes: larger caches, without a new graph."""

    @abstractmethod
    def load(self, progress: Progress | None = None) -> Program:
        """Allocate memory, read the weights, and return the program."""


class Backend(ABC):
    """A kind of device.

    name     as in `device=`
    kernels  names of the ops that it computes itself; None: every op there is
    apart    its memory is its own: inputs and outputs are copied
    widest   most elements of a head that its attention takes; None: any
    experts  most experts that a row can choose from; None: any
    """

    name: ClassVar[str]
    apart: ClassVar[bool] = False
    widest: ClassVar[int | None] = None
    experts: ClassVar[int | None] = None
    kernels: frozenset[str] | None = None

    @abstractmethod
    def prepare(self, declared: Declared, turns: Turns | None = None, passes: Sequence[str] | None = None) -> Prepared:
        """Fuse, lay out and count a program. turns: it runs in pieces, between which other devices run; passes: None for all."""

    def compile(self, outputs: Sequence[Tensor], passes: Sequence[str] | None = None, single: bool = False, strict: bool = False) -> Program:
        """Prepare and load in one go. Raises: GraphError with `strict` for ops that have no kernel here."""
        prepared = self.prepare(Declared(list(outputs)), passes=passes)
        check_kernels(prepared, self.name, strict)
        program = prepared.load()
        program.single = single
        return program


def check_kernels(prepared: Prepared, device: str, strict: bool = False) -> None:
    """Raise GraphError for steps that the reference would compute, if that is not wanted: `strict`, or $PYENGINE_STRICT=1."""
    if prepared.fallbacks and (strict or os.environ.get("PYENGINE_STRICT") == "1"):
        raise GraphError(f"{device} has no kernel for {said(prepared.fallbacks)}; without `strict` the NumPy reference computes them")


def said(fallbacks: Mapping[str, int]) -> str:
    """Describe the steps without a kernel: "conv2d (12 steps)"."""
    return ", ".join(f"{name} ({n} step{'s' if n > 1 else ''})" for name, n in sorted(fallbacks.items()))


def dims_of(leaves: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Read the values of the run-time axes from all inputs' shapes. Raises: GraphError for names and shapes that do not fit."""
    dims: dict[str, int] = {}
    if set(arrays) != set(leaves):
        missing, unknown = sorted(set(leaves) - set(arrays)), sorted(set(arrays) - set(leaves))
        wrong = f"input {missing[0]!r} is missing" if missing else f"there is no input {unknown[0]!r}"
        raise GraphError(f"run: {wrong}; inputs are {sorted(leaves)}")
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
    return dims
