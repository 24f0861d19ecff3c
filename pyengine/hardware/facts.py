"""What detection finds, as plain values. Sizes are bytes."""

from __future__ import annotations

from typing import Any

from pyengine.records import NamedTuple


class Memory(NamedTuple):
    """Main memory: `available` can be taken now, without swapping, within `limit`, the smallest of control groups."""

    total: int
    available: int
    limit: int | None = None
    limit_used: int | None = None    # of the limit, by all in that group, without file pages that can be dropped


class CoreKind(NamedTuple):
    """Cores of one kind: how many, how many logical CPUs they run, how many of the cores this process may use."""

    kind: str
    n_cores: int
    n_cpus: int
    n_usable: int
    max_mhz: int | None = None


class Cache(NamedTuple):
    """Caches of one level and size: L1 data, or unified; `n_cpus` logical CPUs share each of `n_instances`."""

    level: int
    nbytes: int
    n_instances: int
    n_cpus: int


class NumaNode(NamedTuple):
    """Memory and the logical CPUs that are near it."""

    index: int
    cpus: tuple[int, ...]
    total: int
    free: int


class Cpu(NamedTuple):
    """The processors: `n_threads` is how many threads the engine takes unless it is told otherwise."""

    name: str
    architecture: str
    n_cores: int
    n_cpus: int
    kinds: tuple[CoreKind, ...]
    affinity: tuple[int, ...] | None # logical CPUs that this process may run on; None: the system has no such set
    quota: float | None              # processors' worth of time that control groups give; None: no limit
    n_threads: int
    caches: tuple[Cache, ...]
    isas: tuple[str, ...]            # instruction sets that the engine has kernels for and the machine runs, best first


class Device(NamedTuple):
    """Something that computes and has memory: `id` is "cpu", "cuda:0", "rocm:0" or "metal:0".

    total, free: bytes; on a `unified` device they are of main memory, shared with the CPU. host: main memory that the
    device can use besides its own (AMD's GTT). compute: CUDA's compute capability ("9.0"), or AMD's target ("gfx1100").
    """

    kind: str
    name: str
    index: int
    total: int
    free: int
    unified: bool = False
    compute: str | None = None
    pci: str | None = None           # 0000:07:00.0
    uuid: str | None = None
    parent: str | None = None        # UUID of the GPU that a MIG instance is a part of
    host: int | None = None

    @property
    def id(self) -> str:
        """The name that plans use for it."""
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.index}"


class Hardware(NamedTuple):
    """A machine as this process may use it; `devices` begins with the CPU. `notes` says what is assumed, and why."""

    devices: tuple[Device, ...]
    memory: Memory
    cpu: Cpu
    numa: tuple[NumaNode, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**_plain(self), "devices": [{"id": d.id, **_plain(d)} for d in self.devices]}


def _plain(value: Any) -> Any:
    """Turn named values into dicts, and tuples into lists."""
    if isinstance(value, tuple):
        return {k: _plain(v) for k, v in value._asdict().items()} if hasattr(value, "_asdict") else [_plain(v) for v in value]
    return value
