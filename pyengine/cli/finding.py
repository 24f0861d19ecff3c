"""`pyengine-run index` and `pyengine-run search`: folders of pictures, found by what they show."""

from __future__ import annotations

import base64
import html as escaping
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TYPE_CHECKING

from typer import Argument, Option

from pyengine.cli.forms import commands, Form
from pyengine.cli.options import Devices, Json, model_names, Threads
from pyengine.errors import PyEngineError, RequestError

if TYPE_CHECKING:
    from pyengine.search import Found, PictureIndex, Update

PLACE = "PYENGINE_INDEX"             # the environment's name of where the index is
THUMBNAIL = 320                      # pixels of the longer side
SHOWN = 5                            # pictures that could not be read, in the report

Model = Annotated[str | None, Option("--model", "-m", metavar="MODEL", autocompletion=model_names, show_default=False, help=(
    "A model of pictures and texts, CLIP's or SigLIP's kind (default: the one that the index was made with)."))]
Place = Annotated[Path | None, Option("--index", metavar="DIR", show_default=False, help=(
    f"Where the index is (default: ${PLACE}, or ~/.local/share/pyengine/pictures)."))]


def place_of(given: Path | None) -> Path:
    """Return where the index is."""
    if given is not None:
        return given
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.environ.get(PLACE) or f"{data}/pyengine/pictures").expanduser()


def _loaded(index: PictureIndex, model: str | None, **settings: Any) -> Any:
    """Load the model that is given, or the index's own, which must be the same. Raises: RequestError; as `load`."""
    from pyengine.cli import screen
    from pyengine.files.stores import look_up
    from pyengine.search import fingerprint

    name = model or index.model
    if name is None:
        raise RequestError(f"{index.place}: this index is new: give --model MODEL")
    path = look_up(name).path
    loaded = screen.load(name, writes=False, **settings)
    towers = getattr(loaded, "towers", None)
    if towers is None:
        loaded.close()
        raise RequestError(f"{name}: writes text; search over pictures needs a model of vectors, CLIP's or SigLIP's kind")
    try:
        width = next(iter(towers.towers.values())).d_out
        index.use(os.path.abspath(name) if os.path.exists(name) else name, fingerprint(path), width)
    except PyEngineError:
        loaded.close()
        raise
    return loaded


@commands.command(cls=Form)
def index(
    folder: Annotated[list[Path], Argument(metavar="FOLDER", show_default=False, help="Folders of pictures, with those below them.")],
    model: Model = None,
    place: Place = None,
    threads: Threads = None,
    device: Devices = None,
    json: Json = False,
) -> None:
    """Make the pictures of folders searchable, or bring that up to date: new and changed ones are encoded, those that are gone are taken out."""
    from pyengine.cli import screen
    from pyengine.cli.report.planned import parse_device
    from pyengine.media.image import open_image
    from pyengine.search import PictureIndex, Update

    done: list[Update] = []
    with PictureIndex(place_of(place)) as opened, _loaded(opened, model, n_threads=threads, device=parse_device(device or ())) as loaded:
        if loaded.towers.image is None:
            raise RequestError(f"{loaded.plan.model}: reads texts only, and pictures are to be indexed")
        for one in folder:
            with _Progress(one) as progress:
                done.append(opened.update(one, lambda path: loaded.embed(open_image(path)), progress))
        n = len(opened)
    if json:
        screen.show_json({"index": str(opened.place), "pictures": n, "folders": [
            {"folder": str(one), "new": u.new, "changed": u.changed, "removed": u.removed, "unchanged": u.unchanged,
             "faulty": [{"path": str(f.path), "why": f.why} for f in u.faulty]} for one, u in zip(folder, done)]})
        return
    for one, u in zip(folder, done):
        screen.show(f"{one}: {u.new} new, {u.changed} changed, {u.removed} removed, {u.unchanged} as they were")
        for fault in u.faulty[:SHOWN]:
            screen.note(f"left out: {fault.why}")
        if len(u.faulty) > SHOWN:
            screen.note(f"and {len(u.faulty) - SHOWN} more that cannot be read: --json lists them")
    screen.show(f"{n} pictures in {opened.place}: search them with `{screen.PROGRAM} search \"a red car\"`")


