"""The model that the repository ships: right answers about pictures it has not seen, and transformers' answers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import pyengine as pe
from bench import sight

WEIGHTS = ROOT / "converters/demo/weights"
RECORDED = json.loads((ROOT / "tests/data/demo.json").read_text())["conversations"]


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    with np.load(ROOT / "tests/data/demo.npz") as file:
        return [file[f"arr_{i}"] for i in range(len(file.files))]


def ask(model: pe.Model, conversation: dict[str, Any], pictures: list[np.ndarray]) -> list[str]:
    """Hold a recorded conversation with the model's own answers."""
    messages: list[dict[str, Any]] = []
    left = iter(conversation["pictures"])
    for turn in conversation["turns"]:
        shown = [{"type": "image", "image": pictures[i]} for i in islice(left, turn["shown"])]
        messages.append({"role": turn["role"], "content": [*shown, {"type": "text", "text": turn["question"]}]})
        messages.append({"role": "assistant", "content": sight.written(model, messages, conversation["tools"])})
    return [m["content"] for m in messages[1::2]]


def test_answers_in_float32_are_those_of_transformers(pictures: list[np.ndarray], tmp_path: Path) -> None:
    model = pe.load(sight.with_weights(WEIGHTS / "demo-f16.gguf", "F32", tmp_path / "f32.gguf"), n_ctx=512, kv_dtype="f32")
    for conversation in RECORDED:
        assert ask(model, conversation, pictures) == [t["transformers"] for t in conversation["turns"]], conversation


@pytest.mark.parametrize("name", ["demo-f16.gguf", "demo-q8_0.gguf"])
def test_answers_are_right(name: str, pictures: list[np.ndarray]) -> None:
    """Nearly all of them: what the model gets wrong, it gets wrong in transformers too."""
    model, points = pe.load(WEIGHTS / name, n_ctx=512), []
    for conversation in RECORDED:
        for turn, answer in zip(conversation["turns"], ask(model, conversation, pictures)):
            if turn["task"] in ("locate", "find"):
                true, found = (json.loads(text)[0]["bbox_2d"] for text in (turn["true"], answer))
                points.append(sight.overlap(found, true))
            elif turn["task"] == "click":
                places = [json.loads(text.split("\n")[1])["arguments"]["coordinate"] for text in (turn["true"], answer)]
                points.append(float(np.abs(np.subtract(*places)).max() <= 8))
            else:
                points.append(answer == turn["true"])
    assert np.mean(points) > 0.9, points


def test_a_second_question_encodes_no_picture_again(pictures: list[np.ndarray]) -> None:
    model = pe.load(WEIGHTS / "demo-q8_0.gguf", n_ctx=512)
    conversation = next(c for c in RECORDED if len(c["turns"]) > 1 and not c["tools"])
    shown = [{"type": "image", "image": pictures[i]} for i in conversation["pictures"]]
    first, second = ([{"role": "user", "content": [*shown, {"type": "text", "text": turn["question"]}]}]
                     for turn in conversation["turns"][:2])
    assert not any(m.cached for m in model.chat(first, temperature=0, max_tokens=4).media)
    assert all(m.cached for m in model.chat(second, temperature=0, max_tokens=4).media)


def test_boxes_come_back_in_pixels_of_the_original(pictures: list[np.ndarray]) -> None:
    model = pe.load(WEIGHTS / "demo-q8_0.gguf", n_ctx=512)
    conversation, turn = next((c, t) for c in RECORDED for t in c["turns"] if t["task"] == "locate")
    picture = pictures[conversation["pictures"][0]]
    prompt = ["<|im_start|>user\n", picture, f"{turn['question']}<|im_end|>\n<|im_start|>assistant\n"]
    (box,) = model.generate(prompt, temperature=0).boxes
    assert box.label in turn["question"] and 0 <= box.x1 < box.x2 <= picture.shape[1] and 0 <= box.y1 < box.y2 <= picture.shape[0]


