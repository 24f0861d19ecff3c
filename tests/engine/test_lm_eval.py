"""The model for lm-evaluation-harness: scores against transformers' own logits, and against the harness's own model where it is installed."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyengine as pe
from pyengine.errors import RequestError, UnsupportedModelError

MOST = 40


class Template:
    """Stands for the harness's TemplateLM: what of its words the adapter relies on."""

    def __init__(self) -> None:
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Tokenize pairs: blanks at a context's end belong to the continuation, whose tokens are those of both without the context's."""
        pairs = []
        for context, end in (r.args for r in requests):
            if context:
                kept = context.rstrip()
                whole, ids = self.tok_encode(context + end), self.tok_encode(kept)
                pairs.append(((context, end), ids, whole[len(ids):]))
            else:
                pairs.append(((context, end), [self.prefix_token_id], self.tok_encode(end, add_special_tokens=False)))
        return self._loglikelihood_tokens(pairs, disable_tqdm=True)


@pytest.fixture(scope="module")
def harness():
    """The adapter, over the harness or over what stands for it."""
    made = {}
    try:
        importlib.import_module("lm_eval.api.model")
    except ImportError:
        made = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")}
        made["lm_eval.api.model"].TemplateLM = Template
        made["lm_eval.api.registry"].register_model = lambda *names: lambda kind: kind
    sys.modules.update(made)
    yield importlib.import_module("pyengine.lm_eval")
    for name in [*made, "pyengine.lm_eval"]:
        sys.modules.pop(name)


def asked(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


PAIRS = [("the quick brown", " fox jumps"), ("the", "re"), ("", "lazy dog"), ("a dog  ", "x"), ("a dog\n", "sings in"), ("it's", " 12 birds"),
         ("the quick brown " * 12, " fox"), ("over a", " b"), ("over a", " c"), ("over a", " lazy dog"), ("é 日", "本")]


@pytest.fixture(scope="module")
def oracle(tiny_gguf) -> Callable[[str], tuple[Any, Callable[[list[int]], np.ndarray]]]:
    """oracle(kind) -> (transformers' tokenizer, a function of ids to its log-probabilities, float64)."""
    import tiny
    from transformers import AutoTokenizer

    def of(kind: str) -> tuple[Any, Callable[[list[int]], np.ndarray]]:
        folder = tiny_gguf(kind)[1]

        def logprobs(ids: list[int]) -> np.ndarray:
            logits = tiny.hf_logits(folder, ids).astype(np.float64)
            return logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)

        return AutoTokenizer.from_pretrained(folder), logprobs

    return of


@pytest.fixture(scope="module")
def model(harness, tiny_gguf) -> Callable[..., Any]:
    def of(kind: str, **settings: Any) -> Any:
        return harness.PyEngineLM(path=tiny_gguf(kind)[0], **{"kv_dtype": "f32", "max_length": MOST, "n_threads": 1, **settings})

    return of


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_scores_are_those_of_transformers(model, oracle, kind: str) -> None:
    lm, (tokenizer, logprobs) = model(kind), oracle(kind)
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for (context, end), (score, greedy) in zip(PAIRS, lm.loglikelihood([asked(*p) for p in PAIRS]), strict=True):
        whole, kept = tokenizer.encode(context + end), tokenizer.encode(context.rstrip())
        n = len(whole) - len(kept)
        if not context:
            n, whole = len(tokenizer.encode(end, add_special_tokens=False)), [prefix, *tokenizer.encode(end, add_special_tokens=False)]
        rows = logprobs(whole[-(MOST + 1) : -1])[-n:]
        assert abs(score - rows[range(n), whole[-n:]].sum()) < 1e-4 * max(1, n)
        assert greedy == (rows.argmax(1).tolist() == whole[-n:])


