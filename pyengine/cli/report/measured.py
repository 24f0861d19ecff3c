"""Speed for people: lists of numbers as arguments, a line of progress, and llama-bench's table."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyengine.cli.screen import load, printable, show, show_columns, size
from pyengine.errors import RequestError
from pyengine.measure.speed import measure, Result

_CLEAR = "\r\x1b[K"


def parse_numbers(option: str, text: str, least: int = 0) -> list[int]:
    """Return the whole numbers of "512" or "512,1024", each once. Raises: RequestError."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII) or min(map(int, text.split(","))) < least:
        raise RequestError(f"{option} {text}: give a whole number from {least} on, or several, as 512,1024")
    return list(dict.fromkeys(map(int, text.split(","))))


def parse_threads(text: str | None, check: Callable[[int], object]) -> list[int | None]:
    """Return the numbers of threads of "1,2", each of which `check` has seen; [None], the usual number, for None. Raises: RequestError."""
    if text is None:
        return [None]
    numbers = parse_numbers("--threads", text, 1)
    for n in numbers:
        check(n)
    return [*numbers]


def results(model: str, tests: Sequence[tuple[int, int, int]], threads: Sequence[int | None], repetitions: int, profile: bool,
            settings: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[Result]]]:
    """Load the model for each number of threads and yield what was measured with it: (about the model, results).

    tests: (tokens of a prompt, tokens generated, tokens before them) each. settings: arguments of `load`.
    Raises: RequestError, and as `load`.
    """
    if profile and isinstance(settings["device"], dict):
        raise RequestError("--profile times the ops of one device; leave --device out")
    n_ctx, done, all_runs = max(p + n + d for p, n, d in tests), 0, len(threads) * len(tests) * (repetitions + 1)
    terminal = sys.stderr.isatty()

    def progress(test: str, run: int) -> None:
        nonlocal done
        what = f"run {run} of {repetitions}" if run else "warming up"
        print(f"{_CLEAR}{printable(Path(model).name)}, {test}: {what} ({done * 100 // all_runs}%)", end="", file=sys.stderr, flush=True)
        done += 1

    for number in threads:
        loaded = load(model, n_ctx=n_ctx, n_threads=number, **settings)
        try:
            found = [r for p, n, d in tests for r in measure(loaded, p, n, repetitions, profile, d, progress if terminal else None)]
        finally:
            if terminal:
                print(_CLEAR, end="", file=sys.stderr, flush=True)
        tensors, prepared = loaded.file.tensors.values(), loaded.program.prepared
        if isinstance(settings["device"], dict):             # one program a part, of the same threads
            prepared = prepared.prepared[0]
        about = {"model": loaded.plan.model, "n_threads": prepared.n_threads, "isa": prepared.isa, "n_batch": loaded.n_batch,
                 "kv_dtype": settings["kv_dtype"], "model_bytes": sum(t.nbytes for t in tensors), "n_parameters": sum(t.n_elements for t in tensors)}
        del loaded, prepared, tensors
        gc.collect()                                         # the next one's memory is not there twice
        yield about, found


def table(measured: Sequence[tuple[dict[str, Any], list[Result]]]) -> list[str]:
    """Return llama-bench's table in Markdown, with the kernels' instruction set in the place of its backend."""
    head = ["model", "size", "params", "kernels", "threads", "batch", "kv", "test", "t/s"]
    rows = [[a["model"], size(a["model_bytes"]), _count(a["n_parameters"]), a["isa"], str(a["n_threads"]), str(a["n_batch"]), a["kv_dtype"],
             r.test, f"{r.mean:.2f} ± {r.deviation:.2f}"] for a, found in measured for r in found]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    left = ("model", "kernels", "kv", "test")

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(c.ljust(w) if h in left else c.rjust(w) for h, c, w in zip(head, cells, widths))} |"

    rule = "|".join(f" {'-' * w} " if h in left else f" {'-' * (w - 1)}: " for h, w in zip(head, widths))
    return [line(head), f"|{rule}|", *map(line, rows)]


def show_results(measured: Sequence[tuple[dict[str, Any], list[Result]]]) -> None:
    """Print the table, and where the time of a profiled test went."""
    for line in table(measured):
        show(line)
    for _, found in measured:
        for r in found:
            if r.profile:
                spent, wall = sum(t.seconds for t in r.profile), r.profile_seconds
                show(f"\n{r.test}: {spent * 1e3:.1f} ms in ops, {spent / wall:.1%} of {wall * 1e3:.1f} ms")
                times = [(f"  {t.op}", t.weights, f"{t.seconds * 1e3:.2f} ms", f"{t.seconds / wall:.1%}", f"{t.calls} calls")
                         for t in r.profile]
                show_columns(times, right=(2, 3, 4))


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 10**9 else f"{n / 1e6:.2f} M"
