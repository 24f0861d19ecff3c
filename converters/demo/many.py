"""Conversations about many pictures, of 16 to 64 tokens each: what a cache that forgets has to keep.

An album shows shapes, one of them on each picture, texts and forms. Its pictures are numbered by a text before each of them, and
questions name a number or ask for one; or they are not, and one picture alone can answer each question. Of two albums the second shows
the same things but one. Frames show a shape that moves.
How many pictures there are is the difficulty.

As in `pictures`, all that is drawn belongs to the split of its contents.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .pictures import (
    COLOURS,
    GROUP,
    NOW,
    SHAPES,
    THEN,
    Example,
    Mark,
    Picture,
    Turn,
    a_thing,
    form_picture,
    moving_pictures,
    shapes_picture,
    word_page,
)

SIDES = {16: (100, 125), 25: (128, 153), 36: (156, 181), 64: (212, 237)}      # by tokens of a picture: pixels of a side
LONGEST = 4                             # characters of a text
TASKS = ("colour", "shape", "only text", "line", "way", "item", "text", "which", "changed")

OFTEN = {"which": 2, "item": 2, "text": 8, "only text": 5, "line": 4}   # how often they are asked, beside others
QUESTIONS = 12                          # about an album, at most


class Shown(NamedTuple):
    """A picture and what it can be asked for: a shape ("red star"), a text or the lines of a form."""

    picture: Picture
    shape: str = ""
    text: str = ""
    lines: tuple[tuple[str, str], ...] = ()


def _on_sheet(rng: random.Random, picture: Picture, side: tuple[int, int]) -> Picture:
    """Put a picture on a larger sheet of its paper's colour, at whole groups from the top and left."""
    size = [max(own, rng.randint(*side)) for own in picture.size]
    left, top = (GROUP * rng.randint(0, (n - own) // GROUP) for n, own in zip(size, picture.size))
    paper = np.median(picture.pixels.reshape(-1, 3), axis=0).astype(np.uint8)
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    pixels[:] = paper
    pixels[top:top + picture.size[1], left:left + picture.size[0]] = picture.pixels
    marks = (Mark(m.what, (m.box[0] + left, m.box[1] + top, m.box[2] + left, m.box[3] + top)) for m in picture.marks)
    return Picture(pixels, tuple(marks), picture.keys)


def draw_shape(rng: random.Random, split: str, side: tuple[int, int]) -> Shown:
    """Draw a picture of one shape."""
    picture = shapes_picture(rng, split, 1, side)
    return Shown(picture, shape=picture.marks[0].what)


def draw_word(rng: random.Random, split: str, side: tuple[int, int]) -> Shown:
    """Draw a picture of a word or number of 3 or 4 characters, in one row of groups."""
    picture = word_page(rng, split, (rng.randint(*side), rng.randint(*side)), LONGEST, in_row=True)
    return Shown(picture, text="".join(m.what for m in picture.marks))


def draw_form(rng: random.Random, split: str, side: tuple[int, int]) -> Shown:
    """Draw a form of two or three lines."""
    picture, lines = form_picture(rng, split)
    return Shown(_on_sheet(rng, picture, side), lines=tuple(lines.items()))


def _asked(rng: random.Random, shown: Sequence[Shown], numbered: bool) -> dict[str, list[Turn]]:
    """List the turns that an album can answer, by task."""
    turns: dict[str, list[Turn]] = {task: [] for task in TASKS}
    shapes = Counter(s.shape for s in shown)
    words = Counter(word for s in shown for word in s.shape.split())
    for n, s in enumerate(shown, 1):
        for word, other in zip(s.shape.split(), s.shape.split()[::-1]):
            if words[word] == 1 and word in SHAPES:
                turns["colour"].append(Turn("colour", f"What colour is the {word}?", other))
            elif words[word] == 1:
                turns["shape"].append(Turn("shape", f"Which shape is {word}?", other))
        if numbered and s.shape:
            turns["item"].append(Turn("item", f"What is in picture {n}?", f"{a_thing(s.shape).capitalize()}."))
            if shapes[s.shape] == 1:
                turns["which"].append(Turn("which", f"Which picture shows {a_thing(s.shape)}?", f"Picture {n}"))
        if numbered and s.text:
            turns["text"].append(Turn("text", f"What does picture {n} say?", s.text))
        turns["line"] += [Turn("line", f"What is the {key}?", value) for key, value in s.lines]
    texts = [s.text for s in shown if s.text]
    if len(texts) == 1:
        turns["only text"].append(Turn("only text", rng.choice(("What does it say?", "Read the text.")), texts[0]))
    return {task: found for task, found in turns.items() if found}


def album(rng: random.Random, shown: Sequence[Shown], numbered: bool, questions: int, task: str | None = None) -> Example:
    """Ask about an album: of each task that it can answer, or of one alone."""
    found = _asked(rng, shown, numbered)
    if task is not None:
        found = {task: found[task]}
    turns: list[Turn] = []
    while found and len(turns) < questions:
        kind = rng.choices(list(found), [OFTEN.get(kind, 1) for kind in found])[0]
        turns.append(found[kind].pop(rng.randrange(len(found[kind]))))
        if not found[kind]:
            del found[kind]
    before = tuple(str(n) for n in range(1, len(shown) + 1)) if numbered else ()
    return Example(tuple(s.picture for s in shown), tuple(turns), before=before, apart=len(turns) > 1)


def _chosen(rng: random.Random, pool: Sequence[Shown], n: int, texts: int = 1) -> list[Shown]:
    """Choose the pictures of an album: texts, a form, shapes of which one to three are of a form or a colour of their own, and others."""
    most = min(3, 1 + n // 4)
    own = rng.sample(SHAPES, rng.randint(1, most)), rng.sample(list(COLOURS), rng.randint(1, most))
    pairs = [(s, *s.shape.split()) for s in pool if s.shape]
    lone = [rng.choice(found) for shape in own[0] if (found := [s for s, c, f in pairs if f == shape and c not in own[1]])]
    lone += [rng.choice(found) for colour in own[1] if (found := [s for s, c, f in pairs if c == colour and f not in own[0]])]
    others = [s for s, c, f in pairs if c not in own[1] and f not in own[0]]
    shown = [rng.choice([s for s in pool if s.text]) for _ in range(texts)]
    shown += rng.sample(lone, max(0, min(len(lone), n - len(shown) - 1)))
    shown.append(rng.choice([s for s in pool if s.lines]))
    shown += [rng.choice(others or [s for s in pool if s.shape]) for _ in range(n - len(shown))]
    shown = shown[:n]
    rng.shuffle(shown)
    return shown


MAKES = (draw_shape, draw_word, draw_shape, draw_form, draw_shape, draw_shape, draw_shape, draw_shape)


def draw_pool(rng: random.Random, split: str, n: int, side: tuple[int, int]) -> list[Shown]:
    """Draw pictures that albums share: 6 of 8 show a shape, one a text and one a form."""
    return [MAKES[i % len(MAKES)](rng, split, side) for i in range(n)]


def albums(rng: random.Random, split: str, n: int, number: int, tokens: int = 16, pool: Sequence[Shown] = ()) -> list[Example]:
    """Draw n albums of `number` pictures out of a pool, which they share, with up to QUESTIONS each; three of four are numbered.

    Every second one may show several texts. Without a pool (of `draw_pool`) they draw one.
    """
    pool = pool or draw_pool(rng, split, max(32, n * number // 3), SIDES[tokens])
    out = []
    for _ in range(n):
        texts = rng.choice((1, rng.randint(1, max(1, number // 2))))
        out.append(album(rng, _chosen(rng, pool, number, texts), rng.random() < 0.75, QUESTIONS))
    return out


def two_albums(rng: random.Random, number: int, pool: Sequence[Shown]) -> Example:
    """Ask what changed from one album of shapes to a second one, which shows the same things in the same order but one new.

    number: of all pictures; of an odd one, one less
    """
    by_shape: dict[str, list[Shown]] = {}
    for s in pool:
        by_shape.setdefault(s.shape, []).append(s)
    by_shape.pop("", None)
    new = rng.choice(list(by_shape))
    first = [rng.choice([shape for shape in by_shape if shape != new]) for _ in range(number // 2)]
    second = list(first)
    second[rng.randrange(len(second))] = new
    shown = tuple(rng.choice(by_shape[shape]).picture for shape in first + second)
    before = tuple({0: THEN, len(first): NOW}.get(i, "") for i in range(len(shown)))
    return Example(shown, (Turn("changed", "What changed?", f"{a_thing(new).capitalize()}."),), before=before)


def frames_example(rng: random.Random, split: str, number: int, tokens: int = 16) -> Example:
    """Ask which way a shape moves over frames."""
    frames, way = moving_pictures(rng, split, number, SIDES[tokens])
    return Example(frames, (Turn("way", "Which way does it move?", way),))


# of an evaluation, by task: whether the album is numbered
ALBUM_TASKS = {"which": True, "item": True, "text": True, "colour": False, "shape": False, "only text": False, "line": False}


def example(rng: random.Random, split: str, task: str, number: int, tokens: int = 16) -> Example:
    """Draw a conversation of one question of a task about `number` pictures of some `tokens` tokens each."""
    if task == "way":
        return frames_example(rng, split, number, tokens)
    if task == "changed":
        return two_albums(rng, number, draw_pool(rng, split, max(32, 2 * number), SIDES[tokens]))
    numbered = ALBUM_TASKS[task]
    while True:
        pool = draw_pool(rng, split, max(32, 2 * number), SIDES[tokens])
        shown = _chosen(rng, pool, number, number // 4 if task == "text" else 1)
        if task in _asked(rng, shown, numbered):
            return album(rng, shown, numbered, 1, task)


# by kind of a training step: what draws n conversations of `number` pictures
KINDS: dict[str, Callable[[random.Random, str, int, int, int], list[Example]]] = {
    "album": albums,
    "changes": lambda rng, split, n, number, tokens: [
        two_albums(rng, number, draw_pool(rng, split, 2 * number, SIDES[tokens])) for _ in range(n)],
    "frames": lambda rng, split, n, number, tokens: [frames_example(rng, split, number, tokens) for _ in range(n)]}
