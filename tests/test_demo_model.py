"""The model that the repository ships: right answers about pictures it has not seen, and transformers' answers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
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
    for turn in conversation["turns"]:
        shown = [] if messages else [{"type": "image", "image": pictures[i]} for i in conversation["pictures"]]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": turn["question"]}]})
        messages.append({"role": "assistant", "content": str(model.chat(messages, temperature=0, max_tokens=sight.MAX_TOKENS))})
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
            if turn["task"] == "locate":
                true, found = (json.loads(text)[0]["bbox_2d"] for text in (turn["true"], answer))
                points.append(sight.overlap(found, true))
            else:
                points.append(answer == turn["true"])
    assert np.mean(points) > 0.9, points


def test_a_second_question_encodes_no_picture_again(pictures: list[np.ndarray]) -> None:
    model = pe.load(WEIGHTS / "demo-q8_0.gguf", n_ctx=512)
    conversation = next(c for c in RECORDED if len(c["turns"]) > 1)
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


def test_splits_of_the_generator_share_nothing() -> None:
    pytest.importorskip("matplotlib", reason="its fonts: pip install -r requirements/peers.txt")
    from converters.demo import pictures as drawn

    seen: dict[str, set[str]] = {split: set() for split in drawn.SPLITS}
    for split in drawn.SPLITS:
        rng = random.Random(split)
        for _ in range(60):
            picture, text, _ = drawn.text_picture(rng, split)
            seen[split].add(text)
            assert drawn.split_of(text) == split == picture.split and "".join(m.what for m in picture.marks) == text
    assert all(seen[a].isdisjoint(seen[b]) for a in seen for b in seen if a != b)
    fonts = [set(drawn.FONTS[split]) for split in drawn.SPLITS]
    assert all(a.isdisjoint(b) for i, a in enumerate(fonts) for b in fonts[:i])


def test_the_same_seed_draws_the_same() -> None:
    pytest.importorskip("matplotlib", reason="its fonts: pip install -r requirements/peers.txt")
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
