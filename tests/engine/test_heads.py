"""Heads that predict further tokens: their logits are transformers', and what they draft changes no bit of an answer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cases
import heads
import pyengine as pe
from converters.writer import convert
from eager import draft_always
from pyengine.engine import writing
from pyengine.files.gguf import GGUFFile
from pyengine.memory.held import planned_bytes
from pyengine.programs.rows import token_rows
from pyengine.programs.step import Work

KINDS = cases.kinds(heads=True)
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
    """made(kind) -> (GGUF path, transformers' model, its head)"""
    found: dict[str, Any] = {}

    def get(kind: str) -> tuple[Path, Any, Any]:
        if kind not in found:
            folder = tmp_path_factory.mktemp(kind)
            main, head = heads.add_head(tiny_gguf(kind)[1], folder / "hf")
            found[kind] = convert(folder / "hf", folder / "m.gguf", "f32"), main, head
        return found[kind]

    return get


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
def test_logits_are_those_of_transformers(made, kind: str) -> None:
    path, main, head = made(kind)
    model, text = pe.load(path, **SETTINGS, kv_dtype="f32"), ids(44)
    wanted = heads.reference(main, head, text, 40)
    whole = read(model, text, 40, 64)
    for got, want in zip(whole, wanted, strict=True):
        assert np.abs(got - want).max() < 1e-5 * np.ptp(want)
    for step in (1, 7, 39):                                  # wherever the prompt is cut
        assert all(np.array_equal(a, b) for a, b in zip(read(model, text, 40, step), whole, strict=True))


@pytest.fixture
def eager(monkeypatch) -> None:
    draft_always(monkeypatch, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same(made, eager, kind: str) -> None:
    path = made(kind)[0]
    plain = pe.load(path, **SETTINGS, n_seq=8, speculate=False)
    prompts = [ids(5), ids(70, 1), ids(17, 2), ids(130, 3), ids(33, 4), ids(64, 5), ids(9, 6), ids(50, 7)]
    for n_seq in (1, 8):
        model, drafted = pe.load(path, **SETTINGS, n_seq=n_seq), 0
        for seed in range(2):
            some = prompts[: 3 if n_seq == 1 else 8]
            answers = model.generate_many(some, **asked(seed))
            plain.reset()
            assert list(map(told, answers)) == list(map(told, plain.generate_many(some, **asked(seed))))
            drafted += sum(a.report.drafts.get("mtp", (0, 0))[0] for a in answers)
        assert drafted > 20
    longer = [*prompts[1], *answers[1].tokens, *ids(9, 9)]   # a conversation goes on, and one that begins as it does
    for text in (longer, [*longer[:80], *ids(4, 8)]):
        plain.reset()
        assert told(model.generate(text, **asked(0))) == told(plain.generate(text, **asked(0)))


def test_files_have_it_as_those_of_llama_cpp(made) -> None:
    """Names of gguf-py; weights of norms with 1 added, as conversion/qwen.py does for all that end in "norm.weight"."""
    path, _, head = made("qwen3_5_text")
    file, kinds = GGUFFile(path), gguf.MODEL_TENSOR
    assert file.metadata["qwen35.block_count"] == 6 and file.metadata["qwen35.nextn_predict_layers"] == 1
    assert list(file.metadata["qwen35.attention.recurrent_layers"]) == [True, True, True, False, True, False]
    names = {kind: gguf.TENSOR_NAMES[kind].format(bid=5) + ".weight" for kind in (kinds.NEXTN_ENORM, kinds.NEXTN_HNORM, kinds.NEXTN_EH_PROJ, kinds.NEXTN_SHARED_HEAD_NORM)}
    assert {n for n in file.tensors if ".nextn." in n} == set(names.values())
    weights = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    assert np.allclose(weights[names[kinds.NEXTN_ENORM]], head.layers[0].enorm.weight.detach().numpy() + 1, atol=1e-6)
    assert np.array_equal(weights[names[kinds.NEXTN_EH_PROJ]], head.layers[0].eh_proj.weight.detach().numpy())


@pytest.mark.parametrize("names", [("mtp.layers.0.", "mtp.layers.1."), ("mtp.fc.", "model.mtp.fc.")], ids=["several layers", "another name"])
def test_what_has_no_place_is_left_out_and_said(made, tmp_path, capsys, names) -> None:
    shutil.copytree(made("qwen3_5_text")[0].parent / "hf", tmp_path / "hf")
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
    path = made("qwen3_5_text")[0]
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
    path = made("qwen3_5_text")[0]
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
    path, text = made("qwen3_5_text")[0], ids(60)
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


def test_it_goes_on_from_drafts_that_came_as_from_others(made, eager, monkeypatch) -> None:
    """Its first logits behind each token are the same bits whether tokens came one at a time or were drafted."""
    path, text = made("qwen3_5_text")[0], ids(60)
    wanted, found = pe.load(path, **SETTINGS, speculate=False).generate(text, **asked(0)), []
    for right in (True, False):
        seen: dict[int, np.ndarray] = {}

        def drawn(self: Any, w: Any, row: Any, right: bool = right, seen: dict[int, np.ndarray] = seen) -> None:
            n = len(w.asked.job.report.tokens) + len(w.reader.last)
            if not w.reader.last:
                seen[n] = row.whole().copy()
            w.reader.last.append((wanted.tokens[n] if right else 39, 0.9))
            w.odds.append(0.9)

        monkeypatch.setattr(writing.Writer, "_draw", drawn)
        answer = pe.load(path, **SETTINGS).generate(text, **asked(0))
        drafted, accepted = answer.report.drafts["mtp"]
        assert told(answer) == told(wanted) and (accepted == drafted > 20 if right else accepted < drafted)
        found.append(seen)
    both = found[0].keys() & found[1].keys()
    assert len(both) >= 5 and all(np.array_equal(found[0][n], found[1][n]) for n in both)
