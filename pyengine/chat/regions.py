"""Regions that answers name by tokens of places, <loc_0> to <loc_999>, as pixels of the original picture: boxes and polygons with labels.

Follows transformers `Florence2PostProcessor`. A place is the middle of its thousandth of width or height, rounded down to whole pixels. The
ways in which answers name regions:

    boxes              label<loc><loc><loc><loc>: x1, y1, x2, y2, and more boxes of the same label behind it; labels in ASCII
    phrases            the same; phrases that name nothing ("it") are ignored
    bare boxes         places only
    quads              text and the x, y of four corners
    bare polygons      x, y of corners, in parts between <sep>; several regions stand in <poly> and </poly>
    boxes or polygons  polygons with labels in front where there is a <poly>, boxes elsewhere

Labels are stripped; one with a line break in it names nothing. A text is cut into marks once, and all takes linear time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pyengine.chat.boxes import Box, Polygon

THOUSANDTHS = 1000
IGNORED = re.compile(r"</?s>|<pad>")                     # tokens that begin, end and fill
LEAST = 4                                                # places or marks, fewer of which name nothing
_PLACE, _MARK = r"<loc_\d{1,9}>", r"(?:<loc_\d{1,9}>|<sep>|</?poly>)"
_LABEL = "(?<![^<>])(?P<label>[^<]+)"                    # where a token stands in front that is no place, its letters are part of it, as the authors have it
_BOXES, _BARE_BOXES = (re.compile(f"{label}(?P<marks>(?:{_PLACE}){{{LEAST},}})") for label in (_LABEL, "(?P<label>)"))
_OUTLINES, _BARE_OUTLINES = (re.compile(f"{label}(?P<marks>{_MARK}{{{LEAST},}})") for label in (_LABEL, "(?P<label>)"))
_NUMBERS, _FIRST = re.compile(r"<loc_(\d{1,9})>"), re.compile("<loc_|<poly>")
_CORNERS = re.compile(f"(?:{_PLACE}){{8}}")
_REGIONS, _PART = re.compile("<poly>(.*?)</poly>"), re.compile(f"((?:{_PLACE})+)(?:<sep>|$)")


class Naming(NamedTuple):
    """How an answer names regions: the way, and labels of phrases that are ignored."""

    way: str
    ignored: frozenset[str] = frozenset()


class Found(NamedTuple):
    """A region in thousandths of width and height: x, y, x, y ... of a box's two corners, or of a polygon's in each of its parts."""

    label: str
    parts: Sequence[Sequence[int]]
    box: bool


def find_regions(text: str, naming: Naming, size: tuple[int, int], image: int = 0) -> list[Box | Polygon]:
    """Find the regions in an answer with the texts of all its tokens, in its order. size: (width, height) of the picture; image: its number."""
    text, made = IGNORED.sub("", text), list[Box | Polygon]()
    for label, parts, box in _found(text, naming):
        rings = [_pixels(part, size) for part in parts]
        made.append(Box(label, *rings[0], image=image) if box else
                    Polygon(label, tuple(tuple(zip(ring[::2], ring[1::2])) for ring in rings), image))
    return made


def _found(text: str, naming: Naming) -> Iterator[Found]:
    way = naming.way
    if way == "quads":
        return _quads(text)
    if way == "bare polygons" or way == "boxes or polygons" and "<poly>" in text:
        return _polygons(text, _BARE_OUTLINES if way == "bare polygons" else _OUTLINES)
    return _boxes(text, _BARE_BOXES if way == "bare boxes" else _BOXES, naming.ignored if way == "phrases" else frozenset())


def _pixels(places: Sequence[int], size: tuple[int, int]) -> list[int]:
    """Return thousandths x, y, x, y ... in whole pixels, in float32 as the authors compute them."""
    steps = np.tile(np.array(size, np.float64) / THOUSANDTHS, len(places) // 2).astype(np.float32)
    return ((np.array(places, np.float32) + np.float32(0.5)) * steps).astype(np.int32).tolist()


def _numbers(places: str) -> list[int]:
    return [int(n) for n in _NUMBERS.findall(places)]


def _breaks(label: str) -> bool:
    """Say whether a label has a line break behind its first letter."""
    return "\n" in label.lstrip()


def _boxes(text: str, form: re.Pattern[str], ignored: frozenset[str]) -> Iterator[Found]:
    for found in form.finditer(text):
        label, places = found["label"].strip(), _numbers(found["marks"])
        if _breaks(found["label"]) or label in ignored:
            continue
        for i in range(0, len(places) - LEAST + 1, LEAST):
            yield Found(label.encode("ascii", "ignore").decode(), [places[i : i + LEAST]], True)


def _quads(text: str) -> Iterator[Found]:
    """Find quads: a label is all that stands between two of them on a line, at least a letter."""
    at = 0
    while found := _CORNERS.search(text, at + 1):
        start = max(at, text.rfind("\n", at, found.start()) + 1)
        if start >= found.start():                       # nothing but a line break
            at = start
            continue
        yield Found(text[start : found.start()].strip(), [_numbers(found[0])], False)
        at = found.end()


def _polygons(text: str, form: re.Pattern[str]) -> Iterator[Found]:
    """Find polygons: what stands before the first place or <poly> is the label; of marks alone the very first place does not count there."""
    for found in form.finditer(text):
        label, marks = found["label"], found["marks"]
        said = label + (marks if label else re.sub(f"^{_PLACE}", "", marks))
        first = _FIRST.search(said)
        if first is None or _breaks(label):
            continue
        regions = _REGIONS.findall(marks) if "<poly>" in marks and "</poly>" in marks else [marks]
        for region in regions:
            parts = [_numbers(part[1]) for part in _PART.finditer(region)]
            if parts:
                yield Found(said[: first.start()].strip(), [part[: len(part) // 2 * 2] for part in parts], False)
