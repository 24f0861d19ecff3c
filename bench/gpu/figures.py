"""Hot kernels in numbers, without a card: what the assembler and the emulator say of them, and what follows from that for some devices.

    PYENGINE_EMULATE=checked python -m bench.gpu.figures      writes docs/gpu-kernels.md and bench/results/gpu-kernels.json

Each shape is a job of true size, whose bytes and operations the estimates are of, and a smaller one that the emulator runs and counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyengine import ops
from pyengine.backends.cuda.build import TARGETS
from pyengine.backends.cuda.library import library
from pyengine.graph.op import Case

from .. import kernels
from ..kernels import Copy, Job, linear_job
from . import jobs, ptxas
from .counts import Counter
from .devices import occupancy, Published, PUBLISHED

JSON, PAGE = ptxas.ROOT / "bench" / "results" / "gpu-kernels.json", ptxas.ROOT / "docs" / "gpu-kernels.md"
DEVICE = "cuda-emulated"


class Shape(NamedTuple):
    """A job of true size, and one with the same kernels that the emulator does in seconds."""

    full: Job
    cut: Job


def shapes() -> Iterator[Shape]:
    """Yield the shapes of the table."""
    for kind in jobs.FORMATS:
        yield Shape(linear_job("generate", (14336,), 4096, (kind,), 1, {}), linear_job("generate", (128,), 4096, (kind,), 1, {}))
    for m in (4, 8, 32):
        yield Shape(linear_job("few", (14336,), 4096, ("Q4_K",), m, {}), linear_job("few", (128,), 2048, ("Q4_K",), m, {}))
    for kind in ("Q4_K", "Q6_K", "Q8_0", "BF16", "F16"):
        yield Shape(linear_job("prompt", (14336,), 4096, (kind,), 512, {}), linear_job("prompt", (256,), 512, (kind,), 256, {}))
    for m, keys, least in ((512, 512, 256), (8192, 8192, jobs.EXACT_KEYS + 256)):
        yield Shape(jobs.attention("prompt", m, keys, "F16"), jobs.attention("prompt", 128, least, "F16", (4, 1, 128)))
    for keys, kind in ((2048, "F16"), (2048, "Q8_0"), (32768, "F16"), (32768, "Q8_0"), (32768, "Q4_0")):
        least = 1024 if keys <= jobs.EXACT_KEYS else jobs.EXACT_KEYS + 256
        yield Shape(jobs.attention("generate", 1, keys, kind), jobs.attention("generate", 1, least, kind, (8, 2, 128)))
    yield from _mixtures()
    yield from _others()


def _mixtures() -> Iterator[Shape]:
    for m, cut in ((1, 1), (512, 32)):
        yield Shape(jobs.mixture(m, "gate-up", 768, 2048), jobs.mixture(cut, "gate-up", 64, 512))
        scores = [Case({"scores": (rows, 128)}, {}, {"n_used": 8, "gate": "softmax", "normed": True}) for rows in (m, cut)]
        yield Shape(*(Job(ops.top_experts, case, f"128 top-8 m={m}") for case in scores))


def _others() -> Iterator[Shape]:
    norms = [Case({"x": (m, 4096), "weight": (4096,)}, {}, {"eps": 1e-6}) for m in (512, 8)]
    yield Shape(*(Job(ops.rms_norm, case, "4096 m=512") for case in norms))
    ropes = [Case({"q": (m, 32, 128), "k": (m, 8, 128), "v": (m, 8, 128), "table": (m, 128), "cells": (m,), "k_cache": (8, 512, 128),
                   "v_cache": (8, 512, 128)}, {"k_cache": "F16", "v_cache": "F16"}, {}) for m in (512, 8)]
    yield Shape(*(Job(ops.rope_append, case, "32/8x128 F16 m=512") for case in ropes))
    picked = [Case({"table": (n, 4096), "ids": (m,)}, {"table": "Q4_K"}, {}) for n, m in ((128256, 512), (100, 8))]
    yield Shape(*(Job(ops.rows, case, "Q4_K 4096 m=512") for case in picked))
    sums = [Case({"x": (m, 14336), "y": (m, 14336)}, {}, {"kind": "add"}) for m in (512, 4)]
    yield Shape(*(Job(ops.binary, case, "512x14336") for case in sums))
    products = [Case({"x": (n, n), "y": (n, n)}, {}, {}) for n in (1024, 128)]
    yield Shape(*(Job(ops.matmul, case, "1024x1024x1024") for case in products))


# ---- collected ----------------------------------------------------------------------------------------------------------------------


def counted(shape: Shape, counter: Counter) -> dict[str, Any]:
    """Run the smaller job in the emulator: counts by kernel, and how many sectors of weights or caches were read, by how many bytes need."""
    job = shape.cut
    copy = Copy.make(job, np.random.default_rng(0))
    counter.reset()
    program = jobs.Loaded(job, copy, 1, DEVICE).program
    held = program.weights if program.prepared.weight_bytes else program.state_memory
    found, sectors = {}, 0
    for name, (i, counts) in counter.kernels().items():
        found[name] = counts.to_json()
        sectors += counter.buffer(i, held.address)[0].sectors if held.nbytes else 0
    needed = sum(n for name, n in kernels.reads(job, copy).items() if job.op.args[name].kind in ("Weight", "Cache"))
    return {"kernels": found, "held_bytes": needed, "held_sectors": sectors}


def estimated(shape: Shape) -> dict[str, Any]:
    """Return bytes and operations of the job of true size, and the microseconds on each published device that no kernel beats."""
    bound, out = jobs.Bound.of(shape.full, Copy.make(shape.full, np.random.default_rng(0))), {}
    for d in PUBLISHED:
        memory, products = 1e6 * bound.bytes / d.bandwidth, 1e6 * bound.operations * (bound.passes if d.target else 1) / peak(d, bound.unit)
        out[d.name] = {"us": max(memory, products), "by": "memory" if memory >= products else bound.unit}
    return {"bytes": bound.bytes, "operations": bound.operations, "unit": bound.unit, "least": out}


def peak(d: Published, unit: str) -> float:
    """Return operations/s of a device for kernels that use mma.sync, or float32's."""
    return d.f32 if unit == "f32" else d.mma * (d.int8 if unit == "s8" else d.f16)


