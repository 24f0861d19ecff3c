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
    if turn.task == "changed":
        (new,) = {what for n, what in shapes.items() if n > len(marks) // 2} - {what for n, what in shapes.items() if n <= len(marks) // 2}
        return f"A{'n' * new.startswith('o')} {new}."
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


def test_of_two_albums_the_second_shows_the_same_things_but_one() -> None:
    for seed, number in enumerate((4, 9, 24)):
        example = drawn("changed", number, seed=seed)
        half = len(example.pictures) // 2
        first, second = ([p.marks[0].what for p in own] for own in (example.pictures[:half], example.pictures[half:]))
        assert half == number // 2 == example.second and sum(a != b for a, b in zip(first, second, strict=True)) == 1
        said = [part.get("text") for part in pictures.shown_parts(example, [{"type": "image"}] * len(example.pictures))]
        assert [text for text in said if text] == [pictures.THEN, pictures.NOW] and said.index(pictures.NOW) == half + 1


def test_training_runs_what_transformers_does_and_encodes_a_shared_picture_once() -> None:
    pytest.importorskip("torch", reason="trains the model: pip install -r requirements/reference.txt")
    from converters.demo import forward, model

    examples = [*many.albums(random.Random(1), "validation", 2, 6), drawn("which", 4, 25), drawn("way", 4), drawn("changed", 6)]
    assert forward.check_forward(model.make_model(3), examples) < 1e-4
    assert examples[0].apart and len(forward.alone(examples[0])) > 3
    batch = model.make_batch([examples[0]] * 3)
    assert len(batch.rows) == 3 * len(batch.things)
    numbered = next(e for e in examples if e.numbered)
    assert set(model.make_batch([numbered]).labels[1].tolist()) <= {-100, *range(1, 7)}


def test_turns_apart_are_conversations_of_their_own() -> None:
    torch = pytest.importorskip("torch", reason="trains the model: pip install -r requirements/reference.txt")
    from converters.demo import forward, model

    made, (example,) = model.make_model(3).eval(), many.albums(random.Random(2), "validation", 1, 5)
    logits = []
    for examples in ([example], forward.alone(example)):
        batch = model.make_batch(examples)
        with torch.no_grad():
            soft = forward.see(made, batch.patches, batch.grids)
            hidden = forward.hidden(made, batch, soft)[batch.targets >= 0]
            assert float((forward.answers(made, batch, soft).last - hidden).abs().max()) < 1e-4
        logits.append(made.lm_head(hidden))
    assert logits[0].shape == logits[1].shape and float((logits[0] - logits[1]).abs().max()) < 1e-4


def test_pool_has_the_rows_of_its_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="trains the model: pip install -r requirements/reference.txt")
    from converters.demo import forward, model, pool

    made = model.make_model(3).eval()
    monkeypatch.setattr(pool, "SIZE", 16)
    own = pool.Pool("validation", 16)
    for _ in range(3):
        own.renew(made, random.Random(4), 8)
    assert len(own.shown) == len(own.rows) == 16 and {id(s.picture) for s in own.shown} == set(own.rows)
    assert [bool(s.shape) for s in own.some(random.Random(5), 8)].count(True) == 12        # two of each kind are all that there are
    albums = many.albums(random.Random(6), "validation", 2, 5, 16, own.shown)
    known, drawn_again = model.make_batch(albums, own.rows), model.make_batch(albums)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen = forward.see(made, drawn_again.patches, drawn_again.grids)
    assert not known.patches and known.rows.equal(drawn_again.rows) and float((known.soft - seen).abs().max()) < 0.05 * float(seen.abs().max())


def test_losses_of_what_answers_and_rows_should_find() -> None:
    """Attention that gives all to what is sought costs nothing, and even attention the log of its share."""
    torch = pytest.importorskip("torch", reason="trains the model: pip install -r requirements/reference.txt")
    from converters.demo import model

    batch = model.make_batch([drawn("item", 5), drawn("which", 6), drawn("changed", 6)])
    tokens = model._of_token(batch, batch.numbers)
    marked = model._of_token(batch, torch.where(batch.things[batch.rows] > 0, batch.numbers, -100))
    even = torch.zeros(3, 2, *2 * batch.ids.shape[1:])
    ideal = even.clone()
    for b, (example, plane) in enumerate(((drawn("item", 5), 1), (drawn("which", 6), 0), (drawn("changed", 6), 0))):
        (turn,) = example.turns
        shapes = [p.marks[0].what if len(p.marks) == 1 else "" for p in example.pictures]
        picture = int(turn.question.rstrip("?").split()[-1]) - 1 if b == 0 else int(turn.answer.split()[1]) - 1 if b == 1 else max(
            n for n, what in enumerate(shapes) if n >= 3 and what not in shapes[:3])
        answer = batch.targets[b] >= 0
        assert set(batch.found[plane, b, answer].tolist()) == {picture} and (batch.found[1 - plane, b] == -100).all()
        ideal[b, 1, :, marked[b] == picture] = 50.0
    shows, numbers = model.found_losses(ideal, batch)
    assert float(shows) < 1e-4 and float(numbers) < 1e-4
    t = batch.ids.shape[1]
    assert abs(float(model.found_losses(even, batch)[1]) - np.log(t)) < 1e-4           # one row of a shape's picture has it
    things, new = batch.things[batch.rows], model._is_new(batch)
    assert int(new.sum()) == 1 and int(things[new]) == model.THINGS[drawn("changed", 6).turns[0].answer.split(" ", 1)[1].rstrip(".")]
    where = model._of_token(batch, batch.albums)
    assert set(where[2].tolist()) == {-100, 0, 1} and (tokens[2][where[2] == 1] >= 3).all() and (where[:2] == -100).all()
    assert float(model.matched_loss(even, batch)) < np.log(t) + 1e-4


def test_albums_grow_when_they_are_answered_for() -> None:
    torch = pytest.importorskip("torch", reason="trains the model: pip install -r requirements/reference.txt")
    from converters.demo import model, train

    training, batch = train.Training(0), model.make_batch([drawn("which", 4), drawn("colour", 4), drawn("text", 4)])
    known = batch.targets[batch.targets >= 0]
    right = torch.ones(len(known), dtype=torch.bool)
    assert [all(span) for span in train.by_answer(right, batch)] == [True] * 3 and batch.tasks == ["which", "colour", "text"]
    last_wrong = right.clone()
    last_wrong[-1] = False                                                     # the end of the text's answer
    assert training.watch("album", last_wrong, batch) == {"album most": 12, "right which": 1.0, "right colour": 1.0, "right text": 0.0}
    for step in range(40):
        training.step = step
        training.watch("album", right, batch)
    assert 14 <= training.most["album"] <= 15 and training.most["changes"] == train.FIRST_MOST["changes"]


def test_steps_are_of_new_kinds_and_some_of_the_others() -> None:
    pytest.importorskip("torch", reason="trains the model: pip install -r requirements/reference.txt")
    from converters.demo import model, train

    most = train.Training(0).most
    steps = train.Steps(1, 0, 0, most, fixed=model.make_model(0))
    kinds = [steps.kinds(step) for step in range(42)]
    assert all(step[0] == "album" for step in kinds) and {kind for step in kinds for kind in step} == set(train.MIX)
    assert sum("read" in step for step in kinds) == 21
    first = next(iter(steps))
    assert set(first) == set(kinds[0]) and all(batch.soft is not None and not batch.patches for batch in first.values())
    assert len(first["album"].ids) * first["album"].ids.shape[1] < 2 * train.TOKENS
