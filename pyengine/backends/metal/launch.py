"""What a step is on a Metal device: launches of kernels, described from the step's tensors once its run-time axes have values.

A module here that has kernels for ops defines a function for each, of the op's name and marked with @launches: it takes a `Step` and
returns a list of `Launch`, empty where there is nothing to do. @scratch marks one, of the same name, that returns the bytes of working
memory for the largest shapes.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyengine.backends.metal.sources import libraries
from pyengine.dtype import DType
from pyengine.errors import GraphError
from pyengine.graph.op import Op

Constants = Mapping[str, int | float | bool]


class NoKernel(GraphError):
    """A step that the kernels of its op refuse: a format or a layout that they do not know."""


@dataclass(frozen=True)
class View:
    """A tensor with its axes known: where it lies in a memory of the device, and how.

    memory  number of the memory; offset: bytes from its start; strides in bytes
    nbytes  bytes from the first to the last element
    """

    memory: int
    offset: int
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nbytes: int

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    def at(self, byte: int) -> View:
        """Return the same memory from a later byte on, as the address of a buffer."""
        return View(self.memory, self.offset + byte, self.dtype, self.shape, self.strides, max(0, self.nbytes - byte))


@dataclass(frozen=True)
class Launch:
    """One dispatch.

    kernel   its name; constants: values of its library's function constants, 0 for those that are left out
    args     fields of the kernel's _args struct
    buffers  by the names of the kernel's parameters; None or missing: null. One named `fault` is bound by the program
    grid     threadgroups along x, y, z; threads: of one threadgroup; shared_bytes: of threadgroup memory
    """

    kernel: str
    args: Mapping[str, Any]
    buffers: Mapping[str, View | None]
    grid: tuple[int, int, int]
    threads: tuple[int, int, int] = (256, 1, 1)
    shared_bytes: int = 0
    constants: Constants = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A node of a graph with its axes known.

    inputs   the tensors of each argument by its name: a list, empty for one that is left out
    outputs  the results
    params   as items and attributes; those that are one of several words are numbers, as in C
    scratch  working memory, or None
    """

    name: str
    inputs: Mapping[str, list[View]]
    outputs: list[View]
    params: Params
    scratch: View | None

    def one(self, name: str) -> View | None:
        """Return the argument of that name, None where it is left out."""
        return self.inputs[name][0] if self.inputs[name] else None

    def singles(self) -> list[View | None]:
        """Return the arguments of an op that has no lists, in order, None for those left out."""
        return [parts[0] if parts else None for parts in self.inputs.values()]

    def need(self, name: str) -> View:
        """Return the argument of that name, which every step of the op has."""
        return self.inputs[name][0]


Launcher = Callable[[Step], list[Launch]]
LAUNCHERS: dict[str, Launcher] = {}
SCRATCH: dict[str, Callable[[Step], int]] = {}


def launches(function: Launcher) -> Launcher:
    """Register what describes the steps of the op of this name."""
    LAUNCHERS[function.__name__] = function
    return function


def scratch(function: Callable[[Step], int]) -> Callable[[Step], int]:
    """Register what counts the working memory of the op of this name."""
    SCRATCH[function.__name__] = function
    return function


class Params(dict[str, Any]):
    """A step's parameters, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def params_of(op: Op, params: Mapping[str, Any]) -> Params:
    """Return a step's parameters; those that are one of several words as numbers, as in C."""
    specs = op.params
    return Params((n, specs[n].choices.index(value) if specs[n].kind == "enum" else value) for n, value in params.items())


def ceil_div(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


def spread(n: int, per_thread: int = 1, threads: int = 256) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return grid and threads for n elements, so many a thread; no more threads than there is work for, in whole simdgroups."""
    wanted = ceil_div(n, per_thread)
    threads = min(threads, ceil_div(wanted, 32) * 32)
    return (ceil_div(wanted, threads), 1, 1), (threads, 1, 1)


def elements(view: View, strides: Sequence[int] | None = None) -> list[int]:
    """Return a view's strides in elements of its plain numbers."""
    return [s // view.dtype.nbytes for s in (view.strides if strides is None else strides)]


@lru_cache(maxsize=1)
def load_launchers() -> None:
    """Import the modules of this package that have the name of a .metal source: they register what they launch."""
    for name in libraries():
        if (Path(__file__).parent / f"{name}.py").exists():
            importlib.import_module(f"pyengine.backends.metal.{name}")