@commands.command(cls=Form)
def search(
    query: Annotated[list[str] | None, Argument(metavar="QUERY", show_default=False, help="What to look for, in one word or several.")] = None,
    image: Annotated[str | None, Option("--image", metavar="FILE", help="Look for pictures like this one, instead.")] = None,
    top: Annotated[int, Option("--top", "-n", min=1, metavar="N", help="How many.")] = 10,
    html: Annotated[Path | None, Option("--html", metavar="OUT.html", help="Write a page with small pictures, whole in one file.")] = None,
    model: Model = None,
    place: Place = None,
    threads: Threads = None,
    device: Devices = None,
    json: Json = False,
) -> None:
    """Find pictures of the index by what they show; prints cosines and files, the nearest first."""
    from pyengine.cli import pictures, screen
    from pyengine.cli.report.planned import parse_device
    from pyengine.search import PictureIndex

    text = " ".join(query or ())
    if bool(text.strip()) == (image is not None):
        raise RequestError("search: give a QUERY or --image FILE, one of them")
    asked: Any = text if image is None else pictures.open_picture(image, {}).media
    settings: dict[str, Any] = {"n_threads": threads, "device": parse_device(device or ()), **({} if image is not None else {"images": 0})}
    with PictureIndex(place_of(place), writes=False) as opened, _loaded(opened, model, **settings) as loaded:
        found = opened.nearest(loaded.embed(asked), top)
    if html is not None:
        _write(html, page(text or image or "", found))
    if json:
        screen.show_json({"query": text or None, "image": image, "found": [{"path": str(f.path), "score": f.score} for f in found]})
    else:
        screen.show_columns([(f"{f.score:.3f}", f.path) for f in found]) if found else screen.note("the index has no pictures")
        if html is not None:
            screen.note(f"({len(found)} pictures: {html})")


class _Progress:
    """A bar on standard error, where that is a terminal."""

    def __init__(self, folder: Path):
        self._folder, self._bar = folder, None

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, done: int, total: int, path: Path) -> None:
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from pyengine.cli.screen import printable

        if self._bar is None:
            self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                                 console=Console(stderr=True), transient=True)
            self._bar.add_task(printable(str(self._folder)), total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _write(path: Path, text: str) -> None:
    """Write a page. Raises: RequestError."""
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise RequestError(f"--html {path}: {error.strerror}") from None


def thumbnail(path: Path) -> str:
    """Return a picture as a small JPEG in a data URL, "" for one that cannot be read any more."""
    from PIL import Image

    from pyengine.media.image import open_image

    try:
        small = Image.fromarray(open_image(path).pixels)
    except PyEngineError:
        return ""
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def page(query: str, found: Sequence[Found]) -> str:
    """Return a page of what was found, with everything in it."""
    cells = []
    for one in found:
        name, where = escaping.escape(one.path.name), escaping.escape(one.path.absolute().as_uri())
        small = thumbnail(one.path)
        inside = f'<img src="{small}" alt="{name}">' if small else "<i>cannot be read any more</i>"
        below = f'<figcaption title="{escaping.escape(str(one.path))}">{name}<b>{one.score:.3f}</b></figcaption>'
        cells.append(f'<figure><a href="{where}">{inside}</a>{below}</figure>')
    style = ("body{font:15px system-ui,sans-serif;margin:2rem;background:Canvas;color:CanvasText;color-scheme:light dark}"
             "main{display:grid;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));gap:1rem}figure{margin:0}"
             "img{width:100%;height:12rem;object-fit:contain}figcaption{display:flex;justify-content:space-between;gap:1rem;overflow-wrap:anywhere}")
    title = escaping.escape(query)
    return (f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>\n'
            f"<style>{style}</style>\n<h1>{title}</h1>\n<main>\n" + "\n".join(cells) + "\n</main></html>\n")