@pytest.fixture(scope="module")
def drawn() -> Any:
    """The generator."""
    pytest.importorskip("matplotlib", reason="its fonts: pip install -r requirements/peers.txt")
    from converters.demo import pictures

    return pictures


def test_splits_of_the_generator_share_nothing(drawn: Any) -> None:
    seen: dict[str, set[str]] = {split: set() for split in drawn.SPLITS}
    for split in drawn.SPLITS:
        for kind, make in drawn.FAMILIES.items():
            rng = random.Random(f"{split} {kind}")
            for example in (make(rng, split) for _ in range(40)):
                keys = {key for picture in example.pictures for key in picture.keys}
                assert {drawn.split_of(key) for key in keys} == {split}
                seen[split] |= keys
                # what an answer says of a picture's text is among its keys
                assert all(turn.answer in keys for turn in example.turns if turn.task in ("read", "field"))
    assert all(seen[a].isdisjoint(seen[b]) for a in seen for b in seen if a != b)
    fonts = [set(drawn.FONTS[split]) for split in drawn.SPLITS]
    assert all(a.isdisjoint(b) for i, a in enumerate(fonts) for b in fonts[:i])


def middle(mark: Any) -> np.ndarray:
    """Centre (x, y) of what is drawn."""
    return np.array([mark.box[0] + mark.box[2], mark.box[1] + mark.box[3]]) / 2


def answer_by_marks(turn: Any, pictures: Any) -> Any:
    """What a question's answer has to be, from the marks alone."""
    marks = pictures[0].marks
    if turn.task == "read":
        return "".join(mark.what for mark in marks)
    if turn.task == "count":
        return str(len(marks))
    if turn.task == "name":
        colour, shape = marks[0].what.split()
        return {"Wha": f"A{'n' * (colour == 'orange')} {colour} {shape}.", "Whi": shape}[turn.question[:3]] \
            if "colour" not in turn.question else colour
    if turn.task in ("locate", "find"):
        (mark,) = (m for m in marks if turn.question == f"Where is the {m.what}?")
        return json.dumps([{"bbox_2d": [round(v) for v in mark.box], "label": mark.what}], separators=(",", ":"))
    if turn.task == "pick":
        (which,) = (i for i, p in enumerate(pictures) if turn.question.endswith(f" {p.marks[0].what}?"))
        return f"Picture {which + 1}"
    if turn.task == "move":
        dx, dy = middle(pictures[2].marks[0]) - middle(pictures[0].marks[0])
        assert max(abs(dx), abs(dy)) > 10 and min(abs(dx), abs(dy)) < 1e-6
        return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
    if turn.task == "compare":
        left, top = (min(marks, key=lambda m: middle(m)[axis]) for axis in (0, 1))
        small = min(marks, key=lambda m: m.box[2] - m.box[0])
        right, bottom, large = (next(m for m in marks if m is not other) for other in (left, top, small))
        word = turn.question.rstrip("?").split()[-1]
        what = {"left": left, "right": right, "top": top, "bottom": bottom, "smaller": small, "larger": large}[word].what
        return f"A{'n' * what.startswith('o')} {what}."
    assert turn.task == "field"
    (line,) = (m for m in marks if turn.question == f"What is the {m.what}?")
    said = [m.what for m in marks if len(m.what) == 1 and line.box[1] <= middle(m)[1] <= line.box[3]]
    return "".join(said).removeprefix(line.what)


