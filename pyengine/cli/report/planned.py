"""The plan for people: devices and sizes of pictures as arguments, the text on a terminal, and a drawing."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.cli.screen import note, show
from pyengine.errors import RequestError

if TYPE_CHECKING:
    from pyengine.memory.plan import MemoryPlan

DOES_NOT_FIT = 1                     # exit code of `plan`
# One hue a purpose, and its details in shades of it.
_COLOURS = {"weights": "tab:blue", "kv": "tab:orange", "arena": "tab:green", "sampler": "tab:olive", "encoder": "tab:purple",
            "images": "tab:pink", "overhead": "tab:gray"}
_DECIMAL, _BINARY = {"": 1}, {"": 1}
for _power, _letter in enumerate("kmgt", 1):
    _DECIMAL[f"{_letter}b"] = 1000**_power
    _BINARY[_letter] = _BINARY[f"{_letter}ib"] = 1024**_power
_UNITS = _DECIMAL | _BINARY


def parse_device(arguments: Sequence[str]) -> Any:
    """Return what `plan` and `load` take as `device`: "cpu", "cuda:1", parts "cpu:0=6GiB", several of these. Raises: RequestError."""
    if len(arguments) == 1 and "=" not in arguments[0]:
        return arguments[0]
    parts: dict[str, int | None] = {}
    for argument in arguments:
        name, equals, room = argument.partition("=")
        number = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s?([a-z]*)", room.lower(), re.ASCII)
        if equals and not room or not equals and re.fullmatch(r"cpu:\d+", name):
            raise RequestError(f"--device {argument}: of several parts of the memory each has its bytes, as cpu:0=6GiB")
        if equals and (number is None or number[2] not in _UNITS):
            raise RequestError(f"--device {argument}: {room} is no number of bytes; write it as cpu:0=6GiB (or 6G, 6144MiB; 6GB are 6,000,000,000)")
        if name in parts:
            raise RequestError(f"--device {argument}: {name} is given twice; give each part once, as cpu:0=6GiB")
        parts[name] = int(float(number[1]) * _UNITS[number[2]]) if number and equals else None
    if "cpu" in parts and any(name.startswith("cpu:") for name in parts):
        raise RequestError("--device cpu: is all of main memory; beside its parts each has its bytes, as cpu:0=6GiB")
    return parts or "auto"


def parse_size(text: str | None, count: int | None) -> Any:
    """Return what `plan` and `load` take as `images`, from "896x1344" and a number of pictures. Raises: RequestError."""
    if text is None:
        return count
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise RequestError(f"--picture {text}: give WIDTHxHEIGHT in pixels, as 896x1344")
    return (int(width), int(height), *([] if count is None else [count]))


def parse_adapters(files: Sequence[str], scaled: Sequence[str]) -> dict[str, tuple[str, float]] | None:
    """Return adapters and their scales by their names, those of the files: x, x-2, x-3 of several; None without any.

    scaled: FILE:SCALE, or several with commas. Raises: RequestError.
    """
    found = [(file, 1.0) for files_ in files for file in files_.split(",")]
    for one in (part for text in scaled for part in text.split(",")):
        file, _, scale = one.rpartition(":")
        try:
            found.append((file, float(scale)))
        except ValueError:
            raise RequestError(f"--lora-scaled {one}: give FILE:SCALE, as a.gguf:0.5") from None
    named: dict[str, tuple[str, float]] = {}
    for file, factor in found:
        stem = Path(file).stem
        names = (stem, *(f"{stem}-{i}" for i in range(2, len(found) + 1)))
        named[next(n for n in names if n not in named)] = (file, factor)
    return named or None


def show_plan(found: MemoryPlan) -> int:
    """Print a plan, its verdict green or red on a terminal; returns the exit code, 0 where it fits."""
    heading, verdict, *rest = found.table().splitlines()
    show(heading)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        sys.stdout.write(f"\x1b[1;{32 if found.fits else 31}m{verdict}\x1b[0m\n")         # a plan's own words
    else:
        show(verdict)
    for line in (*rest, *found.advice(options=True).splitlines()):
        show(line)
    return 0 if found.fits else DOES_NOT_FIT


def draw(found: MemoryPlan, path: Path) -> None:
    """Draw the plan as one stacked bar a device, and what it has free. Raises: RequestError without matplotlib, or for the file."""
    from pyengine.files.writing import written

    try:
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError("--png draws with matplotlib, which is not installed: pip install matplotlib") from None
    from pyengine.memory.plan import amount, PURPOSES

    unit, size = ("GiB", 2**30) if found.total >= 2**30 else ("MiB", 2**20)
    rows: dict[tuple[str, str, str], int] = {}
    for i in sorted(found.items, key=lambda i: PURPOSES.index(i.purpose)):
        if i.purpose != "mapped":
            rows[i.device, i.purpose, i.detail] = rows.get((i.device, i.purpose, i.detail), 0) + i.nbytes
    details: dict[tuple[str, str], int] = {}
    for (_, purpose, detail), nbytes in rows.items():
        key = purpose, detail
        details[key] = details.get(key, 0) + nbytes
    figure = Figure(figsize=(10, 2 + 0.6 * len(found.devices) + 0.2 * len(details)), layout="constrained")
    axes = figure.subplots()
    left, handles = dict.fromkeys(found.devices, 0.0), {}
    for (device, purpose, detail), nbytes in rows.items():
        same = [d for p, d in details if p == purpose]
        lighter = 0.6 * same.index(detail) / len(same)
        colour = [c + (1 - c) * lighter for c in to_rgb(_COLOURS[purpose])]
        bar = axes.barh(found.devices.index(device), nbytes / size, left=left[device], height=0.6, color=colour, linewidth=0)
        left[device] += nbytes / size
        handles.setdefault((purpose, detail), bar)
    for at, device in enumerate(found.devices):
        if found.available[device] <= 2 * found.on(device):                    # else the bar would be a sliver beside it
            axes.vlines(found.available[device] / size, at - 0.4, at + 0.4, "black", "dashed")
    axes.set_yticks(range(len(found.devices)), [f"{d}\n{amount(found.available[d])} available" for d in found.devices])
    axes.invert_yaxis()                                                        # the first device on top
    axes.set_xlabel(f"{unit} (a dashed line: all that is available)")
    axes.set_title("\n".join((found.heading(), found.verdict())), fontsize=10)
    names = [f"{purpose}: {detail}, {amount(n)}" for (purpose, detail), n in details.items()]
    figure.legend([handles[key] for key in details], names, loc="outside lower left", fontsize=7)
    try:
        with written(path) as file:
            figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise RequestError(f"--png {path}: {error.strerror}") from None
    note(f"wrote {path}")
