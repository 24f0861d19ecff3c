"""Models with recurrent layers: states behind earlier tokens are gone on from, and what comes then has the bits of a whole prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cases
import pyengine as pe
from pyengine.cache.policy import DRAFTED, INTERVAL, SNAPSHOTS, TAIL
from pyengine.engine.speculation import Speculation
from pyengine.errors import RequestError
from test_schedule import ids, options

KIND = cases.first(recurrent=True, own_cache=True, sees=False)
N_CTX = 1100
TEXT = ids(900, 1)


@pytest.fixture
def load(tiny_gguf) -> Any:
    """A model with logits that can be compared: of the first token of each answer."""
    return lambda **settings: pe.load(tiny_gguf(KIND)[0], **{"n_ctx": N_CTX, "n_batch": 64, **settings})


def ask(model: pe.Model, prompt: list[int], n: int = 4) -> pe.Answer:
    return model.generate(prompt, max_tokens=n, logprobs=5, **options(model))


def fresh(model: pe.Model, prompt: list[int], n: int = 4) -> pe.Answer:
    """The answer of a model that remembers nothing."""
    model.reset()
    return ask(model, prompt, n)


def same(a: pe.Answer, b: pe.Answer) -> bool:
    return a.tokens == b.tokens and [(s.logprob, s.top) for s in a.sampled] == [(s.logprob, s.top) for s in b.sampled]


@pytest.mark.parametrize("n_kept, cached", [(900, 900 - TAIL), (899, 900 - TAIL), (890, 768), (768, 768), (700, 512), (300, 256), (200, 0)])
def test_a_prompt_goes_on_from_the_nearest_state(load, n_kept: int, cached: int) -> None:
    model, prompt = load(), [*TEXT[:n_kept], *([] if n_kept == 900 else ids(20, 7))]
    want = fresh(load(), prompt)
    assert fresh(model, TEXT).n_cached == 0
    got = ask(model, prompt)
    assert got.n_cached == cached and same(got, want)
    again = ask(model, prompt)                               # from the state before the prompt's end
    assert again.n_cached == len(prompt) - TAIL and same(again, want)


def test_a_conversation_goes_on_from_its_last_token(load) -> None:
    model = load()
    first = ask(model, TEXT[:300], 30)
    longer = [*TEXT[:300], *first.tokens, *ids(40, 2)]
    second = ask(model, longer)
    assert second.n_cached == 300 + 29 and same(second, fresh(load(), longer))   # all but the last token of the answer
    other = [*TEXT[:300], *first.tokens[:20], *ids(9, 3)]    # it differs within the answer: from before the first prompt's end
    third = ask(model, other)
    assert third.n_cached == 300 - TAIL and same(third, fresh(load(), other))


def test_states_are_left_within_an_answer(load) -> None:
    model = load()
    first = ask(model, TEXT[:250], 300)
    other = [*TEXT[:250], *first.tokens[:290], 5]
    got = ask(model, other)
    assert got.n_cached == 2 * INTERVAL and same(got, fresh(load(), other))


def test_states_that_no_conversation_needs_are_free_again(load) -> None:
    model = load(n_seq=3)
    cells, held = model._runner.cells, []
    for n in (900, 30, 600, 900, 1000, 5):
        ask(model, ids(n, n), 20)
        held.append(max(len(s.marks) for s in cells.conversations))
        assert all(sum(m.stays for m in s.marks) <= SNAPSHOTS for s in cells.conversations)
        assert cells._states.sum() == sum(len(s.marks) for s in cells.conversations)
    assert max(held) <= SNAPSHOTS + 2
    model.reset()
    assert not cells._states.any()


def test_forks_share_states(load) -> None:
    """Answers to one prompt, side by side, and a long prompt whose beginning another one has."""
    model = load(n_seq=4)
    want = [fresh(load(), p) for p in (TEXT, [*TEXT[:600], 1, 2, 3], TEXT[:520])]
    assert same(fresh(model, TEXT), want[0])
    streams = [model.stream(p, max_tokens=4, logprobs=5, **options(model)) for p in (TEXT, [*TEXT[:600], 1, 2, 3], TEXT[:520], TEXT)]
    for s in streams:
        s.begin()
    next(streams[0])
    assert model._runner.cells._states.max() > 1
    answers = [s.answer() for s in streams]
    assert all(same(a, w) for a, w in zip(answers, [*want, want[0]])) and [a.n_cached for a in answers] == [892, 512, 512, 892]


def test_a_session_holds_the_last_state(load, tmp_path) -> None:
    model = load()
    ask(model, TEXT, 4)
    nbytes = model.save(tmp_path / "a")
    other = load(n_seq=2, n_batch=33)
    n = other.restore(tmp_path / "a")
    longer = [*model._runner.cells.conversations[0].keys, 4, 5]
    got = ask(other, longer)
    assert n == got.n_cached == 903 and same(got, fresh(load(), longer))
    shorter = ask(other, [*TEXT[:400], 1])                   # of earlier states a file has none
    assert shorter.n_cached == 0 and same(shorter, fresh(load(), [*TEXT[:400], 1]))
    own = sum(g.policy.nbytes * model._runner.step.layers.count(i) for i, g in enumerate(model._runner.step.groups) if g.policy.recurrent)
    assert own < nbytes < own + 903 * 3000


def test_a_saved_conversation_is_cut_where_a_state_is(load, tmp_path) -> None:
    model = load()
    messages = [{"role": "user", "content": "fox " * 300}]
    answer = model.chat(messages, max_tokens=6, **options(model))
    model.save(tmp_path / "a", answer, [{"role": "user", "content": "fox " * 280 + "dog " * 20}])
    other = load()
    assert answer.report.n_prompt > INTERVAL + 40 and other.restore(tmp_path / "a") == INTERVAL


def test_states_of_drafts_are_taken_back(load, monkeypatch) -> None:
    """Whatever is drafted, a conversation then has the states of what came: it is gone on from with the bits of a whole prompt."""
    monkeypatch.setattr(Speculation, "_paying", lambda self, odds, n, used, reads: len(odds))
    few = {"logit_bias": tuple((t, 60.0) for t in range(40, 44)), "temperature": 1.0, "logprobs": 2}
    plain, fast = load(n_seq=4, speculate=False), load(n_seq=4)
    prompts = [np.random.default_rng(n).integers(40, 44, n).tolist() for n in (300, 40, 90, 263)]
    for turn in range(3):
        wanted, got = ([(a.tokens, a.sampled, a.n_accepted) for a in m.generate_many(prompts, max_tokens=30, seed=turn, **few)] for m in (plain, fast))
        assert [w[:2] for w in wanted] == [g[:2] for g in got] and sum(g[2] for g in got) > 20
        cells = fast._runner.cells
        assert cells.undrafted == DRAFTED and all(len(s.marks) <= SNAPSHOTS + 2 for s in cells.conversations)
        prompts = [[*p, *g[0][: 30 - 5 * turn], 41, 42] for p, g in zip(prompts, got)]


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_step_that_fails_leaves_the_state_that_was_there(load, monkeypatch, where: str) -> None:
    model = load()
    want = fresh(load(), [*TEXT[:300], *ids(90, 4)])
    first = ask(model, TEXT[:300], 1)
    execute = model.program.execute

    def interrupted(*args: Any, **dims: int) -> None:
        if where == "after":
            execute(*args, **dims)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.program, "execute", interrupted)
        ask(model, [*TEXT[:300], *ids(90, 4)])
    got = ask(model, [*TEXT[:300], *ids(90, 4)])
    assert first.n_cached == 0 and got.n_cached == 300 and same(got, want)


def test_the_plan_counts_states(load, tiny_gguf) -> None:
    model, more = load(), load(n_seq=3, n_ctx=512)
    for m, n_seq in ((model, 1), (more, 3)):
        states = [s for name, s in m.program.states.items() if ".state" in name]
        kept = [i for i in m.plan.items if i.purpose == "kv" and "states:" in i.detail]
        assert sum(s.nbytes for s in states) == sum(i.nbytes for i in kept) > 0 and len(states) == 2 * len(kept)
        assert all(s.shape[1] == n_seq * (SNAPSHOTS + 2) + DRAFTED and s.dtype.name == "F32" for s in states)
        assert sum(i.nbytes for i in m.plan.items if i.purpose == "kv") == m.program.prepared.state_bytes
    plans = {speculate: pe.plan(tiny_gguf(KIND)[0], n_ctx=512, n_seq=3, n_batch=64, speculate=speculate) for speculate in (None, False, True, 2)}
    one = sum(s.nbytes // s.shape[1] for name, s in more.program.states.items() if ".state" in name)
    assert plans[None].total == plans[True].total == more.plan.total == plans[2].total + (DRAFTED - 2) * one == plans[False].total + DRAFTED * one


def test_tokens_cannot_be_removed_from_the_middle(load) -> None:
    model = load()
    logits = model.feed(TEXT[:30])
    with pytest.raises(RequestError, match="M-RoPE|bounded past"):
        model.shift(3, 9)
    model.reset()
    assert np.array_equal(model.feed(TEXT[:30]), logits)
