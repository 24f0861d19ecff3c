"""The C sampler against a plain float64 NumPy chain; its distributions, edges, promise of equal tokens, and speed."""

from __future__ import annotations

import math
import time

import cbuild
import numpy as np
import pytest

from pyengine.errors import PyEngineError, RequestError, ShapeError

OFF = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)  # nothing truncates


@pytest.fixture(scope="module")
def sampling():
    with cbuild.native("pe_sample"):
        from pyengine.text import sampling

        yield sampling


def softmax(x):
    with np.errstate(over="ignore"):
        e = np.exp(x - x.max())
    return e / e.sum()


def reference(logits, p, counts=(), allowed=None, mu=None):
    """Return {token: probability} of the final draw; float64, a full sort, written from the definitions."""
    x = logits.astype(np.float64)
    for token, bias in p.logit_bias:
        x[token] += bias
    for token, count in dict(counts).items():
        x[token] = x[token] / p.repeat_penalty if x[token] > 0 else x[token] * p.repeat_penalty
        x[token] -= count * p.frequency_penalty + p.presence_penalty
    if allowed is not None:
        x[~allowed] = -np.inf
    ids = np.argsort(-x, kind="stable")
    ids = ids[np.isfinite(x[ids])]
    if p.temperature == 0:
        return {int(ids[0]): 1.0}
    if p.mirostat:
        return mirostat(x[ids] / p.temperature, ids, p, 2 * p.mirostat_tau if mu is None else mu, len(logits))[0]
    if p.top_n_sigma > 0:                                                    # arXiv:2411.07641, algorithm 1
        ids = ids[x[ids] >= x[ids[0]] - p.top_n_sigma * np.std(x[ids])]
    if p.top_k > 0:
        ids = ids[: p.top_k]
    if p.typical_p < 1:
        probs = softmax(x[ids])
        entropy = -np.sum(probs * np.log(probs, where=probs > 0, out=np.zeros_like(probs)))
        surprise = np.log(np.sum(np.exp(x[ids] - x[ids[0]]))) - (x[ids] - x[ids[0]])
        order = np.argsort(np.abs(surprise - entropy), kind="stable")
        over = np.flatnonzero(np.cumsum(probs[order]) > p.typical_p)
        ids = ids[np.sort(order[: over[0] + 1 if over.size else None])]
    if p.top_p < 1:
        reached = np.flatnonzero(np.cumsum(softmax(x[ids])) >= p.top_p)
        ids = ids[: reached[0] + 1 if reached.size else None]
    probs = softmax(x[ids])
    ids = ids[probs >= p.min_p * probs[0]]
    choices = np.flatnonzero(softmax(x[ids]) >= p.xtc_threshold)
    if p.xtc_probability == 1 and choices.size > 1:                           # text-generation-webui 6335: all of them but the least probable
        ids = np.delete(ids, choices[:-1])
    t = p.temperature
    if p.dynatemp_range > 0 and ids.size > 1:                                 # koboldcpp 600
        probs = softmax(x[ids])
        part = -np.sum(probs * np.log(probs, where=probs > 0, out=np.zeros_like(probs))) / np.log(ids.size)
        low, high = max(0, t - p.dynatemp_range), t + p.dynatemp_range
        t = low + (high - low) * part**p.dynatemp_exponent
    return dict(zip(ids.tolist(), (softmax(x[ids] / t) if t > 0 else np.eye(ids.size)[0]).tolist()))


