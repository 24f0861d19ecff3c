"""Boxes and points that models print, as pixels of the original picture; and drawing them.

Three notations are read (Qwen2.5-VL: arXiv:2502.13923, section 2.2; Qwen2-VL: arXiv:2409.12191, section 2.2; Molmo: arXiv:2409.17146):

    Qwen2.5-VL  JSON objects {"bbox_2d": [x1, y1, x2, y2], "label": "..."} or {"point_2d": [x, y], ...}, in a list or
                not, fenced or not, cut off or not, as JSON or as Python prints it; in pixels of the picture as the
                processor has resized it
    Qwen2-VL    <|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>, in thousandths of
                width and height; without special tokens, which generated text leaves out: label(x1,y1),(x2,y2)
    Molmo       <point x="10.5" y="20" alt="...">label</point>, <points x1=".." y1=".." x2=".." y2=".." alt="...">label</points>, in
                percent of width and height

Objects are read token by token, not by a JSON parser, so that a cut or faulty answer still gives the boxes that are
whole, and no nesting is too deep. A text ends at a quote that something of JSON follows, or where a key of a box begins:
a line break or a quote in a label costs no other box. No pattern reads far before it fails, so any text takes linear time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import PIL.Image
import PIL.ImageColor
import PIL.ImageDraw
import PIL.ImageFont

from pyengine.errors import RequestError
from pyengine.media.image import Image

KEYS = {"bbox_2d": 4, "point_2d": 2}                     # how many numbers each has
LABELS = ("label", "text_content")                       # the second where Qwen2.5-VL reads documents
THOUSANDTHS = 1000                                       # Qwen2-VL's scale
PERCENT = 100                                            # Molmo's
MARKS = ("<|box_start|>", "<|box_end|>")                 # tokens of models that were taught to print boxes, also of those that print JSON

_NUMBER = r"""["']?([-+]?(?:\d{1,9}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d)?)["']?"""            # models quote some
_SPACE = r"\s{0,99}"
_KEY = r"(?:bbox_2d|point_2d|label|text_content)"
_NEW_KEY = rf"""[{{,]?{_SPACE}["']{_KEY}["']{_SPACE}:"""      # within a text no key of a box stands unescaped: its end is missing


def _text_in(quote: str, last: str) -> str:
    """Return a text up to the quote that ends it, behind which JSON goes on; every step takes a character, so it never turns
    back."""
    after = rf"""{_SPACE}(?:[{last}}}\])]|,{_SPACE}(?:["'{{\[(\d}}\]-]|$)|$)"""
    return rf"(?:\\.|(?!{_NEW_KEY})[^{quote}\\]|(?!{_NEW_KEY}){quote}(?!{after}))*"


def _token(last: str) -> re.Pattern[str]:
    """Return the expression of what is looked for; `last` may follow a text. Without, it is a value, and stands behind spaces at
    most."""
    return re.compile(rf"{_SPACE if not last else ''}(?:(?P<numbers>[\[(]{_SPACE}{_NUMBER}(?:{_SPACE},{_SPACE}{_NUMBER}){{1,3}}{_SPACE},?{_SPACE}[\])])"
                      r"|(?P<brace>[{}])"
                      rf'|"(?P<double>{_text_in(chr(34), last)})(?P<end>")?(?P<key>{_SPACE}:)?'
                      rf"|(?<!\w)'(?P<single>{_text_in(chr(39), last)})(?P<stop>')?(?P<name>{_SPACE}:)?"
                      rf"|(?P<bare>\b{_KEY}){_SPACE}:)", re.DOTALL)


_TOKEN, _VALUE = _token(":"), _token("")                 # a value is no key, whatever stands in it
_DIGIT = re.compile(r"\d")
_PAIR = r"\((\d{1,4}),\s?(\d{1,4})\)"
_PAIRS = re.compile(rf"<\|box_start\|>{_PAIR}(?:,\s?{_PAIR})?<\|box_end\|>|{_PAIR},\s?{_PAIR}")
_TAG = re.compile(r"<points?(?=\s)(?P<attributes>[^<>]*)(?:>(?P<label>[^<]*))?")
_AXIS = re.compile(r"""\b([xy])(\d{0,4})=(["'])(\d{1,3}(?:\.\d{0,40})?)\3""")
_ALT = re.compile(r"""\balt=(?:"([^"]*)"|'([^']*)')""")


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the original picture: x1 <= x2 to the right, y1 <= y2 down (of `regions` as the answer has them); image: which
    picture."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    image: int = 0


@dataclass(frozen=True)
class Point:
    """A point in pixels of the original picture; image: which picture."""

    label: str
    x: float
    y: float
    image: int = 0


@dataclass(frozen=True)
class Polygon:
    """A region in pixels of the original picture: the corners (x, y) of each of its parts; image: which picture."""

    label: str
    parts: tuple[tuple[tuple[float, float], ...], ...]
    image: int = 0

    @property
    def points(self) -> list[tuple[float, float]]:
        """The corners of all parts."""
        return [corner for part in self.parts for corner in part]


def find_boxes(text: str, size: tuple[int, int], processed: tuple[int, int], scale: float | None = None,
               image: int = 0) -> list[Box | Point]:
    """Find the boxes and points in a model's answer, in its order; those outside the picture are moved to its edge.

    size       (width, height) of the original picture
    processed  (width, height) that the processor made of it
    scale      what JSON coordinates count to on both axes; None: to the processed width and height
    image      number of the picture, for the results
    A text with boxes in one notation is not searched for those below it.
    Raises: RequestError for sizes below 1.
    """
    if min(*size, *processed) < 1 or scale is not None and not scale > 0:
        raise RequestError(f"boxes: size {size}, processed {processed} and scale {scale} must be above 0")
    if _DIGIT.search(text) is None:                      # most answers
        return []
    found = [(numbers, label, processed if scale is None else (scale, scale)) for numbers, label in _json(text)]
    found = found or [(numbers, label, (THOUSANDTHS, THOUSANDTHS)) for numbers, label in _pairs(text)]
    found = found or [(numbers, label, (PERCENT, PERCENT)) for numbers, label in _tags(text)]
    boxes: list[Box | Point] = []
    for numbers, label, full in found:
        x = [min(max(n * size[0] / full[0], 0.0), float(size[0])) for n in numbers[0::2]]
        y = [min(max(n * size[1] / full[1], 0.0), float(size[1])) for n in numbers[1::2]]
        boxes.append(Point(label, x[0], y[0], image) if len(x) == 1
                     else Box(label, min(x), min(y), max(x), max(y), image))
    return boxes


@dataclass(slots=True)
class _Object:
    """A JSON object as far as it has been read."""

    key: str = ""
    label: str = ""
    waits: bool = False                                  # the key's value comes next
    coordinates: list[list[float]] = field(default_factory=list)
    corner: tuple[float, ...] = ()                       # the first of two that are lists of their own

    def marks(self) -> Iterator[tuple[list[float], str]]:
        return ((numbers, self.label) for numbers in self.coordinates)

    def add(self, numbers: list[float]) -> None:
        """Take a list of numbers under the present key; two corners of a box may be lists of their own: [[x1, y1], [x2, y2]]."""
        wanted = KEYS.get(self.key)
        if wanted == 4 and len(numbers) == 2:
            self.corner, numbers = ((), [*self.corner, *numbers]) if self.corner else (tuple(numbers), [])
        else:
            self.corner = ()
        if wanted == len(numbers):
            self.coordinates.append(numbers)


def _json(answer: str) -> Iterator[tuple[list[float], str]]:
    """Return (coordinates, label) of each box or point in JSON objects; several lists under one key are as many boxes."""
    open_objects: list[_Object] = []
    at = answer.find("{")
    while at >= 0:
        token = _VALUE.match(answer, at) if open_objects and open_objects[-1].waits else None
        token = token or _TOKEN.search(answer, at)
        if token is None:
            break
        at = token.end()
        brace = token["brace"]
        if brace == "{":
            if open_objects and open_objects[-1].coordinates and open_objects[-1].key in (*KEYS, *LABELS):
                yield from open_objects.pop().marks()    # its own brace is missing
            if open_objects:
                open_objects[-1].waits = False
            open_objects.append(_Object())
            continue
        if brace:
            yield from open_objects.pop().marks()
            if not open_objects:
                at = answer.find("{", at)                # between objects there may be prose, with quotes
                continue
        last = open_objects[-1]
        text = next((t for t in token.group("double", "single", "bare") if t is not None), None)
        if text is not None and (token["key"] or token["name"] or token["bare"]):
            last.key, last.waits, last.corner = text, True, ()
            continue
        last.waits = False
        if text is not None and last.key in LABELS:
            whole = token["end"] or token["stop"] or at == len(answer)
            last.label = _unescaped(text if whole else text.partition("\n")[0])
        elif token["numbers"]:
            last.add([float(n) for n in re.findall(_NUMBER, token["numbers"])])
    for cut in open_objects:
        if cut.coordinates:
            yield from cut.marks()


def _unescaped(text: str) -> str:
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:                                   # cut within an escape, or one that JSON does not have
        return text


def _pairs(text: str) -> Iterator[tuple[list[float], str]]:
    """Return (coordinates, label) of each "label(x1,y1),(x2,y2)"; a box that follows another directly has its label."""
    at, label = 0, ""
    for match in _PAIRS.finditer(text):
        numbers = [float(n) for n in match.groups() if n is not None]
        before, marked, named = text[at:match.start()].rpartition("<|object_ref_start|>")
        named = named.partition("<|object_ref_end|>")[0]
        label = (named if marked else named[named.rfind("\n") + 1:]).strip(" \t\n,.:;-") or label
        at = match.end()
        if max(numbers) <= THOUSANDTHS:
            yield numbers, label


def _tags(text: str) -> Iterator[tuple[list[float], str]]:
    """Return ([x, y], label) of each point of an XML tag; one without a text is labelled by its `alt`."""
    for tag in _TAG.finditer(text):
        alt = _ALT.search(tag["attributes"])
        label = (tag["label"] or "").strip() or ("" if alt is None else alt[1] or alt[2] or "")
        points: dict[str, dict[str, float]] = {}
        for axis, number, _, value in _AXIS.findall(tag["attributes"]):
            points.setdefault(number, {})[axis] = float(value)
        for point in points.values():
            if len(point) == 2 and max(point.values()) <= PERCENT:
                yield [point["x"], point["y"]], label


def draw(image: Image, boxes: Iterable[Box | Point | Polygon]) -> PIL.Image.Image:
    """Draw boxes, points and polygons with their labels on a copy of the picture: one colour for each label."""
    picture = PIL.Image.fromarray(image.pixels)
    pen = PIL.ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 200))
    font = PIL.ImageFont.load_default(max(12, round(min(picture.size) / 32)))
    boxes = list(boxes)
    colours = {label: _colour(i) for i, label in enumerate(dict.fromkeys(b.label for b in boxes))}
    for box in boxes:
        colour = colours[box.label]
        if isinstance(box, Box):
            pen.rectangle((min(box.x1, box.x2), min(box.y1, box.y2), max(box.x1, box.x2), max(box.y1, box.y2)), outline=colour, width=line)
        elif isinstance(box, Polygon):
            for part in box.parts:
                pen.line([*part, *part[:2]], fill=colour, width=line, joint="curve")
        else:
            pen.circle((box.x, box.y), 3 * line, fill=colour, outline="white", width=max(1, line // 2))
    for box in boxes:                                    # above every line
        if box.label:
            _draw_label(pen, picture.size, box, colours[box.label], line, font)
    return picture


def _draw_label(pen: PIL.ImageDraw.ImageDraw, size: tuple[int, int], box: Box | Point | Polygon, colour: tuple[int, int, int],
                line: int, font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont) -> None:
    """Draw a filled tab with the text: above a box or beside a point, and always in the picture."""
    text = " ".join(box.label[:60].encode("utf-8", "replace").decode().split())
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 2 * line, bottom - top + 2 * line
    if isinstance(box, Box):
        x, y = min(box.x1, box.x2), min(box.y1, box.y2) - height
    elif isinstance(box, Polygon):
        x, y = (min((corner[axis] for corner in box.points), default=0.0) for axis in (0, 1))
        y -= height
    else:
        right_of = box.x + 4 * line
        x, y = right_of if right_of + width <= size[0] else box.x - 4 * line - width, box.y - height / 2
    x, y = max(0.0, min(x, size[0] - width)), max(0.0, min(y, size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    red, green, blue = colour
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140                  # ITU-R BT.601 luma
    pen.text((x + line - left, y + line - top), text, fill="white" if dark else "black", font=font)


def _colour(number: int) -> tuple[int, int, int]:
    """Return a colour: hues a golden angle apart, so that any number of neighbours differ."""
    return PIL.ImageColor.getrgb(f"hsv({number * 137.508 % 360:.1f}, 90%, {95 - 25 * (number % 3 == 2)}%)")[:3]
