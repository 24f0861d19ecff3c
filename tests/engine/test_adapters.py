"""LoRA adapters: equal to transformers with the adapters merged, whoever is beside them in a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cases
import lora
import pyengine as pe
from pyengine import ops
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError
from pyengine.files.adapters import asked_for, open_adapter
from pyengine.files.gguf import GGUFFile
from pyengine.files.weights import WeightRef
from pyengine.nn.layers import constant
from pyengine.programs.adapters import adapted

pytest.importorskip("transformers", reason="needs transformers and torch: pip install -r requirements/test.txt")
import tiny  # noqa: E402

from converters.adapters import convert_adapter  # noqa: E402
from converters.checkpoint import read_safetensors_header  # noqa: E402

IDS = [3, 77, 12, 200, 45, 9, 301, 88, 5, 17, 60, 121]
TEXTS = [c.kind for c in cases.select(sees=False) if c.converted is not None]


def close(got: np.ndarray, want: np.ndarray, error: float = 1e-5) -> None:
    assert np.abs(got - want).max() <= error * (want.max() - want.min())


@pytest.fixture(scope="module")
def pair(tiny_gguf, tmp_path_factory):
    """A llama with two adapters: files and folders."""
    path, hf = tiny_gguf("llama")
    folder = tmp_path_factory.mktemp("lora")
    one = lora.make_adapter(folder / "one", hf, seed=1)
    two = lora.make_adapter(folder / "two", hf, ("q_proj", "v_proj", "down_proj"), seed=2, r=3, lora_alpha=5, ranks={"down_proj": 6},
                            alpha_pattern={"v_proj": 7}, use_rslora=True)
    files = [convert_adapter(f, None, folder / f"{f.name}.gguf") for f in (one, two)]
    return {"base": path, "hf": hf, "folders": (one, two), "files": files, "folder": folder}


def merged_logits(pair: dict[str, Any], one: float, two: float) -> np.ndarray:
    out = pair["folder"] / f"merged-{one}-{two}"
    if not out.exists():
        lora.merge(out, pair["hf"], list(zip(pair["folders"], (one, two))))
    return tiny.hf_logits(out, IDS)


@pytest.mark.parametrize("kind", TEXTS)
def test_adapted_is_merged(kind: str, tiny_gguf, tmp_path: Path) -> None:
    """Every position's logits are those of transformers with W + s B A, in all matrices of layers."""
    path, hf = tiny_gguf(kind)
    adapter = lora.make_adapter(tmp_path / "a", hf)
    file = convert_adapter(adapter, hf, tmp_path / "a.gguf")
    assert convert_adapter(adapter, path, tmp_path / "of-file.gguf").read_bytes() == file.read_bytes()          # of the base only names and shapes are needed
    want = tiny.hf_logits(lora.merge(tmp_path / "merged", hf, [(adapter, 0.7)]), IDS)
    with pe.load(path, n_ctx=64, kv_dtype="f32", adapters=[(file, 0.7)]) as model:
        close(model.logits(IDS), want)
        close(model.logits(IDS, adapters={}), tiny.hf_logits(hf, IDS))
    assert np.abs(want - tiny.hf_logits(hf, IDS)).max() > 0.1


@pytest.mark.parametrize("kind", cases.quick(c.kind for c in cases.select(sees=True) if c.converted and c.model_class not in tiny.OWN))
def test_text_models_of_checkpoints_that_see(kind: str, tiny_gguf, tmp_path: Path) -> None:
    """By the folder, and by a file of the base model, which says less."""
    path, hf = tiny_gguf(kind)
    names = set(read_safetensors_header(hf / "model.safetensors"))
    if not any("gate_proj" in name for name in names) or any("vision" in name and "o_proj" in name and "model.layers." in name for name in names):
        pytest.skip("its text model's matrices have other names, or its encoder's the same")
    adapter = lora.make_adapter(tmp_path / "a", hf, ("gate_proj", "o_proj"), within=("language_model", "text_model", "model.layers."))
    file = convert_adapter(adapter, hf, tmp_path / "a.gguf")
    assert convert_adapter(adapter, path, tmp_path / "b.gguf").read_bytes() == file.read_bytes()
    with pe.load(path, n_ctx=64, adapters=file) as model, pe.load(path, n_ctx=64) as plain:
        assert np.abs(model.logits(IDS) - plain.logits(IDS)).max() > 0.05


