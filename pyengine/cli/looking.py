"""`pyengine-run attention`: what a model's queries look at in a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from pyengine.cli.forms import commands, Form
from pyengine.cli.options import Devices, EncoderDevice, Json, Mmproj, ModelName, Threads
from pyengine.errors import RequestError

LEAST_CONTEXT = 256                  # positions that hold a picture's rows: the text model is not run


@commands.command(cls=Form)
def attention(
    model: ModelName,
    image: Annotated[str, Option("--image", metavar="FILE", show_default=False, help="The picture: a file, a file:// or a data URL.")],
    png: Annotated[Path | None, Option("--png", metavar="OUT.png", help=(
        "Write the picture with the map of each query over it, the mean of all heads."))] = None,
    query: Annotated[list[int] | None, Option("--query", "-q", min=0, metavar="N", help=(
        "The number of a query, from 0 (default: all); repeatable."))] = None,
    prompt: Annotated[str, Option("--prompt", "-p", metavar="TEXT", show_default=False, help=(
        "What the prompt says, for a model whose queries read it."))] = "",
    layer: Annotated[int | None, Option("--layer", "-l", min=0, metavar="N", help="The number of the layer (default: the last with maps).")] = None,
    mmproj: Mmproj = None,
    threads: Threads = None,
    device: Devices = None,
    encoder_device: EncoderDevice = None,
    json: Json = False,
) -> None:
    """Show where the queries of a model's encoder look in a picture: shares of attention, and a drawing."""
    from pyengine.cli import pictures, screen
    from pyengine.cli.report.planned import parse_device
    from pyengine.media import maps

    shown = pictures.open_picture(image, {})
    if png is not None:
        pictures.check_drawing(png, [shown], "--png")
    queries = list(dict.fromkeys(query or ()))
    with screen.load(model, n_ctx=LEAST_CONTEXT, mmproj=mmproj, n_threads=threads, device=parse_device(device or ()), encoder_device=encoder_device) as loaded:
        found = loaded.attention([shown.media, prompt] if prompt else shown.media)
    name = _layer(found, layer)
    looks = maps.looks(shown.media, found[name], queries)
    if png is not None:
        pictures.save(maps.draw(shown.media, found[name], queries), png, "--png")
    if json:
        screen.show_json({"layers": {own: list(each.shape) for own, each in found.items()}, "layer": name, "picture": list(shown.media.size),
                          "queries": [look._asdict() for look in looks], "png": png and str(png)})
        return
    heads, n, keys = found[name].shape
    screen.show(f"{name} of {', '.join(found)}: {heads} heads, {n} queries, a class token and {keys - 1} patches\n")
    for look in looks:
        screen.show(f"query {look.query:3}: {look.most:6.1%} at ({look.x:.0f}, {look.y:.0f}) of {shown.media.size[0]} x {shown.media.size[1]} pixels, "
                    f"class token {look.class_token:.1%}")
    if png is not None:
        screen.note(f"({len(looks)} {'map' if len(looks) == 1 else 'maps'} over {shown.name}: {png})")


def _layer(found: dict[str, Any], layer: int | None) -> str:
    """Return the name of a layer's map, the last one's without a number. Raises: RequestError for a layer without one."""
    numbers = {int(name.rpartition(".")[2]): name for name in found}
    if layer is not None and layer not in numbers:
        raise RequestError(f"--layer {layer}: layers {', '.join(map(str, numbers))} attend to the picture")
    return numbers[max(numbers) if layer is None else layer]

