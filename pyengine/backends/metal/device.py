"""The interface to a device: memory that the host sees too, and launches that are recorded once and replayed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pyengine.backends.metal.launch import Constants
from pyengine.backends.metal.sources import Kernel, Library


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
    def allocate(self, nbytes: int) -> Memory:
        """Return zeroed memory. Raises: PlanError where there is not so much."""

    @abstractmethod
    def mapped(self, array: np.ndarray) -> Memory | None:
        """Return memory over bytes that lie in the host's already, without a copy; None where they must be copied."""

    @abstractmethod
    def record(self, bound: Sequence[Bound]) -> Recording:
        """Prepare launches to be run again and again."""
