"""Check and time everything on a card, and write one JSON: `make gpu-check`. Needs no network and no pytest; PyTorch is only compared with.

    python -m bench.gpu.check                              the card, in under 9 minutes
    python -m bench.gpu.check --device cuda-emulated --tiny    the same on small sizes, without a card
    python -m bench.gpu.check --only ops,agree             parts: speeds, ops, kernels, agree, model, torch

Exit code 1 when a result is wrong, or a part fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pyengine import ops
from pyengine.backends.cuda.library import library
from pyengine.errors import GraphError

from .. import kernels
from ..machine import describe, ROOT
from . import jobs, models, synthetic
from .speeds import measure, Speeds

PARTS = ("speeds", "ops", "kernels", "agree", "model", "torch")
BUDGET = 220.0                                               # seconds after which no further kernel is timed


@dataclass
class Check:
    """A run of all parts: what they found, and what was wrong."""

    device: str
    tiny: bool
    folder: Path
    begun: float = field(default_factory=time.perf_counter)
    found: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    took: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part, and note it as wrong if it fails."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")
            traceback.print_exc()
        self.took[name] = time.perf_counter() - start
        print(f"-- {name}: {self.took[name]:.0f} s", flush=True)

    def each(self, part: str, items: Any, do: Callable[[Any], dict[str, Any]], name: Callable[[Any], str]) -> list[dict[str, Any]]:
        """Do something with every item; what fails is noted and the rest goes on."""
        out = []
        for item in items:
            try:
                record = do(item)
            except Exception as error:
                self.wrong.append(f"{part}: {name(item)}: {type(error).__name__}: {str(error)[:500]}")
                continue
            if not record.pop("right"):
                self.wrong.append(f"{part}: {name(item)}: {brief(record)}")
            out.append(record)
        return out

    def covers(self, job: kernels.Job) -> bool:
        """Say whether the device has the job's kernel, which computes what the reference does."""
        return job.op is not ops.attention_sums             # the CPU alone fuses `attention` and `key_sums`: docs/gpu.md

    @property
    def index(self) -> int:
        """The number of the device."""
        return int(self.device.partition(":")[2] or 0)

    @property
    def speeds(self) -> Speeds:
        """The device's limits, measured once."""
        if "speeds" not in self.found:
            own = library("-emulated" in self.device)
            sizes = {"nbytes": 1 << 20, "steps": 2, "rounds": 1} if self.tiny else {}
            self.found["device"] = own.facts(self.index)._asdict()
            self.found["speeds"] = measure(own, self.index, **sizes).to_json()
        return Speeds(**self.found["speeds"])


def brief(record: dict[str, Any]) -> str:
    """Return the numbers of a record on one line."""
    shown = {k: v for k, v in record.items() if isinstance(v, (int, float)) or (k == "fallbacks" and v)}
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


# ---- parts ------------------------------------------------------------------------------------------------------------------------


def check_ops(c: Check) -> None:
    """Every declared case, and layers of real models in every format, beside the reference."""
    of_ops = [j for j in kernels.jobs() if c.covers(j) and (not c.tiny or j.label.startswith("case "))]

    def do(job: kernels.Job) -> dict[str, Any]:
        record = jobs.checked(job, c.device)
        return {**record, "right": record["correct"]}

    records = c.each("ops", of_ops, do, lambda job: job.name)
    worst = max(records, key=lambda r: r["nmse"], default=None)
    c.found["ops"] = {"checked": len(records), "worst": worst}
    print(f"ops: {len(records)} of {len(of_ops)} cases ran; worst {worst}")


def check_kernels(c: Check) -> None:
    """Every hot kernel: right, and what share of its limit."""
    speeds, hot = c.speeds, list(jobs.tiny() if c.tiny else jobs.hot())

    def do(job: kernels.Job) -> dict[str, Any]:
        if time.perf_counter() - c.begun > BUDGET:
            raise TimeoutError(f"not timed: {BUDGET:.0f} s have passed")
        record = jobs.measured(job, c.device, speeds, 1 if c.tiny else jobs.REPEAT)
        s = record["seconds"]
        print(f"{record['name']:64} {1e6 * s['median']:10.1f} us  {record['gbps']:8.1f} GB/s {record['tops']:8.2f} Top/s"
              f"  {100 * record['share']:5.1f}% of {record['limit']:5} {'' if record['correct'] else 'WRONG'}", flush=True)
        return {**record, "right": record["correct"]}

    c.found["kernels"] = c.each("kernels", hot, do, lambda job: job.name)


