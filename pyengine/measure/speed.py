"""Tokens per second by llama-bench's definitions, and the time of each op.

    ppN   process a prompt of N tokens from an empty cache, in steps of the batch's size; the last row of each step goes
          through the head
    tgN   generate N tokens one by one from an empty cache; which ones does not matter

Neither tokenizes, samples or decodes text. Each test runs once to warm up; tokens per second are the mean of the
repetitions', and the deviation is that of a sample. Source: llama.cpp, tools/llama-bench.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class OpTime:
    """What all steps of one op and one format of weights took together."""

    op: str
    weights: str                 # formats of the constants that it reads; "" if it reads none
    calls: int = 0               # nodes of the program times its replays
    seconds: float = 0.0


@dataclass
class Result:
    """One test."""

    test: str
    n_tokens: int
    samples: list[float]         # tokens/s of each repetition
    profile: list[OpTime] = field(default_factory=list)
    profile_seconds: float = 0.0     # wall time of the profiled repetition

    @property
    def mean(self) -> float:
        return statistics.fmean(self.samples)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain data for --json."""
        profile = [{"op": t.op, "weights": t.weights, "calls": t.calls, "seconds": t.seconds} for t in self.profile]
        return {"test": self.test, "tokens_per_second": self.mean, "stddev": self.deviation, "samples": self.samples,
                **({"profile": profile, "profile_wall_seconds": self.profile_seconds} if profile else {})}


def measure(model: Any, n_prompt: int, n_generate: int, repetitions: int, profile: bool = False) -> list[Result]:
    """Run the tests ppN and tgN; 0 leaves one out. `profile` times one more repetition of each, op by op.

    The context must hold the longer one. Raises what a step raises.
    """
    ids = np.random.default_rng(0).integers(0, model.n_vocab, max(n_prompt, n_generate)).tolist()
    if model.tokenizer.add_bos:
        ids[0] = model.tokenizer.bos_id
    tests = [(f"pp{n_prompt}", ids[:n_prompt], model.n_batch), (f"tg{n_generate}", ids[:n_generate], 1)]
    return [_test(model, name, part, rows, repetitions, profile) for name, part, rows in tests if part]


def _test(model: Any, name: str, ids: list[int], rows: int, repetitions: int, profile: bool) -> Result:
    def feed() -> int:
        model.reset()
        model.feed(ids, rows)
        return -(-len(ids) // rows)

    _seconds(feed)
    result = Result(name, len(ids), [len(ids) / _seconds(feed) for _ in range(repetitions)])
    if profile:
        model.program.profile(True)
        steps: list[int] = []
        result.profile_seconds = _seconds(lambda: steps.append(feed()))
        result.profile = op_times(model.program, steps[0])
        model.program.profile(False)
    return result


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def op_times(program: Any, replays: int) -> list[OpTime]:
    """Add a program's times up by op and weights' format, longest first."""
    prepared = program.prepared
    times: dict[tuple[str, str], OpTime] = {}
    for node, seconds in program.seconds():
        roots = (prepared.layout.of(t).root.node for t in node.inputs)
        resident = (prepared.residents.get(id(root)) for root in roots)
        key = node.op.name, "+".join(sorted({r.dtype.unpacked.name for r in resident if r is not None}))
        entry = times.setdefault(key, OpTime(*key))
        entry.calls += replays
        entry.seconds += seconds
    return sorted(times.values(), key=lambda entry: -entry.seconds)
