"""Synthetic pictures with questions and answers, drawn from a seed.

A picture shows a word or a number in capital letters, or coloured shapes. Questions ask to read, to name, to count, to locate
(a box in Qwen2.5-VL's notation, in pixels of the picture as the processor resizes it) and which of several pictures shows
something.

Training, validation and test are disjoint by construction: each word, number and layout of shapes belongs to one of them by the
CRC of its name, and each has its own fonts.

    python -m converters.demo.pictures FOLDER -n 8 --seed 1       write some to look at, with a JSON line for each conversation
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from dataclasses import dataclass
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
SHAPES = ("circle", "square", "triangle", "star", "cross")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ALPHABET = LETTERS + "0123456789"
TASKS = ("read", "ink", "name", "count", "locate", "pick")


@dataclass(frozen=True)
class Mark:
    """Something drawn: a character or "red circle", its box (x1, y1, x2, y2) in pixels of the picture."""

    what: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """Pixels uint8 [height, width, 3] and what is drawn there; split: where it belongs by its content."""

    pixels: np.ndarray
    marks: tuple[Mark, ...]
    split: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]


@dataclass(frozen=True)
class Turn:
    """A question, its answer and the task that it belongs to."""

    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A conversation: the pictures come before the first question."""

    pictures: tuple[Picture, ...]
    turns: tuple[Turn, ...]


def split_of(key: str) -> str:
    """Say which of SPLITS a content belongs to: 1 of 10 to validation, 1 of 10 to the test."""
    return ("test", "validation", *["train"] * 8)[zlib.crc32(key.encode()) % 10]


def processed_size(width: int, height: int) -> tuple[int, int]:
    """Size that Qwen2.5-VL's processor gives a picture within MIN_PIXELS and MAX_PIXELS (transformers `smart_resize`)."""
    w, h = (max(GROUP, round(n / GROUP) * GROUP) for n in (width, height))
    if not MIN_PIXELS <= w * h <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} is outside of what this generator makes")
    return w, h


# ---- words ---------------------------------------------------------------------------------------------------------------------


@lru_cache
def words() -> tuple[str, ...]:
    """English words of 3 to 8 letters, in capitals: those of Python's own help topics."""
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


def _near(rng: random.Random, colour: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    return tuple(min(255, max(0, c + rng.randint(-by, by))) for c in colour)        # type: ignore[return-value]


def _paper(rng: random.Random, dark: bool) -> tuple[int, int, int]:
    return _near(rng, (rng.randint(10, 50),) * 3 if dark else (rng.randint(205, 250),) * 3, 8)


@lru_cache
def _noise() -> np.ndarray:
    """Normal deviates, drawn once: a picture takes a stretch of them."""
    return np.random.default_rng(0).standard_normal(1 << 20, np.float32)


def _noisy(rng: random.Random, picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture, np.float32)
    start = rng.randrange(_noise().size - pixels.size)
    return np.clip(pixels + _noise()[start:start + pixels.size].reshape(pixels.shape) * rng.uniform(0, 7), 0, 255).astype(np.uint8)


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
    ImageDraw.Draw(picture).text((x, y - top), text, fill=_near(rng, INKS[ink], 12), font=font)
    centre = (x + ends[-1] / 2, y + (bottom - top) / 2)
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, center=centre, fillcolor=paper)
    marks = []
    for i, char in enumerate(text):
        away = x + (ends[i] + ends[i + 1]) / 2 - centre[0]
        cx, cy = centre[0] + away * np.cos(turn), centre[1] - away * np.sin(turn)
        rx, ry = (ends[i + 1] - ends[i]) / 2, (bottom - top) / 2
        marks.append(Mark(char, (cx - rx, cy - ry, cx + rx, cy + ry)))
    return Picture(_noisy(rng, picture), tuple(marks), split), text, ink