def test_answers_follow_from_what_is_drawn(drawn: Any) -> None:
    tasks = set()
    for kind, make in drawn.FAMILIES.items():
        rng = random.Random(kind)
        for example in (make(rng, "test") for _ in range(40)):
            for turn in () if example.tools else example.turns:
                if turn.task == "ink":                                      # no mark says it
                    assert turn.answer in drawn.INKS
                elif turn.task in drawn.BOXES:
                    found, true = (json.loads(a)[0] for a in (turn.answer, answer_by_marks(turn, example.pictures)))
                    picture = example.pictures[0]
                    scale = np.tile(np.divide(drawn.processed_size(*picture.size), picture.size), 2)
                    assert found["label"] == true["label"] and np.abs(found["bbox_2d"] - true["bbox_2d"] * scale).max() <= 1
                else:
                    assert turn.answer == answer_by_marks(turn, example.pictures), (turn, example.pictures[0].marks)
                tasks.add(turn.task)
    assert tasks == {"read", "ink", "count", "name", "locate", "pick", "move", "compare", "find", "field"}


@pytest.mark.parametrize("kind", ["click", "task"])
def test_calls_follow_from_what_is_drawn(drawn: Any, kind: str) -> None:
    rng = random.Random(kind)
    for example in (drawn.FAMILIES[kind](rng, "test") for _ in range(40)):
        page, seen = example.pictures[0], []
        (mark,) = (m for m in page.marks if example.turns[0].question == f"Click the {m.what}.")
        for turn in example.turns:
            opening, call, closing = turn.answer.split("\n")
            assert (opening, closing) == ("<tool_call>", "</tool_call>") and json.loads(call)["name"] == "computer_use"
            seen.append(json.loads(call)["arguments"])
        scale = np.divide(drawn.processed_size(*page.size), page.size)
        assert seen[0]["action"] == "left_click" and np.abs(seen[0]["coordinate"] - middle(mark) * scale).max() <= 0.5
        assert sight.clicked(example, example.turns[0].answer) and not sight.clicked(example, example.turns[-1].answer.replace("left", "right"))
        for picture, arguments in zip(example.pictures[1:], seen[1:], strict=True):
            words = all(len(m.what) == 1 for m in picture.marks)
            assert arguments == ({"action": "terminate", "status": "success"} if words else seen[0])
        assert not any(turn.mistaken for turn in example.turns[-2 if kind == "task" else -1:])


@pytest.mark.parametrize("kind", ["click", "form", "move", "pair", "pick", "task"])
def test_marks_lie_where_something_is_drawn(drawn: Any, kind: str) -> None:
    """The pixels inside of a mark's box differ more from the paper than those outside of all boxes."""
    rng = random.Random(kind)
    for _ in range(10):
        for picture in drawn.FAMILIES[kind](rng, "test").pictures:
            paper = np.median(picture.pixels.reshape(-1, 3).astype(float), axis=0)
            away = np.abs(picture.pixels - paper).max(-1)
            free = np.ones(away.shape, bool)
            for mark in picture.marks:
                x1, y1, x2, y2 = (round(v) for v in mark.box)
                assert away[y1:y2, x1:x2].max() > 60, mark
                free[max(0, y1 - 3):y2 + 3, max(0, x1 - 3):x2 + 3] = False
            assert away[free].max() < 60


def test_the_same_seed_draws_the_same(drawn: Any) -> None:
    for a, b in zip(sight.draw(3, 5), sight.draw(3, 5)):
        assert a.turns == b.turns and all(np.array_equal(p.pixels, q.pixels) for p, q in zip(a.pictures, b.pictures))
    assert sight.draw(3, 5)[0].turns != sight.draw(3, 6)[0].turns


def test_the_generator_and_the_engine_need_no_torch() -> None:
    code = "import sys, bench.sight, converters.demo.pictures, pyengine; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("points, low, high", [([1.0] * 10, 0.722, 1.0), ([1.0] * 90 + [0.0] * 10, 0.826, 0.945),
                                               ([0.5, 0.7], 0.404, 0.796)])
def test_intervals(points: list[float], low: float, high: float) -> None:
    assert sight.interval(points) == pytest.approx((low, high), abs=1e-3)


def test_overlap() -> None:
    assert sight.overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert sight.overlap((0, 0, 1, 1), (2, 2, 3, 3)) == sight.overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0