def collect(targets: Sequence[str], threads: int, kept_only: bool = False) -> dict[str, Any]:
    """Return everything, as plain data; kept_only: registers of what was compiled before, and what the JSON says of files that are the same."""
    if os.environ.get("PYENGINE_EMULATE") != "checked":
        raise SystemExit("figures: counts need PYENGINE_EMULATE=checked")
    assembled = ptxas.every(targets, threads, kept_only)
    registers = {file: {name: {t: list(k[1:]) for t, k in by.items()} for name, by in found.items()} for file, found in assembled.items()}
    before = unchanged() if kept_only else {"registers": {}, "shapes": {}}
    for file, kernels_of in before["registers"].items():
        own = registers.setdefault(file, {})
        for name, by in kernels_of.items():
            own[name] = by | own.get(name, {})
    counter = Counter(str(library(True).path))
    rows = []
    for shape in shapes():
        print(shape.full.name, flush=True)
        name = shape.full.name
        rows.append(before["shapes"].get(name) or {"name": name, "counted": shape.cut.name, **counted(shape, counter), **estimated(shape)})
    return {"sources": marks(), "targets": list(targets), "registers": registers, "shapes": rows}


def unchanged() -> dict[str, Any]:
    """Return what the JSON says of files that have not changed since: registers, and by name the shapes all of whose kernels are theirs."""
    found = json.loads(JSON.read_text(encoding="utf-8")) if JSON.exists() else {"sources": {}, "registers": {}, "shapes": []}
    today = marks()
    registers = {file: by for file, by in found["registers"].items() if found["sources"].get(file) == today.get(file)}
    known = {name for by in registers.values() for name in by}
    return {"registers": registers, "shapes": {row["name"]: row for row in found["shapes"] if row["kernels"] and known.issuperset(row["kernels"])}}


def marks() -> dict[str, str]:
    """Return a hash of each file of kernels with all that it includes, comments left out: the table is of these."""
    return {path.name: ptxas.content(ptxas.included(path), code_only=True) for path in ptxas.sources()}


def hot(found: dict[str, Any]) -> list[str]:
    """Return the names of the kernels that the shapes launch."""
    return sorted({name for row in found["shapes"] for name in row["kernels"]})


def of_kernel(found: dict[str, Any], name: str) -> dict[str, list[int]]:
    """Return registers, spills and stack by target of a kernel, {} where the assembler did not see it."""
    return next((by[name] for by in found["registers"].values() if name in by), {})


# ---- written ------------------------------------------------------------------------------------------------------------------------

