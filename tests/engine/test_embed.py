"""Hidden states are those of transformers at every position; vectors are made of them as asked, and do not depend on who else is served."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cases
import pyengine as pe
from pictures import A, B
from pyengine.engine.vectors import pooling_of, Vectors
from pyengine.errors import ContextOverflowError, RequestError, UnsupportedModelError
from sight import sight_of

PLAIN = cases.kinds(sees=False)
TEXTS = ["What is in the picture?", "The quick brown fox jumps over the lazy dog. " * 4, "x", "def add(a, b):"]


def ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((seed, n)).integers(0, 300, n).tolist()


def head_input(model: Any, run: Any) -> np.ndarray:
    """What the output head of a model of transformers reads while `run` runs it: its last hidden states, [n, d_model]."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        run()
    finally:
        hook.remove()
    return seen[-1][0].numpy()


def hf_hidden(folder: Path, prompt: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        inner = getattr(model, "model", None) or model.base_model
        own = inner(torch.tensor([prompt])).last_hidden_state[0].numpy()
        assert np.array_equal(own, head_input(model, lambda: model(torch.tensor([prompt]))))
    return own


def hf_seen(folder: Path, prompt: list[Any]) -> np.ndarray:
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return head_input(model, lambda: sight_of(folder).seen(model, folder, prompt, None))


def assert_close(got: np.ndarray, want: np.ndarray, share: float = 1e-5) -> None:
    assert got.shape == want.shape and got.dtype == np.float32
    assert np.abs(got - want).max() <= share * np.ptp(want)


@pytest.fixture(scope="module")
def model(tiny_gguf) -> pe.Model:
    return pe.load(tiny_gguf("llama")[0], n_ctx=128, n_batch=16, n_seq=3, n_threads=1)


# -- hidden states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_hidden_states_at_every_position(tiny_gguf, kind: str) -> None:
    path, folder = tiny_gguf(kind)
    prompt = ids(70)
    want = hf_hidden(folder, prompt)
    for n_batch in (512, 9):
        assert_close(pe.load(path, n_ctx=128, n_batch=n_batch, kv_dtype="f32").hidden(prompt), want)


@pytest.mark.parametrize("kind", cases.kinds(sees=True, own_cache=True))
def test_hidden_states_with_a_picture(tiny_gguf, kind: str) -> None:
    path, folder = tiny_gguf(kind)
    prompt = ["what is ", A, " this?"]
    want = hf_seen(folder, prompt)
    model = pe.load(path, n_ctx=256, kv_dtype="f32")
    assert_close(model.hidden(prompt), want, 2e-5)
    assert np.array_equal(model.embed([prompt], normalize=False)[0], model.hidden(prompt)[-1])


def test_the_head_makes_the_logits_of_the_hidden_states(tiny_gguf) -> None:
    path, folder = tiny_gguf("llama")
    model, prompt = pe.load(path, n_ctx=128, n_batch=16, kv_dtype="f32"), ids(40)
    from safetensors.numpy import load_file

    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert_close(model.hidden(prompt) @ head.T, model.logits(prompt))


# -- vectors --------------------------------------------------------------------------------------------------------------


def test_poolings(model) -> None:
    for text in TEXTS:
        rows = model.hidden(text).astype(np.float64)
        assert len(rows) == len(model.tokenize(text))
        for pooling, want in (("mean", rows.mean(axis=0)), ("cls", rows[0]), ("last", rows[-1]), (None, rows[-1])):
            assert_close(model.embed(text, normalize=False, pooling=pooling), want, 1e-6)
            assert_close(model.embed(text, pooling=pooling), want / np.linalg.norm(want), 1e-6)
    assert model.embed("a").shape == (96,) and model.embed(["a"]).shape == (1, 96) and model.embed([]).shape == (0, 96)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_side_by_side_is_alone(tiny_gguf, pooling: str) -> None:
    path, _ = tiny_gguf("gemma3_text")
    inputs = [*TEXTS, ids(100), ids(1), *TEXTS]
    alone = pe.load(path, n_ctx=128)
    want = np.stack([alone.embed([x], pooling=pooling)[0] for x in inputs])
    for settings in ({"n_seq": 4}, {"n_seq": 3, "n_batch": 7}, {"n_seq": 1, "n_batch": 5}):
        model = pe.load(path, n_ctx=128, **settings)
        assert np.array_equal(model.embed(inputs, pooling=pooling), want), settings
        assert not model._runner.cells.conversations           # they are gone
    assert model.stats["steps"] > len(inputs) or pooling == "cls"              # of which the first steps are enough


def test_several_texts_share_steps(tiny_gguf) -> None:
    texts = ["a b c"] * 8
    steps = {}
    for n_seq in (1, 4):
        model = pe.load(tiny_gguf("llama")[0], n_ctx=64, n_seq=n_seq)
        model.embed(texts)
        steps[n_seq] = model.stats["steps"]
    assert steps == {1: 8, 4: 2}


def test_the_head_is_not_computed(tiny_gguf, monkeypatch) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64)
    ran = []
    execute = model.program.execute
    monkeypatch.setattr(model.program, "execute", lambda entry=None, turn=None, **dims: (ran.append(dims), execute(entry, turn, **dims)))
    model.hidden(ids(20))
    model.embed("some text", pooling="last")
    assert [(d["l"], d["w"]) for d in ran] == [(0, 20), (0, 1)]