def _outline(shape: str, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    """Corners of a shape whose box has the centre (cx, cy) and sides 2 r, or nearly."""
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


def shapes_picture(rng: random.Random, split: str, n: int, side: tuple[int, int] = (100, 145)) -> Picture:
    """Draw n different shapes that do not touch."""
    while True:
        width, height = rng.randint(*side), rng.randint(*side)
        kinds = rng.sample([f"{c} {s}" for c in COLOURS for s in SHAPES], n)
        placed: list[tuple[float, float, float]] = []
        for _ in range(60):
            r = rng.uniform(9, 20)
            x, y = rng.uniform(r + 2, width - r - 2), rng.uniform(r + 2, height - r - 2)
            if all(max(abs(x - a), abs(y - b)) > r + q + 4 for a, b, q in placed):
                placed.append((x, y, r))
            if len(placed) == n:
                break
        key = " ".join(f"{kind} {int(x) // 14} {int(y) // 14}" for kind, (x, y, _) in sorted(zip(kinds, placed)))
        if len(placed) == n and split_of(key) == split:
            break
    picture = Image.new("RGB", (2 * width, 2 * height), _paper(rng, rng.random() < 0.3))
    draw, marks = ImageDraw.Draw(picture), []
    for kind, (x, y, r) in zip(kinds, placed):
        colour, shape = kind.split()
        fill = _near(rng, COLOURS[colour], 14)
        if shape == "circle":
            corners = [(x - r, y - r), (x + r, y + r)]
            draw.ellipse([(2 * a, 2 * b) for a, b in corners], fill=fill)
        else:
            corners = _outline(shape, x, y, r)
            draw.polygon([(2 * a, 2 * b) for a, b in corners], fill=fill)
        xs, ys = zip(*corners)
        marks.append(Mark(kind, (min(xs), min(ys), max(xs), max(ys))))
    return Picture(_noisy(rng, picture.reduce(2)), tuple(marks), split)


# ---- questions -----------------------------------------------------------------------------------------------------------------


def box_text(mark: Mark, size: tuple[int, int]) -> str:
    """Write a mark as Qwen2.5-VL does: a list of one box in pixels of the processed picture."""
    w, h = processed_size(*size)
    x1, y1, x2, y2 = mark.box
    box = [round(x1 * w / size[0]), round(y1 * h / size[1]), round(x2 * w / size[0]), round(y2 * h / size[1])]
    return json.dumps([{"bbox_2d": box, "label": mark.what}], separators=(",", ":"))


def _a(thing: str) -> str:
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
        names = (("What is in the picture?", f"{_a(mark.what).capitalize()}."), (f"What colour is the {shape}?", colour),
                 (f"Which shape is {colour}?", shape))
        turns += [Turn("name", *rng.choice(names)), Turn("locate", f"Where is the {mark.what}?", box_text(mark, picture.size))]
        rng.shuffle(turns)
    return Example((picture,), tuple(turns))


def pick_example(rng: random.Random, split: str) -> Example:
    """Ask which of two or three pictures shows a shape."""
    n = rng.randint(2, 3)
    while True:
        pictures = [shapes_picture(rng, split, 1, (48, 62)) for _ in range(n)]
        names = [p.marks[0].what for p in pictures]
        if len(set(names)) == n:
            break
    order = rng.sample(range(n), 2)
    turns = [Turn("pick", f"Which picture shows {_a(names[i])}?", f"Picture {i + 1}") for i in order]
    return Example(tuple(pictures), tuple(turns))


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
        for kind, make in (("text", text_example), ("shapes", shapes_example), ("pick", pick_example)):
            example = make(rng, args.split)
            names = [f"{kind}-{i}-{j + 1}.png" for j in range(len(example.pictures))]
            for name, picture in zip(names, example.pictures):
                Image.fromarray(picture.pixels).save(args.folder / name)
            lines.append({"pictures": names, "turns": [[t.question, t.answer] for t in example.turns]})
    (args.folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
