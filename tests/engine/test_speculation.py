"""Speculation changes no bit of an answer: tokens, log-probabilities and texts are those of one token a step, whatever is drafted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import cases
import pyengine as pe
import tiny_sources
from converters.writer import convert
from pyengine.engine.drafts import _with_forced, Draft, Drafter
from pyengine.engine.pace import Pace
from pyengine.engine.speculation import Speculation
from pyengine.errors import RequestError

KINDS = cases.kinds(own_cache=True)
N_CTX = 256
FEW = tuple(range(40, 46))           # tokens that a random model writes, so that texts repeat


def ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((seed, n)).choice(FEW, n).tolist()


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompts(kind: str) -> list[list[Any]]:
    plain = [ids(5), ids(70, 1), ids(17, 2), ids(130, 3)]
    if not cases.find(kind).sees:
        return plain
    return [*plain[:2], [*FEW, picture(1), *FEW, *ids(9)], [*ids(30, 5), picture(2, 90, 70), *FEW]]


def settings(seed: int) -> dict[str, Any]:
    """Sampling among FEW tokens, greedy for even seeds."""
    return {"temperature": 0 if seed % 2 == 0 else 1.0, "seed": seed, "logit_bias": tuple((t, 60.0) for t in FEW), "logprobs": 2}


@pytest.fixture
def eager(monkeypatch) -> None:
    """Draft all that there is to draft, whatever it costs."""
    monkeypatch.setattr(Speculation, "_paying", lambda self, odds, n, used, reads: len(odds))


def told(answer: Any) -> tuple[Any, ...]:
    return str(answer), answer.tokens, answer.sampled, answer.finish, answer.report.stopped_by, answer.report.ended_by


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same(tiny_gguf, eager, kind: str) -> None:
    path, wanted = tiny_gguf(kind)[0], prompts(kind)
    for n_seq, n_batch in ((1, 512), (3, 40)):
        model = pe.load(path, n_ctx=N_CTX, n_batch=n_batch, n_seq=n_seq, n_threads=1)
        for seed in range(2):
            found = []
            for speculate in (False, None):
                model.reset()
                found.append([told(a) for a in model.generate_many(wanted, max_tokens=40, speculate=speculate, **settings(seed))])
            assert found[0] == found[1]
        drafted, accepted = model.stats["drafted_tokens"], model.stats["accepted_tokens"]
        assert drafted > accepted > 0


@pytest.mark.parametrize("kind", [cases.first(), cases.first(ring=True), cases.first(mrope=True), cases.first(recurrent=True)])
def test_what_is_cached_is_what_was_read_and_written(tiny_gguf, eager, kind: str) -> None:
    """A conversation that goes on, and one that begins as it does, find the cells of the tokens that came, and no others."""
    path, asked = tiny_gguf(kind)[0], ids(50, 7)
    plain, fast = (pe.load(path, n_ctx=N_CTX, n_batch=24, n_seq=2, n_threads=1, speculate=speculate) for speculate in (False, True))
    for seed in range(4):
        answers = [m.generate(asked, max_tokens=30, **settings(seed)) for m in (plain, fast)]
        assert told(answers[0]) == told(answers[1])
        held = [m._runner.cells.conversations[-1] for m in (plain, fast)]
        assert held[0].keys == held[1].keys and held[0].next == held[1].next
        asked = [*asked[:40], *answers[0].tokens[: 10 * seed], *ids(6, seed)]
    fresh = pe.load(path, n_ctx=N_CTX, n_threads=1, speculate=False)
    assert told(fresh.generate(asked, max_tokens=20, **settings(1))) == told(fast.generate(asked, max_tokens=20, **settings(1)))


@pytest.fixture
def llama(tiny_gguf) -> Any:
    return pe.load(tiny_gguf("llama")[0], n_ctx=N_CTX, n_batch=64, n_seq=2, n_threads=1)


def both(model: Any, prompt: Any, **asked: Any) -> Any:
    """Ask with and without drafts; return the answer with them."""
    answers = []
    for speculate in (False, None):
        model.reset()
        answers.append(model.generate(prompt, speculate=speculate, **asked))
    assert told(answers[0]) == told(answers[1])
    assert answers[0].report.n_drafted == 0
    return answers[1]


def test_lengths_and_the_context(llama, eager) -> None:
    for most in (0, 1, 2, 3, 20):
        assert len(both(llama, ids(60), max_tokens=most, **settings(0)).tokens) == most
    for n in (N_CTX - 30, N_CTX - 2, N_CTX - 1, N_CTX):      # full in the middle of a draft
        answer = both(llama, ids(n, 3), max_tokens=None, **settings(0))
        assert answer.finish == "length" and len(answer.tokens) == N_CTX - n + 1
    assert len(both(llama, ids(60), max_tokens=40, **settings(0)).report.conversation) <= N_CTX


def test_stops_penalties_and_ends(llama, eager) -> None:
    text = both(llama, ids(60), max_tokens=60, **settings(0))
    for stop in (str(text)[20:24], str(text)[33:35]):
        assert both(llama, ids(60), max_tokens=60, stop=stop, **settings(0)).finish == "stop"
    for more in ({"repeat_penalty": 1.3}, {"presence_penalty": 0.5, "frequency_penalty": 0.3}, {"repeat_penalty": 1.1, "repeat_last_n": -1},
                 {"top_p": 0.7, "min_p": 0.1}, {"top_k": 3}, {"typical_p": 0.8}):
        for seed in range(4):
            both(llama, ids(60, seed), max_tokens=60, **{**settings(seed), "repeat_last_n": 20, **more})
    end = next(iter(llama.tokenizer.eog_ids))
    asked = settings(1)
    asked["logit_bias"] = (*asked["logit_bias"], (end, 58.0))
    repeats = [*ids(20, 2), end, *ids(20, 2), end, *ids(20, 2)[:3]]
    assert {both(llama, repeats, max_tokens=100, **{**asked, "seed": s}).finish for s in range(8)} >= {"stop"}


def test_pieces_come_in_order(llama, eager) -> None:
    asked = {"max_tokens": 50, **settings(0)}
    whole = both(llama, ids(60), **asked)
    assert "".join(llama.stream(ids(60), **asked)) == whole and whole.report.n_accepted
    handle = llama.submit(ids(60), **asked)
    assert "".join(handle) == whole == handle.result() and handle.tokens == whole.tokens
    times = handle.report.times
    assert len(times) == len(whole.tokens) and times == sorted(times)


def test_ending_one_leaves_the_other(llama, eager) -> None:
    wanted = llama.generate(ids(60), max_tokens=60, speculate=False, **settings(0))
    first, second = (llama.stream(ids(60), max_tokens=60, **settings(0)) for _ in range(2))
    taken = next(first) + next(first)
    begun = next(second)
    first.close()
    assert wanted.startswith(taken) and len(first.tokens) < 60 and begun + "".join(second) == wanted
    again = llama.generate(ids(60), max_tokens=60, **settings(0))                # from what the first one has left
    assert told(again) == told(wanted)


def test_a_sampler_that_fails_ends_its_own_answer(llama, eager, monkeypatch) -> None:
    wanted = llama.generate(ids(60), max_tokens=40, **settings(0))
    first, second = (llama.stream(ids(60), max_tokens=40, **settings(0)) for _ in range(2))
    accept, left = first._request.sampler.accept, iter(range(15))

    def fails(token: int) -> None:
        if next(left, None) is None:
            raise RequestError("enough")
        accept(token)

    first.begin()
    next(second)
    monkeypatch.setattr(first._request.sampler, "accept", fails)
    with pytest.raises(RequestError, match="enough"):
        list(first)
    second.answer()
    assert second.tokens == wanted.tokens


def test_beside_a_long_prompt(llama, monkeypatch) -> None:
    """Likely tokens are drafted while another one's prompt is read, and the answers stay the same."""
    alone = [llama.generate(p, max_tokens=30, speculate=False, **settings(0)).sampled for p in (ids(60), ids(200, 9))]
    monkeypatch.setattr("pyengine.engine.scheduler.BESIDE", 16)
    llama.reset()
    first, second = llama.stream(ids(60), max_tokens=30, **settings(0)), llama.stream(ids(200, 9), max_tokens=30, **settings(0))
    next(first)
    second.begin()
    assert [s.answer().sampled for s in (first, second)] == alone


