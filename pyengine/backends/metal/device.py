"""The interface to a device: memory that the host sees too, and launches that are recorded once and replayed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyengine.backends.metal.launch import Constants, Launch
from pyengine.backends.metal.sources import kernel, Kernel, Library
from pyengine.errors import GraphError


class Memory:
    """Memory of the device, as bytes of the host: `array` (uint8). Unified memory needs no copies."""

    array: np.ndarray


class Bound(NamedTuple):
    """A launch with everything found: its kernel, packed arguments, and (memory, offset, bytes) of each buffer by its number."""

    library: Library
    kernel: Kernel
    constants: Constants
    args: bytes
    buffers: Mapping[int, tuple[Memory, int, int]]
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_bytes: int


def bind(one: Launch, memories: Sequence[Memory], own: Mapping[str, tuple[Memory, int, int] | None], place: Path | None = None) -> Bound:
    """Find the kernel of a launch, pack its arguments, and number its buffers; `own`: those that every kernel may name.

    place: the folder of the kernel's source. Raises: GraphError for a launch that does not fit its kernel.
    """
    library, k = kernel(one.kernel, place)
    buffers: dict[int, tuple[Memory, int, int]] = {}
    for name, view in one.buffers.items():
        if view is not None:
            buffers[k.buffer(name).index] = memories[view.memory], view.offset, view.nbytes
    for p in k.parameters:
        if p.kind == "buffer" and own.get(p.name) is not None:
            buffers[p.index] = own[p.name]
    unknown = sorted(set(one.constants) - set(library.constants))
    if unknown or 0 in one.grid or 0 in one.threads:
        raise GraphError(f"metal: {one.kernel} is launched with unknown constants {unknown}, or an empty grid: {one.grid} x {one.threads}")
    args = library.pack(k.arguments.args, one.args) if k.arguments else b""
    return Bound(library, k, dict(one.constants), args, buffers, one.grid, one.threads, one.shared_bytes)


class Recording(ABC):
    """Launches that are run one after the other, each seeing what the ones before it wrote."""

    @abstractmethod
    def run(self, timed: bool = False) -> None:
        """Run them and wait; `timed`: so that `seconds` can tell how long each took. Raises: GraphError where the device reports an error."""

    @abstractmethod
    def seconds(self) -> list[float]:
        """Return the seconds of each launch, as far as the device tells."""


class Device(ABC):
    """A Metal device, or the emulator in its place."""

    name: str
    max_threadgroup_bytes: int

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Return the bytes of main memory that it can use, and how many of them are free."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Memory:
        """Return zeroed memory. Raises: PlanError where there is not so much."""

    @abstractmethod
    def mapped(self, array: np.ndarray) -> Memory | None:
        """Return memory over bytes that lie in the host's already, without a copy; None where they must be copied."""

    @abstractmethod
    def record(self, bound: Sequence[Bound]) -> Recording:
        """Prepare launches to be run again and again."""