@pytest.mark.parametrize("n_words", [3, 60])
def test_whole_texts_are_scored_once(model, oracle, n_words: int) -> None:
    lm, (tokenizer, logprobs) = model("llama"), oracle("llama")
    text = " ".join(np.random.default_rng(n_words).choice("the quick brown fox jumps over a lazy dog".split(), n_words))
    ids = tokenizer.encode(text)
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    want, line = 0.0, [prefix, *ids]                                           # token j of ids is line[j + 1]
    for start in range(0, len(ids), MOST):
        stop = min(start + MOST, len(ids))
        shown = line[max(0, stop - MOST) : stop]
        want += logprobs(shown)[start - stop :][range(stop - start), ids[start:stop]].sum()
    got, = lm.loglikelihood_rolling([asked(text)], disable_tqdm=True)
    assert abs(got - want) < 1e-4 * len(ids) and (len(ids) > MOST) == (n_words == 60)


def test_windows_hold_every_token_once(harness) -> None:
    for n in (0, 1, 4, 5, 8, 9, 11):
        found = list(harness._windows(list(range(n)), 99, 4))
        assert [t for _, end in found for t in end] == list(range(n))
        assert all(1 <= len(context) and len(context) + len(end) - 1 <= 4 for context, end in found)
        assert all(context == ([99] if end[0] == 0 else list(range(end[0] - len(context), end[0]))) for context, end in found)
    assert list(harness._windows(list(range(10)), 99, 4))[-1] == ([5, 6, 7], [8, 9])      # the example of the harness's page


def test_continuations_of_one_context_take_one_pass(model) -> None:
    lm = model("llama")
    one, other = "over a", "lazy"
    ends = [" a", " b", " c"]
    alone = [lm.loglikelihood([asked(one, e)])[0] for e in ends]
    before = lm.model.stats["steps"]
    together = lm.loglikelihood([asked(one, ends[0]), asked(other, " x"), asked(one, ends[1]), asked(one, ends[2])])
    assert [together[i] for i in (0, 2, 3)] == alone
    lengths = {len(lm.tok_encode(one + e)) for e in ends}
    assert lm.model.stats["steps"] - before == 2 if lengths == {len(lm.tok_encode(one)) + 1} else True


def test_texts_are_those_of_generate(model) -> None:
    lm = model("llama", batch_size=2)
    base = {"max_gen_toks": 9, "do_sample": False}
    contexts = ["the quick", "a lazy dog", "birds sing", "over"]
    greedy = [str(lm.model.generate(c, max_tokens=9, temperature=0)) for c in contexts]
    assert lm.generate_until([asked(c, base) for c in contexts], disable_tqdm=True) == greedy
    assert lm.model.n_seq == 2
    stop = greedy[0][3:5]
    cut, whole = lm.generate_until([asked(contexts[0], {**base, "until": [stop]}), asked(contexts[1], {**base, "until": stop + "\0"})],
                                   disable_tqdm=True)
    assert cut == greedy[0][: greedy[0].index(stop)] and whole == greedy[1]
    long = "the quick brown " * 20
    ids = lm.tok_encode(long)[-(MOST - 9) :]
    assert lm.generate_until([asked(long, base)], disable_tqdm=True) == [lm.model.generate(ids, max_tokens=9, temperature=0)]
    for wrong in ({"num_beams": 4}, {"max_gen_toks": "x"}, {"max_gen_toks": MOST}):
        with pytest.raises(RequestError):
            lm.generate_until([asked("x", {**base, **wrong})], disable_tqdm=True)
    drawn = lm._options({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 3, "repetition_penalty": 1.1})
    assert drawn["temperature"] == 0.7 and drawn["top_p"] == 0.9 and drawn["max_tokens"] == 3 and drawn["repeat_penalty"] == 1.1
    assert lm._options({"temperature": 0.7})["temperature"] == 0.7 and lm._options({"do_sample": False, "temperature": 0.7})["temperature"] == 0


def test_what_is_cut_is_said(model, caplog) -> None:
    lm = model("llama")
    with caplog.at_level(logging.WARNING):
        lm.loglikelihood([asked("the quick brown " * 12, " fox")])
    assert "are cut off" in caplog.text


