"""Every encoder-decoder against transformers, on tiny random checkpoints in float32: encoder, decoder at every position, ids, texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import tiny
import tiny_sources
import tiny_towers

import pyengine as pe
from converters.writer import convert
from pyengine.errors import ContextOverflowError, RequestError, TemplateError

VARIANTS = [(kind, name) for kind, case in cases.sources().items() for name in case.variants]
KINDS = list(cases.sources())


class Made:
    """A checkpoint, its file, and transformers' model."""

    def __init__(self, kind: str, folder: Path, **how: Any):
        self.case = cases.sources()[kind]
        self.folder = tiny_sources.make(self.case, folder / "hf", **how)
        self.path = convert(self.folder, folder / "model.gguf", "f32")
        self.theirs = tiny_sources.reference(self.case, self.folder)
        self.start = self.theirs.config.decoder_start_token_id

    def ids(self, seed: int, n: int) -> list[int]:
        return np.random.default_rng(seed).integers(5, 180, n).tolist()


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda p: p[1])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    kind, name = request.param
    return Made(kind, tmp_path_factory.mktemp(name), **cases.sources()[kind].variants[name])


@pytest.fixture(scope="module")
def model(made: Made) -> Any:
    with pe.load(made.path, kv_dtype="f32") as loaded:
        yield loaded


def test_encoder_and_decoder_at_every_position(made: Made, model: Any) -> None:
    for n, m in ((1, 1), (29, 17), (100, 90)):
        source, ids = made.ids(n, n), [made.start, *made.ids(n + 1, m)]
        hidden, logits = tiny_sources.states(made.theirs, source, ids)
        tiny_towers.close(model.hidden(source), hidden)
        tiny_towers.close(model.embed([source], normalize=False)[0], hidden.mean(0))
        tiny_towers.close(model.embed([source], pooling="last", normalize=False)[0], hidden[-1])
        got = model.logits(ids, source=source)
        tiny_towers.close(got, logits)
        assert (got.argmax(-1) == logits.argmax(-1)).all()


def test_texts_get_special_tokens_and_parts_do_not(made: Made, model: Any) -> None:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(made.folder)
    for text in (*tiny.TEXTS, "", "a", "  two  blanks "):
        ids = words(text)["input_ids"]
        assert model.tokenize(text) == ids, text
        assert np.array_equal(model.hidden(text), model.hidden(ids))
        assert np.array_equal(model.logits([made.start], source=text), model.logits([made.start], source=ids))
        plain = words(text, add_special_tokens=False)["input_ids"]
        if plain:
            assert np.array_equal(model.hidden([text]), model.hidden(plain))


@pytest.mark.parametrize("settings", [{"n_batch": 1}, {"n_batch": 7}, {"n_threads": 1}, {"n_threads": 3}], ids=str)
def test_steps_and_threads_give_the_same_bits(made: Made, model: Any, settings: dict[str, int]) -> None:
    source, ids = made.ids(1, 60), [made.start, *made.ids(2, 40)]
    want = model.logits(ids, source=source)
    with pe.load(made.path, kv_dtype="f32", **settings) as other:
        assert np.array_equal(other.logits(ids, source=source), want)


def test_greedy_texts_are_those_of_transformers(made: Made, model: Any) -> None:
    for i, n in enumerate((3, 30, 77)):
        source = made.ids(i + 20, n)
        want = tiny_sources.written(made.theirs, source, 24)
        answer = model.generate(source, max_tokens=24, temperature=0)
        assert answer.tokens == want and answer.n_prompt == n
        assert model.generate(source, max_tokens=24).tokens == want              # greedy unless somebody wants else
        assert str(answer) == model.detokenize([t for t in want if t not in model.tokenizer.special_ids])


def test_many_at_once_are_each_as_alone(made: Made, model: Any) -> None:
    prompts = [made.ids(i, 1 + 13 * i % 60) for i in range(9)]
    alone = [model.generate(p, max_tokens=12, temperature=0).tokens for p in prompts]
    assert [a.tokens for a in model.generate_many(prompts, max_tokens=12, temperature=0)] == alone
    handles = [model.submit(p, max_tokens=12, temperature=0) for p in prompts]
    assert [h.result(60).tokens for h in handles] == alone
    assert "".join(model.stream(tiny.TEXTS[0], max_tokens=12)) == model.generate(tiny.TEXTS[0], max_tokens=12)


