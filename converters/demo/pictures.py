"""Synthetic pictures with questions and answers, drawn from a seed.

A picture shows a word or a number in capital letters, a form of a few lines, or coloured shapes. Questions ask to read, to name,
to count, to locate (a box in Qwen2.5-VL's notation, in pixels of the picture as the processor resizes it), for the value of a
line, which of two shapes is on one side or larger, which of several pictures shows something and which way it moves from one
picture to the next. Screenshots of pages are a task of their own: a call of the computer's tool clicks a shape, and ends the task
when the page shows a word.

Training, validation and test are disjoint by construction: each word, number, layout of shapes and movement belongs to one of
them by the CRC of its name, and each has its own fonts.

    python -m converters.demo.pictures FOLDER -n 8 --seed 1       write some to look at, with a JSON line for each conversation
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GROUP = 28                              # pixels of a merged row's side: 2 patches of 14
MIN_PIXELS, MAX_PIXELS = GROUP * GROUP, 64 * GROUP * GROUP
SPLITS = ("train", "validation", "test")
FONTS = {
    "train": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneral",
              "STIXGeneralBol", "cmr10", "cmtt10"),
    "validation": ("cmss10",),
    "test": ("DejaVuSansMono-Bold", "cmb10"),
}
COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 210, 40),
           "purple": (140, 50, 170), "orange": (245, 130, 30)}
# of texts, on light paper
INKS = {"black": (20, 20, 20), **{name: COLOURS[name] for name in ("red", "green", "blue", "purple")}}
# as style sheets write them: https://www.w3.org/TR/css-color-4/#named-colors
CSS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "purple": (128, 0, 128),
       "orange": (255, 165, 0)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ALPHABET = LETTERS + "0123456789"
KEYS = ("TOTAL", "DATE", "PRICE", "ROOM", "CODE", "SEAT", "YEAR", "WEEK")       # of a form's lines; no two begin alike
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BOXES = ("locate", "find")              # tasks whose answer is a box
THEN, NOW = "Then:", "Now:"              # before two albums to compare
TOOL = "computer_use"                   # the function that Qwen2.5-VL's computer tool is called by
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Mark:
    """Something drawn: a character, "red circle" or a form's line by its key; its box (x1, y1, x2, y2) in pixels of the picture."""

    what: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """Pixels uint8 [height, width, 3] and what is drawn there; keys: contents that `split_of` counts to the picture's split."""

    pixels: np.ndarray
    marks: tuple[Mark, ...]
    keys: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]


@dataclass(frozen=True)
class Turn:
    """A question, its answer and the task that it belongs to.

    pictures   how many of the example's a tool returned as the question
    mistaken   another answer to go on from, which is not learnt: what follows it is
    """

    task: str
    question: str
    answer: str
    pictures: int = 0
    mistaken: str = ""

    @property
    def role(self) -> str:
        """Of the message that asks."""
        return "tool" if self.pictures else "user"


@dataclass(frozen=True)
class Example:
    """A conversation: pictures that no turn has of its own come before the first question; tools: names of functions to call.

    before     texts that stand before those pictures, one for each or none: "" is left out
    apart      its turns are conversations of their own about the same pictures, which training holds at once
    """

    pictures: tuple[Picture, ...]
    turns: tuple[Turn, ...]
    tools: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    apart: bool = False

    @property
    def numbered(self) -> bool:
        """Say whether before each picture stands its number, from 1."""
        return self.before[:1] == ("1",)

    @property
    def second(self) -> int:
        """Return where a second album begins that is to be compared with the first; 0: there is none."""
        return self.before.index(NOW) if NOW in self.before else 0

    def shown(self) -> list[int]:
        """Count the pictures that each turn shows."""
        own = [turn.pictures for turn in self.turns]
        return [len(self.pictures) - sum(own), *own[1:]]

    def functions(self) -> list[dict[str, object]]:
        """List the tools as a chat template gets them."""
        return [{"type": "function", "function": {"name": name}} for name in self.tools]


