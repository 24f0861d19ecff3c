"""Engines in processes of their own, asked by lines of JSON: this project, llama.cpp and other builds of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

OURS, LLAMA, IK = "pyengine", "llama.cpp", "ik_llama.cpp"
PACKAGES = {"llama_cpp": LLAMA, "ik_llama_cpp": IK}        # what a folder of `--peer` may hold, and the worker that speaks to it


def worker(module: str, *arguments: Any) -> dict[str, Any]:
    """Return `args` and `env` for subprocess that run a module of this package, under the name that it has here.

    The package is `bench` in a checkout and `pyengine.bench` where pyengine is installed; it is found from any working folder. An op
    without a kernel is an error there: the NumPy reference is not to be timed.
    """
    top = sys.modules[__package__.partition(".")[0]]
    path = [str(Path(top.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return {"args": [sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)],
            "env": {"PYENGINE_STRICT": "1", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}}


class Process:
    """A worker process of a module of this package; `call` asks it and waits. `ready` is what it said when it was."""

    def __init__(self, name: str, module: str, *arguments: Any):
        self.name = name
        self.process = subprocess.Popen(**worker(module, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the worker ended with exit code {self.process.wait()}; its messages are above")
        return json.loads(line)

    def call(self, name: str, **arguments: Any) -> Any:
        self.process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stdout.close()


class Engine(Process):
    """An engine with a text model (bench/worker.py); `folder` holds its package where it is not the installed one."""

    def __init__(self, name: str, path: str | Path, n_threads: int, n_ctx: int = 512, folder: Path | None = None):
        super().__init__(name, "worker", *which(name, folder), path, "-t", n_threads, "--ctx", n_ctx)
        self.n_vocab: int = self.ready["n_vocab"]


def which(name: str, folder: Path | None) -> list[str]:
    """The worker's arguments that say which engine it is. Raises: FileNotFoundError for a folder without one."""
    if folder is None:
        return [name]
    kinds = [kind for package, kind in PACKAGES.items() if (folder / package).is_dir()]
    if not kinds:
        raise FileNotFoundError(f"{folder}: holds none of the packages {', '.join(PACKAGES)}; make it with pip install --target")
    return [kinds[0], "--folder", str(folder.resolve())]
