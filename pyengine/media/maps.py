"""Maps of attention over a picture: a colour for each patch, a panel for each map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from pyengine.errors import RequestError
from pyengine.media.image import Image

# From little to much: each colour is brighter than the one before it, so the order is seen without colours too
COLOURS = np.array([(16, 24, 96), (130, 30, 140), (230, 80, 80), (250, 170, 60), (255, 250, 200)], np.float32)
LEAST, MOST = 0.35, 0.75             # how far a colour covers the picture, where there is least and most attention
ALONE, BESIDE = 768, 192             # pixels of a panel's longer side: one, and one of several
ACROSS = 8                           # panels in a line
GAP = 4                              # pixels between panels


class Look(NamedTuple):
    """Where one query looks: its share of attention to the class token, and to the patch that gets most, whose middle is (x, y) in pixels."""

    query: int
    class_token: float
    most: float
    x: float
    y: float


def mean_of_heads(attention: np.ndarray, queries: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over heads of attention [heads, queries, 1 + side * side], of these queries or all: shares of the class token [n], and
    of the patches [n, side, side]. Raises: RequestError for a query that there is not, and for keys that are no class token and square."""
    n_queries, side = attention.shape[1], math.isqrt(attention.shape[2] - 1)
    if side**2 != attention.shape[2] - 1:
        raise RequestError(f"attention to {attention.shape[2]} rows is no class token and a square of patches")
    for query in queries:
        if not 0 <= query < n_queries:
            raise RequestError(f"query {query}: there are {n_queries}, from 0 to {n_queries - 1}")
    mean = attention.mean(axis=0)[list(queries) if queries else slice(None)]
    return mean[:, 0], mean[:, 1:].reshape(-1, side, side)


def looks(image: Image, attention: np.ndarray, queries: Sequence[int] = ()) -> list[Look]:
    """Say where each of these queries looks, or all do, by the mean over heads. Raises: as `mean_of_heads`."""
    own, maps = mean_of_heads(attention, queries)
    found = []
    for query, token, shares in zip(queries or range(len(maps)), own, maps):
        line, column = divmod(int(shares.argmax()), len(shares))
        x, y = ((i + 0.5) * pixels / len(shares) for i, pixels in zip((column, line), image.size))
        found.append(Look(query, float(token), float(shares.max()), x, y))
    return found


def draw(image: Image, attention: np.ndarray, queries: Sequence[int] = ()) -> PIL.Image.Image:
    """Draw the mean over heads of attention [heads, queries, 1 + side * side] over a picture, a panel for each of these queries, or for all.

    Colours go from the least to the most of each panel. The patches lie over the whole picture, as where it was squeezed into a square.
    Raises: as `mean_of_heads`.
    """
    _, maps = mean_of_heads(attention, queries)
    scale = (ALONE if len(maps) == 1 else BESIDE) / max(image.size)
    size = tuple(max(1, round(n * scale)) for n in image.size)
    picture = PIL.Image.fromarray(image.pixels).resize(size, PIL.Image.Resampling.LANCZOS)
    columns = min(ACROSS, len(maps))
    lines = -(-len(maps) // columns)
    sheet = PIL.Image.new("RGB", (columns * (size[0] + GAP) - GAP, lines * (size[1] + GAP) - GAP), "white")
    for i, (query, shares) in enumerate(zip(queries or range(len(maps)), maps)):
        panel = over(picture, shares)
        if len(maps) > 1:
            _name(panel, str(query))
        sheet.paste(panel, (i % columns * (size[0] + GAP), i // columns * (size[1] + GAP)))
    return sheet


def over(picture: PIL.Image.Image, shares: np.ndarray) -> PIL.Image.Image:
    """Draw one map [lines, columns] over a whole picture, from the least share to the most."""
    span = float(np.ptp(shares)) or 1.0
    small = PIL.Image.fromarray(((shares - shares.min()) / span).astype(np.float32))
    level = np.clip(np.asarray(small.resize(picture.size, PIL.Image.Resampling.BICUBIC)), 0, 1)         # [h, w]
    at = level * (len(COLOURS) - 1)
    colour = np.stack([np.interp(at, np.arange(len(COLOURS)), channel) for channel in COLOURS.T], axis=2)
    cover = (LEAST + (MOST - LEAST) * level)[..., None]
    return PIL.Image.fromarray(np.rint(np.asarray(picture) * (1 - cover) + colour * cover).astype(np.uint8))


def _name(panel: PIL.Image.Image, text: str) -> None:
    """Write a panel's name into its corner."""
    pen, font = PIL.ImageDraw.Draw(panel), PIL.ImageFont.load_default(14)
    pen.text((4, 2), text, fill="white", font=font, stroke_width=2, stroke_fill="black")
