"""`pyengine-run embed`: vectors of texts and pictures, and how alike they are."""

from __future__ import annotations

import json as js
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from pyengine.cli.forms import commands, Form
from pyengine.cli.options import BatchSize, Context, Devices, Json, Mmproj, ModelName, N_BATCH, Threads
from pyengine.errors import RequestError

SHOWN = 6                            # numbers of a vector at a terminal


@commands.command(cls=Form)
def embed(
    model: ModelName,
    text: Annotated[list[str] | None, Argument(metavar="TEXT", show_default=False, help="A text, each of one argument; - reads lines of standard input.")] = None,
    file: Annotated[list[Path] | None, Option("--file", "-f", metavar="FILE", help="A file with a text on each line; repeatable.")] = None,
    image: Annotated[list[str] | None, Option("--image", metavar="FILE", help="A picture, where the model sees; repeatable.")] = None,
    pooling: Annotated[str | None, Option("--pooling", help="mean, cls, last, eos or head (default: what the file says).")] = None,
    no_normalize: Annotated[bool, Option("--no-normalize", help="Leave the length of vectors as it is.")] = False,
    compare: Annotated[bool, Option("--compare", help="Print how alike they are instead: the cosine of each two.")] = False,
    ctx: Context = None,
    batch: BatchSize = N_BATCH,
    mmproj: Mmproj = None,
    threads: Threads = None,
    device: Devices = None,
    json: Json = False,
) -> None:
    """Print the vectors of texts and pictures, one a line; at a terminal their first numbers."""
    from pyengine.cli import pictures, screen
    from pyengine.cli.report.planned import parse_device

    texts = [line for one in text or () for line in (_lines("-") if one == "-" else [one])]
    texts += [line for one in file or () for line in _lines(str(one))]
    seen = [pictures.open_picture(one, {}) for one in pictures.separate(image or ())]
    if not texts and not seen:
        raise RequestError("embed: give a TEXT, --file FILE or --image FILE")
    names = [*texts, *(one.name for one in seen)]
    with screen.load(model, writes=False, n_ctx=ctx, n_batch=batch, mmproj=mmproj, n_threads=threads, device=parse_device(device or ())) as loaded:
        found = loaded.embed([*texts, *(one.media for one in seen)], normalize=compare or not no_normalize, pooling=pooling)
    if compare:
        _show_alike(names, found @ found.T, json)
    elif json:
        screen.show_json({"model": Path(model).name, "size": found.shape[1], "vectors": [{"of": name, "vector": v.tolist()} for name, v in zip(names, found)]})
    elif sys.stdout.isatty():
        for name, v in zip(names, found):
            screen.show(f"{_short(name, 40):40}  {' '.join(f'{x:9.5f}' for x in v[:SHOWN])} ... ({len(v)} numbers)")
    else:
        for v in found:
            print(js.dumps(v.tolist()), flush=True)


def _lines(name: str) -> list[str]:
    """Return the lines of a file, or of standard input, that are not empty. Raises: RequestError."""
    try:
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise RequestError(f"--file {name}: {error.strerror}") from None
    return [line for line in text.decode("utf-8", "replace").splitlines() if line.strip()]


def _short(text: str, n: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n else f"{text[: n - 1]}\u2026"


def _show_alike(names: list[str], alike: Any, json: bool) -> None:
    """Print cosines as a table, or as JSON."""
    from pyengine.cli import screen

    if json:
        screen.show_json({"of": names, "cosines": [[float(x) for x in row] for row in alike]})
        return
    rows = [["", *(str(i) for i in range(len(names)))]]
    rows += [[f"{i} {_short(name, 40)}", *(f"{x:.3f}" for x in row)] for i, (name, row) in enumerate(zip(names, alike))]
    screen.show_columns(rows, right=range(1, len(names) + 1))