def check_models(c: Check) -> None:
    """Small models of every layout beside the CPU backend, and an encoder of pictures."""
    pairs: list[tuple[str, str]] = [(name, "f16") for name in synthetic.SMALL] + [("llama F32", "f32"), ("llama Q4_K_M", "q8_0"), ("llama Q4_K_M", "q4_0")]
    pairs = [*(p for p in pairs if p != ("llama F32", "f16")), ("picture", "f16"), ("picture", "q8_0")]

    def do(pair: tuple[str, str]) -> dict[str, Any]:
        name, kind = pair
        if name == "picture":
            record = models.seen(kind, c.device)
        else:
            record = models.agree(name, c.device, c.folder, kind, 24 if c.tiny else 100)
        print(f"{record['name']:40} differs by {record['difference']:.2e} of the range; error {record['error']:.2e}, the CPU's {record['error_of_cpu']:.2e}",
              flush=True)
        return {**record, "right": models.right(record)}

    c.found["agree"] = c.each("agree", pairs, do, " ".join)


def time_model(c: Check) -> None:
    """A model of 8 billion weights (tiny: a small one): prompt, generation, a long context."""
    model = synthetic.SMALL["llama Q4_K_M"] if c.tiny else synthetic.EIGHT
    sizes = {"prompt": 16, "generate": 6, "depth": 96} if c.tiny else {}
    start = time.perf_counter()
    path = synthetic.write(c.folder / "timed.gguf", model)
    print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
    found = c.found["model"] = models.speeds(path, c.device, **sizes)
    path.unlink()
    for what in ("prompt", "generation", "long"):
        print(f"{what}: {json.dumps({k: v for k, v in found[what].items() if k != 'seconds'})}")
    print(f"between steps: {100 * found['between_steps']:.1f}% of a token; by op: "
          + ", ".join(f"{op} {1e3 * s:.3f} ms" for op, s in sorted(found["steps_seconds"].items(), key=lambda i: -i[1])))


def compare_torch(c: Check) -> None:
    """PyTorch on the shapes of the kernels, in a process of its own."""
    records = c.found.get("kernels", [])
    asked = json.dumps([{k: r[k] for k in ("name", "op", "shapes")} for r in records])
    done = subprocess.run([sys.executable, "-m", "bench.gpu.beside"], input=asked, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}")
    found = c.found["torch"] = json.loads(done.stdout)
    for r in records:
        if isinstance(theirs := found["seconds"].get(r["name"]), float):
            r["torch_seconds"] = theirs
            print(f"{r['name']:64} {1e6 * r['seconds']['median']:10.1f} us, PyTorch {1e6 * theirs:10.1f} us: {theirs / r['seconds']['median']:5.2f} x")


DO: dict[str, Callable[[Check], None]] = {"ops": check_ops, "kernels": check_kernels, "agree": check_models, "model": time_model,
                                          "torch": compare_torch}


def run(device: str, tiny: bool, only: list[str]) -> Check:
    """Run the parts in order."""
    library("-emulated" in device)                           # the emulator's is compiled first, which does not count
    with tempfile.TemporaryDirectory() as folder:
        c = Check(device, tiny, Path(folder))
        with c.part("speeds"):
            print(json.dumps(c.speeds.to_json()), json.dumps(c.found["device"]))
        for name, part in DO.items():
            if name in only and c.found.get("speeds"):
                with c.part(name):
                    part(c)
    return c


def parser(module: str, text: str | None, devices: Sequence[str], parts: Sequence[str], prefix: str) -> argparse.ArgumentParser:
    """Return the options of a check. devices: the default first; prefix: of the file that it writes."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default=devices[0], help=", ".join(devices))
    made.add_argument("--tiny", action="store_true", help="sizes that the emulator does in a minute")
    made.add_argument("--only", default=",".join(parts), help="parts, with commas between them")
    made.add_argument("--json", type=Path, help=f"the file to write; by default bench/results/{prefix}-NAME.json")
    return made


def known(check: str, only: Sequence[str], parts: Sequence[str]) -> bool:
    """Say whether all parts that are asked for are there, and print those that are not."""
    if unknown := set(only) - set(parts):
        print(f"{check}: no part is named {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    return not unknown


def finished(c: Any, args: argparse.Namespace, only: Sequence[str], prefix: str, device: str) -> int:
    """Write the JSON, say what was wrong, and return the exit code."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = args.json or ROOT / "bench" / "results" / f"{prefix}-{name}.json"
    record = {"when": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": describe(), "tiny": args.tiny, "parts": list(only),
              "seconds": {**c.took, "all": time.perf_counter() - c.begun}, "wrong": c.wrong, **c.found}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}; {time.perf_counter() - c.begun:.0f} s; {len(c.wrong)} wrong")
    for line in c.wrong:
        print(f"WRONG {line}")
    return 1 if c.wrong else 0


def main(argv: list[str] | None = None) -> int:
    """Run, write the JSON, say what was wrong."""
    args = parser("bench.gpu.check", __doc__, ("cuda", "cuda:1", "cuda-emulated"), PARTS, "gpu").parse_args(argv)
    only = args.only.split(",")
    if not known("gpu-check", only, PARTS):
        return 2
    try:
        c = run(args.device, args.tiny, only)
    except GraphError as error:
        print(f"gpu-check: {error}")
        return 1
    return finished(c, args, only, "gpu", c.found.get("device", {}).get("name", args.device))


if __name__ == "__main__":
    sys.exit(main())
