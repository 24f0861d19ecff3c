"""Tokens per second by llama-bench's definitions, and the time of each op.

    ppN   process a prompt of N tokens from an empty cache, in steps of the batch's size; the last row of each step goes
          through the head
    tgN   generate N tokens one by one from an empty cache; which ones does not matter
    @ dN  the same behind N tokens, which are computed before and not timed

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
    depth: int = 0                   # tokens in the context before

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


Progress = Callable[[str, int], None]


def measure(model: Any, n_prompt: int, n_generate: int, repetitions: int, profile: bool = False, depth: int = 0,
            progress: Progress | None = None) -> list[Result]:
    """Run the tests ppN and tgN behind `depth` tokens; 0 leaves one out. `profile` times one more repetition of each, op by op.

    The context must hold the longer one behind them. progress(test, run) is told of each run before it begins; 0 warms up.
    Raises what a step raises.
    """
    ids = np.random.default_rng(0).integers(0, model.n_vocab, depth + max(n_prompt, n_generate)).tolist()
    if model.tokenizer.add_bos:
        ids[0] = model.tokenizer.bos_id
    behind = f" @ d{depth}" if depth else ""
    tests = [(f"pp{n_prompt}{behind}", n_prompt, model.n_batch), (f"tg{n_generate}{behind}", n_generate, 1)]
    return [_test(model, Result(name, n, [], depth=depth), ids, rows, repetitions, profile, progress or (lambda *_: None))
            for name, n, rows in tests if n]


def _test(model: Any, result: Result, ids: list[int], rows: int, repetitions: int, profile: bool, progress: Progress) -> Result:
    before, own = ids[:result.depth], ids[result.depth : result.depth + result.n_tokens]

    def seconds(timed: Callable[[], Any] = lambda: None) -> float:
        model.reset()
        if before:
            model.feed(before, model.n_batch)
        timed()
        started = time.perf_counter()
        model.feed(own, rows)
        return time.perf_counter() - started

    for run in range(repetitions + 1):
        progress(result.test, run)
        rate = len(own) / seconds()
        result.samples += [rate] if run else []
    if profile:
        result.profile_seconds = seconds(lambda: model.program.profile(True))
        result.profile = op_times(model.program, -(-len(own) // rows))
        model.program.profile(False)
    return result


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
