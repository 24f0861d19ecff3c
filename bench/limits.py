"""The machine's own limits, measured in the run that reports shares of them: read bandwidth, int8 and fp32 peak.

Each limit is the best of some repetitions, since nothing can be faster than a limit; kernels are medians.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .machine import last_level_cache

RAMP = 0.02                                                                    # seconds of one measurement of a peak


@dataclass(frozen=True)
class Limits:
    """What `n_threads` threads can do at most on instruction set `isa`; operations count a product and a sum as 2."""

    isa: str
    n_threads: int
    read: float                                                                # bytes/s from memory
    int8: float                                                                # operations/s
    fp32: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _cpus() -> list[int] | None:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def together(n: int, work: Callable[[int], Any]) -> tuple[float, list[Any]]:
    """Call work(0) ... work(n - 1) in as many threads at once; returns seconds from first start to last end, and the results.

    Each thread stays on a CPU of its own: a new thread may otherwise share one with its maker for milliseconds.
    """
    cpus, barrier = _cpus(), threading.Barrier(n)
    spans: list[tuple[float, float, Any]] = [(0.0, 0.0, None)] * n

    def member(i: int) -> None:
        if cpus:
            os.sched_setaffinity(0, {cpus[i % len(cpus)]})                     # 0: this thread
        barrier.wait()
        start = time.perf_counter()
        result = work(i)                                                       # C; cffi lets the interpreter go
        spans[i] = (start, time.perf_counter(), result)

    threads = [threading.Thread(target=member, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return max(s[1] for s in spans) - min(s[0] for s in spans), [s[2] for s in spans]


@lru_cache(maxsize=1)
def _memory(nbytes: int) -> np.ndarray:
    return np.ones(nbytes // 8, np.uint64)                                     # written, so that every page is there


def _native() -> Any:
    from pyengine import native

    return native


def read_bandwidth(n_threads: int, repeat: int = 5, native: Any = None) -> float:
    """Bytes/s that n threads read from memory together, each its own part in order."""
    native = native or _native()
    memory = _memory(max(512 << 20, 8 * last_level_cache()))
    part = memory.nbytes // n_threads // 4096 * 4096
    start = native.ffi.cast("char *", native.ffi.from_buffer(memory))

    def work(i: int) -> int:
        return native.lib.pe_limit_read(start + i * part, part)

    best = 0.0
    for _ in range(repeat):
        seconds, sums = together(n_threads, work)
        if sums != [part // 8] * n_threads:
            raise RuntimeError(f"the read loop returned {sums}, not {part // 8} for each thread")
        best = max(best, part * n_threads / seconds)
    return best


def peak(kind: str, isa: str, n_threads: int, repeat: int = 5, native: Any = None) -> float:
    """Operations/s of n threads together; kind: int8 or fp32. 0.0 where the machine does not have the instruction set."""
    native = native or _native()
    loop, name = {"int8": native.lib.pe_limit_int8, "fp32": native.lib.pe_limit_fp32}[kind], isa.encode()
    rounds = 1000
    seconds, (done,) = together(1, lambda i: loop(name, rounds))
    if not done:
        return 0.0
    while seconds < RAMP / 4:
        rounds *= 4
        seconds, _ = together(1, lambda i: loop(name, rounds))
    rounds = int(rounds * RAMP / seconds) + 1
    best = 0.0
    for _ in range(repeat):
        seconds, done = together(n_threads, lambda i: loop(name, rounds))
        best = max(best, sum(done) / seconds)
    return best


def measure(isa: str, n_threads: int, repeat: int = 5, native: Any = None) -> Limits:
    """All limits of one instruction set and number of threads."""
    return Limits(isa, n_threads, read_bandwidth(n_threads, repeat, native), peak("int8", isa, n_threads, repeat, native),
                  peak("fp32", isa, n_threads, repeat, native))


def best(a: Limits, b: Limits) -> Limits:
    """The higher of two measurements of the same limits."""
    return Limits(a.isa, a.n_threads, max(a.read, b.read), max(a.int8, b.int8), max(a.fp32, b.fp32))