def test_grammars_and_their_forced_tokens(real_model, eager) -> None:
    qwen = real_model("qwen", n_seq=2)
    form = {"type": "object", "properties": {"first_name": {"type": "string", "maxLength": 8}, "profession": {"enum": ["carpenter", "engineer"]},
                                             "age": {"type": "integer", "maximum": 99}}, "required": ["first_name", "profession", "age"], "additionalProperties": False}
    for seed in range(3):
        answers = [qwen.chat([{"role": "user", "content": "Invent a person."}], format=form, temperature=0.9, seed=seed, max_tokens=80, speculate=s)
                   for s in (False, None)]
        assert told(answers[0]) == told(answers[1]) and json.loads(answers[1])
        assert answers[1].report.n_accepted >= 4             # names of fields are foreseen
    text = both(qwen, "Numbers: 1, 2, 3, 4, 5, 6,", regex=r"( [0-9]+,){12}", temperature=0, max_tokens=80)
    assert text.report.n_drafted


@pytest.mark.slow
@pytest.mark.parametrize("name,n", [("smollm2", 100), ("qwen", 60), ("gemma", 40)])
def test_real_models_write_the_same(real_model, name: str, n: int) -> None:
    """200 prompts, each greedy and sampled in turns, one at a time and 8 side by side."""
    text, rng = (ROOT / "tests/data/plain_text.txt").read_text(), np.random.default_rng(0)
    several, one = real_model(name, n_seq=8, n_ctx=512), real_model(name, n_ctx=512)
    prompts = [text[at : at + 60 * (1 + i % 6)] for i, at in enumerate(rng.integers(0, len(text) - 400, n))]
    prompts = [p + "\n\n" + p[: len(p) // 3] if i % 3 == 0 else p for i, p in enumerate(prompts)]
    for start in range(0, n, 20):
        part, asked = prompts[start : start + 20], {"temperature": 0.7 * (start // 20 % 2), "seed": start, "max_tokens": 32, "logprobs": 1}
        wanted = [told(a) for a in several.generate_many(part, speculate=False, **asked)]
        for model in (several, one):
            model.reset()
            assert [told(a) for a in model.generate_many(part, speculate=True, **asked)] == wanted
    assert all(m.stats["accepted_tokens"] > n for m in (several, one))


@pytest.mark.slow
def test_a_real_model_writes_the_same_about_pictures() -> None:
    """200 questions about drawn pictures, each greedy or sampled in turns, one at a time and 8 side by side."""
    pytest.importorskip("matplotlib", reason="its fonts: pip install -r requirements/peers.txt")
    from bench.sight import draw

    several, one = (pe.load(ROOT / "converters/demo/weights/demo-q8_0.gguf", n_ctx=1024, n_threads=1, n_seq=n) for n in (8, 1))

    def answered(model: Any, examples: list[Any], speculate: bool, **asked: Any) -> list[Any]:
        handles = [model.submit(messages=[{"role": "user", "content": [*({"type": "image", "image": p.pixels} for p in e.pictures[: e.shown()[0]]),
                                                                        {"type": "text", "text": e.turns[0].question}]}],
                                speculate=speculate, **asked) for e in examples]
        return [(h.result(60), h.report.tokens, h.report.sampled, h.report.finish, h.report.n_accepted) for h in handles]

    examples, accepted = draw(25, 0), [0, 0]
    for start in range(0, 200, 20):
        part, asked = examples[start : start + 20], {"temperature": 0.7 * (start // 20 % 2), "seed": start, "max_tokens": 48, "logprobs": 1}
        wanted = answered(several, part, False, **asked)
        for i, model in enumerate((several, one)):
            model.reset()
            found = answered(model, part, True, **asked)
            assert [f[:-1] for f in found] == [w[:-1] for w in wanted]
            accepted[i] += sum(f[-1] for f in found)
    assert len(examples) == 200 and min(accepted) > 50


def test_requests_and_models_may_leave_it_out(tiny_gguf, llama, eager) -> None:
    assert llama.generate(ids(60), max_tokens=20, speculate=False, **settings(0)).report.n_drafted == 0
    assert llama.generate(ids(60), max_tokens=20, speculate=3, **settings(0)).report.n_drafted > 0
    with pytest.raises(RequestError, match="speculate"):
        llama.generate(ids(60), speculate="yes")
    plain = pe.load(tiny_gguf("llama")[0], n_ctx=N_CTX, speculate=False)
    assert plain.generate(ids(60), max_tokens=20, **settings(0)).report.n_drafted == 0
    assert plain.generate(ids(60), max_tokens=20, speculate=True, **settings(0)).report.n_drafted > 0
    with pytest.raises(RequestError, match="speculate"):
        pe.load(tiny_gguf("llama")[0], n_ctx=N_CTX, speculate="yes")


def test_no_drafts_without_states_for_them(tiny_gguf) -> None:
    model = pe.load(tiny_gguf(cases.first(recurrent=True))[0], n_ctx=N_CTX, speculate=False)
    with pytest.raises(RequestError, match="keep states"):
        model.generate(ids(9), speculate=4)
    assert model.generate(ids(60), max_tokens=20, **settings(0)).report.n_drafted == 0


@pytest.mark.parametrize("kind", list(cases.sources()))
def test_decoders_of_a_source(tmp_path, eager, kind: str) -> None:
    folder = tiny_sources.make(cases.sources()[kind], tmp_path / "hf")
    model = pe.load(convert(folder, tmp_path / "m.gguf", "f32"), n_ctx=64, n_threads=1, n_seq=2)
    for seed in range(2):
        assert both(model, "a text of some words", max_tokens=40, n_beams=1, **settings(seed)).report.n_accepted
    with pytest.raises(RequestError, match="beams"):
        model.generate("a text", n_beams=2, speculate=True)


def test_compressed_conversations(tiny_gguf, eager) -> None:
    """After a prompt's compression drafts come and go as ever; where each row adds to sums that choose cells, there are none."""
    for policy, drafts in ((pe.LookM(ratio=0.3), True), (pe.H2O(budget=40, when="always"), False)):
        model = pe.load(tiny_gguf("llama")[0], n_ctx=N_CTX, n_batch=32, n_threads=1, compress=policy)
        for seed in range(2):
            assert bool(both(model, ids(90), max_tokens=60, **settings(seed)).report.n_drafted) == drafts


def test_odds_follow_what_comes(llama) -> None:
    text = ids(40)
    right, wrong = Drafter([*text, *text[:8]]), Drafter([*text, *text[:8]])
    for i in range(8, 30):
        assert right.draft(4).tokens[0] == text[i]
        right.extend([text[i]])
        wrong.draft(4)
        wrong.extend([text[i] + 10, *text[i - 7 : i + 1]])
    assert right.draft(1).odds[0] > 0.9 > 0.4 > wrong.draft(1).odds[0]


def test_what_is_forced_goes_first() -> None:
    assert _with_forced(Draft([1, 2], [0.5, 0.4]), []) == Draft([1, 2], [0.5, 0.4])
    assert _with_forced(Draft([1, 2], [0.5, 0.4]), [1, 3]) == Draft([1, 3], [0.95, 0.95], "grammar")
    tokens, odds, _ = _with_forced(Draft([1, 2, 4], [0.5, 0.4, 0.2]), [1, 2])
    assert tokens == [1, 2, 4] and odds == pytest.approx([0.95, 0.95, 0.475])


def test_pace_and_what_pays() -> None:
    pace, some = Pace(), Speculation(None, None, {})
    assert pace.costs(1, 3) == sorted(pace.costs(1, 3)) and pace.costs(1, 3)[0] > 0
    for _ in range(20):
        for rows, seconds in ((1, 1.0), (4, 1.0), (8, 1.5), (16, 4.0)):
            some.pace.note(rows, seconds)
    some.pace.note(1, 500.0)                                 # something else went on
    found = some.pace.costs(1, 16)
    assert found[0] < 1.2 and found[3] == pytest.approx(1, rel=0.05) and found[7] == pytest.approx(1.5, rel=0.05) and found[15] > 3.5
    assert some._paying([0.9, 0.8, 0.7, *[0.1] * 8], 1, 1, False) == 3
    assert some._paying([0.99] * 15, 1, 1, False) == 7       # 16 rows do not pay
    assert some._paying([0.01], 1, 4, False) == 0
    assert some._paying([0.9, 0.6, 0.4], 2, 100, True) == 2
    assert len(pace.costs(5, 700)) == 696 == len(some.pace.costs(5, 700))


def test_what_was_slow_once_is_tried_again() -> None:
    pace = Pace()
    pace.note(1, 1.0)
    pace.note(8, 3.0)
    assert pace.costs(1, 8)[-1] > 2
    for _ in range(300):
        pace.note(1, 1.0)
    assert pace.costs(1, 8)[-1] < 1.4
