"""Samplers that keep something between tokens: mirostat's mu, xtc's chance, and the repetitions that DRY counts."""

from __future__ import annotations

import time

import numpy as np
import pytest
from test_sampling import mirostat, OFF

import pyengine as pe
from pyengine.errors import RequestError
from pyengine.text.repetition import Repetitions
from pyengine.text.sampling import Sampler, SamplingParams

WORDS = [b"a", b"b", b"c", b"d", b"\n", b"x:", b"<", b"/", b"br>", b"<b", b"r>y", b" e"]


def dry(tokens, multiplier, base, allowed, last_n, breakers, words):
    """Return what DRY takes from each token: every place before is compared with the end, one token after the other."""
    start = 0 if last_n < 0 else max(len(tokens) - last_n, 0)
    begins = np.cumsum([0, *(len(words[t]) for t in tokens)])
    text, free = b"".join(words[t] for t in tokens), 0        # tokens behind the last one in which a breaker ends
    for b in breakers:
        at = text.find(b)
        while at >= 0:
            free = max(free, int(np.searchsorted(begins, at + len(b), "left")))
            at = text.find(b, at + 1)
    longest = {}
    for end in range(start, len(tokens) - 1):
        n = 0
        while end - n >= start and n < len(tokens) - free and tokens[end - n] == tokens[len(tokens) - 1 - n]:
            n += 1
        if n >= max(allowed, 1) and not any(b in words[tokens[end + 1]] for b in breakers):
            longest[tokens[end + 1]] = max(n, longest.get(tokens[end + 1], 0))
    return {t: min(multiplier * base ** (n - allowed), 1e38) for t, n in longest.items()}


@pytest.mark.parametrize("breakers", [(), (b"\n", b":"), (b"<br>", b"\n"), (b"d",)])
@pytest.mark.parametrize("allowed, last_n", [(2, 64), (1, -1), (0, 20), (4, -1)])
def test_repetitions_are_those_of_the_definition(allowed, last_n, breakers) -> None:
    rng = np.random.default_rng(len(breakers) + allowed)
    found = 0
    for n_words in (2, 4, len(WORDS)):
        for _ in range(12):
            tokens = rng.integers(0, n_words, 40).tolist()
            tokens = tokens[:25] + tokens[5:20] if rng.random() < 0.5 else tokens
            counted = Repetitions(0.8, 1.75, allowed, last_n, [b.decode() for b in breakers], WORDS.__getitem__)
            for i, token in enumerate(tokens):
                counted.accept(token)
                got, want = dict(counted.penalties()), dry(tokens[: i + 1], 0.8, 1.75, allowed, last_n, breakers, WORDS)
                assert got.keys() == want.keys()
                assert [got[t] for t in got] == pytest.approx([want[t] for t in got], rel=1e-12)
                found += len(got)
    assert found > 100


def test_the_numbers_of_the_pull_request() -> None:
    """After "a b c d ... a b c" the next "d" would repeat three tokens: it loses multiplier * base^(3 - 2)."""
    counted = Repetitions(0.8, 1.75, 2, -1, (), WORDS.__getitem__)
    for token in (0, 1, 2, 3, 5, 0, 1):
        counted.accept(token)
    assert counted.penalties() == [(2, pytest.approx(0.8))]
    counted.accept(2)
    assert counted.penalties() == [(3, pytest.approx(0.8 * 1.75))]


def test_dry_takes_from_logits_and_no_repetition_reaches_over_a_breaker() -> None:
    logits = np.array([5.0, 4.0, 3.0, 2.0], np.float32)
    for breakers, want in (((), [0, 1, 2, 0, 1, 3]), (("\n",), [0, 1, 2, 0, 1, 2])):
        sampler = Sampler(SamplingParams(temperature=0, dry_multiplier=100.0, dry_sequence_breakers=breakers), 4, [b"a", b"b", b"\n", b"c"].__getitem__)
        for token in want[:5]:
            sampler.accept(token)
        logits[2] = 10.0                                     # what followed "a b" before: taken from, unless it is the breaker
        logits[3] = 9.0
        assert sampler.sample(logits).token == want[5]
    with pytest.raises(RequestError, match="dry_sequence_breakers"):
        Sampler(SamplingParams(dry_multiplier=1.0), 4)
    off = Sampler(SamplingParams(dry_multiplier=1.0, dry_penalty_last_n=0), 4)
    assert off.sample(logits).token in range(4)


def test_dry_is_quick_in_long_contexts_that_repeat_themselves() -> None:
    counted = Repetitions(0.8, 1.0, 2, -1, ("\n",), WORDS.__getitem__)
    for i in range(32768):
        counted.accept(i % 2)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert dict(counted.penalties()) == {0: pytest.approx(0.8)}
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