def test_a_prompt_is_read_once(made: Made) -> None:
    with pe.load(made.path) as own:
        source = made.ids(3, 20)
        own.generate(source, max_tokens=3)
        own.logits([made.start], source=source)
        own.hidden(source)
        assert (own.stats["source_misses"], own.stats["source_hits"]) == (1, 2)
        own.hidden(source[1:])
        assert own.stats["source_misses"] == 2


def test_what_cannot_be_asked_is_said(made: Made, model: Any) -> None:
    with pytest.raises(RequestError, match="give source="):
        model.logits([made.start])
    with pytest.raises(RequestError, match="there are no ids"):
        model.logits([], source="a")
    with pytest.raises(RequestError, match="nothing says what its encoder reads"):
        model.feed([made.start])
    with pytest.raises(RequestError, match="nothing says what its encoder reads"):
        next(model.logit_blocks([made.start]))
    with pytest.raises(RequestError, match="the prompt is empty"):
        model.generate([])
    with pytest.raises(ContextOverflowError, match="the encoder reads"):
        model.generate(made.ids(0, model.n_ctx + 1))
    with pytest.raises(RequestError, match="prompt_logprobs"):
        model.submit("a", prompt_logprobs=1)


def test_forms_hold(made: Made, model: Any) -> None:
    """Also where the vocabulary's texts begin with a blank, and where it cannot write what is asked for."""
    for regex in ("dog", "a (dog|fox) is", "[a-f]{3} dog"):
        answer = model.generate("the fox", regex=regex, max_tokens=32)
        assert answer.finish == "stop" and re.fullmatch(regex, answer)
    try:
        assert model.generate("the fox", regex=r"\{dog\}", max_tokens=32) == "{dog}"
    except RequestError as error:
        assert "nothing can be written" in str(error) and not any(b"{" in model.tokenizer.piece(i) for i in range(model.tokenizer.vocab_size))


def test_a_conversation_is_one_text(made: Made, model: Any) -> None:
    text = tiny.TEXTS[0]
    assert model.chat([{"role": "user", "content": text}], max_tokens=8) == model.generate(text, max_tokens=8)
    with pytest.raises(TemplateError, match="one message of a user"):
        model.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}])


