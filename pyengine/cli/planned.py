"""The plan for people: devices and sizes of pictures as arguments, and a drawing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine import DISTRIBUTION
from pyengine.errors import RequestError

if TYPE_CHECKING:
    from pyengine.memory.plan import MemoryPlan

MIB = 2**20
_UNITS = {None: 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_device(arguments: Sequence[str]) -> Any:
    """Return what `plan` and `load` take as `device`, from "cpu" or from parts "cpu:0=6GiB". Raises: RequestError."""
    parts: dict[str, int] = {}
    for argument in arguments:
        name, equals, room = argument.partition("=")
        number = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([kmgt]ib)?", room.lower(), re.ASCII)
        if equals and number and name not in parts:
            parts[name] = int(float(number[1]) * _UNITS[number[2]])
        elif equals or len(arguments) > 1:
            raise RequestError(f"--device {argument}: give each part of the memory once, with its bytes, as cpu:0=6GiB")
    return parts or (arguments[0] if arguments else "auto")


def parse_size(text: str | None, count: int | None) -> Any:
    """Return what `plan` and `load` take as `images`, from "896x1344" and a number of pictures. Raises: RequestError."""
    if text is None:
        return count
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise RequestError(f"--picture {text}: give WIDTHxHEIGHT in pixels, as 896x1344")
    return (int(width), int(height), *([] if count is None else [count]))


def draw(found: MemoryPlan, path: Path) -> None:
    """Draw the plan as one stacked bar a device, and what it has free. Raises: RequestError without matplotlib, or for the file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError(f"--png draws with matplotlib, which is not installed: pip install '{DISTRIBUTION}[bench]'") from None
    figure = Figure(figsize=(9, 1.8 + 0.6 * len(found.devices) + 0.18 * len(found.lines())), layout="constrained")
    axes = figure.subplots()
    for at, device in enumerate(found.devices):
        left = 0.0
        for own, purpose, nbytes, detail in found.lines():
            if own == device and purpose != "mapped":
                label = f"{purpose}: {detail}, {nbytes / MIB:.1f} MiB"
                axes.barh(at, nbytes / MIB, left=left, height=0.6, label=label, linewidth=0)
                left += nbytes / MIB
        if found.available[device] <= 2 * found.on(device):                    # else the bar would be a sliver beside it
            axes.vlines(found.available[device] / MIB, at - 0.4, at + 0.4, "black", "dashed")
    axes.set_yticks(range(len(found.devices)), [f"{d}\n{found.available[d] / MIB:.0f} MiB free" for d in found.devices])
    axes.set_xlabel("MiB; dashed: free, where it is near")
    times = f" x {found.n_seq}" if found.n_seq > 1 else ""
    axes.set_title(f"{found.model}: context {found.n_ctx}{times}, kv {found.kv_dtype}, {found.total / MIB:.1f} MiB", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", fontsize=7)
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise RequestError(f"--png {path}: {error.strerror}") from None
