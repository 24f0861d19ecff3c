"""Give readers damaged inputs: each ends in a result or in a PyEngineError, in bounded time and memory.

    python tests/fuzz/fuzzing.py [TARGET ...] [--seconds S] [--seed N] [--folder F]   all targets, S seconds each; exit code 1 for findings
    python tests/fuzz/fuzzing.py TARGET --input FILE                                  one input again, with the whole traceback

An input is a number of a seed: the same each time. Where atheris is installed (pip install atheris; Linux), `--guided` lets it choose
inputs by the lines that they reach; our mutators are its own then. A worker runs the inputs in a process of its own, which may die;
what it found lies in F (build/fuzz) by the place of the fault, with the traceback beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), *os.environ.get("PYENGINE_FUZZ_PATH", "").split(os.pathsep)]

MEMORY = 2 << 30                      # bytes of addresses beyond those of the first input
HANG = 60                             # seconds of the clock, on a machine that others use too


class Slow(Exception):
    """An input took more time than its target has."""


def place_of(error: BaseException) -> str:
    """Name a finding: the exception, and the last line of ours that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/pyengine/" in f.filename or "/converters/" in f.filename] or frames
    at = f"{Path(own[-1].filename).name}-{own[-1].name}" if own else "nowhere"
    return f"{type(error).__name__}-{at}".replace("<", "").replace(">", "")