@pytest.mark.parametrize("kind", cases.kinds(own_cache=True))
def test_beside_answers(tiny_gguf, kind: str) -> None:
    """Answers and vectors in the same steps: both are those that each gets alone."""
    path, _ = tiny_gguf(kind)
    alone = pe.load(path, n_ctx=256, n_batch=32, n_seq=1)
    asked = [ids(40, 1), ids(3, 2)]
    answers = [alone.generate(p, max_tokens=24, seed=1).tokens for p in asked]
    long = ids(200, 3)
    vectors = alone.embed([long, *TEXTS], pooling="mean")
    states = alone.hidden(long)
    model = pe.load(path, n_ctx=256, n_batch=32, n_seq=4)
    handles = [model.submit(p, max_tokens=24, seed=1) for p in asked]
    assert np.array_equal(model.embed([long, *TEXTS], pooling="mean"), vectors)
    assert [h.result(60).tokens for h in handles] == answers
    streams = [model.stream(p, max_tokens=24, seed=1) for p in asked]
    for s in streams:
        next(s)
    assert np.array_equal(model.hidden(long), states)
    assert [s.answer().tokens for s in streams] == answers
    model.loop.close()


def test_threads_ask_at_once(model) -> None:
    want = model.embed(TEXTS)
    found: list[Any] = [None] * 6
    errors = []

    def work(i: int) -> None:
        try:
            found[i] = model.generate("a", max_tokens=30, temperature=0) if i % 3 == 0 else model.embed(TEXTS)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not errors and all(np.array_equal(found[i], want) for i in range(6) if i % 3)


def test_more_than_there_are_places_wait_their_turn(model) -> None:
    """All places generate, and more wait: a reading that is queued gets a place when one is free."""
    handles = [model.submit(f"{i}", max_tokens=20, client="a", logit_bias={i: -1e9 for i in model.tokenizer.eog_ids}) for i in range(8)]
    reading = model.vectors.reading(TEXTS[1], "last")
    mine = model.loop.submit(reading, client="b")
    ended: list[Any] = []
    for h in (mine, *handles):
        h.on_done(ended.append)
    for h in (mine, *handles):
        h.result(60)
    assert ended.index(mine) < len(handles) - 1              # it did not wait for all of them
    assert np.array_equal(reading.vector(), model.embed(TEXTS[1], pooling="last"))


def test_a_reading_that_is_cancelled_leaves_nothing(model) -> None:
    model.reset()
    for pooling in ("mean", "last"):
        reading = model.vectors.reading(ids(120), pooling)
        with model._lock:                                    # so that no step comes between
            handle = model.loop.submit(reading)
            handle.cancel()
        assert handle.result(10) == "" and handle.finish == "cancelled"
        with pytest.raises(RequestError, match="not read to its end"):
            reading.vector()
    assert np.array_equal(model.embed("a"), model.embed("a"))
    assert not [s for s in model._runner.cells.conversations if s.active]


def test_pictures(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("gemma3")[0], n_ctx=256, n_seq=2, kv_dtype="f32")
    found = model.embed([A, "a text", B])
    assert np.array_equal(found, [model.embed(A), model.embed("a text"), model.embed(B)])
    bos = model.tokenizer.bos_id
    rows = model.hidden([bos, A])
    assert_close(found[0], rows[-1] / np.linalg.norm(rows[-1].astype(np.float64)), 1e-6)
    assert len(np.unique(found.round(4), axis=0)) == 3


# -- what files and callers say -------------------------------------------------------------------------------------------