def mirostat(x, ids, p, mu, n_vocab):
    """Return {token: probability}, and how surprising each is in bits, by arXiv:2007.14966 and its authors' program, of sorted logits."""
    probs = softmax(x)
    with np.errstate(divide="ignore"):
        surprise = -np.log2(probs)
    if p.mirostat == 2:
        n = max(1, int(np.sum(surprise <= mu)))
    else:
        best = x[:100]
        t, b = np.log(np.arange(2, best.size + 1) / np.arange(1, best.size)), best[:-1] - best[1:]
        n = 1
        if best.size > 1:
            s = max(t @ b / (t @ t), 1e-9)
            with np.errstate(over="ignore"):
                k = ((s - 1) * 2.0**mu / (1 - n_vocab ** -(s - 1))) ** (1 / s)
            n = round(k) + 1 if k < x.size else x.size
    kept = softmax(x[:n])
    return dict(zip(ids[:n].tolist(), kept.tolist())), dict(zip(ids.tolist(), surprise.tolist()))


def bits(allowed):
    padded = np.zeros(-(-allowed.size // 32) * 32, bool)
    padded[: allowed.size] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


def draws(sampler, logits, count, allowed=None):
    return np.array([sampler.sample(logits, allowed).token for _ in range(count)])


def assert_distributed(tokens, expected):
    """Pearson's chi-square with bins of at least 10 expected draws, rejected at about one in 10^5 (seeds are fixed)."""
    assert set(tokens.tolist()) <= set(expected)
    ids = np.array(sorted(expected, key=lambda t: -expected[t]))
    want = np.array([expected[t] for t in ids]) * tokens.size
    counts = np.bincount(tokens, minlength=ids.max() + 1)[ids]
    big = want >= 10
    want = np.append(want[big], want[~big].sum())
    counts = np.append(counts[big], counts[~big].sum())
    if want[-1] < 10:  # too little for a bin of its own
        want[-2] += want[-1]
        counts[-2] += counts[-1]
        want, counts = want[:-1], counts[:-1]
    freedom = max(want.size - 1, 1)
    chi2 = np.sum((counts - want) ** 2 / want)
    wilson_hilferty = freedom * (1 - 2 / (9 * freedom) + 4.3 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < wilson_hilferty, (chi2, freedom)


CHAINS = [
    dict(),
    dict(temperature=1.7, top_k=5),
    dict(OFF),
    dict(OFF, temperature=0.6),
    dict(OFF, temperature=2.5),
    dict(OFF, top_p=0.7),
    dict(OFF, top_p=0.999),
    dict(OFF, min_p=0.02),
    dict(OFF, min_p=1.0),
    dict(OFF, typical_p=0.6),
    dict(OFF, typical_p=0.3, top_k=50, top_p=0.9, min_p=0.1, temperature=1.3),
    dict(OFF, top_k=10**9, temperature=0.9),
    dict(OFF, top_p=0.0),
    dict(OFF, typical_p=0.0),
    dict(temperature=0.0),
    dict(OFF, top_n_sigma=1.0),
    dict(top_n_sigma=2.5, top_k=20, typical_p=0.9, temperature=0.5),
    dict(OFF, top_n_sigma=1.5, top_p=0.6),
    dict(OFF, xtc_probability=1.0, temperature=1.4),
    dict(OFF, xtc_probability=1.0, xtc_threshold=0.001),
    dict(min_p=0.02, xtc_probability=1.0, xtc_threshold=0.05),
    dict(xtc_probability=1.0, xtc_threshold=1.0),
    dict(OFF, dynatemp_range=0.5),
    dict(OFF, dynatemp_range=2.0, dynatemp_exponent=0.7, xtc_probability=1.0, xtc_threshold=0.02),
    dict(dynatemp_range=0.4, dynatemp_exponent=2.0, top_p=1.0),
    dict(mirostat=1, mirostat_tau=3.0),
    dict(mirostat=2, mirostat_tau=2.0, temperature=0.7),
    dict(mirostat=2, mirostat_tau=30.0, top_k=3),
]


@pytest.mark.parametrize("n_vocab", (1, 2, 63, 64, 65, 300, 4096, 5000))
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default")
def test_kept_tokens(sampling, n_vocab, chain):
    """The number of tokens kept, and every token drawn, agree with the reference; peaked, flat and mixed rows."""
    rng = np.random.default_rng(n_vocab)
    for row, spread in enumerate((0.01, 1.0, 3.0, 30.0)):
        logits = (rng.standard_normal(n_vocab) * spread).astype(np.float32)
        params = sampling.SamplingParams(**chain, seed=row)
        sampler = sampling.Sampler(params, n_vocab)
        mu = sampler._input.mu
        for _ in range(8):
            expected = reference(logits, params, mu=mu)
            token = sampler.sample(logits).token
            assert sampler._out.n_kept == len(expected) and token in expected
            mu = sampler._input.mu


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default")
def test_distribution(sampling, chain):
    n_vocab = 5000  # more than one chunk
    logits = np.random.default_rng(3).standard_normal(n_vocab).astype(np.float32) * 2
    logits[[7, 4500, 4999]] = 8.0, 9.0, 8.5
    params = sampling.SamplingParams(**chain, seed=11, mirostat_eta=0.0)       # mu stays
    tokens = draws(sampling.Sampler(params, n_vocab), logits, 4000)
    assert_distributed(tokens, reference(logits, params))


def test_penalties_bias_and_mask(sampling):
    """All three at once, counts above one, logits of both signs, tokens falling out of the window."""
    n_vocab, rng = 100, np.random.default_rng(5)
    logits = rng.standard_normal(n_vocab).astype(np.float32) * 2
    allowed = rng.random(n_vocab) < 0.6
    params = sampling.SamplingParams(
        **OFF, repeat_penalty=1.8, presence_penalty=0.3, frequency_penalty=0.4, repeat_last_n=12, seed=1,
        logit_bias=((3, 2.0), (8, -math.inf), (50, -1.0), (3, 0.5)),
    )
    sampler = sampling.Sampler(params, n_vocab)
    history = rng.integers(0, 8, 40).tolist()
    for token in history:
        sampler.accept(token)
    window = history[-12:]
    counts = {token: window.count(token) for token in window}
    assert max(counts.values()) > 1
    expected = reference(logits, params, counts, allowed)
    before = logits.copy()
    assert_distributed(draws(sampler, logits, 6000, bits(allowed)), expected)
    assert np.array_equal(logits, before)
    plain = sampling.Sampler(params, n_vocab)  # the same without history differs
    assert_distributed(draws(plain, logits, 6000, bits(allowed)), reference(logits, params, {}, allowed))


def test_penalty_window(sampling):
    logits = np.array([4.0, 3.0, 2.0, -1.0], np.float32)
    greedy = dict(temperature=0, presence_penalty=10.0)
    forever = sampling.Sampler(sampling.SamplingParams(**greedy, repeat_last_n=-1), 4)
    never = sampling.Sampler(sampling.SamplingParams(**greedy, repeat_last_n=0), 4)
    two = sampling.Sampler(sampling.SamplingParams(**greedy, repeat_last_n=2), 4)
    chosen = {"forever": [], "never": [], "two": []}
    for name, sampler in (("forever", forever), ("never", never), ("two", two)):
        for _ in range(4):
            token = sampler.sample(logits).token
            sampler.accept(token)
            chosen[name].append(token)
    assert chosen == {"forever": [0, 1, 2, 3], "never": [0, 0, 0, 0], "two": [0, 1, 2, 0]}


def test_logprobs_are_of_the_logits_as_given(sampling):
    n_vocab = 1000
    logits = np.random.default_rng(9).standard_normal(n_vocab).astype(np.float32) * 4
    logits[[10, 20]] = 15.0  # a tie at the top
    params = sampling.SamplingParams(temperature=0.3, top_k=3, logprobs=7, seed=2, logit_bias=((500, 30.0),))
    sampled = sampling.Sampler(params, n_vocab).sample(logits)
    logprobs = logits - logits.max() - np.log(np.sum(np.exp(logits.astype(np.float64) - logits.max())))
    best = np.argsort(-logits, kind="stable")[:7]
    assert sampled.token == 500
    assert sampled.logprob == pytest.approx(logprobs[500], abs=1e-5)
    assert [token for token, _ in sampled.top] == best.tolist()
    np.testing.assert_allclose([value for _, value in sampled.top], logprobs[best], atol=1e-5)
    everything = sampling.Sampler(sampling.SamplingParams(logprobs=n_vocab), n_vocab).sample(logits).top
    assert math.fsum(math.exp(value) for _, value in everything) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default")
def test_edges(sampling, chain):
    """One token left, extreme logits, everything tied."""
    params = sampling.SamplingParams(**chain, seed=0, logprobs=1)
    for n_vocab, only in ((1, 0), (70, 69), (5000, 4097)):
        logits = np.full(n_vocab, -np.inf, np.float32)
        logits[only] = -3.0
        assert sampling.Sampler(params, n_vocab).sample(logits) == (only, 0.0, ((only, 0.0),))
    huge = np.array([-3e38, 3e38, -np.inf, 1e30, 3e38], np.float32)
    assert set(draws(sampling.Sampler(params, 5), huge, 50).tolist()) <= {1, 4}
    tied = np.full(777, 2.5, np.float32)
    kept = set(draws(sampling.Sampler(params, 777), tied, 300).tolist())
    assert kept <= set(reference(tied, params))
    if params.temperature == 0:
        assert kept == {0}  # the lowest id wins


def test_ties_at_top_k_keep_lowest_ids(sampling):
    logits = np.zeros(500, np.float32)
    logits[400] = 1.0
    logits[100:110] = -0.0  # equal to 0
    sampler = sampling.Sampler(sampling.SamplingParams(temperature=1e6, top_k=4, top_p=1, min_p=0, seed=4), 500)
    assert set(draws(sampler, logits, 400).tolist()) == {400, 0, 1, 2}


def test_refused_logits(sampling):
    sampler = sampling.Sampler(sampling.SamplingParams(seed=0), 200)
    good = np.zeros(200, np.float32)
    for position in (0, 63, 64, 199):
        for value in (np.nan, np.inf):
            bad = good.copy()
            bad[position] = value
            with pytest.raises(PyEngineError, match=f"logit of token {position} is NaN"):
                sampler.sample(bad)
    with pytest.raises(RequestError, match="no token is left"):
        sampler.sample(np.full(200, -np.inf, np.float32))
    with pytest.raises(RequestError, match="no token is left"):
        sampler.sample(good, np.zeros(7, np.uint32))
    for bad in (good[:-1], good.astype(np.float64), np.zeros((1, 200), np.float32), np.zeros(400, np.float32)[::2]):
        with pytest.raises(ShapeError, match="logits"):
            sampler.sample(bad)
    with pytest.raises(ShapeError, match="allowed"):
        sampler.sample(good, np.zeros(6, np.uint32))
    assert sampler.step == 0  # refusals draw nothing
    sampler.sample(good)


@pytest.mark.parametrize(
    "bad",
    [
        *(dict(temperature=v) for v in (-0.1, math.nan, math.inf, "1", None, True)),
        *(dict(top_k=v) for v in (-1, 1.5, 2**31)),
        *({name: v} for name in ("top_p", "min_p", "typical_p") for v in (-0.01, 1.01, math.nan)),
        *(dict(repeat_penalty=v) for v in (0, -1, math.inf, 1e-60)),
        dict(repeat_last_n=-2),
        dict(presence_penalty=math.nan),
        dict(frequency_penalty=1e39),
        *({name: v} for name in ("xtc_probability", "xtc_threshold") for v in (-0.01, 1.01, math.nan, "1")),
        *({name: v} for name in ("dynatemp_range", "dynatemp_exponent", "mirostat_tau", "mirostat_eta", "dry_multiplier") for v in (-0.1, math.nan, None)),
        dict(top_n_sigma=math.inf),
        dict(dry_base=0.9),
        *(dict(mirostat=v) for v in (-1, 3, 1.0, True)),
        *(dict(dry_allowed_length=v) for v in (-1, 1.5)),
        dict(dry_penalty_last_n=-2),
        *(dict(dry_sequence_breakers=v) for v in ("abc", [""], [1], 5, None)),
        *(dict(seed=v) for v in (-1, 2**64, 0.5)),
        dict(logprobs=-1),
        *(dict(logit_bias=v) for v in (5, (1, 2), ((1, 2, 3),), ((-1, 0.0),), ((1, math.inf),), ((1.0, 0.0),))),
    ],
    ids=str,
)
def test_refused_params(sampling, bad):
    with pytest.raises(RequestError, match=next(iter(bad))):
        sampling.SamplingParams(**bad)


def test_refused_by_the_vocabulary(sampling):
    for params, n_vocab in ((dict(logprobs=11), 10), (dict(logit_bias=((10, 1.0),)), 10), ({}, 0)):
        with pytest.raises(RequestError):
            sampling.Sampler(sampling.SamplingParams(**params), n_vocab)
    for token in (-1, 10, 2.0):
        with pytest.raises(RequestError, match="token"):
            sampling.Sampler(sampling.SamplingParams(), 10).accept(token)


def test_random_stream():
    """SplitMix64 from the paper, written with Python's integers."""
    ffi, lib = cbuild.compile_c(("host/sampling.c",), ("host/sampling.h",))
    mask = 2**64 - 1

    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    for seed in (0, 1, 2**63, mask):
        for step in (0, 1, 1000, mask):
            expected = (mix(mix(seed) + (step + 1) * 0x9E3779B97F4A7C15 & mask) >> 11) / 2**53
            assert lib.pe_random_unit(seed, step) == expected


def test_same_seed_same_tokens(sampling):
    logits = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    first = sampling.Sampler(sampling.SamplingParams(**OFF), 1000)  # its seed is drawn
    again = sampling.Sampler(sampling.SamplingParams(**OFF, seed=first.seed), 1000)
    other = sampling.Sampler(sampling.SamplingParams(**OFF, seed=first.seed ^ 1), 1000)
    tokens = draws(first, logits, 50)
    assert np.array_equal(tokens, draws(again, logits, 50))
    assert not np.array_equal(tokens, draws(other, logits, 50))


def test_same_tokens_whatever_the_compiler_does():
    """Without optimisation and with vectors: the kept sets, tokens and logprobs have equal bits."""
    n_vocab, rng = 9000, np.random.default_rng(8)
    rows = [rng.standard_normal(n_vocab).astype(np.float32) * s for s in (0.1, 1, 2, 5)]
    results = []
    for flag in ("-O3", "-O0", "-Os"):
        ffi, lib = cbuild.compile_c(("host/sampling.c",), ("host/sampling.h",), (flag,))
        scratch = np.empty(lib.pe_sample_scratch(n_vocab) + 64, np.uint8)
        at = ffi.cast("void *", scratch.ctypes.data + -scratch.ctypes.data % 64)
        out, found = ffi.new("pe_sampled *"), []
        plain = ((0, 1, 0, 1), (40, 0.95, 0.05, 1), (0, 0.9, 0, 1), (0, 1, 0, 0.7))
        for k, top_p, min_p, typical, sigma, xtc, dyna, miro in (*((*p, 0, 0, 0, 0) for p in plain), *((*p, 0, 0.5, 0.5, 0) for p in plain),
                                                                (0, 1, 0, 1, 2.0, 0, 0, 0), (0, 1, 0, 1, 0, 0, 0, 1), (0, 1, 0, 1, 0, 0, 0, 2)):
            params = ffi.new("pe_sampler_params *", [0.7, k, top_p, min_p, typical, 1, 0, 0, sigma, xtc, 0.02, dyna, 0.7, miro, 4.0, 0.1])
            for row in rows:
                for step in range(20):
                    row_in = ffi.new("pe_sampler_input *", dict(n_vocab=n_vocab, seed=5, step=step, mu=6.0))
                    row_in.logits = ffi.cast("float *", row.ctypes.data)
                    assert lib.pe_sample(params, row_in, at, out, ffi.NULL, 0) == 0
                    found.append((out.token, out.n_kept, out.logprob, out.mu))
        results.append(found)
    assert results[0] == results[1] == results[2]


def test_c_refuses_what_python_would_not_pass(sampling):
    """The flat function is called by others too: bad parameters and tokens are refused, nothing is written."""
    ffi, lib = cbuild.compile_c(("host/sampling.c",), ("host/sampling.h",))
    logits, scratch = ffi.new("float[8]", [1.0] * 8), ffi.new("char[]", lib.pe_sample_scratch(8) + 64)
    out = ffi.new("pe_sampled *")
    good = [1.0, 0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]

    def call(params=good, n_top=0, n_vocab=8, **given):
        row = ffi.new("pe_sampler_input *", dict(logits=logits, n_vocab=n_vocab, **given))
        params, top = ffi.new("pe_sampler_params *", params), ffi.new("pe_token_value[8]")
        return lib.pe_sample(params, row, scratch, out, top, n_top), out.fault

    assert call() == (0, lib.PE_FAULT_NONE)
    assert call(n_vocab=0)[0] == call(n_top=9)[0] == call(n_top=-1)[0] == 1
    for i in (0, 2, 3, 4, 5, 6, 7):
        for value in (math.nan, -1.0 if i in (0, 2, 4, 5) else math.inf):
            assert call([*good[:i], value, *good[i + 1 :]]) == (3, lib.PE_FAULT_PARAMS)
    for i, wrong in ((0, (math.nan, math.inf)), (1, (math.nan, -0.1, 1.1)), (2, (math.nan, -0.1, 1.1)), (3, (math.nan, -1.0)), (4, (math.nan, -1.0)),
                     (5, (-1, 3)), (6, (math.nan, -1.0)), (7, (math.nan, -1.0))):
        for value in wrong:
            assert call([*good, *[0] * i, value]) == (3, lib.PE_FAULT_PARAMS)
    for token in (-1, 8, 2**31 - 1):
        pair = ffi.new("pe_token_value[]", [(token, 1.0)])
        assert call(bias=pair, n_bias=1) == (3, lib.PE_FAULT_TOKEN) and out.token == token
        count = ffi.new("pe_token_count[]", [(token, 1)])
        assert call(less=pair, n_less=1) == (3, lib.PE_FAULT_TOKEN) and out.token == token
        penalty = [*good[:6], 0.5, 0.0]
        assert call(penalty, recent=count, n_recent=1) == (3, lib.PE_FAULT_TOKEN) and out.token == token


def test_without_undefined_behaviour(tmp_path):
    """All steps on exactly sized memory under the address and undefined-behaviour sanitizers."""
    program = tmp_path / "run.c"
    program.write_text(
        f"""#include "{cbuild.CSRC / "host/sampling.h"}"
#include <math.h>
#include <stdlib.h>
#include <string.h>
int main(void) {{
  static const int sizes[] = {{1, 2, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097, 20000}};
  static const float extremes[] = {{-INFINITY, -3e38f, 3e38f, 0, -0.0f, 1e-45f}};
  for (int s = 0; s < 12; s++) {{
    int n = sizes[s], n_words = (n + 31) / 32;
    float *logits = malloc(sizeof *logits * n);
    uint32_t *allowed = malloc(4 * n_words);
    pe_token_value *top = malloc(sizeof *top * n), bias = {{n - 1, 1.0f}};
    pe_token_count recent = {{0, 2}};
    void *scratch = aligned_alloc(64, pe_sample_scratch(n));
    memset(allowed, 0xff, 4 * n_words);
    for (int round = 0; round < 128; round++) {{
      for (int i = 0; i < n; i++) {{
        float unit = (float)pe_random_unit(round, i);
        logits[i] = round % 3 == 0 ? 0 : round % 3 == 1 ? 20 * unit : extremes[(int)(unit * 5.99f)];
      }}
      logits[n / 2] = 1;
      pe_sampler_params p = {{round % 4 ? 0.7f : 0, round & 1 ? 40 : 0, round & 2 ? 0.9f : 1, round & 4 ? 0.1f : 0,
                             round & 8 ? 0.5f : 1, 1.5f, 0.1f, 0.1f, round & 16 ? 1.5f : 0, round & 32 ? 0.7f : 0, 0.1f,
                             round & 64 ? 0.9f : 0, 0.5f, round % 7 < 3 ? round % 7 : 0, 3, 0.5f}};
      pe_sampler_input in = {{logits, n, &recent, 1, &bias, 1, round & 16 ? allowed : NULL, 1, (uint64_t)round, &bias, 1, round % 9}};
      pe_sampled out;
      if (pe_sample(&p, &in, scratch, &out, top, n < 20 ? n : 20) != PE_OK) return 1;
      if (out.token < 0 || out.token >= n || out.n_kept < 1 || out.n_kept > n) return 2;
    }}
    free(logits);
    free(allowed);
    free(top);
    free(scratch);
  }}
  return 0;
}}
""",
        encoding="utf-8",
    )
    cbuild.run_sanitized((program, cbuild.CSRC / "host/sampling.c"), tmp_path / "run")


FEW = [
    {}, dict(temperature=0.0), dict(top_k=7, typical_p=0.6), dict(top_k=256, top_p=1.0, min_p=0.0, temperature=3.0), dict(logprobs=9),
    dict(top_k=0, top_p=0.6), dict(top_k=0, top_p=1.0, min_p=0.02), dict(temperature=0.0, logprobs=256), dict(top_k=0, top_p=0.999, min_p=0.0),
    OFF, dict(top_k=300), dict(top_k=0, typical_p=0.5), dict(xtc_probability=0.5, dynatemp_range=0.5), dict(top_k=0, top_p=0.6, xtc_probability=1.0),
]


@pytest.mark.parametrize("n_vocab", (5, 256, 1000, 9001))
@pytest.mark.parametrize("chain", FEW, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default")
def test_the_largest_logits_give_the_same_tokens(sampling, chain, n_vocab):
    """Tokens, logprobs and the random stream, bit for bit; or None, and then the whole row must be needed: see the second half."""
    if chain.get("logprobs", 0) > n_vocab:
        return
    k, rng, decided = min(n_vocab, 256), np.random.default_rng(n_vocab), 0
    params = sampling.SamplingParams(**chain, seed=11)
    few, whole = sampling.Sampler(params, n_vocab), sampling.Sampler(params, n_vocab)
    for spread in (0.0, 0.1, 1.0, 3.0, 10.0, 60.0) * 3:
        row = np.round(rng.standard_normal(n_vocab) * spread, 1).astype(np.float32)          # with ties
        row[rng.random(n_vocab) < 0.1] = -np.inf
        values, tokens, sums = largest(row, k)
        drawn, want = few.sample_few(values, tokens, sums), whole.sample(row)
        if drawn is None:
            few.step += 1
        else:
            assert drawn == want
            decided += 1
    limited = chain.get("temperature") == 0 or 0 < chain.get("top_k", 40) <= min(k, n_vocab - 1)
    assert decided == 18 if limited else decided < 18 or n_vocab <= 256 or chain.get("min_p") == 0.02


def largest(row, k):
    """What the op top_k gives for a row, with sums by the C sampler's own arithmetic, in NumPy."""
    n = len(row)
    tokens = np.argsort(-row, kind="stable")[:k].astype(np.int32)
    one = np.float32(1)
    x = np.fmax(row - row.max(), np.float32(-87))
    steps = (x * np.float32(1.44269504) - np.float32(0.5)).astype(np.int32)
    f = x - steps.astype(np.float32) * np.float32(0.693359375)
    f = f - steps.astype(np.float32) * np.float32(-2.12194440e-4)
    y = np.full_like(f, 1 / 5040)
    for c in (one / np.float32(720), one / np.float32(120), one / np.float32(24), one / np.float32(6), np.float32(0.5), one, one):
        y = y * f + c
    weights = (y + y) * ((steps + 126).astype(np.uint32) << 23).view(np.float32)
    weights = np.pad(weights, (0, -n % 4096)).reshape(-1, 256, 16)
    sums = np.zeros((len(weights), 16), np.float32)
    for i in range(256):
        sums += weights[:, i]
    return row[tokens], tokens, sums.reshape(-1)


def test_the_largest_logits_are_not_enough(sampling):
    row = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    few = largest(row, 256)
    for params in (dict(logit_bias=((3, 1.0),)), dict(logprobs=257), dict(top_k=257), OFF, dict(top_n_sigma=1.0), dict(mirostat=1), dict(mirostat=2),
                   dict(OFF, xtc_probability=1.0)):
        assert sampling.Sampler(sampling.SamplingParams(**params), 1000).sample_few(*few) is None
    penalized = sampling.Sampler(sampling.SamplingParams(presence_penalty=1.0), 1000)
    assert penalized.sample_few(*few) is not None                              # nothing is recent yet
    penalized.accept(int(few[1][0]))
    assert penalized.sample_few(*few) is None
    dry = sampling.Sampler(sampling.SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=()), 1000)
    for token, whole in ((1, False), (2, False), (3, False), (1, False), (2, True), (9, False)):
        dry.accept(token)
        assert (dry.sample_few(*few) is None) == whole                         # where it takes something from a token
    for bad in (math.nan, math.inf):
        row[17] = bad
        values, tokens = np.array([bad, 1.0], np.float32), np.array([17, 3], np.int32)
        with pytest.raises(PyEngineError, match="token 17 is NaN or infinite"):
            sampling.Sampler(sampling.SamplingParams(), 1000).sample_few(values, tokens, few[2])


def test_speed(sampling, capsys):
    """Gemma's vocabulary, medians of 50 calls from Python; the bound is loose because machines are busy."""
    n_vocab = 262_144
    logits = np.random.default_rng(0).standard_normal(n_vocab).astype(np.float32) * 3
    logits[::50_000] += 15
    cases = {
        "greedy": dict(temperature=0),
        "default": dict(),
        "default, penalties": dict(repeat_penalty=1.1),
        "default, 20 logprobs": dict(logprobs=20),
        "temperature": dict(OFF, temperature=0.8),
        "top_p": dict(OFF, top_p=0.95),
        "typical_p": dict(OFF, typical_p=0.9),
        "top_n_sigma": dict(OFF, top_n_sigma=1.0),
        "default, xtc": dict(xtc_probability=0.5),
        "xtc": dict(OFF, xtc_probability=1.0),
        "default, dynatemp": dict(dynatemp_range=0.5),
        "dynatemp": dict(OFF, dynatemp_range=0.5),
        "mirostat 1": dict(mirostat=1),
        "mirostat 2": dict(mirostat=2),
        "default, dry": dict(dry_multiplier=0.8, dry_penalty_last_n=-1, dry_sequence_breakers=()),
    }
    lines = []
    for name, chain in cases.items():
        sampler = sampling.Sampler(sampling.SamplingParams(**chain, seed=0), n_vocab)
        for token in range(64):
            sampler.accept(token)
        times = []
        for _ in range(50 if name != "typical_p" else 5):
            start = time.perf_counter()
            sampler.sample(logits)
            times.append(time.perf_counter() - start)
        lines.append(f"{name:22} {1e3 * sorted(times)[len(times) // 2]:7.3f} ms")
        assert min(times) < 0.05
    with capsys.disabled():
        print("\nsampling from 262,144 logits, median", *lines, sep="\n  ")
