"""`pyengine-run classify`: what a picture shows, of labels that are given or those of the model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pyengine.cli.forms import commands, Form
from pyengine.cli.options import Devices, Json, ModelName, Threads
from pyengine.errors import RequestError, UnsupportedModelError

TOP = 10                             # labels that are shown of the model's own
WIDTH = 30                           # of the longest bar, in letters


@commands.command(cls=Form)
def classify(
    model: ModelName,
    label: Annotated[list[str] | None, Argument(metavar="LABEL", show_default=False, help=(
        "What the picture may show, as the model should read it: \"a cat\" \"a dog\" (default: the classes of the model's file)."))] = None,
    image: Annotated[list[str] | None, Option("--image", metavar="FILE", show_default=False, help=(
        "The picture: a file, a file:// or a data URL; repeatable."))] = None,
    labels: Annotated[list[Path] | None, Option("--labels", "-f", metavar="FILE", help="A file with a label on each line; repeatable.")] = None,
    activation: Annotated[str | None, Option("--activation", help=(
        "softmax (shares of 100%), sigmoid (each label for itself) or none (default: what the model was trained with)."))] = None,
    top: Annotated[int | None, Option("--top", "-n", min=1, metavar="N", help=(
        f"The first N labels (default: all that are given, {TOP} of the model's)."))] = None,
    threads: Threads = None,
    device: Devices = None,
    json: Json = False,
) -> None:
    """Say how probable labels are for a picture, with a model of pictures and texts (CLIP, SigLIP) or of classes (ViT)."""
    from pyengine.cli import pictures, screen
    from pyengine.cli.report.planned import parse_device

    asked = [*(label or ()), *(line for file in labels or () for line in _lines(file))]
    if not image:
        raise RequestError("classify: --image FILE is missing")
    if twice := {name for name in asked if asked.count(name) > 1}:
        raise RequestError(f"classify: the label {sorted(twice)[0]!r} is given twice")
    if labels and not asked:
        raise RequestError(f"--labels {labels[0]}: no line has a label")
    shown = [pictures.open_picture(file, {}) for file in pictures.separate(image)]
    with screen.load(model, writes=False, n_threads=threads, device=parse_device(device or ())) as loaded:
        if loaded.writes:
            raise UnsupportedModelError(f"classify: {loaded.plan.model} writes text and has no classes; ask it about the picture instead: "
                                        f"`{screen.PROGRAM} MODEL QUESTION --image FILE`")
        found = [loaded.classify(one.media, asked or None, activation) for one in shown]
        names, kind = [one.name for one in shown], activation or ("sigmoid" if loaded.towers.independent else "softmax")
    top = top or (len(asked) if asked else TOP)
    if json:
        screen.show_json({"model": Path(model).name, "activation": kind, "pictures": [
            {"picture": name, "labels": dict(list(scores.items())[:top])} for name, scores in zip(names, found)]})
        return
    for i, (name, scores) in enumerate(zip(names, found)):
        if len(found) > 1:
            screen.show(f"{chr(10) if i else ''}{name}")
        _show(dict(list(scores.items())[:top]), kind)


def _lines(file: Path) -> list[str]:
    """Return the lines of a file that are not empty, without blanks around them. Raises: RequestError."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()]
    except OSError as error:
        raise RequestError(f"--labels {file}: {error.strerror}") from None


def _show(scores: Mapping[str, float], kind: str) -> None:
    """Print labels with their numbers, and bars at a terminal."""
    from pyengine.cli import screen
    from pyengine.cli.talk.terminal import width

    numbers = [f"{x:.4f}" if kind == "none" else f"{100 * x:.2f}%" for x in scores.values()]
    if kind == "none" or not sys.stdout.isatty():
        screen.show_columns([*zip(scores, numbers)], right=(1,))
        return
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold", max_width=max(20, width(sys.stdout) - WIDTH - 12))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(width=WIDTH)
    for (name, x), number in zip(scores.items(), numbers):
        table.add_row(Text(screen.printable(name)), Text(number, style="bold"), Bar(1.0, 0.0, x, color="cyan"))
    Console(file=sys.stdout, width=width(sys.stdout)).print(table)