@pytest.mark.parametrize("scales", [(1.0, 0.0), (0.0, 1.0), (0.5, -1.5)])
def test_several_with_scales(pair, scales: tuple[float, float]) -> None:
    """rslora, patterns of ranks and alphas, and mixes of two adapters."""
    with pe.load(pair["base"], n_ctx=64, kv_dtype="f32", adapters=pair["files"]) as model:
        assert model.adapters == {"one": 1.0, "two": 1.0}
        close(model.logits(IDS, adapters=dict(zip(("one", "two"), scales))), merged_logits(pair, *scales))
        model.use_adapters({"two": 0.25})
        close(model.logits(IDS), merged_logits(pair, 0.0, 0.25))


def test_heads_and_weights_in_parts(tiny_gguf, tmp_path: Path) -> None:
    """The output head takes an adapter, and so do q, k and v of a checkpoint that has them in one matrix."""
    path, hf = tiny_gguf("qwen2", tie_word_embeddings=False)
    adapter = lora.make_adapter(tmp_path / "a", hf, ("lm_head", "q_proj"))
    file = convert_adapter(adapter, hf, tmp_path / "a.gguf")
    with pe.load(path, n_ctx=64, kv_dtype="f32", n_batch=5, adapters=file) as model:
        close(model.logits(IDS), tiny.hf_logits(lora.merge(tmp_path / "merged", hf, [(adapter, 1.0)]), IDS))


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2"])
def test_embeddings(kind: str, tiny_gguf, tmp_path: Path) -> None:
    """Rows that are looked up change, with the embedding's own factor; an output head that is the same matrix does not."""
    import json

    from safetensors.numpy import save_file

    path, hf = tiny_gguf(kind)
    adapters = [lora.make_adapter(tmp_path / f"a{seed}", hf, ("embed_tokens", "wte", "down_proj"), seed=seed, r=3 + seed) for seed in (1, 2)]
    files = [convert_adapter(folder, path, tmp_path / f"{folder.name}.gguf") for folder in adapters]
    merged, config = lora.merge(tmp_path / "merged", hf, [(adapters[0], 0.5), (adapters[1], 1.0)]), json.loads((hf / "config.json").read_text())
    tensors, base = lora.read(merged / "model.safetensors"), lora.read(hf / "model.safetensors")
    head = next(value for name, value in base.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
    save_file({**tensors, "lm_head.weight": base.get("lm_head.weight", head)}, merged / "model.safetensors", metadata={"format": "pt"})
    (merged / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pe.load(path, n_ctx=64, kv_dtype="f32", adapters=[(files[0], 0.5), files[1]]) as model, pe.load(path, n_ctx=64, kv_dtype="f32") as plain:
        close(model.logits(IDS), tiny.hf_logits(merged, IDS))
        assert np.array_equal(model.logits(IDS, adapters={}), plain.logits(IDS))


def test_rows_of_pictures_are_no_embeddings(tiny_gguf, tmp_path: Path) -> None:
    from pictures import A

    path, hf = tiny_gguf("qwen3_vl")
    adapter = lora.make_adapter(tmp_path / "a", hf, ("embed_tokens",))
    file, prompt = convert_adapter(adapter, hf, tmp_path / "a.gguf"), [5, A, "what is it?", 9]
    with pe.load(path, n_ctx=256, kv_dtype="f32", adapters=file) as model:
        close(model.logits(prompt), tiny.hf_seen(lora.merge(tmp_path / "merged", hf, [(adapter, 1.0)]), prompt).logits, 2e-5)


@pytest.mark.parametrize("kind", ["qwen3moe", "olmoe"])
def test_experts(kind: str, tiny_gguf, tmp_path: Path) -> None:
    """Each expert has matrices of its own; two adapters of them, in a step whose rows take different ones."""
    path, hf = tiny_gguf(kind)
    adapters = [lora.make_adapter(tmp_path / f"a{seed}", hf, targets, seed=seed, r=2 + seed, within=(".experts.",))
                for seed, targets in ((1, ("gate_proj", "down_proj", "w1", "w2")), (2, ("up_proj", "down_proj", "w3", "w2")))]
    files = [convert_adapter(folder, path, tmp_path / f"{folder.name}.gguf") for folder in adapters]
    assert files[0].read_bytes() == convert_adapter(adapters[0], hf, tmp_path / "again.gguf").read_bytes()
    want = tiny.hf_logits(lora.merge(tmp_path / "merged", hf, [(adapters[0], 0.5), (adapters[1], 1.0)]), IDS)
    with pe.load(path, n_ctx=64, kv_dtype="f32", adapters=[(files[0], 0.5), files[1]]) as model, pe.load(path, n_ctx=64, kv_dtype="f32") as plain:
        close(model.logits(IDS), want)
        assert np.array_equal(model.logits(IDS, adapters={}), plain.logits(IDS))
        mixed = [model.generate(IDS[i:], adapters=mix, max_tokens=4, temperature=0).tokens for i, mix in enumerate(({}, None, "a1"))]
        model.reset()
        assert [model.generate(IDS[i:], adapters=mix, max_tokens=4, temperature=0).tokens for i, mix in enumerate(({}, None, "a1"))] == mixed


@pytest.mark.parametrize(("outtype", "error"), [("q8_0", 3e-2), ("f16", 1e-4)])
def test_quantized_weights_stay_as_they_are(pair, tiny_gguf, outtype: str, error: float) -> None:
    """On weights in blocks an adapter adds no error of its own: see `oracle` for the same sums in float64."""
    import oracle

    path = tiny_gguf("llama", outtype)[0]
    asked = [(pair["files"][0], 1.0), (pair["files"][1], 0.5)]
    with pe.load(path, n_ctx=64, kv_dtype="f32", adapters=asked) as model:
        close(model.logits(IDS), oracle.logits(path, IDS, asked).astype(np.float32), error)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_adapters(pair, tmp_path: Path, dtype: str) -> None:
    """Files keep the type of the tensors, and two of one type lie joined in it."""
    folder, hf = pair["folder"], pair["hf"]
    outtype = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    files = [convert_adapter(f, hf, tmp_path / f"{f.name}.gguf", outtype) for f in pair["folders"]]
    with pe.load(pair["base"], n_ctx=64, kv_dtype="f32", adapters=files) as model:
        close(model.logits(IDS), merged_logits(pair, 1.0, 1.0), 2e-2)
        weights = [i for i in model.plan.items if "adapters" in i.detail]
    wide = pe.plan(pair["base"], n_ctx=64, kv_dtype="f32", adapters=pair["files"])
    assert weights and folder.exists()
    assert sum(i.nbytes for i in weights) < 0.6 * sum(i.nbytes for i in wide.items if "adapters" in i.detail)


MIXES: list[Any] = [None, {}, {"one": 1.0}, {"two": -0.5}, {"one": 0.3, "two": 0.7}]


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_rows_of_one_step_have_adapters_of_their_own(pair, tiny_gguf, outtype: str) -> None:
    """Five requests side by side give the bits that each gives alone, and those of a model that never had the other adapter."""
    path, prompts = tiny_gguf("llama", outtype)[0], [IDS[i:] for i in range(5)]
    asked = {"max_tokens": 8, "temperature": 0, "logprobs": 3}
    with pe.load(path, n_ctx=64, n_seq=5, adapters=pair["files"]) as model:
        alone = []
        for ids, mix in zip(prompts, MIXES):
            alone.append(model.generate(ids, adapters=mix, **asked))
            model.reset()
        from pyengine.engine.answer import Streams

        before = model.stats["steps"]
        together = Streams([model.stream(ids, adapters=mix, **asked) for ids, mix in zip(prompts, MIXES)]).answers()
        assert model.stats["steps"] - before <= 10                              # they were in the same steps
        assert [a.report.sampled for a in together] == [a.report.sampled for a in alone]
        one, none = model.logits(IDS, adapters="one"), model.logits(IDS, adapters={})
    with pe.load(path, n_ctx=64, n_seq=5, adapters=pair["files"][0]) as model:
        assert np.array_equal(model.logits(IDS), one)
    with pe.load(path, n_ctx=64, n_seq=5) as model:
        assert np.array_equal(model.logits(IDS), none)
        assert model.generate(prompts[1], **asked).report.sampled == together[1].report.sampled


def test_drafted_rows_have_their_request_s_adapters(pair, monkeypatch) -> None:
    from pyengine.engine.answer import Streams
    from pyengine.engine.speculation import Speculation

    monkeypatch.setattr(Speculation, "_paying", lambda self, odds, n, used, reads: len(odds))
    asked = {"max_tokens": 24, "temperature": 0, "logprobs": 3, "logit_bias": tuple((i, 60.0) for i in IDS[:4])}
    with pe.load(pair["base"], n_ctx=128, n_seq=5, adapters=pair["files"]) as model:
        found = []
        for speculate in (False, True):
            model.reset()
            found.append([a.sampled for a in Streams([model.stream(IDS[:4] * 6, adapters=mix, speculate=speculate, **asked) for mix in MIXES]).answers()])
        assert found[0] == found[1] and model.stats["drafted_tokens"] > model.stats["accepted_tokens"] > 0


def test_a_graph_without_adapters_has_nothing_of_them(pair) -> None:
    from pyengine.compiler.listing import to_text
    import oracle

    plain, changed = (to_text(oracle.step_of(pair["base"], adapters=a).declare().outputs) for a in (None, pair["files"]))
    assert "lora" not in plain and "lora_scales" in changed


def test_another_adapter_is_another_prefix(pair) -> None:
    with pe.load(pair["base"], n_ctx=64, n_seq=3, adapters=pair["files"]) as model:
        asked = {"max_tokens": 4, "temperature": 0}
        first = model.generate(IDS, adapters="one", **asked)
        again, other = model.generate(IDS, adapters="one", **asked), model.generate(IDS, adapters={"one": 0.5}, **asked)
        base = model.generate(IDS, adapters={}, **asked)
        assert (first.report.n_cached, again.report.n_cached, other.report.n_cached, base.report.n_cached) == (0, len(IDS) - 1, 0, 0)
        assert again.tokens == first.tokens
        more = model.generate([*IDS, *first.tokens[:2]], adapters={"one": 1}, **asked)
        assert more.report.n_cached == len(IDS) + 1


def test_saved_conversations_know_their_adapters(pair, tmp_path: Path) -> None:
    asked = {"max_tokens": 4, "temperature": 0}
    with pe.load(pair["base"], n_ctx=64, n_seq=2, adapters=pair["files"]) as model:
        answer = model.generate(IDS, adapters="two", **asked)
        model.save(tmp_path / "s", answer)
        model.reset()
        with pytest.raises(pe.errors.SessionError, match="adapters"):
            model.restore(tmp_path / "s")
        assert model.restore(tmp_path / "s", adapters="two") == len(IDS) + 3
        assert model.generate(IDS, adapters={}, **asked).report.n_cached == 0
        assert model.generate(IDS, adapters="two", **asked).report.n_cached == len(IDS) - 1
        plain = model.generate(IDS[::-1], adapters={}, **asked)
        model.save(tmp_path / "plain", plain)
    with pe.load(pair["base"], n_ctx=64, n_seq=2) as model:                     # computed without any: any model of these weights has it
        assert model.restore(tmp_path / "plain") == len(IDS) + 3
        with pytest.raises(pe.errors.SessionError, match="adapters"):
            model.restore(tmp_path / "s")


def test_vectors_take_the_usual_adapters(pair) -> None:
    with pe.load(pair["base"], n_ctx=64, kv_dtype="f32", adapters=[(pair["files"][0], 0.5)]) as model, pe.load(pair["base"], n_ctx=64) as plain:
        assert np.abs(model.hidden(IDS) - plain.hidden(IDS)).max() > 0.05
        last = model.logits(IDS)[-1]
        assert np.array_equal(model.feed(IDS), last)


@pytest.mark.parametrize("many", [1, 2])
def test_what_is_allocated_is_what_was_planned(pair, many: int) -> None:
    settings = {"n_ctx": 64, "n_seq": 2, "adapters": pair["files"][:many]}
    before, model = pe.plan(pair["base"], **settings), pe.load(pair["base"], **settings)
    program = model.program
    assert model.plan.items == before.items
    assert before.of("weights") == program.weights.nbytes and before.of("kv") == program.state_memory.nbytes and before.of("arena") == program.arena.nbytes
    low = sum(t.nbytes for f in model._files.adapters for t in f.file.tensors.values())
    counted = sum(i.nbytes for i in before.items if "adapters" in i.detail)
    assert low <= counted <= 4 * low                                            # ranks are padded to groups of 16 rows
    assert before.total > pe.plan(pair["base"], n_ctx=64, n_seq=2).total + low
    model.close()


def test_mapped_weights_give_the_same(pair) -> None:
    with pe.load(pair["base"], n_ctx=64, adapters=pair["files"]) as model, pe.load(pair["base"], n_ctx=64, adapters=pair["files"], mmap=True) as mapped:
        assert np.array_equal(model.logits(IDS), mapped.logits(IDS))


def test_on_a_card(pair, tiny_gguf) -> None:
    path = tiny_gguf("llama", "q8_0")[0]
    for base, error in ((pair["base"], 1e-5), (path, 3e-2)):
        with pe.load(base, n_ctx=64, kv_dtype="f32", adapters=pair["files"]) as model, \
                pe.load(base, n_ctx=64, kv_dtype="f32", device="cuda-emulated", adapters=pair["files"]) as card:
            close(card.logits(IDS), model.logits(IDS), error)


def test_layers_on_several_devices(pair) -> None:
    device = {"cpu:0": 1 << 30, "cpu:1": 1 << 30}
    with pe.load(pair["base"], n_ctx=64, adapters=pair["files"]) as model, pe.load(pair["base"], n_ctx=64, adapters=pair["files"], device=device) as parts:
        assert np.array_equal(model.logits(IDS, adapters="two"), parts.logits(IDS, adapters="two"))


# -- refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "says"), [
    (7, "adapters"), ([("a.gguf", "x")], "scale"), ([("a.gguf", float("nan"))], "scale"), (["x/a.gguf", "y/a.gguf"], "two are called 'a'"),
    ({"": "a.gguf"}, "name"), ([None], "adapters"),
])
def test_wrong_arguments(pair, given: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        pe.load(pair["base"], adapters=given)


@pytest.mark.parametrize(("given", "says"), [({"three": 1}, "'three'.*one, two"), ({"one": "x"}, "scale of 'one'"), ({"one": float("inf")}, "finite"), (5, "mapping"),
                                             ({2: 1.0}, "2"), ({True: 1.0}, "True"), ([["one"]], "one")])
def test_wrong_requests(pair, given: Any, says: str) -> None:
    with pe.load(pair["base"], n_ctx=64, adapters=pair["files"]) as model, pytest.raises(RequestError, match=says):
        model.generate(IDS, adapters=given)


def test_wrong_files_are_refused(pair, tiny_gguf, tmp_path: Path) -> None:
    import gguf

    base, small = pair["base"], tiny_gguf("llama", hidden_size=48, head_dim=16)[0]
    with pytest.raises(InvalidModelError, match="blk.0.*lora_a.*another base model"):
        pe.load(small, adapters=pair["files"][0])
    with pytest.raises(InvalidModelError, match="architecture 'llama'.*'qwen2'"):
        pe.load(tiny_gguf("qwen2")[0], adapters=pair["files"][0])
    with pytest.raises(InvalidModelError, match="is an adapter.*adapters="):
        pe.load(pair["files"][0])
    with pytest.raises(InvalidModelError, match="is no adapter"):
        pe.load(base, adapters=base)
    with pytest.raises(InvalidModelError, match="folder.*python -m converters"):
        pe.load(base, adapters=pair["folders"][0])

    def write(name: str, keys: dict[str, Any], **tensors: tuple[int, ...]) -> Path:
        out = gguf.GGUFWriter(tmp_path / name, "llama")
        out.add_type("adapter")
        for key, value in {"adapter.type": "lora", **keys}.items():
            (out.add_string if isinstance(value, str) else out.add_float32)(key, value)
        for tensor, shape in tensors.items():
            out.add_tensor(tensor, np.ones(shape, np.float32))
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        return tmp_path / name

    alpha, q = {"adapter.lora.alpha": 1.0}, "blk.0.attn_q.weight"
    for keys, tensors, error, says in (
        ({}, {f"{q}.lora_a": (2, 96)}, InvalidModelError, "adapter.lora.alpha"),
        ({**alpha, "adapter.type": "control"}, {f"{q}.lora_a": (2, 96)}, UnsupportedModelError, "'control'"),
        ({**alpha, "adapter.alora.invocation_tokens": "1"}, {f"{q}.lora_a": (2, 96)}, UnsupportedModelError, "activated"),
        (alpha, {f"{q}.lora_a": (2, 96)}, InvalidModelError, "lora_b"),
        (alpha, {f"{q}.lora_b": (96, 2)}, InvalidModelError, "lora_a"),
        (alpha, {f"{q}.lora_a": (2, 96), f"{q}.lora_b": (96, 3)}, InvalidModelError, "rows of the one"),
        (alpha, {f"{q}.lora_a": (2, 96), f"{q}.lora_b": (96, 2), f"{q}.lora_magnitude": (96,)}, UnsupportedModelError, "lora_magnitude"),
        (alpha, {"blk.0.ffn_gate_exps.weight.lora_a": (3, 2, 96), "blk.0.ffn_gate_exps.weight.lora_b": (3, 96, 2)}, InvalidModelError, "has no tensor"),
        (alpha, {f"{q}.lora_a": (3, 2, 96), f"{q}.lora_b": (3, 96, 2)}, InvalidModelError, r"\(3, 96, 96\)"),
        (alpha, {f"{q}.lora_a": (3, 2, 96), f"{q}.lora_b": (2, 96, 2)}, InvalidModelError, "two of each expert"),
        (alpha, {"token_embd.weight.lora_a": (2, 96), "token_embd.weight.lora_b": (512, 2)}, InvalidModelError, "columns of the one"),
        (alpha, {"token_embd.weight.lora_a": (500, 2), "token_embd.weight.lora_b": (96, 2)}, InvalidModelError, "another base model"),
        (alpha, {"v.blk.0.attn_q.weight.lora_a": (2, 96), "v.blk.0.attn_q.weight.lora_b": (96, 2)}, UnsupportedModelError, "encoder"),
        (alpha, {"blk.9.attn_q.weight.lora_a": (2, 96), "blk.9.attn_q.weight.lora_b": (96, 2)}, InvalidModelError, "has no tensor"),
        (alpha, {}, InvalidModelError, "no tensors"),
    ):
        with pytest.raises(error, match=says):
            pe.load(base, n_ctx=64, adapters=write("x.gguf", keys, **tensors))


def test_factors_of_no_product_are_refused(tiny_gguf, tmp_path: Path) -> None:
    """A matrix that is read in rows takes no adapter: GPT-2's positions."""
    import gguf

    path = tiny_gguf("gpt2")[0]
    out = gguf.GGUFWriter(tmp_path / "x.gguf", "gpt2")
    out.add_type("adapter")
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", 0.0)
    shape = pe.plan(path, n_ctx=16) and next(t.shape for n, t in __import__("pyengine.files.gguf", fromlist=["GGUFFile"]).GGUFFile(path).tensors.items()
                                             if n == "position_embd.weight")
    out.add_tensor("position_embd.weight.lora_a", np.ones((2, shape[1]), np.float32))
    out.add_tensor("position_embd.weight.lora_b", np.ones((shape[0], 2), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.raises(UnsupportedModelError, match="position_embd.weight.*not multiplied"):
        pe.load(path, n_ctx=16, adapters=tmp_path / "x.gguf")


def test_a_product_that_is_not_changed_is_refused(pair) -> None:
    """Rows of other axes have no scales: what multiplies only them cannot be left as it is in silence."""
    name, file = "blk.0.attn_q.weight", GGUFFile(pair["base"])
    whole = open_adapter(asked_for(pair["files"][0])[0])
    adapter = replace(whole, pairs={name: whole.pairs[name]})
    for scale, changed in ((1, True), (2, False)):
        with pe.Graph() as g:
            axis = pe.Dim("m", 8, scale)
            y = ops.linear(g.input("x", (axis, 96)), [constant(WeightRef(name, file.tensors[name].shape, file.tensors[name].dtype, file))])[0]
            scales = {"m": g.input("scales", (pe.Dim("m", 8), 1))}
            if changed:
                assert adapted([y], [adapter], scales)[0].shape == y.shape
            else:
                with pytest.raises(UnsupportedModelError, match=f"{name}.*not multiplied"):
                    adapted([y], [adapter], scales)
