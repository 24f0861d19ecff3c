"""Conversations of more pictures than there are cells for: read within the budget and a fifth, and the one that was asked for is still known."""

from __future__ import annotations

import random
from typing import Any

import pytest

import pyengine as pe
from conftest import ROOT
from converters.demo import many
from pyengine.cache.cells import Cells, Conversation
from pyengine.errors import ContextOverflowError

WEIGHTS = ROOT / "converters/demo/weights/demo-many-f16.gguf"
SETTINGS: dict[str, Any] = {"n_threads": 1, "images": (140, 140, 48)}


def needle(seed: int, n: int) -> tuple[list[dict[str, Any]], str]:
    """Draw n pictures of a shape each, of which one is of a form that no other has, and ask for its colour: messages, and the answer."""
    rng = random.Random(f"needle {seed} {n}")
    own = many.draw_shape(rng, "test", many.SIDES[16])
    colour, form = own.shape.split()
    shown: list[many.Shown] = []
    while len(shown) < n - 1:
        other = many.draw_shape(rng, "test", many.SIDES[16])
        shown += [other] if other.shape.split()[1] != form else []
    shown.insert(rng.randrange(n), own)
    content = [*({"type": "image", "image": s.picture.pixels} for s in shown), {"type": "text", "text": f"What colour is the {form}?"}]
    return [{"role": "user", "content": content}], colour


@pytest.mark.parametrize(("n", "budget"), [(32, 160), (48, 200)])
def test_pictures_that_would_not_fit(monkeypatch: pytest.MonkeyPatch, n: int, budget: int) -> None:
    """Of 592 tokens, or 880, a quarter have cells at a time: never more than 1.2 x the budget, and no byte more than the plan says."""
    asked, most = [needle(seed, n) for seed in range(10)], budget + budget // 5
    policy = pe.Diverse(budget=budget, window=8, when="always")
    extend, held = Cells.extend, []

    def watched(self: Cells, s: Conversation, count: int, *args: Any, **more: Any) -> Any:
        found = extend(self, s, count, *args, **more)
        held.append(self.filled(0, s) + count)
        return found

    monkeypatch.setattr(Cells, "extend", watched)
    plan = pe.plan(WEIGHTS, n_ctx=8192, compress=policy, **SETTINGS)
    with pe.load(WEIGHTS, n_ctx=8192, compress=policy, **SETTINGS) as model:
        answers = [model.chat(messages, temperature=0, max_tokens=8) for messages, _ in asked]
        assert plan.items == model.plan.items and plan.of("kv") == model.program.state_memory.nbytes
        cells = sum(item.nbytes for item in plan.items if item.purpose == "kv" and "positions" in item.detail)
        each = 4 * 2 * 2 * 32 * 2                            # layers, heads, keys and values, elements, bytes; beside them sums and a table
        assert cells == most * each <= 1.2 * budget * each and plan.of("kv") - cells == most * (4 * 2 * 4 + 4)
    assert all(answer.n_prompt > 3 * budget for answer in answers) and budget < max(held) <= most
    assert sum(str(answer).strip() == colour for answer, (_, colour) in zip(answers, asked)) >= 9
    with pe.load(WEIGHTS, n_ctx=most, **SETTINGS) as model, pytest.raises(ContextOverflowError):
        model.chat(asked[0][0], temperature=0, max_tokens=8)
