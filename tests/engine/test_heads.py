"""Heads that predict further tokens: their logits are transformers', and what they draft changes no bit of an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import cases
import foreign
import heads
import pyengine as pe
from converters.__main__ import main as converters_main
from converters.writer import convert
from eager import draft_always
from pyengine.engine import writing
from pyengine.engine.drafts import Draft, Drafts
from pyengine.errors import InvalidModelError, PlanError, RequestError, UnsupportedModelError
from pyengine.files.gguf import GGUFFile
from pyengine.memory.held import planned_bytes
from pyengine.programs.rows import token_rows
from pyengine.programs.step import Work

OWN = cases.kinds(heads=True)                                # of models that bring it
BESIDE = list(heads.BESIDE)                                  # of a file of its own
KINDS = [*OWN, *BESIDE]
N_CTX = 256
SETTINGS: dict[str, Any] = {"n_ctx": N_CTX, "n_batch": 64, "n_threads": 1, "device": "cpu"}


def ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((seed, n)).integers(40, 400, n).tolist()


def asked(seed: int) -> dict[str, Any]:
    """Greedy for even seeds, and a few tokens that come often for odd ones."""
    few = tuple((t, 60.0) for t in range(40, 44))
    return {"temperature": 0 if seed % 2 == 0 else 1.0, "seed": seed, "logprobs": 2, "max_tokens": 30, "logit_bias": few if seed % 2 else ()}


def told(answer: Any) -> tuple[Any, ...]:
    return str(answer), answer.tokens, answer.sampled, answer.finish


@pytest.fixture(scope="module")
def made(tiny_gguf, tmp_path_factory) -> Any:
    """made(kind) -> the files of a model and of its head, and what the head says: `heads.Made`"""
    found: dict[str, heads.Made] = {}

    def get(kind: str) -> heads.Made:
        if kind not in found:
            folder = tmp_path_factory.mktemp("head")
            if kind in OWN:
                wanted = heads.add_head(tiny_gguf(kind)[1], folder / "hf")
                found[kind] = heads.Made(convert(folder / "hf", folder / "m.gguf", "f32"), None, "mtp", wanted)
            else:
                found[kind] = heads.BESIDE[kind].make(tiny_gguf, folder)
        return found[kind]

    return get


def loaded(pair: heads.Made, **settings: Any) -> Any:
    return pe.load(pair.path, **SETTINGS, draft=pair.draft, **settings)


def read(model: Any, text: list[int], n: int, step: int) -> list[np.ndarray]:
    """Return the head's logits behind each of the last tokens of a text, of which the model has read the first n, in steps of so many."""
    runner, rows = model._runner, token_rows(text[:n], 0, model._runner.axes)
    s = runner.cells.new()
    for start in range(0, n, step):
        stop = min(n, start + step)
        runner.run([Work(s, rows, start, stop, np.array([stop - start - 1], np.int32))])
    found, hidden = [], runner.last(s)
    for i, token in enumerate(text[n:]):
        (row,), (state,) = runner.ahead([(s, i, token, hidden)])
        found.append(row.whole().copy())
        hidden = state.copy()
    s.active = False
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_reference(made, kind: str) -> None:
    pair = made(kind)
    model, text = loaded(pair, kv_dtype="f32"), ids(44)
    for n in (40, 3):                                        # beyond a window, and within it
        wanted, whole = pair.wanted(text[: n + 4], n), read(model, text[: n + 4], n, 64)
        for got, want in zip(whole, wanted, strict=True):
            assert np.abs(got - want).max() < 1e-5 * np.ptp(want)
        for step in (1, 7, 39):                              # wherever the prompt is cut
            assert all(np.array_equal(a, b) for a, b in zip(read(model, text[: n + 4], n, step), whole, strict=True))