HEAD = """# Kernels of the GPU backends in numbers

No graphics card was at hand when these kernels were written. What follows comes from NVIDIA's assembler (`nvcc -Xptxas -v`), from the counts of the
emulator (csrc/emulate), and from published figures of devices; `make gpu-check` measures on a card. Written by `python -m bench.gpu.figures`; a test
holds it to the kernels of today.

## On a card

`make gpu-check` on a machine with a card, nvcc, Python, NumPy, pybind11, cffi and Pillow builds for that card, checks every declared case of every op and
layers of real models in every format beside NumPy, small models and an encoder beside the CPU backend, times each hot kernel beside the limits that it
measures first (copies, reads, products on each kind of unit) and beside PyTorch where that is installed, and a model of 8 billion random weights: a prompt of
512, generation, a context of 32768. It takes under 9 minutes and writes one JSON into bench/results, named by the card. `make gpu-sanitize` runs
the small sizes under compute-sanitizer. `python -m bench.gpu.check --device cuda-emulated --tiny` is the same script without a card.

## Registers and occupancy

Registers of a thread on each target; behind the slash the share of a multiprocessor's threads that are resident with the block and the shared
memory that the launch has; 0%: more shared memory than a block may have there, where smaller blocks are launched. `make gpu-figures` makes this anew.
"""
REQUESTS = """
## Requests to memory

Counted by the emulator on smaller sizes than the name says (in the JSON). Weights, caches: 32-byte sectors that were read of them, against those that
hold what is needed; more than 1 where several blocks read the same (most of it from L2). Sectors: of all requests, against the bytes that threads asked for
(below 1 where lanes share what they read). Conflicts: passes over shared memory's banks beyond the first, as a share of all.

"""
LEAST = """
## Least times

Microseconds that memory (m) or the units that multiply (s8, f16: tensor cores through mma.sync; f32) need at least on each device, from bytes that must be moved and
operations that must be done. Kernels reach a part of it: see `make gpu-check`'s JSON for shares on real cards.

"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def page(found: dict[str, Any]) -> str:
    """Return the page."""
    targets = found["targets"]
    blocks = {name: c for row in found["shapes"] for name, c in row["kernels"].items()}
    rows = []
    for name in hot(found):
        by, c = of_kernel(found, name), blocks[name]
        cells = [f"{by[t][0]} / {100 * occupancy(t, by[t][0], c['threads'], c['shared_bytes']):.0f}%" if t in by else "-" for t in targets]
        rows.append([f"`{name}`", str(c["threads"]), str(c["shared_bytes"]), *cells])
    text = HEAD + _spilled(found) + table(["kernel", "threads", "shared", *(f"sm_{t}" for t in targets)], rows)
    text += REQUESTS + table(["shape", "weights, caches", "sectors", "conflicts", "mma", "dp4a", "barriers"], [_requests(row) for row in found["shapes"]])
    names = [d.name for d in PUBLISHED]
    least = [[row["name"], *(f"{row['least'][n]['us']:.1f} {row['least'][n]['by'].replace('memory', 'm')}" for n in names)] for row in found["shapes"]]
    text += LEAST + table(["shape", *names], least)
    sources = "".join(f"- {d.name}: {d.bandwidth / 1e9:.0f} GB/s, int8 {d.int8 / 1e12:.0f}, f16 {d.f16 / 1e12:.0f}, f32 {d.f32 / 1e12:.0f} Top/s"
                      f"{f', of which mma.sync reaches {d.mma:.2f}' if d.mma < 1 else ''}. {d.source}\n" for d in PUBLISHED)
    return text + "\nThe devices' figures:\n\n" + sources


def _spilled(found: dict[str, Any]) -> str:
    """Say which of all kernels, those that no shape launches too, spill registers to memory, and what a dash is where the table has one."""
    every = [(name, t, k[1]) for by in found["registers"].values() for name, of in by.items() for t, k in of.items()]
    spilled = "; ".join(f"`{name}` on sm_{t}: {n} bytes" for name, t, n in every if n)
    kernels = len({name for name, _, _ in every})
    text = f"Of all {kernels} kernels of the library, these and the others, {'some spill' if spilled else 'none spills'} registers to memory"
    text += f": {spilled}.\n" if spilled else ".\n"
    if any(set(of_kernel(found, name)) != set(found["targets"]) for name in hot(found)):
        text += "A dash: not compiled for that target yet.\n"
    return text + "\n"


def _requests(row: dict[str, Any]) -> list[str]:
    """Return the numbers of a shape's requests."""
    total = {what: sum(c[what][part] for c in row["kernels"].values()) for what, part in (("loads", "sectors"), ("stores", "sectors"))}
    asked = sum(c[what]["bytes"] for c in row["kernels"].values() for what in total)
    passes = [sum(c[what][part] for c in row["kernels"].values() for what in ("shared_loads", "shared_stores")) for part in ("conflicts", "sectors")]
    held = f"{32 * row['held_sectors'] / row['held_bytes']:.2f}" if row["held_sectors"] else "-"
    counts = [str(sum(c[what] for c in row["kernels"].values()) or "-") for what in ("mma", "dp4a", "barriers")]
    return [row["name"], held, f"{32 * sum(total.values()) / asked:.2f}", f"{100 * passes[0] / passes[1]:.1f}%" if passes[1] else "-", *counts]


def main(argv: Sequence[str] | None = None) -> int:
    """Collect, and write the page and the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--threads", type=int, default=1, help="compilers at once")
    parser.add_argument("--kept", action="store_true", help="compile nothing: registers of what was compiled before, - elsewhere")
    args = parser.parse_args(argv)
    found = collect(args.targets.split(","), args.threads, args.kept)
    JSON.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", json.dumps(found, indent=1)) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