def changed(source: Path, out: Path, key: str, value: bool | int) -> Path:
    """A copy of a file with another value of a key."""
    import gguf

    reader = gguf.GGUFReader(source)
    w = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (key, "general.architecture"):
            w.add_key_value(name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    (w.add_bool if isinstance(value, bool) else w.add_uint32)(key, value)
    for t in reader.tensors:
        w.add_tensor(t.name, np.array(t.data))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return out


def vectors_of(path: Path, tmp_path: Path, value: int) -> Vectors:
    """The vectors of a model whose file has this pooling_type."""
    return pe.load(changed(path, tmp_path / f"{value}.gguf", "llama.pooling_type", value), n_ctx=64).vectors


def test_a_file_says_how_vectors_are_made(tiny_gguf, tmp_path) -> None:
    path = tiny_gguf("llama")[0]
    assert {v: vectors_of(path, tmp_path, v).pooling() for v in (0, 1, 2, 3)} == {0: "last", 1: "mean", 2: "cls", 3: "last"}
    assert pooling_of(pe.load(path, n_ctx=64).vectors.h) == ""
    ranks = vectors_of(path, tmp_path, 4)
    with pytest.raises(RequestError, match="scores pairs of texts.*pooling="):
        ranks.embed("a")
    assert ranks.embed("a", pooling="mean").shape == (96,)
    with pytest.raises(UnsupportedModelError, match="pooling_type is 9, which is not known"):
        vectors_of(path, tmp_path, 9).pooling()


def test_texts_end_as_the_file_says(tiny_gguf, tmp_path) -> None:
    path = tiny_gguf("llama")[0]
    plain, ended = (pe.load(p, n_ctx=64) for p in (path, changed(path, tmp_path / "e.gguf", "tokenizer.ggml.add_eos_token", True)))
    whole = [*plain.tokenize("some text"), plain.tokenizer.eos_id]
    assert ended.tokenize("some text") == whole
    assert np.array_equal(ended.embed("some text"), plain.embed([whole])[0])
    long = ended.vectors.reading("word " * 100, "last", cut=True)              # the end stays, the text is cut
    assert long.rows.ids[-1] == plain.tokenizer.eos_id and len(long.rows) == 64
    assert long.rows.ids[:-1].tolist() == ended.tokenize("word " * 100)[:63]
    assert plain.vectors.reading("word " * 100, "last", cut=True).rows.ids.tolist() == plain.tokenize("word " * 100)[:64]


@pytest.mark.parametrize("call, message", [
    (lambda m: m.embed("a", pooling="max"), "pooling must be one of mean, cls, last"),
    (lambda m: m.embed("a", pooling=np.arange(3)), "pooling must be one of"), (lambda m: m.embed("a", normalize="no"), "normalize"),
    (lambda m: m.embed([1, 2]), r"x\[0\].*token ids are a list in the list"), (lambda m: m.embed(["a", None]), r"x\[1\]"),
    (lambda m: m.embed(5), "not int"), (lambda m: m.embed(A), "no media encoder"), (lambda m: m.embed(["a", [5, 10**6]]), r"x\[1\].*vocabulary"),
    (lambda m: m.embed([[]]), r"x\[0\]: the prompt is empty"), (lambda m: m.hidden([]), "the prompt is empty"), (lambda m: m.hidden(5), "a prompt is"),
    (lambda m: m.embed("a", poling="mean"), "'poling' is no argument; near: pooling"),
])
def test_wrong_inputs_are_refused_in_words(model, call: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call(model)
    assert not model._scheduler.active and not model._scheduler.waiting


def test_what_exceeds_the_context_is_named(model) -> None:
    with pytest.raises(ContextOverflowError, match=r"x\[1\]: the prompt has 129 tokens, but the context holds 128"):
        model.embed(["a", ids(129)])
    with pytest.raises(ContextOverflowError, match="larger n_ctx"):
        model.hidden(ids(129))
    assert np.array_equal(model.embed("a"), model.embed("a"))


def test_a_closed_model_says_so(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=32)
    model.close()
    for call in (model.embed, model.hidden):
        with pytest.raises(RequestError, match="is closed"):
            call("a")


# -- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_nothing_is_allocated_that_was_not_planned(tiny_gguf, kind: str) -> None:
    """Hidden states lie in the arena that generation has; what a call returns is the caller's."""
    model = pe.load(tiny_gguf(kind)[0], n_ctx=256, n_seq=2, n_batch=64)
    prompt, most = ids(200), {}
    for pooling in ("last", "last", "mean"):                  # the first time it is also what is made once
        tracemalloc.start()
        model.embed([prompt, "a", ids(30)], pooling=pooling)
        most[pooling] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most["mean"] - most["last"] < 100 * model.config.d_model * 4        # one row is kept, not 200
    assert model.hidden(prompt).shape == (200, model.config.d_model)
    assert model.plan.of("arena") == model.program.arena.nbytes and model.plan.of("kv") == model.program.state_memory.nbytes