@pytest.fixture
def eager(monkeypatch) -> None:
    draft_always(monkeypatch, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same(made, eager, kind: str) -> None:
    pair = made(kind)
    plain = pe.load(pair.path, **SETTINGS, n_seq=8, speculate=False)
    prompts = [ids(5), ids(70, 1), ids(17, 2), ids(130, 3), ids(33, 4), ids(64, 5), ids(9, 6), ids(50, 7)]
    for n_seq in (1, 8):
        model, drafted = loaded(pair, n_seq=n_seq), 0
        for seed in range(2):
            some = prompts[: 3 if n_seq == 1 else 8]
            answers = model.generate_many(some, **asked(seed))
            plain.reset()
            assert list(map(told, answers)) == list(map(told, plain.generate_many(some, **asked(seed))))
            drafted += sum(a.report.drafts.get(pair.origin, (0, 0))[0] for a in answers)
        assert drafted > 20
    longer = [*prompts[1], *answers[1].tokens, *ids(9, 9)]   # a conversation goes on, and one that begins as it does
    for text in (longer, [*longer[:80], *ids(4, 8)]):
        plain.reset()
        assert told(model.generate(text, **asked(0))) == told(plain.generate(text, **asked(0)))


def test_files_have_it_as_those_of_llama_cpp(made) -> None:
    """Names of gguf-py; weights of norms with 1 added, as conversion/qwen.py does for all that end in "norm.weight"."""
    path = made("qwen3_5_text").path
    file, kinds = GGUFFile(path), gguf.MODEL_TENSOR
    assert file.metadata["qwen35.block_count"] == 6 and file.metadata["qwen35.nextn_predict_layers"] == 1
    assert list(file.metadata["qwen35.attention.recurrent_layers"]) == [True, True, True, False, True, False]
    names = {kind: gguf.TENSOR_NAMES[kind].format(bid=5) + ".weight" for kind in (kinds.NEXTN_ENORM, kinds.NEXTN_HNORM, kinds.NEXTN_EH_PROJ, kinds.NEXTN_SHARED_HEAD_NORM)}
    assert {n for n in file.tensors if ".nextn." in n} == set(names.values())
    weights, checkpoint = {t.name: t.data for t in gguf.GGUFReader(path).tensors}, load_file(path.parent / "hf/model.safetensors")
    assert np.allclose(weights[names[kinds.NEXTN_ENORM]], checkpoint["mtp.pre_fc_norm_embedding.weight"] + 1, atol=1e-6)
    assert np.array_equal(weights[names[kinds.NEXTN_EH_PROJ]], checkpoint["mtp.fc.weight"])


OLLAMA = {"eh_proj": "mtp.fc", "enorm": "mtp.pre_fc_norm_embedding", "hnorm": "mtp.pre_fc_norm_hidden", "shared_head_norm": "mtp.norm"}


def as_ollama(name: str, data: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """A tensor in the names of Ollama's convert/convert_qwen3next.go before it had llama.cpp's: there 1 is added to norms that end in "_norm.weight"."""
    around = next((theirs for ours, theirs in OLLAMA.items() if name == f"blk.5.nextn.{ours}.weight"), None)
    if around is not None:
        return [(f"{around}.weight", data - 1 if data.ndim == 1 else data)]
    return [(name.replace("blk.5.", "mtp.layers.0.").replace("ssm_dt.bias", "ssm_dt"), data)]


def test_older_files_of_ollama_have_it_too(made, tmp_path) -> None:
    path, text = made("qwen3_5_text").path, ids(24)
    keys = {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": None, "qwen35.attention.recurrent_layers": None,
            "qwen35.attention.head_count_kv": [0, 0, 0, 2, 0]}
    assert GGUFFile(path).metadata["qwen35.attention.head_count_kv"] == 2
    theirs = pe.load(foreign.copied(path, tmp_path / "o.gguf", keys, as_ollama), **SETTINGS)
    for got, want in zip(read(theirs, text, 20, 64), read(pe.load(path, **SETTINGS), text, 20, 64), strict=True):
        assert np.array_equal(got, want)
    apart = foreign.copied(path, tmp_path / "e.gguf", keys, lambda name, data: [  # experts are not joined there
        (n.replace("mtp.layers.0.ffn_up", "mtp.layers.0.mlp.experts.0.up_proj"), d) for n, d in as_ollama(name, data)])
    model = pe.load(apart, **SETTINGS)
    assert model._scheduler.speculation.source is None and "layers that predict further tokens are left out: they have names of Ollama's" in model.plan.table()
    assert "left out" not in pe.plan(apart, **SETTINGS, speculate=False).table()


def test_of_several_layers_the_first_drafts_and_the_plan_says_so(made, eager, tmp_path) -> None:
    path, text = made("qwen3_5_text").path, ids(24)
    keys = {"qwen35.block_count": 7, "qwen35.nextn_predict_layers": 2, "qwen35.attention.recurrent_layers": [True, True, True, False, True, False, False]}
    two = foreign.copied(path, tmp_path / "t.gguf", keys, lambda name, data: [
        (name, data), *([(name.replace("blk.5.", "blk.6."), -data)] if name.startswith("blk.5.") else [])])
    model, one = pe.load(two, **SETTINGS), pe.load(path, **SETTINGS)
    assert "of the file's 2 layers that predict further tokens the first drafts, and the others are left out" in model.plan.table()
    assert model.plan.of("weights") == one.plan.of("weights") and "further tokens the first" not in one.plan.table()
    assert "left out" not in pe.plan(two, **SETTINGS, speculate=False).table()
    assert all(map(np.array_equal, read(model, text, 20, 64), read(one, text, 20, 64)))
    answer = model.generate(ids(9), **asked(0))
    assert answer.report.drafts["mtp"][0] > 5 and told(answer) == told(pe.load(path, **SETTINGS, speculate=False).generate(ids(9), **asked(0)))


@pytest.mark.parametrize("names", [("mtp.layers.0.", "mtp.layers.1."), ("mtp.fc.", "model.mtp.fc.")], ids=["several layers", "another name"])
def test_what_has_no_place_is_left_out_and_said(made, tmp_path, capsys, names) -> None:
    shutil.copytree(made("qwen3_5_text").path.parent / "hf", tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    tensors, (known, other) = load_file(file), names
    tensors |= {other + name.removeprefix(known): value for name, value in tensors.items() if name.startswith(known)}
    if other.startswith("model."):
        del tensors["mtp.fc.weight"]
    save_file(tensors, file)
    out = convert(tmp_path / "hf", tmp_path / "m.gguf", "f32")
    assert "the layers that predict further tokens are left out" in capsys.readouterr().err
    assert not any(".nextn." in n for n in GGUFFile(out).tensors)


def test_it_is_left_out_where_nothing_drafts(made) -> None:
    path = made("qwen3_5_text").path
    plain, model = pe.load(path, **SETTINGS, speculate=False), pe.load(path, **SETTINGS, n_seq=2)
    assert not plain._scheduler.speculation.source and model._scheduler.speculation.source
    assert not any("blk.5." in name for name in plain.program.states) and "blk.5.k" in model.program.states
    assert model.generate(ids(60), speculate=False, **asked(0)).report.drafts == {}
    for policy in ("look-m:ratio=0.5",):
        left = pe.load(path, **SETTINGS, compress=policy)
        assert not left._scheduler.speculation.source and "head that predicts further tokens is left out" in left.plan.table()
    beside = pe.load(path, **SETTINGS, draft=path)
    assert beside._scheduler.speculation.source.origin == "model" and not beside._fitted.layout.draft.sizes.ahead


def test_what_it_takes_is_in_the_plan(made) -> None:
    path = made("qwen3_5_text").path
    model, without = pe.load(path, **SETTINGS, n_seq=2), pe.plan(path, **SETTINGS, n_seq=2, speculate=False)
    assert model.plan.total == pe.plan(path, **SETTINGS, n_seq=2).total > without.total
    assert model.plan.of("weights") == model.program.prepared.weight_bytes and model.plan.of("kv") == model.program.prepared.state_bytes
    assert planned_bytes(model.plan)["cpu"] == model.plan.total - model.plan.of("overhead")
    cells = [i for i in model.plan.items if i.purpose == "kv" and i.layer == 5]
    assert sum(i.nbytes for i in cells) == sum(model.program.states[f"blk.5.{kind}"].nbytes for kind in "kv") > 0
    layout = model._fitted.layout
    assert layout.total_at(N_CTX, 2) == layout.taken
    assert layout.total_at(128, 3) == pe.plan(path, **{**SETTINGS, "n_ctx": 128}, n_seq=3).total


def test_saved_conversations_are_those_of_the_model(made, eager, tmp_path) -> None:
    """What the head has read is not saved: with it and without it files are the same, and it reads what follows."""
    path, text = made("qwen3_5_text").path, ids(60)
    with_head, without = pe.load(path, **SETTINGS), pe.load(path, **SETTINGS, speculate=False)
    first = [m.generate(text, **asked(0)) for m in (with_head, without)]
    for model, name in ((with_head, "a"), (without, "b")):
        model.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    longer, answers = [*text, *first[0].tokens, *ids(6, 1)], []
    for model in (with_head, without):
        model.reset()
        assert model.restore(tmp_path / "b") == 89
        answers.append(model.generate(longer, **asked(0)))
    assert told(answers[0]) == told(answers[1]) and answers[0].report.n_cached == 89 and answers[0].report.drafts["mtp"][0] > 5
    assert with_head._runner.cells.conversations[0].ahead == 89


@pytest.mark.parametrize("kind", ["qwen3_5_text", *BESIDE])
def test_it_goes_on_from_drafts_that_came_as_from_others(made, eager, monkeypatch, kind: str) -> None:
    """Its first logits behind each token are the same bits whether tokens came one at a time or were drafted."""
    pair, text = made(kind), ids(60)
    monkeypatch.setattr(Drafts, "next", lambda self, tokens, most: Draft([], []))                  # nothing from the text itself
    wanted, found = pe.load(pair.path, **SETTINGS, speculate=False).generate(text, **asked(0)), []
    for right in (True, False):
        seen: dict[int, np.ndarray] = {}

        def drawn(self: Any, w: Any, row: Any, right: bool = right, seen: dict[int, np.ndarray] = seen) -> None:
            n = len(w.asked.job.report.tokens) + len(w.reader.last)
            if not w.reader.last:
                seen[n] = row.whole().copy()
            w.reader.last.append((wanted.tokens[n] if right else 39, 0.9))
            w.odds.append(0.9)

        monkeypatch.setattr(writing.Writer, "_draw", drawn)
        answer = loaded(pair).generate(text, **asked(0))
        drafted, accepted = answer.report.drafts[pair.origin]
        assert told(answer) == told(wanted) and (accepted == drafted > 20 if right else accepted < drafted)
        found.append(seen)
    both = found[0].keys() & found[1].keys()
    assert len(both) >= 5 and all(np.array_equal(found[0][n], found[1][n]) for n in both)


# -- heads in files of their own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BESIDE)
def test_a_head_beside_a_model_is_in_its_plan(made, kind: str) -> None:
    pair = made(kind)
    model, alone = loaded(pair, n_seq=2), pe.plan(pair.path, **SETTINGS, n_seq=2)
    assert model.plan.total == pe.plan(pair.path, **SETTINGS, n_seq=2, draft=pair.draft).total > alone.total
    assert model.plan.of("weights") == model.program.prepared.weight_bytes and model.plan.of("kv") == model.program.prepared.state_bytes
    assert model.plan.of("arena") == model.program.prepared.arena_bytes and planned_bytes(model.plan)["cpu"] == model.plan.total - model.plan.of("overhead")
    assert f"drafts are of the head in {pair.draft.name}, " in model.plan.table()
    assert (model.plan.of("kv") > alone.of("kv")) == bool(model._fitted.layout.step.ahead.own)
    layout = model._fitted.layout
    assert layout.total_at(N_CTX, 2) == layout.taken
    for n_ctx, n_seq in ((128, 2), (N_CTX, 5), (100, 1)):
        assert layout.total_at(n_ctx, n_seq) == pe.plan(pair.path, **{**SETTINGS, "n_ctx": n_ctx}, n_seq=n_seq, draft=pair.draft).total


@pytest.mark.parametrize("kind", BESIDE)
def test_a_head_beside_a_model_is_left_out_where_nothing_drafts(made, kind: str) -> None:
    pair = made(kind)
    plain = loaded(pair, speculate=False)
    assert plain._scheduler.speculation.source is None and plain.plan.of("weights") == pe.plan(pair.path, **SETTINGS, speculate=False).of("weights")
    left = loaded(pair, compress="look-m:ratio=0.5")
    assert not left._scheduler.speculation.source and "head that predicts further tokens is left out: conversations are compressed" in left.plan.table()


@pytest.mark.parametrize("kv_dtype, why", [("q8_0", "its heads are no whole blocks of kv_dtype=q8_0"), ("kivi4", "keys are kept by channel")])
def test_a_head_whose_keys_have_no_place_in_the_cache_is_left_out(tiny_gguf, tmp_path, kv_dtype: str, why: str) -> None:
    """The model's heads have 32 elements, which are a block, and the head's 16."""
    pair = heads.BESIDE["eagle3"].make(lambda kind, **config: tiny_gguf(kind, **config, head_dim=32), tmp_path)
    settings = {**SETTINGS, "kv_dtype": kv_dtype}
    left, plain = pe.load(pair.path, **settings, draft=pair.draft), pe.load(pair.path, **settings, speculate=False)
    assert not left._scheduler.speculation.source and f"head that predicts further tokens is left out: {why}" in left.plan.table()
    assert told(left.generate(ids(40), **asked(0))) == told(plain.generate(ids(40), **asked(0)))
    assert "left out" not in pe.plan(pair.path, **settings, draft=pair.draft, speculate=False).table()


@pytest.mark.parametrize("kind", BESIDE)
def test_conversations_are_saved_without_what_a_head_beside_a_model_read(made, eager, tmp_path, kind: str) -> None:
    pair, text = made(kind), ids(60)
    for model, name in ((loaded(pair), "a"), (pe.load(pair.path, **SETTINGS, speculate=False), "b")):
        first = model.generate(text, **asked(0))
        model.save(tmp_path / name)
        model.reset()
        assert model.restore(tmp_path / name) == 89
        longer = [*text, *first.tokens, *ids(6, 1)]
        last = told(model.generate(longer, **asked(0)))
        wanted = last if name == "a" else wanted
    assert last == wanted and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kind", BESIDE)
def test_a_model_and_its_head_must_fit(made, machine, kind: str) -> None:
    pair = made(kind)
    alone, both = pe.plan(pair.path, **SETTINGS).total, pe.plan(pair.path, **SETTINGS, draft=pair.draft).total
    machine((alone + both) // 2)
    with pytest.raises(PlanError, match="draft=None"):
        loaded(pair)


def test_an_assistant_is_of_one_model(made, tiny_gguf, tmp_path) -> None:
    pair, wide = made("assistant"), tiny_gguf("gemma4_text", hidden_size=128)[0]
    for path, why in ((tiny_gguf("llama")[0], "this is another model"), (wide, "hidden states of 96 numbers, and this model's have 128"),
                      (made("assistant, no shared caches").path, "2 key/value heads of 64 elements"),
                      (tiny_gguf("gemma4_text", sliding_window=9)[0], "2 key/value heads of 32 elements")):
        with pytest.raises(RequestError, match=f"draft: .*{why}"):
            pe.load(path, **SETTINGS, draft=pair.draft)
    with pytest.raises(UnsupportedModelError, match="is a head that drafts for another model: load that one, with draft="):
        pe.load(pair.draft)


def test_an_assistant_has_the_names_of_llama_cpp(made, tmp_path, capsys) -> None:
    """src/models/gemma4-assistant.cpp. Clusters of tokens, which its converter leaves out too, are none of them."""
    pair = made("assistant")
    file = GGUFFile(pair.draft)
    assert {k: file.metadata[f"gemma4-assistant.{k}"] for k in ("block_count", "nextn_predict_layers", "embedding_length", "embedding_length_out", "attention.shared_kv_layers")} == {
        "block_count": 4, "nextn_predict_layers": 4, "embedding_length": 64, "embedding_length_out": 96, "attention.shared_kv_layers": 4}
    layer = {f"blk.0.{n}.weight" for n in ("attn_norm", "attn_q", "attn_q_norm", "attn_output", "post_attention_norm", "ffn_norm", "ffn_gate", "ffn_up",
                                           "ffn_down", "post_ffw_norm", "layer_output_scale")}
    assert {n for n in file.tensors if not n.startswith(("blk.1.", "blk.2.", "blk.3."))} == layer | {
        "token_embd.weight", "output_norm.weight", "rope_freqs.weight", "nextn.pre_projection.weight", "nextn.post_projection.weight"}
    shutil.copytree(pair.draft.parent / "hf", tmp_path / "hf")
    more = {"masked_embedding.centroids.weight": np.zeros((8, 64), np.float32), "masked_embedding.token_ordering": np.arange(512)}
    save_file(load_file(tmp_path / "hf/model.safetensors") | more, tmp_path / "hf/model.safetensors")
    out = convert(tmp_path / "hf", tmp_path / "m.gguf", "f32")
    assert "the table of clusters of tokens is left out" in capsys.readouterr().err
    assert GGUFFile(out).tensors.keys() == file.tensors.keys()


def test_an_assistant_drafts_behind_pictures(tiny_gguf, eager, tmp_path) -> None:
    path, folder = tiny_gguf("gemma4")
    heads.add_assistant(tiny_gguf("gemma4_text")[1], tmp_path / "hf")
    draft = convert(tmp_path / "hf", tmp_path / "d.gguf", "f32")
    seen = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    prompt = [*ids(9), seen, *ids(6)]
    model, plain = (pe.load(path, **SETTINGS, **more) for more in ({"draft": draft}, {"speculate": False}))
    for seed in range(2):
        answer = model.generate(prompt, **asked(seed))
        assert told(answer) == told(plain.generate(prompt, **asked(seed))) and answer.report.drafts["assistant"][0] > 5


def test_an_eagle_is_of_one_model(made, tiny_gguf, tmp_path) -> None:
    pair, own = made("eagle3"), made("eagle3, as speculators have it")
    for path, why in ((tiny_gguf("gemma2", tokenizer=None, num_hidden_layers=7)[0], "does not tell what its layers take"),
                      (tiny_gguf(cases.first(mrope=True), tokenizer=None)[0], "on several"),
                      (tiny_gguf("llama", num_hidden_layers=4)[0], "what layers .2, 3, 4. take, and this model has 4 layers"),
                      (tiny_gguf("llama", num_hidden_layers=7, hidden_size=192)[0], "hidden states of 96 numbers, and this model's have 192")):
        with pytest.raises(RequestError, match=f"draft: .*{why}"):
            pe.load(path, **SETTINGS, draft=pair.draft)
    with pytest.raises(RequestError, match="draft: .* other tokens than"):                    # its file has those of its model
        pe.load(pair.path, **SETTINGS, draft=own.draft)


def test_an_eagle_has_the_names_of_llama_cpp(made) -> None:
    """src/models/eagle3.cpp; `d2t` are tokens, not how far they are from their rows."""
    pair = made("eagle3, as speculators have it")
    file, saved = GGUFFile(pair.draft), load_file(pair.draft.parent / "hf/model.safetensors")
    assert {k: file.metadata[f"eagle3.{k}"] for k in ("block_count", "embedding_length", "target_hidden_size", "norm_before_residual", "norm_before_fc")} == {
        "block_count": 1, "embedding_length": 64, "target_hidden_size": 96, "norm_before_residual": True, "norm_before_fc": True}
    assert list(file.metadata["eagle3.target_layers"]) == [2, 3, 4] and file.metadata.count("tokenizer.ggml.tokens") == 512
    layer = ("attn_norm", "attn_norm_2", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    assert set(file.tensors) == {*(f"blk.0.{n}.weight" for n in layer), "fc.weight", "enc.output_norm.weight", "output_norm.weight", "output.weight",
                                 "token_embd.weight", "d2t"}
    assert np.array_equal(file.array("d2t"), saved["d2t"] + np.arange(300)) and saved["t2d"][file.array("d2t")].all() and saved["t2d"].sum() == 300
    assert "rope_freqs.weight" in GGUFFile(made("eagle3, the model's tokens").draft).tensors


def test_which_layers_an_eagle_reads(made, tmp_path, capsys) -> None:
    """Those of its own config: inputs where vLLM looks, outputs where SGLang does; else those of the model's depth, which has to be given."""
    folder = made("eagle3").draft.parent / "hf"
    shutil.copytree(folder, tmp_path / "hf")
    config, name = json.loads((folder / "config.json").read_text()), "eagle_aux_hidden_state_layer_ids"
    with pytest.raises(RequestError, match="give --base"):
        convert(folder, tmp_path / "m.gguf", "f32")
    for more, layers in (({name: [1, 3, 5]}, [1, 3, 5]), ({"eagle_config": {name: [1, 3, 5]}}, [2, 4, 6])):
        (tmp_path / "hf/config.json").write_text(json.dumps(config | more))
        assert list(GGUFFile(convert(tmp_path / "hf", tmp_path / "m.gguf", "f32")).metadata["eagle3.target_layers"]) == layers
    base = made("eagle3").path.parent / "hf"
    assert converters_main([str(folder), "--base", str(base), "-o", str(tmp_path / "m.gguf"), "--outtype", "f16"]) == 0
    assert list(GGUFFile(tmp_path / "m.gguf").metadata["eagle3.target_layers"]) == [2, 3, 4] and capsys.readouterr().err.count("\n") == 2      # of the two before
    assert converters_main([str(base), "--base", str(base), "-o", str(tmp_path / "n.gguf")]) == 2 and "--base is for an adapter" in capsys.readouterr().err


def test_a_head_has_rows_of_its_own_in_the_plan(made) -> None:
    """Seven layers and a head are not eight."""
    for kind, n in (("eagle3", 7), ("qwen3_5_text", 5)):
        pair = made(kind)
        plan, alone = pe.plan(pair.path, **SETTINGS, draft=pair.draft), pe.plan(pair.path, **SETTINGS, speculate=False)
        assert plan.n_layers == alone.n_layers == n
        rows = {(purpose, detail) for _, purpose, _, detail in plan.lines()}
        assert rows >= {(purpose, detail) for _, purpose, _, detail in alone.lines() if detail.endswith("layers)") and "states" not in detail}
        assert ("kv", f"the head that predicts further tokens: all {N_CTX} positions (1 layer)") in rows
        assert (("weights", "the head that predicts further tokens (1 layer)") in rows) == (pair.draft is None)


NUMBERS = (("rope.freq_base", (0.0, -1.0, float("nan"), float("inf"))), ("attention.layer_norm_rms_epsilon", (0.0, -1e-5, float("nan"))),
           ("attention.head_count", (0, 2**32 - 1)), ("embedding_length", (0,)))


@pytest.mark.parametrize("kind", ["eagle3", "assistant"])
def test_a_head_with_impossible_numbers_is_refused(made, tmp_path, kind: str) -> None:
    """The error names the file, and the key as it stands there."""
    pair = made(kind)
    arch = GGUFFile(pair.draft).metadata["general.architecture"]
    for key, values in NUMBERS:
        for value in values:
            file = foreign.altered(pair.draft, tmp_path / "n.gguf", f"{arch}.{key}", value)
            with pytest.raises(InvalidModelError) as error:
                pe.load(pair.path, **SETTINGS, draft=file)
            assert f"{file}: {arch}.{key} is " in str(error.value)


def test_a_head_without_a_tensor_names_it_as_the_file_does(made, tmp_path) -> None:
    for kind, name in (("eagle3", "blk.0.attn_q.weight"), ("eagle3", "fc.weight"), ("assistant", "blk.2.ffn_down.weight"), ("assistant", "nextn.pre_projection.weight")):
        pair = made(kind)
        file = foreign.copied(pair.draft, tmp_path / "m.gguf", {}, lambda n, data, name=name: [] if n == name else [(n, data)])
        with pytest.raises(InvalidModelError) as error:
            pe.load(pair.path, **SETTINGS, draft=file)
        assert f"{file}: tensor '{name}': is missing" in str(error.value) and "ahead" not in str(error.value)
    pair, heads_of = made("assistant"), ("token_embd", "output")
    file = foreign.copied(pair.draft, tmp_path / "m.gguf", {}, lambda n, data: [] if n.startswith(heads_of) and n != "output_norm.weight" else [(n, data)])
    with pytest.raises(InvalidModelError, match=f"{file}: neither 'output.weight' nor 'token_embd.weight'"):
        pe.load(pair.path, **SETTINGS, draft=file)


def test_an_eagle_without_its_layers_names_todays_key(made, tmp_path) -> None:
    pair = made("eagle3, the model's tokens")
    found = GGUFFile(pair.draft).metadata["eagle3.target_layers"].tolist()
    without = foreign.copied(pair.draft, tmp_path / "w.gguf", {"eagle3.target_layers": None}, lambda n, data: [(n, data)])
    with pytest.raises(InvalidModelError, match=f"{without}: the key 'eagle3.target_layers' is missing"):
        pe.load(pair.path, **SETTINGS, draft=without)
    older = foreign.copied(pair.draft, tmp_path / "o.gguf", {"eagle3.target_layers": None, "eagle3.extract_layers": found}, lambda n, data: [(n, data)])
    assert pe.load(pair.path, **SETTINGS, draft=older)._fitted.layout.step.ahead.layers == found


def test_an_eagle_that_names_a_token_twice_is_refused(made, tmp_path) -> None:
    """As in files of llama.cpp's before it wrote tokens: they are distances there."""
    pair = made("eagle3")
    file = GGUFFile(pair.draft)
    data = bytearray(pair.draft.read_bytes())
    info = file.tensors["d2t"]
    data[info.offset + 8 : info.offset + 16] = data[info.offset : info.offset + 8]
    (tmp_path / "d.gguf").write_bytes(data)
    with pytest.raises(InvalidModelError, match="d2t.*another token for each of 200 rows"):
        pe.load(pair.path, **SETTINGS, draft=tmp_path / "d.gguf")
