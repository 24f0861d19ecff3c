"""Check and time everything on a Mac, and write one JSON: `make metal-check`. Needs a Mac with an M1 or later, and pyobjc-framework-Metal.

    python -m bench.gpu.metal                                       the Mac's GPU, in some minutes
    python -m bench.gpu.metal --device metal-emulated --tiny        the same on small sizes, on any machine
    python -m bench.gpu.metal --only speeds,kernels                 parts: speeds, replay, tests, ops, kernels, agree, model

Exit code 1 when a result is wrong, or a part fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.backends import backend
from pyengine.backends.metal.device import bind, Device
from pyengine.backends.metal.launch import Launch, View
from pyengine.dtype import I8
from pyengine.errors import PyEngineError

from .. import kernels
from ..kernels import Copy, Job
from ..machine import ROOT
from ..stats import summary
from . import check, jobs
from .speeds import Speeds

PARTS = ("speeds", "replay", "tests", "ops", "kernels", "agree", "model")
CACHES = 128 << 20                                           # bytes that no Mac's caches hold (M2 Ultra: 96 MB)
GROUPS, CHAINS = 1024, 8                                     # of csrc/metal/speed.metal: threadgroups of a launch, products of a turn
REPEAT = 7


def timed(device: Device, launch: Launch, memories: Sequence[Any], repeat: int = 5) -> float:
    """Return the least seconds of a launch."""
    recording = device.record([bind(launch, memories, {})])
    seconds = []
    for _ in range(repeat):
        recording.run(True)
        seconds.append(recording.seconds()[0])
    return min(seconds)


def limits(device: Device, tiny: bool) -> Speeds:
    """Measure what the device can do at most. Products of bytes are products of halves here."""
    nbytes, turns, groups = (1 << 16, 4, 2) if tiny else (512 << 20, 4096, GROUPS)
    memories = [device.allocate(nbytes), device.allocate(max(nbytes, 256 * groups))]
    x, out = (View(i, 0, I8, (m.array.nbytes,), (1,), m.array.nbytes) for i, m in enumerate(memories))
    threads = 64 if tiny else 1 << 17
    quads = dict(n=nbytes // 16, threads=threads)
    grid, block = (threads // min(threads, 256), 1, 1), (min(threads, 256), 1, 1)
    copied = timed(device, Launch("copy_quads", quads, dict(x=x, out=out), grid, block), memories)
    read = timed(device, Launch("read_quads", quads, dict(x=x, out=out), grid, block), memories)
    products = [timed(device, Launch(kernel, dict(turns=turns), dict(out=out), (groups, 1, 1), (128, 1, 1), 256), memories)
                for kernel in ("multiply_halves", "multiply_floats")]
    operations = 4 * groups * turns * CHAINS * 2 * 8**3
    halves, floats = (operations / max(s, 1e-9) for s in products)
    return Speeds(2 * nbytes / max(copied, 1e-9), nbytes / max(read, 1e-9), halves, halves, halves, floats)


def measured(job: Job, device: str, speeds: Speeds, tiny: bool) -> dict[str, Any]:
    """Check a job and time it on the GPU's own clock, and compare it with the limits."""
    copy = Copy.make(job, np.random.default_rng(0))
    bound = jobs.Bound.of(job, copy)
    least, limit = bound.seconds(speeds)
    copies = 1 if limit != "read" or tiny else int(max(1, min(32, -(-CACHES // max(1, bound.bytes)))))
    loaded = jobs.Loaded(job, copy, copies, device)
    nmse = kernels.error(loaded.results(), *kernels.expected(job, copy))
    samples = []
    for _ in range(1 if tiny else REPEAT):
        loaded.program.profile(True)
        loaded.program.execute()
        samples.append(sum(s for node, s in loaded.program.seconds() if node.op is job.op) / copies)
    seconds = summary(samples)
    return {"name": job.name, **jobs.named(job), "seconds": seconds, "bytes": bound.bytes, "operations": bound.operations, "copies": copies,
            "limit": limit, "share": least / seconds["median"], "gbps": bound.bytes / seconds["median"] / 1e9,
            "tops": bound.operations / seconds["median"] / 1e12, "nmse": nmse, "correct": bool(nmse <= kernels.tolerance(job))}


class MacCheck(check.Check):
    """A run of all parts on a Metal device."""

    def covers(self, job: Job) -> bool:
        """Leave out attention by bytes: its reference rounds, and Metal's kernel does not, whichever products are allowed."""
        return super().covers(job) and job.case.params.get("products") != "int8"

    @property
    def own(self) -> Device:
        """The device itself."""
        return backend(self.device).device                   # type: ignore[attr-defined]  Metal's backend has one

    @property
    def speeds(self) -> Speeds:
        """The device's limits, measured once."""
        if "speeds" not in self.found:
            total, free = self.own.memory()
            self.found["device"] = {"name": self.own.name, "memory": total, "free": free, "threadgroup_bytes": self.own.max_threadgroup_bytes}
            self.found["speeds"] = limits(self.own, self.tiny).to_json()
        return Speeds(**self.found["speeds"])


def check_replay(c: MacCheck) -> None:
    """Whether launches are replayed from an indirect command buffer, or each is encoded in each run."""
    emulated = ["--emulated"] if "emulated" in c.device else []
    done = subprocess.run([sys.executable, "-m", "pyengine.backends.metal.trial", *emulated], cwd=ROOT, capture_output=True, text=True, check=False)
    c.found["replay"] = {"works": done.returncode == 0, "said": done.stderr.strip()[-1000:], "indirect": getattr(c.own, "indirect", None)}
    print(json.dumps(c.found["replay"]))
    if done.returncode:
        raise RuntimeError("a list of launches gives wrong results")


def run_tests(c: MacCheck) -> None:
    """The tests of kernels and of tiny models, on the device; pytest and transformers must be there."""
    if not all(map(find_spec, ("pytest", "transformers", "hypothesis"))):
        print("tests: left out; they need `pip install pytest hypothesis transformers torch`")
        return
    files = ["ops", "rows"] if c.tiny else ["ops", "rows", "linear", "attention", "models"]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "--backend", c.device, *(f"tests/gpu/test_metal_{f}.py" for f in files)]
    done = subprocess.run([*command, *(["-k", "scale or norm"] if c.tiny else [])], cwd=ROOT, capture_output=True, text=True, check=False)
    c.found["tests"] = done.stdout.strip().splitlines()[-1:]
    print(*done.stdout.strip().splitlines()[-40 if done.returncode else -1:], sep="\n")
    if done.returncode:
        raise RuntimeError(c.found["tests"][0] if c.found["tests"] else done.stderr[-500:])


def time_kernels(c: MacCheck) -> None:
    """Every hot kernel: right, and what share of its limit."""
    speeds, hot = c.speeds, list(jobs.tiny() if c.tiny else jobs.hot())

    def do(job: Job) -> dict[str, Any]:
        record = measured(job, c.device, speeds, c.tiny)
        print(f"{record['name']:64} {1e6 * record['seconds']['median']:10.1f} us  {record['gbps']:8.1f} GB/s {record['tops']:8.2f} Top/s"
              f"  {100 * record['share']:5.1f}% of {record['limit']:5} {'' if record['correct'] else 'WRONG'}", flush=True)
        return {**record, "right": record["correct"]}

    c.found["kernels"] = c.each("kernels", hot, do, lambda job: job.name)


DO: dict[str, Callable[[Any], None]] = {"replay": check_replay, "tests": run_tests, "ops": check.check_ops, "kernels": time_kernels,
                                        "agree": check.check_models, "model": check.time_model}


def main(argv: list[str] | None = None) -> int:
    """Run the parts in order, write the JSON, say what was wrong."""
    args = check.parser("bench.gpu.metal", __doc__, ("metal", "metal-emulated"), PARTS, "metal").parse_args(argv)
    only = args.only.split(",")
    if not check.known("metal-check", only, PARTS):
        return 2
    with tempfile.TemporaryDirectory() as folder:
        c = MacCheck(args.device, args.tiny, Path(folder))
        try:
            print(json.dumps(c.speeds.to_json()), json.dumps(c.found["device"]))
        except PyEngineError as error:
            print(f"metal-check: {error}")
            return 1
        for name, part in DO.items():
            if name in only:
                with c.part(name):
                    part(c)
    return check.finished(c, args, only, "metal", c.own.name)


if __name__ == "__main__":
    sys.exit(main())
