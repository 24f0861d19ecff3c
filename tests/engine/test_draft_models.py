"""A draft model changes no bit of an answer, keeps in step with what came, and is in the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cases
import pyengine as pe
from eager import draft_always
from pyengine.engine import draft_model, writing
from pyengine.engine.proposing import Asked, Terms
from pyengine.engine.writing import Odds
from pyengine.errors import ModelNotFoundError, PlanError, RequestError
from pyengine.files.gguf import GGUFFile
from pyengine.memory.held import planned_bytes
from pyengine.text.vocabulary import Vocabulary

N_CTX = 256
SETTINGS: dict[str, Any] = {"n_ctx": N_CTX, "n_batch": 64, "n_threads": 1}


def ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((seed, n)).integers(40, 400, n).tolist()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def asked(seed: int) -> dict[str, Any]:
    """Greedy for even seeds; so cold for odd ones that the most probable token of a random model comes now and then, and now and then not."""
    return {"temperature": 0 if seed % 2 == 0 else 0.15, "seed": seed, "logprobs": 2, "max_tokens": 30, "min_p": 0}


def told(answer: Any) -> tuple[Any, ...]:
    return str(answer), answer.tokens, answer.sampled, answer.finish, answer.report.stopped_by, answer.report.ended_by


def by_model(*answers: Any) -> tuple[int, int]:
    """Return the tokens that the draft model drafted for answers, and those of them that came."""
    each = [a.report.drafts.get("model", (0, 0)) for a in answers]
    return sum(n for n, _ in each), sum(n for _, n in each)


@pytest.fixture
def eager(monkeypatch) -> None:
    draft_always(monkeypatch, 5)


@pytest.fixture(scope="module")
def pair(tiny_gguf) -> tuple[Path, Path]:
    """A model, and a smaller one of the same tokens."""
    return tiny_gguf("llama")[0], tiny_gguf("llama", num_hidden_layers=1)[0]


@pytest.mark.parametrize("kind", [cases.first(), cases.first(ring=True), cases.first(mrope=True), cases.first(recurrent=True)])
def test_answers_are_the_same(tiny_gguf, eager, kind: str) -> None:
    """Of a model that drafts for itself, whose drafts all come where it is greedy; of one and of eight conversations, with pictures."""
    path, case = tiny_gguf(kind)[0], cases.find(kind)
    prompts: list[Any] = [ids(5), ids(70, 1), ids(17, 2), ids(100, 3), ids(33, 4), ids(64, 5), ids(9, 6), ids(50, 7)]
    if case.sees:
        prompts[1:3] = [[*ids(9), picture(1), *ids(6)], [*ids(30, 5), picture(2), *ids(3)]]
    wanted = pe.load(path, **SETTINGS, n_seq=8, speculate=False)
    for n_seq in (1, 8):
        model = pe.load(path, **SETTINGS, n_seq=n_seq, draft=path)
        for seed in range(2):
            answers = model.generate_many(prompts[: 3 if n_seq == 1 else 8], **asked(seed))
            wanted.reset()
            assert list(map(told, answers)) == list(map(told, wanted.generate_many(prompts, **asked(seed))))[: len(answers)]
            drafted, accepted = by_model(*answers)
            assert drafted == accepted >= 10 if seed == 0 and not case.sees else drafted >= accepted > 0


def test_of_another_model(pair, eager) -> None:
    plain, model = pe.load(pair[0], **SETTINGS, n_seq=3, speculate=False), pe.load(pair[0], **SETTINGS, n_seq=3, draft=pair[1])
    prompts = [ids(20), ids(80, 1), ids(150, 2), ids(7, 3), ids(40, 4)]
    for seed in range(2):
        answers = model.generate_many(prompts, **asked(seed))
        assert list(map(told, answers)) == list(map(told, plain.generate_many(prompts, **asked(seed))))
        assert by_model(*answers)[0] > 0


def test_with_all_that_shapes_an_answer(pair, eager) -> None:
    plain, model = pe.load(pair[0], **SETTINGS, speculate=False), pe.load(pair[0], **SETTINGS, draft=pair[0])
    text = plain.generate(ids(60), **asked(0))
    for more in ({"repeat_penalty": 1.3, "repeat_last_n": 20}, {"presence_penalty": 0.5}, {"stop": str(text)[9:12]}, {"max_tokens": 2}, {"max_tokens": 1},
                 {"regex": "[a-z ]{20}"}, {"mirostat": 2}, {"compress": pe.LookM(ratio=0.5)}):
        for seed in range(2):
            given = {**asked(seed), **more}
            assert told(model.generate(ids(60), **given)) == told(plain.generate(ids(60), **given)), more
    for n in (N_CTX - 20, N_CTX - 1, N_CTX):                 # full in the middle of a draft
        assert told(model.generate(ids(n), **asked(0))) == told(plain.generate(ids(n), **asked(0)))
    assert not model.generate(ids(60), speculate=False, **asked(0)).report.drafts


def held(model: Any) -> list[Any]:
    """Return the conversations of the draft model."""
    return model._scheduler.speculation.source.runner.cells.conversations


def test_it_keeps_in_step(pair, eager) -> None:
    """Its conversation has what was read and written, and no more than was drafted behind it; another one begins with that."""
    model = pe.load(pair[0], **SETTINGS, n_seq=2, draft=pair[0])
    source = model._scheduler.speculation.source
    first = model.generate(ids(60), **asked(1))
    (s,) = held(model)
    whole = ids(60) + first.tokens
    assert not s.active and s.keys[:70] == whole[:70] and s.next == len(s) and source._readers == {}
    steps, read = source.runner.n_steps, []
    run = source.runner.run

    def counted(work: Any) -> Any:
        read.append([w.stop - w.start for w in work])
        return run(work)

    source.runner.run = counted
    second = model.generate([*whole[:65], *ids(4, 9)], **asked(0))
    assert read[0][0] < 10 and source.runner.n_steps > steps                     # the beginning was there
    stream = model.stream(ids(90, 3), **asked(0))
    taken = next(stream) + next(stream)
    stream.close()
    assert not any(s.active for s in held(model)) and source._readers == {}
    again = model.generate(ids(90, 3), **asked(0))
    assert again.startswith(taken)
    plain = pe.load(pair[0], **SETTINGS, speculate=False)
    assert told(again) == told(plain.generate(ids(90, 3), **asked(0)))
    assert told(second) == told(plain.generate([*whole[:65], *ids(4, 9)], **asked(0)))
    model.reset()
    assert held(model) == []


def test_a_long_prompt_is_read_by_and_by(pair, eager, monkeypatch) -> None:
    monkeypatch.setattr(draft_model, "BESIDE", 16)
    plain, model = pe.load(pair[0], **SETTINGS, n_seq=2, speculate=False), pe.load(pair[0], **SETTINGS, n_seq=2, draft=pair[0])
    prompts = [ids(9), ids(200, 1)]
    answers = model.generate_many(prompts, **asked(0))
    assert list(map(told, answers)) == list(map(told, plain.generate_many(prompts, **asked(0))))
    assert by_model(answers[0])[1] > by_model(answers[1])[1] > 0


def test_what_it_takes_is_in_the_plan(pair) -> None:
    model, alone, own = pe.load(pair[0], **SETTINGS, n_seq=2, draft=pair[1]), pe.plan(pair[0], **SETTINGS, n_seq=2), pe.plan(pair[1], **SETTINGS, n_seq=2)
    program, plan = model._scheduler.speculation.source.program, model.plan
    assert plan.total == pe.plan(pair[0], **SETTINGS, n_seq=2, draft=pair[1]).total
    mine = [i for i in plan.items if i.program == "draft"]
    assert sum(i.nbytes for i in mine if i.purpose == "weights") == program.prepared.weight_bytes == own.of("weights")
    assert sum(i.nbytes for i in mine if i.purpose == "kv") == program.prepared.state_bytes == own.of("kv")
    assert sum(i.nbytes for i in mine if i.purpose == "arena") == own.of("arena") == program.prepared.arena_bytes
    assert plan.total == alone.total + sum(i.nbytes for i in mine if i.purpose != "mapped")
    assert "draft model's layers" in plan.table() and f"drafts are of {pair[1].name}" in plan.table() and "draft model's" in plan.explain()
    assert planned_bytes(plan)["cpu"] == plan.total - plan.of("overhead") and model.held().resident["cpu"] >= program.resident()
    layout = model._fitted.layout
    assert layout.total_at(N_CTX, 2) == layout.taken
    for n_ctx, n_seq in ((128, 2), (N_CTX, 5), (100, 1)):
        assert layout.total_at(n_ctx, n_seq) == pe.plan(pair[0], **{**SETTINGS, "n_ctx": n_ctx}, n_seq=n_seq, draft=pair[1]).total


def test_both_must_fit(pair, machine) -> None:
    alone, both = pe.plan(pair[0], **SETTINGS).total, pe.plan(pair[0], **SETTINGS, draft=pair[0]).total
    machine((alone + both) // 2)
    with pytest.raises(PlanError, match="draft=None") as refused:
        pe.load(pair[0], **SETTINGS, draft=pair[0])
    assert refused.value.plan.total == both and "without --draft" in refused.value.plan.refusal(options=True)
    pe.load(pair[0], **SETTINGS).close()


def test_only_models_of_the_same_tokens(tiny_gguf, pair, tmp_path) -> None:
    other = tiny_gguf("llama", tokenizer="qwen2")[0]
    mine, its = (Vocabulary(GGUFFile(p).metadata) for p in (pair[0], other))
    first = next(i for i in range(len(mine)) if mine.tokens[i] != its.tokens[i])
    with pytest.raises(RequestError, match=f"other tokens than .*: {first} is "):
        pe.load(pair[0], **SETTINGS, draft=other)
    with pytest.raises(ModelNotFoundError):
        pe.load(pair[0], **SETTINGS, draft=tmp_path / "none.gguf")
    with pytest.raises(RequestError, match="draft"):
        pe.load(pair[0], **SETTINGS, draft=3)


def test_vocabularies_are_compared_by_what_stands_for_text() -> None:
    def made(tokens: list[str], kinds: list[int]) -> Vocabulary:
        return Vocabulary({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": np.array(kinds, np.int32)})

    mine = made(["<s>", "a", "b", "c"], [3, 1, 1, 1])
    assert mine.first_other(made(["<s>", "a", "b", "c", "[PAD4]"], [3, 1, 1, 1, 5])) is None
    assert mine.first_other(made(["<begin>", "a", "b"], [3, 1, 1])) is None
    assert mine.first_other(made(["<begin>", "a", "d"], [3, 1, 1])) == 2
    assert mine.first_other(made(["x", "a", "b"], [1, 1, 1])) == 0


def test_drafts_follow_what_they_cost_and_how_often_they_come(pair) -> None:
    odds = Odds()
    for _ in range(60):
        odds.note(0.99, True)
        odds.note(0.3, False)
    assert odds.of(0.99) > 0.95 and odds.of(0.3) < 0.05 and 0.3 < odds.any < 0.7 and Odds(odds).of(0.3) == pytest.approx(odds.of(0.3))
    model = pe.load(pair[0], **SETTINGS, draft=pair[0])
    source = model._scheduler.speculation.source
    assert source._share == 1
    costly, cheap = Terms(1, [1.0] * 40, True), Terms(1, [100.0] * 40, True)
    for _ in range(30):
        source.pace.note(1, 2.0)
    drafts = [writing.Writing(0, Asked(None, 30, (), 0.0), writing.Known(Odds()))]
    assert source._hopeful(drafts, costly) == [] and source._hopeful(drafts, cheap) == drafts
    assert not any(source._hopeful(drafts, costly) for _ in range(200))         # it takes longer than what it saves
    for _ in range(60):
        drafts[0].reader.odds.note(0.5, False)
    drafts[0].reader.waited, fair = 0, Terms(1, [8.0] * 40, True)
    assert [bool(source._hopeful(drafts, fair)) for _ in range(80)].count(True) == 1          # tried again now and then
    assert writing._expected(0.5, 2) == 0.75 and writing._expected(1.0, 7) == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "qwen"])
def test_real_models_write_the_same(real_model, name: str, eager) -> None:
    from conftest import real_path

    plain, model = real_model(name, n_seq=4, n_ctx=512, speculate=False), pe.load(real_path(name), n_ctx=512, n_seq=4, draft=real_path(name))
    prompts = ["The harbour office opens at", "def add(a, b):", "Once upon a time", "Glass is made of", "1, 2, 3,"]
    for temperature in (0, 0.8):
        given = {"temperature": temperature, "seed": 5, "max_tokens": 32, "logprobs": 1}
        answers = model.generate_many(prompts, **given)
        assert list(map(told, answers)) == list(map(told, plain.generate_many(prompts, **given)))
        assert by_model(*answers)[1] > 10