def shown_parts(example: Example, parts: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Put the texts that stand before a conversation's pictures there, as parts of a message."""
    said = example.before or ("",) * len(parts)
    return [part for text, picture in zip(said, parts) for part in ([{"type": "text", "text": text}] if text else []) + [picture]]


def split_of(key: str) -> str:
    """Say which of SPLITS a content belongs to: 1 of 10 to validation, 1 of 10 to the test."""
    return ("test", "validation", *["train"] * 8)[zlib.crc32(key.encode()) % 10]


def processed_size(width: int, height: int) -> tuple[int, int]:
    """Return the size that Qwen2.5-VL's processor gives pictures within MIN_PIXELS and MAX_PIXELS (transformers `smart_resize`)."""
    w, h = (max(GROUP, round(n / GROUP) * GROUP) for n in (width, height))
    if not MIN_PIXELS <= w * h <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} is outside of what this generator makes")
    return w, h


# ---- words ---------------------------------------------------------------------------------------------------------------------


@lru_cache
def words() -> tuple[str, ...]:
    """List English words of 3 to 8 letters, in capitals: those of Python's own help topics."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    return tuple(sorted({w.upper() for w in re.findall(r"[A-Za-z]{3,8}", text)}))


def draw_text(rng: random.Random, split: str, longest: int = 8) -> str:
    """Choose a word, a pronounceable non-word, a row of letters or a number that belongs to the split."""
    while True:
        kind, n = rng.random(), rng.randint(min(3, longest), longest)
        if kind < 0.35:
            text = rng.choice(words())
        elif kind < 0.5:
            text = "".join(rng.choice("AEIOU" if i % 2 else "BCDFGHJKLMNPQRSTVWXYZ") for i in range(n))
        elif kind < 0.6:
            text = "".join(rng.choice(LETTERS) for _ in range(n))
        else:
            text = "".join(rng.choice("0123456789") for _ in range(n))
        if len(text) <= longest and split_of(text) == split:
            return text


# ---- drawing -------------------------------------------------------------------------------------------------------------------


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)


def _near(rng: random.Random, colour: Colour, by: int) -> Colour:
    return tuple(min(255, max(0, c + rng.randint(-by, by))) for c in colour)        # type: ignore[return-value]


def _paper(rng: random.Random, dark: bool) -> Colour:
    return _near(rng, (rng.randint(10, 50),) * 3 if dark else (rng.randint(205, 250),) * 3, 8)


@lru_cache
def _noise() -> np.ndarray:
    """Draw normal deviates, once: a picture takes a stretch of them."""
    return np.random.default_rng(0).standard_normal(1 << 20, np.float32)


def _noisy(rng: random.Random, picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture, np.float32)
    start = rng.randrange(_noise().size - pixels.size)
    return np.clip(pixels + _noise()[start:start + pixels.size].reshape(pixels.shape) * rng.uniform(0, 7), 0, 255).astype(np.uint8)


def _bolder(rng: random.Random, split: str) -> float:
    """Choose the pixels that a stroke gains on each side: training has fewer bold fonts than the test."""
    return rng.uniform(0.05, 0.35) if split == "train" and rng.random() < 0.4 else 0.0


def text_picture(rng: random.Random, split: str, longest: int = 8) -> tuple[Picture, str, str]:
    """Draw one line of text, slightly turned; return the picture, the text and the name of its colour."""
    text, ink = draw_text(rng, split, longest), rng.choice(list(INKS))
    font = _font(rng.choice(FONTS[split]), rng.randint(16, 21))
    ends = [font.getlength(text[:i]) for i in range(len(text) + 1)]
    top, bottom = font.getbbox("H0")[1::2]
    tall = rng.random() < 0.15
    height = rng.randint(44, 66) if tall else rng.randint(max(24, bottom - top + 8), 34)
    width = int(ends[-1]) + rng.randint(10, 40)
    angle = rng.uniform(-3, 3) if tall else rng.uniform(-1, 1)
    turn = np.deg2rad(angle)
    slack = height - (bottom - top) - abs(np.sin(turn)) * ends[-1]
    x = rng.uniform(4, max(4.0, width - ends[-1] - 4))
    y = (height - (bottom - top)) / 2 + rng.uniform(-0.5, 0.5) * max(0.0, slack - 6)
    paper = _paper(rng, dark=False)
    picture = Image.new("RGB", (width, height), paper)
    bolder = _bolder(rng, split)
    ImageDraw.Draw(picture).text((x, y - top), text, fill=_near(rng, INKS[ink], 12), font=font, stroke_width=bolder)
    centre = (x + ends[-1] / 2, y + (bottom - top) / 2)
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, center=centre, fillcolor=paper)
    marks = []
    for i, char in enumerate(text):
        away = x + (ends[i] + ends[i + 1]) / 2 - centre[0]
        cx, cy = centre[0] + away * np.cos(turn), centre[1] - away * np.sin(turn)
        rx, ry = (ends[i + 1] - ends[i]) / 2, (bottom - top) / 2
        marks.append(Mark(char, (cx - rx, cy - ry, cx + rx, cy + ry)))
    return Picture(_noisy(rng, picture), tuple(marks), (text,)), text, ink


def form_picture(rng: random.Random, split: str) -> tuple[Picture, dict[str, str]]:
    """Draw two or three lines of a key and a number of 2 to 4 digits; return the picture and the number of each key."""
    lines = dict.fromkeys(rng.sample(KEYS, rng.randint(2, 3)), "")
    for key in lines:
        while not lines[key] or split_of(lines[key]) != split:
            lines[key] = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 4)))
    font, pitch = _font(rng.choice(FONTS[split]), rng.randint(16, 19)), rng.uniform(25, 31)
    top, bottom = font.getbbox("H0")[1::2]
    left = rng.uniform(3, 8)
    column = left + max(font.getlength(key) for key in lines) + rng.uniform(8, 20)
    size = int(column + max(font.getlength(value) for value in lines.values()) + rng.uniform(4, 12)), round(pitch * len(lines))
    picture = Image.new("RGB", size, _paper(rng, dark=False))
    draw, ink, bolder, marks = ImageDraw.Draw(picture), _near(rng, INKS[rng.choice(list(INKS))], 12), _bolder(rng, split), []
    for i, (key, value) in enumerate(lines.items()):
        y = pitch * (i + 0.5) - (bottom - top) / 2 + rng.uniform(-1, 1)
        marks.append(Mark(key, (left, y, size[0], y + bottom - top)))
        for x, text in ((left, key), (column, value)):
            draw.text((x, y - top), text, fill=ink, font=font, stroke_width=bolder)
            ends = [x + font.getlength(text[:j]) for j in range(len(text) + 1)]
            marks += [Mark(char, (a, y, b, y + bottom - top)) for char, a, b in zip(text, ends, ends[1:])]
    return Picture(_noisy(rng, picture), tuple(marks), tuple(lines.values())), lines


def _outline(shape: str, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    """Return the corners of a shape whose box has the centre (cx, cy) and sides 2 r, or nearly."""
    if shape == "square":
        return [(cx - r, cy - r), (cx + r, cy - r), (cx + r, cy + r), (cx - r, cy + r)]
    if shape == "triangle":
        return [(cx, cy - r), (cx + r, cy + r), (cx - r, cy + r)]
    if shape == "star":
        turns = [np.pi * (i / 5 - 0.5) for i in range(10)]
        return [(cx + (r, 0.45 * r)[i % 2] * np.cos(t), cy + (r, 0.45 * r)[i % 2] * np.sin(t)) for i, t in enumerate(turns)]
    a = 0.36 * r
    return [(cx - a, cy - r), (cx + a, cy - r), (cx + a, cy - a), (cx + r, cy - a), (cx + r, cy + a), (cx + a, cy + a),
            (cx + a, cy + r), (cx - a, cy + r), (cx - a, cy + a), (cx - r, cy + a), (cx - r, cy - a), (cx - a, cy - a)]


def shapes_picture(rng: random.Random, split: str, n: int, side: tuple[int, int] = (100, 145), page: bool = False) -> Picture:
    """Draw n different shapes that do not touch; page: as a browser does, often in a style sheet's colours, without noise.

    On a page two shapes are often of one colour or of one form, and all may touch its edge.
    """
    edge, gap = (0, 3) if page else (2, 4)
    while True:
        width, height = rng.randint(*side), rng.randint(*side)
        names = [f"{c} {s}" for c in COLOURS for s in SHAPES]
        kinds = rng.sample(names, n)
        if page and n > 1 and rng.random() < 0.6:
            word = rng.choice(kinds[0].split())
            kinds[1] = rng.choice([name for name in names if word in name.split() and name not in kinds])
        placed: list[tuple[float, float, float]] = []
        for _ in range(60):
            r = rng.uniform(9, 20)
            x, y = rng.uniform(r + edge, width - r - edge), rng.uniform(r + edge, height - r - edge)
            if all(max(abs(x - a), abs(y - b)) > r + q + gap for a, b, q in placed):
                placed.append((x, y, r))
            if len(placed) == n:
                break
        key = " ".join(f"{kind} {int(x) // 14} {int(y) // 14}" for kind, (x, y, _) in sorted(zip(kinds, placed)))
        if len(placed) == n and split_of(key) == split:
            break
    plain = page and rng.random() < 0.6
    fills = [CSS[kind.split()[0]] if plain else _near(rng, COLOURS[kind.split()[0]], 14) for kind in kinds]
    paper = (255, 255, 255) if page and rng.random() < 0.7 else _paper(rng, not page and rng.random() < 0.3)
    return _draw_shapes(rng, key, (width, height), paper, zip(kinds, placed, fills), noisy=not page)


def _draw_shapes(rng: random.Random, key: str, size: tuple[int, int], paper: Colour,
                 shapes: Iterable[tuple[str, tuple[float, float, float], Colour]], noisy: bool = True) -> Picture:
    """Draw shapes ("red star", centre and half of the side, colour to fill it with)."""
    picture, marks = Image.new("RGB", (2 * size[0], 2 * size[1]), paper), []
    draw = ImageDraw.Draw(picture)
    for kind, (x, y, r), fill in shapes:
        shape = kind.split()[1]
        if shape == "circle":
            corners = [(x - r, y - r), (x + r, y + r)]
            draw.ellipse([(2 * a, 2 * b) for a, b in corners], fill=fill)
        else:
            corners = _outline(shape, x, y, r)
            draw.polygon([(2 * a, 2 * b) for a, b in corners], fill=fill)
        xs, ys = zip(*corners)
        marks.append(Mark(kind, (min(xs), min(ys), max(xs), max(ys))))
    small = picture.reduce(2)
    return Picture(_noisy(rng, small) if noisy else np.asarray(small), tuple(marks), (key,))


def moving_pictures(rng: random.Random, split: str, number: int = 3,
                    side: tuple[int, int] = (48, 62)) -> tuple[tuple[Picture, ...], str]:
    """Draw pictures of a shape that moves from one side to the other; return them and the way (of MOVES)."""
    while True:
        kind, way = f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}", rng.choice(list(MOVES))
        size, r = (rng.randint(*side), rng.randint(*side)), rng.uniform(9, 11)
        room = [n - 2 * r - 4 for n in size]
        start = [2 + r + rng.uniform(0, n) for n in room]
        dx, dy = MOVES[way]
        axis = 0 if dx else 1
        travel = room[axis] * rng.uniform(0.8, 1)
        start[axis] = size[axis] / 2 - (dx + dy) * travel / 2
        key = f"{kind} {way} {int(start[0]) // 4} {int(start[1]) // 4}"
        if split_of(key) == split:
            break
    paper, fill = _paper(rng, rng.random() < 0.3), _near(rng, COLOURS[kind.split()[0]], 14)
    places = [(start[0] + dx * travel * t, start[1] + dy * travel * t, r) for t in np.linspace(0, 1, number)]
    return tuple(_draw_shapes(rng, key, size, paper, [(kind, place, fill)]) for place in places), way


def word_page(rng: random.Random, split: str, size: tuple[int, int], longest: int = 5, in_row: bool = False) -> Picture:
    """Draw a page of this size that shows one short word or number; in_row: within one row of groups, or nearly."""
    while True:
        text, font = draw_text(rng, split, longest), _font(rng.choice(FONTS[split]), rng.randint(16, 21))
        ends = [font.getlength(text[:i]) for i in range(len(text) + 1)]
        if ends[-1] + 8 < size[0]:
            break
    top, bottom = font.getbbox("H0")[1::2]
    x, y = rng.uniform(4, size[0] - ends[-1] - 4), rng.uniform(4, size[1] - (bottom - top) - 4)
    if in_row:
        rows = processed_size(*size)[1] // GROUP
        y = (rng.randrange(rows) + 0.5) * size[1] / rows - (bottom - top) / 2 + rng.uniform(-4, 4)
    picture = Image.new("RGB", size, (255, 255, 255) if rng.random() < 0.7 else _paper(rng, dark=False))
    ImageDraw.Draw(picture).text((x, y - top), text, fill=INKS[rng.choice(list(INKS))], font=font, stroke_width=_bolder(rng, split))
    marks = [Mark(char, (x + a, y, x + b, y + bottom - top)) for char, a, b in zip(text, ends, ends[1:])]
    return Picture(np.asarray(picture), tuple(marks), (text,))


# ---- questions -----------------------------------------------------------------------------------------------------------------


def box_text(mark: Mark, size: tuple[int, int]) -> str:
    """Write a mark as Qwen2.5-VL does: a list of one box in pixels of the processed picture."""
    w, h = processed_size(*size)
    x1, y1, x2, y2 = mark.box
    box = [round(x1 * w / size[0]), round(y1 * h / size[1]), round(x2 * w / size[0]), round(y2 * h / size[1])]
    return json.dumps([{"bbox_2d": box, "label": mark.what}], separators=(",", ":"))


def a_thing(thing: str) -> str:
    """Put an article before a name."""
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def _read_turn(rng: random.Random, text: str) -> Turn:
    questions = ["What does it say?", "Read the text.", "Read the number." if text.isdigit() else "Read the word."]
    return Turn("read", rng.choice(questions), text)


def text_example(rng: random.Random, split: str, longest: int = 8) -> Example:
    """Ask for a text, then for its colour; sometimes the other way round."""
    picture, text, ink = text_picture(rng, split, longest)
    turns = [_read_turn(rng, text), Turn("ink", "What colour is the text?", ink)]
    if rng.random() < 0.3:
        turns.reverse()
    return Example((picture,), tuple(turns))


def shapes_example(rng: random.Random, split: str) -> Example:
    """Ask how many of 1 to 5 shapes there are; one that is alone also what and where it is, in any order."""
    picture = shapes_picture(rng, split, 1 if rng.random() < 0.6 else rng.randint(2, 5))
    mark = picture.marks[0]
    colour, shape = mark.what.split()
    turns = [Turn("count", "How many shapes are there?", str(len(picture.marks)))]
    if len(picture.marks) == 1:
        names = (("What is in the picture?", f"{a_thing(mark.what).capitalize()}."), (f"What colour is the {shape}?", colour),
                 (f"Which shape is {colour}?", shape))
        turns += [Turn("name", *rng.choice(names)), Turn("locate", f"Where is the {mark.what}?", box_text(mark, picture.size))]
        rng.shuffle(turns)
    return Example((picture,), tuple(turns))


def pick_example(rng: random.Random, split: str) -> Example:
    """Ask which of two to six pictures shows a shape, of two of them."""
    n = rng.randint(2, 6)
    while True:
        pictures = [shapes_picture(rng, split, 1, (48, 62)) for _ in range(n)]
        names = [p.marks[0].what for p in pictures]
        if len(set(names)) == n:
            break
    order = rng.sample(range(n), 2)
    turns = [Turn("pick", f"Which picture shows {a_thing(names[i])}?", f"Picture {i + 1}") for i in order]
    return Example(tuple(pictures), tuple(turns))


def move_example(rng: random.Random, split: str) -> Example:
    """Ask which way a shape moves over three pictures."""
    pictures, way = moving_pictures(rng, split)
    return Example(pictures, (Turn("move", "Which way does it move?", way),))


# of two shapes, the one whose box (x1, y1, x2, y2) times this is the larger one; to be clear to see, by more than CLEAR
COMPARISONS = {"Which shape is on the left?": (-1, 0, -1, 0), "Which shape is on the right?": (1, 0, 1, 0),
               "Which shape is at the top?": (0, -1, 0, -1), "Which shape is at the bottom?": (0, 1, 0, 1),
               "Which shape is larger?": (-4, 0, 4, 0), "Which shape is smaller?": (4, 0, -4, 0)}
CLEAR = 32


def compare(question: str, marks: Sequence[Mark]) -> Mark | None:
    """Return the one of two shapes that a question of COMPARISONS asks for; None if it is not clear to see."""
    def value(mark: Mark) -> float:
        return float(np.dot(COMPARISONS[question], mark.box))

    less, more = sorted(marks, key=value)
    return more if value(more) - value(less) > CLEAR else None


def pair_example(rng: random.Random, split: str) -> Example:
    """Ask which of two shapes is on the left, larger and the like, and where one is."""
    picture = shapes_picture(rng, split, 2, (76, 95))
    question, mark = rng.choice([(q, mark) for q in COMPARISONS if (mark := compare(q, picture.marks))])
    turns = [Turn("compare", question, f"{a_thing(mark.what).capitalize()}.")]
    if rng.random() < 0.8:
        found = rng.choice(picture.marks)
        turns.append(Turn("find", f"Where is the {found.what}?", box_text(found, picture.size)))
        rng.shuffle(turns)
    return Example((picture,), tuple(turns))


def form_example(rng: random.Random, split: str) -> Example:
    """Ask for the values of two lines of a form."""
    picture, lines = form_picture(rng, split)
    return Example((picture,), tuple(Turn("field", f"What is the {key}?", lines[key]) for key in rng.sample(list(lines), 2)))


def call_text(**arguments: object) -> str:
    """Write a call of TOOL as Qwen2.5 does (https://qwen.readthedocs.io/en/latest/framework/function_call.html)."""
    return f"<tool_call>\n{json.dumps({'name': TOOL, 'arguments': arguments})}\n</tool_call>"


def click_text(mark: Mark, size: tuple[int, int]) -> str:
    """Write the call that clicks the middle of a mark, in pixels of the processed picture."""
    w, h = processed_size(*size)
    x1, y1, x2, y2 = mark.box
    at = [round((x1 + x2) / 2 * w / size[0]), round((y1 + y2) / 2 * h / size[1])]
    return call_text(action="left_click", coordinate=at)


def click_example(rng: random.Random, split: str) -> Example:
    """Ask to click one of 1 to 5 shapes of a page."""
    picture = shapes_picture(rng, split, rng.choice((1, 2, 3, 3, 4, 4, 5, 5)), (100, 145), page=True)
    mark = rng.choice(picture.marks)
    return Example((picture,), (Turn("click", f"Click the {mark.what}.", click_text(mark, picture.size)),), (TOOL,))


def task_example(rng: random.Random, split: str) -> Example:
    """Ask for a click, then show the next screenshots: the same page once or twice, and a page with a word, which ends the task."""
    first = click_example(rng, split)
    picture, turn = first.pictures[0], first.turns[0]
    turns, pages = [turn], [picture]
    for _ in range(rng.choice((0, 0, 1, 2))):
        if rng.random() < 0.7:
            x, y = (rng.randrange(n) for n in processed_size(*picture.size))
            turns[-1] = replace(turns[-1], mistaken=call_text(action="left_click", coordinate=[x, y]))
        turns.append(Turn("click", "", turn.answer, pictures=1))
        pages.append(picture)
    pages.append(word_page(rng, split, picture.size))
    turns.append(Turn("finish", "", call_text(action="terminate", status="success"), pictures=1))
    return Example(tuple(pages), tuple(turns), first.tools)


# by kind: what draws a conversation
FAMILIES: dict[str, Callable[[random.Random, str], Example]] = {
    "read": text_example, "shapes": shapes_example, "pick": pick_example, "move": move_example, "pair": pair_example,
    "form": form_example, "click": click_example,
    "task": task_example}


def main() -> None:
    """Write pictures and their questions."""
    parser = argparse.ArgumentParser(prog="python -m converters.demo.pictures", description="Write pictures and their questions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("-n", "--number", type=int, default=8, help="conversations of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--split", choices=SPLITS, default="test")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(args.seed), []
    for i in range(args.number):
        for kind, make in FAMILIES.items():
            example = make(rng, args.split)
            names = [f"{kind}-{i}-{j + 1}.png" for j in range(len(example.pictures))]
            for name, picture in zip(names, example.pictures):
                Image.fromarray(picture.pixels).save(args.folder / name)
            lines.append({"pictures": names, "turns": [[t.question, t.answer] for t in example.turns]})
    (args.folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