@pytest.mark.parametrize("version", (1, 2))
@pytest.mark.parametrize("n_vocab, spread", [(300, 2.0), (5000, 3.0), (5000, 1.0)])
def test_mirostat_follows_what_was_drawn(version, n_vocab, spread) -> None:
    """Every mu is the reference's; the mean surprise comes to tau where the distribution can give it."""
    rng, tau = np.random.default_rng(version), 3.0
    params = SamplingParams(mirostat=version, mirostat_tau=tau, mirostat_eta=0.1, temperature=0.9, seed=1)
    sampler, mu, seen = Sampler(params, n_vocab), 2 * tau, []
    for _ in range(300):
        logits = (rng.standard_normal(n_vocab) * spread).astype(np.float32)
        x = logits.astype(np.float64) / np.float32(0.9)
        ids = np.argsort(-x, kind="stable")
        kept, surprise = mirostat(x[ids], ids, params, mu, n_vocab)
        token = sampler.sample(logits).token
        assert token in kept and sampler._out.n_kept == len(kept)
        seen.append(surprise[token])
        mu -= 0.1 * (surprise[token] - tau)
        assert sampler._input.mu == pytest.approx(mu, abs=1e-4)
        mu = sampler._input.mu                               # no differences are gathered
    if spread > 1:
        assert np.mean(seen[50:]) == pytest.approx(tau, abs=0.35)


def test_mirostat_of_ties_and_of_one_token() -> None:
    for version in (1, 2):
        for logits in (np.zeros(500, np.float32), np.r_[np.float32(0), np.full(99, -np.inf, np.float32)], np.zeros(1, np.float32)):
            sampler = Sampler(SamplingParams(mirostat=version, seed=3), len(logits))
            for _ in range(50):
                assert np.isfinite(logits[sampler.sample(logits).token]) and np.isfinite(sampler._input.mu)


def test_xtc_leaves_out_the_top_choices_as_often_as_asked() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    params = SamplingParams(**OFF, xtc_probability=0.4, xtc_threshold=0.1, seed=5)
    drawn = Sampler(params, 4)
    counts = np.bincount([drawn.sample(logits).token for _ in range(8000)], minlength=4) / 8000
    kept, cut = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0, 0, 0.75, 0.25])
    np.testing.assert_allclose(counts, 0.6 * kept + 0.4 * cut, atol=0.02)      # the chance does not depend on the draw


def test_steps_that_are_off_change_no_bit() -> None:
    """Each at the value that leaves it out, with others beside it, on several chains: tokens and log-probabilities are those of before."""
    rng = np.random.default_rng(4)
    rows = [(rng.standard_normal(3000) * 3).astype(np.float32) for _ in range(40)]
    off = dict(top_n_sigma=-1.0, xtc_probability=0.0, xtc_threshold=0.3, dynatemp_range=0.0, dynatemp_exponent=3.0, mirostat=0, mirostat_tau=1.0,
               mirostat_eta=0.9, dry_multiplier=0.0, dry_base=3.0)
    for chain in ({}, OFF, dict(OFF, top_p=0.8), dict(repeat_penalty=1.3)):
        plain, same = (Sampler(SamplingParams(**chain, **more, seed=2), 3000) for more in ({}, off))
        for row in rows:
            a, b = plain.sample(row), same.sample(row)
            assert a == b
            plain.accept(a.token), same.accept(b.token)


def test_a_model_takes_them_by_name(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64, n_threads=1)
    for chosen in (dict(top_n_sigma=1.5), dict(xtc_probability=0.5), dict(dynatemp_range=0.5), dict(mirostat=1), dict(mirostat=2, mirostat_tau=3.0),
                   dict(dry_multiplier=5.0, dry_allowed_length=1, dry_sequence_breakers=["\n"])):
        first = model.generate([1, 2, 3, 1, 2], max_tokens=12, seed=7, **chosen)
        assert first.tokens == model.generate([1, 2, 3, 1, 2], max_tokens=12, seed=7, **chosen).tokens
    biased = dict(max_tokens=40, temperature=0, logit_bias={5: 100.0, 6: 100.0})
    loops = model.generate([1, 2, 3], **biased)
    free = model.generate([1, 2, 3], **biased, dry_multiplier=1e4, dry_allowed_length=1, dry_penalty_last_n=-1,
                          dry_sequence_breakers=())
    pairs = [list(zip(t, t[1:])) for t in (loops.tokens, free.tokens)]
    assert len(set(pairs[0])) < len(pairs[0]) and len(set(pairs[1])) == len(pairs[1])      # no pair of tokens stands there twice
