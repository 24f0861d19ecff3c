"""Conversations about many pictures: splits share nothing, answers follow from what is drawn, a picture's place is in its number."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="its fonts: pip install -r requirements/peers.txt")

from converters.demo import many, pictures  # noqa: E402  they need the fonts


def drawn(task: str, number: int = 8, tokens: int = 16, split: str = "test", seed: int = 0) -> Any:
    return many.example(random.Random(f"{task} {number} {tokens} {split} {seed}"), split, task, number, tokens)


def answer_by_marks(turn: Any, shown: Any) -> str:
    """What a question's answer has to be, from the marks alone."""
    marks = [p.marks for p in shown]
    shapes = {n: m[0].what for n, m in enumerate(marks, 1) if len(m) == 1}
    last = turn.question.rstrip("?.").split()[-1]
    if turn.task == "which":
        (n,) = (n for n, what in shapes.items() if turn.question in (f"Which picture shows a {what}?", f"Which picture shows an {what}?"))
        return f"Picture {n}"
    if turn.task == "item":
        return f"A{'n' * shapes[int(last)].startswith('o')} {shapes[int(last)]}."
    if turn.task == "text":
        return "".join(m.what for m in marks[int(turn.question.split()[3]) - 1])
    if turn.task in ("colour", "shape"):
        (what,) = (what.split() for what in shapes.values() if last in what.split())
        return what[0] if turn.task == "colour" else what[1]
    texts = [m for m in marks if len(m) > 1 and all(len(mark.what) == 1 for mark in m)]
    if turn.task == "only text":
        (text,) = texts
        return "".join(m.what for m in text)
    if turn.task == "line":
        (form, line) = next((m, mark) for m in marks for mark in m if mark.what == last)
        middle = [(m, (m.box[1] + m.box[3]) / 2) for m in form if len(m.what) == 1]
        return "".join(m.what for m, y in middle if line.box[1] <= y <= line.box[3]).removeprefix(last)
    (x0, y0), (x1, y1) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (marks[0][0].box, marks[-1][0].box))
    return ("right" if x1 > x0 else "left") if abs(x1 - x0) > abs(y1 - y0) else ("down" if y1 > y0 else "up")


@pytest.mark.parametrize("task", many.TASKS)
def test_answers_follow_from_what_is_drawn(task: str) -> None:
    for seed, number in enumerate((4, 8, 24, 48)):
        example = drawn(task, number, seed=seed)
        (turn,) = example.turns
        assert len(example.pictures) == number and turn.task == task
        assert turn.answer == answer_by_marks(turn, example.pictures), turn


def test_answers_are_spread_over_the_pictures() -> None:
    """No place is likelier than others, so a guess is right in one of as many cases as there are pictures."""
    said = [drawn("which", 4, seed=seed).turns[0].answer for seed in range(80)]
    assert min(said.count(f"Picture {n}") for n in range(1, 5)) >= 8


def test_splits_share_nothing() -> None:
    seen: dict[str, set[str]] = {}
    for split in pictures.SPLITS:
        rng = random.Random(split)
        examples = [e for make in many.KINDS.values() for e in make(rng, split, 3, 12, 16)]
        seen[split] = {key for e in examples for p in e.pictures for key in p.keys}
        assert {pictures.split_of(key) for key in seen[split]} == {split}
    assert all(seen[a].isdisjoint(seen[b]) for a in seen for b in seen if a != b)


@pytest.mark.parametrize("tokens", many.SIDES)
def test_pictures_have_the_tokens_that_are_asked_for(tokens: int) -> None:
    for task in ("colour", "which", "way"):
        sizes = [pictures.processed_size(*p.size) for p in drawn(task, 8, tokens).pictures]
        counts = [w * h // pictures.GROUP**2 for w, h in sizes]
        assert np.median(counts) == tokens and max(counts) <= 1.5 * tokens


def test_marks_lie_where_something_is_drawn() -> None:
    for task in many.TASKS:
        for picture in drawn(task).pictures:
            paper = np.median(picture.pixels.reshape(-1, 3).astype(float), axis=0)
            away = np.abs(picture.pixels - paper).max(-1)
            for mark in picture.marks:
                x1, y1, x2, y2 = (round(v) for v in mark.box)
                assert away[y1:y2, x1:x2].max() > 60, mark


def test_numbers_stand_before_pictures() -> None:
    parts = [{"type": "image"}] * 3
    assert pictures.shown_parts(drawn("colour"), parts) == parts
    assert [p.get("text") for p in pictures.shown_parts(drawn("which"), parts)] == ["1", None, "2", None, "3", None]


def test_training_runs_what_transformers_does_and_encodes_a_shared_picture_once() -> None:
    pytest.importorskip("torch", reason="trains the model: pip install -r requirements/reference.txt")
    from converters.demo import model

    examples = [*many.albums(random.Random(1), "validation", 2, 6), drawn("which", 4, 25), drawn("way", 4)]
    assert model.check_forward(model.make_model(3), examples) < 1e-4
    assert examples[0].apart and len(model.alone(examples[0])) > 3
    batch = model.make_batch([examples[0]] * 3)
    assert len(batch.rows) == 3 * len(batch.things)
    numbered = examples[0]
    assert numbered.numbered and set(model.make_batch([numbered]).labels[1].tolist()) <= {-100, *range(1, 7)}


def test_turns_apart_are_conversations_of_their_own() -> None:
    torch = pytest.importorskip("torch", reason="trains the model: pip install -r requirements/reference.txt")
    from converters.demo import model

    made, (example,) = model.make_model(3).eval(), many.albums(random.Random(2), "validation", 1, 5)
    logits = []
    for examples in ([example], model.alone(example)):
        batch = model.make_batch(examples)
        with torch.no_grad():
            hidden = model.hidden(made, batch, model.see(made, batch))
        logits.append(made.lm_head(hidden)[batch.targets >= 0])
    assert logits[0].shape == logits[1].shape and float((logits[0] - logits[1]).abs().max()) < 1e-4
