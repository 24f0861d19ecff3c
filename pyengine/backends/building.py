"""Libraries that are compiled on this machine: objects are kept until a file that they were made from changes.

Several processes may ask for the same library at once; one compiles it, the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from pyengine.errors import GraphError

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


class Job(NamedTuple):
    """A file to compile, by a command that ends with what `-o OBJECT -c SOURCE -MMD -MF LIST` would add."""

    source: Path
    command: tuple[str, ...]


def library(name: str, jobs: Sequence[Job], link: Sequence[str], folder: Path) -> Path:
    """Return the path of a library made of these objects, compiled where that has not been done: folder/name-HASH.so.

    link: the command that links, to which `-o LIBRARY OBJECTS` is added.
    Raises: GraphError with the compiler's words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(lambda job: _object(job, folder / name), jobs))
        mark = _hash(*link, *(o.read_text(encoding="utf-8") for _, o in objects))
        made = folder / f"{name}-{mark}.so"
        if not made.exists():
            new = made.with_suffix(f".{os.getpid()}")
            _run([*link, "-o", str(new), *(str(o) for o, _ in objects)], made.name)
            new.replace(made)
            for old in folder.glob(f"{name}-*.so"):
                if old != made:
                    old.unlink()                             # programs that have it open keep it
    return made


def _object(job: Job, folder: Path) -> tuple[Path, Path]:
    """Return an object and the list of what it was made from (paths and hashes of their contents), compiling it where one differs."""
    place = folder / f"{job.source.stem}-{_hash(str(job.source), *job.command)}"
    made, listed = place.with_suffix(".o"), place.with_suffix(".json")
    if made.exists() and listed.exists():
        before = json.loads(listed.read_text(encoding="utf-8"))
        if all(_content(Path(path)) == mark for path, mark in before.items()):
            return made, listed
    folder.mkdir(parents=True, exist_ok=True)
    rules = place.with_suffix(".d")
    _run([*job.command, "-o", str(made), "-c", str(job.source), "-MMD", "-MF", str(rules)], str(job.source))
    paths = rules.read_text(encoding="utf-8").split(": ", 1)[1].replace("\\\n", " ").split()
    listed.write_text(json.dumps({path: _content(Path(path)) for path in sorted({*paths, str(job.source)})}), encoding="utf-8")
    return made, listed


def _run(command: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise GraphError(f"{what} cannot be compiled: {command[0]}: {error}") from None
    if done.returncode:
        raise GraphError(f"{what} does not compile:\n{' '.join(command)}\n{done.stdout}")


def _content(path: Path) -> str:
    return _hash(path.read_bytes().decode("latin-1")) if path.exists() else ""


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