@pytest.mark.parametrize("kind", KINDS)
def test_what_authors_say_of_answers_is_kept(kind: str, tmp_path: Path) -> None:
    """A forced first token counts; runs that came do not come again; an end comes late enough."""
    made = Made(kind, tmp_path, generation={"no_repeat_ngram_size": 2, "forced_bos_token_id": 77, "min_length": 9})
    with pe.load(made.path, kv_dtype="f32") as model:
        for i in range(4):
            source = made.ids(i, 25)
            answer = model.generate(source, max_tokens=20, temperature=0)
            assert answer.tokens == tiny_sources.written(made.theirs, source, 20) and answer.tokens[0] == 77
            assert model.generate(source, max_tokens=12, n_beams=3).tokens == tiny_sources.written(made.theirs, source, 12, num_beams=3)
        free = model.generate(source, max_tokens=20, temperature=0, no_repeat_ngram=0)
        assert free.tokens == tiny_sources.written(made.theirs, source, 20, no_repeat_ngram_size=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_narrow_weights(kind: str, outtype: str, tmp_path: Path) -> None:
    made = Made(kind, tmp_path)
    source, ids = made.ids(1, 40), [made.start, *made.ids(2, 30)]
    hidden, logits = tiny_sources.states(made.theirs, source, ids)
    with pe.load(convert(made.folder, tmp_path / "narrow.gguf", outtype)) as model:
        for got, want in ((model.hidden(source), hidden), (model.logits(ids, source=source), logits)):
            cosine = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
            assert np.median(cosine) > 0.99, cosine


# ---- beams --------------------------------------------------------------------------------------------------------------

SEARCHES = [{"num_beams": 2}, {"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True},
            {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.5}, {"num_beams": 4, "no_repeat_ngram_size": 2},
            {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"}]
NAMES = {"num_beams": "n_beams", "no_repeat_ngram_size": "no_repeat_ngram"}


@pytest.fixture(scope="module", params=KINDS)
def ending(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model that ends its answers now and then: its end is more probable than chance has it."""
    import torch

    case = cases.sources()[request.param]
    folder = tmp_path_factory.mktemp("ending")
    tiny_sources.make(case, folder / "hf", seed=3)
    theirs = tiny_sources.reference(case, folder / "hf")
    with torch.no_grad():
        theirs.get_input_embeddings().weight[:] *= 0.5
    theirs.save_pretrained(folder / "hf")
    made = Made.__new__(Made)
    made.case, made.folder, made.theirs = case, folder / "hf", tiny_sources.reference(case, folder / "hf")
    made.path, made.start = convert(made.folder, folder / "model.gguf", "f32"), theirs.config.decoder_start_token_id
    return made


@pytest.fixture(scope="module")
def searching(ending: Made) -> Any:
    with pe.load(ending.path, kv_dtype="f32") as loaded:
        yield loaded


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_beams_find_the_texts_of_transformers(ending: Made, searching: Any, search: dict[str, Any]) -> None:
    ours = {NAMES.get(k, k): v for k, v in search.items()}
    for i in range(6):
        source = ending.ids(i + 40, 5 + 11 * i)
        for n in (1, 12):
            want = tiny_sources.written(ending.theirs, source, n, **search)
            assert searching.generate(source, max_tokens=n, **ours).tokens == want, (i, n)


def test_beams_beside_others(ending: Made, searching: Any) -> None:
    prompts = [ending.ids(i, 5 + 9 * i) for i in range(5)]
    alone = [searching.generate(p, max_tokens=10, n_beams=3) for p in prompts]
    greedy = searching.generate(prompts[0], max_tokens=10, temperature=0)
    assert [a.tokens for a in searching.generate_many(prompts, max_tokens=10, n_beams=3)] == [a.tokens for a in alone]
    handles = [searching.submit(p, max_tokens=10, **how) for p in prompts[:2] for how in ({"n_beams": 3}, {"temperature": 0})]
    found = [h.result(60).tokens for h in handles]
    assert found[0] == alone[0].tokens and found[1] == greedy.tokens and found[2] == alone[1].tokens
    answer = alone[0]
    assert len(answer.logprobs) == len(answer.tokens) and all(p <= 0 for p in answer.logprobs)
    assert searching.generate(prompts[0], max_tokens=10, temperature=0, n_beams=3).tokens == greedy.tokens
    assert searching.generate(prompts[0], max_tokens=0, n_beams=3) == ""
    assert not any(s.active for s in searching._runner.cells.conversations)


def test_answers_end_where_the_context_does(ending: Made) -> None:
    """Greedy or searched for, with as many tokens; what transformers finds with as many is the same."""
    source = ending.ids(8, 9)
    with pe.load(ending.path, kv_dtype="f32", n_ctx=12) as model:
        for ours, theirs in (({"temperature": 0}, {}), ({"n_beams": 2, "early_stopping": "never"}, {"num_beams": 2, "early_stopping": "never"})):
            answer = model.generate(source, max_tokens=None, **ours)
            assert answer.tokens == tiny_sources.written(ending.theirs, source, 12, **theirs)
            assert answer.finish == ("length" if len(answer.tokens) == 12 else "stop")


def test_a_search_that_is_none_is_refused(searching: Any) -> None:
    for wrong, said in (({"n_beams": 2, "top_k": 5}, "top_k does not go with beams"), ({"n_beams": 2, "temperature": 0.5}, "temperature does not go"),
                        ({"n_beams": 99}, "n_beams"), ({"n_beams": 9}, "load with n_seq=9"), ({"n_beams": 0}, "n_beams"),
                        ({"n_beams": 2, "early_stopping": "soon"}, "early_stopping"), ({"n_beams": 2, "regex": "a+"}, "form of the content")):
        with pytest.raises(RequestError, match=said):
            searching.generate("a", **wrong)


def test_the_files_say_how_answers_are_searched(ending: Made, tmp_path: Path) -> None:
    import json

    file = ending.folder / "generation_config.json"
    before = file.read_text()
    said = {"num_beams": 5, "length_penalty": 0.5, "early_stopping": True, "no_repeat_ngram_size": 3}
    file.write_text(json.dumps({**json.loads(before), **said}))
    try:
        path = convert(ending.folder, tmp_path / "said.gguf", "f32")
    finally:
        file.write_text(before)
    source = ending.ids(7, 30)
    with pe.load(path, kv_dtype="f32") as model:
        assert model.n_seq == 5
        assert model.generate(source, max_tokens=10).tokens == tiny_sources.written(ending.theirs, source, 10, **said)
        greedy = tiny_sources.written(ending.theirs, source, 10, no_repeat_ngram_size=3)
        assert model.generate(source, max_tokens=10, temperature=0).tokens == greedy
        assert model.generate(source, max_tokens=10, temperature=0.7, top_k=1).tokens == greedy