class Worker:
    """Runs inputs of one target and notes what is wrong with them."""

    def __init__(self, name: str, folder: Path):
        import targets
        from pyengine.errors import PyEngineError

        self.right = PyEngineError
        self.target = targets.TARGETS[name]()
        self.folder = folder
        self.refused = 0
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Run the right inputs, then set the limits."""
        for data in self.target.seeds:
            with contextlib.nullcontext() if self.target.right else contextlib.suppress(self.right):
                self.target.run(data)
        from pyengine.native import engine

        if getattr(engine, "SANITIZED", False):              # which takes terabytes of addresses
            return
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20,) * 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def input(self, seed: int, number: int) -> bytes:
        rng = Random(f"{seed} {number}")
        return self.target.spoilt(rng, rng.choice(self.target.seeds))

    def run(self, data: bytes) -> None:
        """Run one input; keep it if something is wrong."""
        (self.folder / "current").write_bytes(data)
        faulthandler.dump_traceback_later(HANG, exit=True)
        started, wall = time.process_time(), time.monotonic()
        try:
            self.target.run(data)
        except self.right:
            self.refused += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.keep(place_of(error), data, traceback.format_exc())
        spent = min(time.process_time() - started, time.monotonic() - wall)
        if spent > self.target.seconds:
            self.keep(f"Slow-{self.target.name}-{int(spent)}s", data, f"took {spent:.1f} s, more than {self.target.seconds}\n")
        faulthandler.cancel_dump_traceback_later()

    def keep(self, place: str, data: bytes, text: str) -> None:
        with open(self.folder / "found", "a", encoding="utf-8") as noted:
            noted.write(f"{place}\n")
        if not (self.folder / f"{place}.input").exists():
            (self.folder / f"{place}.input").write_bytes(data)
            (self.folder / f"{place}.txt").write_text(text[-20_000:], errors="backslashreplace")


def work(name: str, seed: int, first: int, seconds: float, runs: int, folder: Path) -> None:
    """Run inputs first, first + 1 .. of a seed, and print a line of JSON about them."""
    warnings.simplefilter("ignore")
    worker = Worker(name, folder)
    worker.prepare()
    number, end = first, time.monotonic() + seconds
    while time.monotonic() < end and number < first + runs:
        (folder / "at").write_text(str(number))
        worker.run(worker.input(seed, number))
        number += 1
    print(json.dumps({"runs": number - first, "refused": worker.refused}), flush=True)
    os._exit(0)                                              # not what hostile objects do when they go


def guided(name: str, seed: int, seconds: float, folder: Path) -> None:
    """Let atheris choose: it keeps inputs that reach new lines, and spoils those again."""
    import atheris

    with atheris.instrument_imports(include=["pyengine", "converters"]):
        import pyengine.files.gguf                           # noqa: F401
        worker = Worker(name, folder)
        worker.prepare()
    warnings.simplefilter("ignore")
    kept = folder / "corpus"
    kept.mkdir(exist_ok=True)
    for data in worker.target.seeds:
        (kept / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    number = 0

    def run(data: bytes) -> None:
        nonlocal number
        (folder / "at").write_text(str(number := number + 1))
        worker.run(data)

    atheris.Setup([sys.argv[0], str(kept), f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-rss_limit_mb=0", "-timeout=600", "-verbosity=0",
                   f"-max_len={max(map(len, worker.target.seeds)) * 2}"], run,
                  custom_mutator=lambda data, size, seed: worker.target.spoilt(Random(seed), data)[:size])
    atheris.Fuzz()


def fuzz(name: str, seconds: float, seed: int = 0, runs: int = 1 << 60, folder: Path = ROOT / "build" / "fuzz", guide: bool = False) -> dict[str, Any]:
    """Run a target for so long; what came of it: runs, refused, and found, by the place of the fault."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in ("found", "at", "current"):
        (folder / left_over).unlink(missing_ok=True)
    total: dict[str, Any] = {"runs": 0, "refused": 0, "found": {}}
    end, first = time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 0 and total["runs"] < runs:
        command = [sys.executable, __file__, "--worker", name, str(seed), str(first), str(left), str(runs - total["runs"]), str(folder), str(int(guide))]
        paths = [p for p in sys.path if p and Path(p, "pyengine").is_dir()]
        env = {**os.environ, "PYENGINE_FUZZ_PATH": os.pathsep.join(paths)}
        with tempfile.TemporaryDirectory() as own:           # what a worker leaves there goes with it
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=own, env={**env, "TMPDIR": own})
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"runs"')]
        if done.returncode == 0 and lines:
            said = json.loads(lines[-1])
            total["runs"] += said["runs"]
            total["refused"] += said["refused"]
            break
        at = int((folder / "at").read_text()) if (folder / "at").exists() else first
        if guide and done.returncode == 0:
            total["runs"] += at - first
            break
        if not (folder / "current").exists():
            raise RuntimeError(f"{name}: the worker does not start\n{done.stderr[-4000:]}")
        place = f"Died-{name}-{done.returncode}-{at}"
        (folder / f"{place}.input").write_bytes((folder / "current").read_bytes())
        (folder / f"{place}.txt").write_text(done.stderr[-20_000:], errors="backslashreplace")
        total["found"][place] = 1
        total["runs"] += at + 1 - first
        first = at + 1
    noted = (folder / "found").read_text(encoding="utf-8").split() if (folder / "found").exists() else []
    total["found"].update(Counter(noted))
    return total


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        name, seed, first, seconds, runs, folder, guide = sys.argv[2:]
        if guide == "1":
            guided(name, int(seed), float(seconds), Path(folder))
        work(name, int(seed), int(first), float(seconds), int(runs), Path(folder))
    import targets

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(targets.TARGETS))
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_SECONDS", 60)))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FUZZ_SEED", time.time())))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--guided", action="store_true", help="by atheris")
    parser.add_argument("--input", type=Path, help="run this file's bytes once")
    args = parser.parse_args()
    unknown = set(args.targets) - set(targets.TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(targets.TARGETS)}")
    if args.input:
        targets.TARGETS[args.targets[0]]().run(args.input.read_bytes())
        return 0
    bad = 0
    for name in args.targets or targets.TARGETS:
        total = fuzz(name, args.seconds, args.seed, folder=args.folder.resolve(), guide=args.guided)
        bad += len(total["found"])
        print(f"{name}: {total['runs']} inputs of seed {args.seed}, {total['refused']} refused, {len(total['found'])} findings", flush=True)
        for place, n in total["found"].items():
            print(f"    {n} x {place}: python tests/fuzz/fuzzing.py {name} --input {args.folder}/{name}/{place}.input", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
