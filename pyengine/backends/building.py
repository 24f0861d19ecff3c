"""Libraries that are compiled on this machine: an object is kept for each state of the files that it was made from.

Several processes may ask for the same library at once; one compiles it, the others wait. $PYENGINE_OBJECTS names a folder of objects
that several checkouts share.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyengine.errors import GraphError
from pyengine.records import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


class Job(NamedTuple):
    """A file to compile, by a command to which `-o OBJECT -c SOURCE -MMD -MF LIST` is added."""

    source: Path
    command: tuple[str, ...]


def library(name: str, jobs: Sequence[Job], link: Sequence[str], folder: Path) -> Path:
    """Return the path of a library made of these objects, compiled where that has not been done: folder/name-HASH.so.

    link: the command that links, to which `-o LIBRARY OBJECTS` is added.
    Raises: GraphError with the compiler's words.
    """
    from concurrent.futures import ThreadPoolExecutor        # here: who only looks for a library that was built compiles nothing

    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    kept = Path(os.environ.get("PYENGINE_OBJECTS") or folder / "objects")
    kept.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(lambda job: _object(job, kept), jobs))
        made = folder / f"{name}-{_hash(*link, *(o.name for o in objects))}.so"
        if not made.exists():
            new = made.with_suffix(f".{os.getpid()}")
            _run([*link, "-o", str(new), *map(str, objects)], made.name)
            new.replace(made)
            for old in folder.glob(f"{name}-*.so"):
                if old != made and len(old.stem) == len(made.stem):
                    old.unlink()                             # programs that have it open keep it
    return made


def _object(job: Job, folder: Path) -> Path:
    """Return the object of a file in the state in which it and the files that it includes are now, compiled if it is not there."""
    command = " ".join(job.command).replace(str(ROOT), ".")
    place = folder / f"{job.source.stem}-{_hash(command, _content(job.source))}"
    for listed in _lists(place):
        made = _made(place, listed)
        if made.exists():
            return made
    new = place.with_name(f"{place.name}.{os.getpid()}.o")
    rules = new.with_suffix(".d")
    _run([*job.command, "-o", str(new), "-c", str(job.source), "-MMD", "-MF", str(rules)], str(job.source))
    paths = rules.read_text(encoding="utf-8").split(": ", 1)[1].replace("\\\n", " ").split()
    listed = sorted({os.path.relpath(path, ROOT) for path in [*paths, str(job.source)]})
    made = _made(place, listed)
    with open(place.with_suffix(".lists"), "a", encoding="utf-8") as lists:
        lists.write(json.dumps(listed) + "\n")
    new.replace(made)
    rules.unlink()
    return made


def _lists(place: Path) -> Iterator[list[str]]:
    """Yield the lists of files that objects of a file were made from, each once."""
    lists = place.with_suffix(".lists")
    for line in dict.fromkeys(lists.read_text(encoding="utf-8").splitlines()) if lists.exists() else ():
        yield json.loads(line)


def _made(place: Path, listed: Sequence[str]) -> Path:
    """Return where the object is that is made from these files as they are now."""
    return place.with_name(f"{place.name}-{_hash(*(part for path in listed for part in (path, _content(ROOT / path))))}.o")


def _run(command: Sequence[str], what: str) -> None:
    import subprocess

    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise GraphError(f"{what} cannot be compiled: {command[0]}: {error}") from None
    if done.returncode:
        raise GraphError(f"{what} does not compile:\n{' '.join(command)}\n{done.stdout}")


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