def test_special_tokens_stand_once(model, tiny_gguf) -> None:
    lm = model("llama")
    tokenizer = lm.model.tokenizer
    bos = tokenizer.bos_id
    text = tokenizer.piece(bos).decode()
    assert lm.tok_encode("x", add_special_tokens=False) == tokenizer.tokenize("x", add_special=False)
    assert lm.tok_encode(text + "x").count(bos) == 1
    forced = model("llama", add_bos_token=True)
    assert forced.tok_encode("x") == [bos, *tokenizer.tokenize("x", add_special=False)] and forced.tok_encode(text + "x").count(bos) == 1
    assert model("llama", add_bos_token=False).tok_encode("x") == tokenizer.tokenize("x", add_special=False)
    assert model("llama", prefix_token_id=7).prefix_token_id == 7


def test_chats_are_written_by_the_model_s_template(model) -> None:
    lm = model("llama")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I say"}]
    assert lm.apply_chat_template(turns[:1]) == lm.model.template.render(turns[:1])
    left_open = lm.apply_chat_template(turns, add_generation_prompt=False)
    assert left_open.endswith("I say") and left_open.startswith(lm.model.template.render(turns[:1], add_generation_prompt=False))
    assert lm.chat_template(True) == lm.model.template.source and lm.chat_template(False) is None
    assert lm.get_model_info()["model_num_parameters"] > 1000 and lm.tokenizer_name == "f32.gguf"


def test_arguments(harness, tiny_gguf) -> None:
    path = tiny_gguf("llama")[0]
    assert harness.PyEngineLM(pretrained=path, batch_size="auto:4", max_batch_size=64, device="cuda:0").model.n_seq == 8
    trained = pe.load(path).n_ctx
    assert harness.PyEngineLM(path=path).max_length == min(trained, harness.MAX_LENGTH)
    for wrong in ({}, {"path": path, "pretrained": path}, {"path": path, "n_gpu": 1}, {"path": path, "device": "tpu"}, {"path": path, "batch_size": "x"}, {"path": path, "max_length": 0.5}):
        with pytest.raises(RequestError):
            harness.PyEngineLM(**wrong)


def test_without_the_harness_it_says_what_to_install(monkeypatch) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pyengine.lm_eval", raising=False)
    with pytest.raises(UnsupportedModelError, match="pip install lm_eval"):
        importlib.import_module("pyengine.lm_eval")


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
def test_the_harness_s_own_model_gives_the_same(model, tiny_gguf, kind: str) -> None:
    hf = pytest.importorskip("lm_eval.models.huggingface", reason="needs the harness: pip install lm_eval accelerate", exc_type=ImportError)
    theirs = hf.HFLM(pretrained=str(tiny_gguf(kind)[1]), dtype="float32", device="cpu", max_length=MOST, batch_size=2)
    lm = model(kind, batch_size=3)
    for got, want in zip(lm.loglikelihood([asked(*p) for p in PAIRS]), theirs.loglikelihood([asked(*p) for p in PAIRS]), strict=True):
        assert got[0] == pytest.approx(want[0], rel=1e-6, abs=1e-4) and got[1] == want[1]
    texts = [asked("the quick brown fox"), asked("a lazy dog sings " * 15), asked("x")]
    assert lm.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-6, abs=1e-4)
    tasks = [asked("the quick", {"until": ["\n\n"], "max_gen_toks": 8}), asked("a lazy dog " * 20, {"until": ["e"], "max_gen_toks": 8})]
    assert lm.generate_until(tasks) == [theirs.generate_until([t])[0] for t in tasks]


def test_its_command_without_the_harness_says_so_in_a_line() -> None:
    code = "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module('pyengine.lm_eval', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("pyengine.lm_eval needs the harness: pip install lm_eval (")
    assert done.stderr.count("\n") == 1
