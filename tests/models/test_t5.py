"""T5 and its kin: what all encoder-decoders must do is in tests/contract/test_sources.py; this file declares what it does it with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hollow
import numpy as np
import pytest
import tiny
import tiny_sources
import tiny_towers
from cases import SourceCase

import pyengine as pe
from converters.writer import convert
from pyengine.errors import InvalidModelError, UnsupportedModelError

T5 = SourceCase(
    "t5", "t5", "T5Config", "T5ForConditionalGeneration", "unigram",
    {"d_model": 56, "d_kv": 20, "d_ff": 88, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 3, "relative_attention_num_buckets": 16,
     "relative_attention_max_distance": 40, "decoder_start_token_id": 0},
    {"t5": {}, "flan-t5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-5}},
    lambda config: config.d_kv**-0.5, ("T5WithLMHeadModel", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration"))
SOURCES = (T5,)


def test_a_head_of_its_own_is_used(tmp_path: Path) -> None:
    """T5 1.1: transformers 5 ties the head whatever the checkpoint has, so it is taken apart here."""
    import torch

    folder = tiny_sources.make(T5, tmp_path / "hf", own_head=True, tie_word_embeddings=False)
    theirs = tiny_sources.reference(T5, folder)
    saved = __import__("safetensors.torch", fromlist=["load_file"]).load_file(folder / "model.safetensors")
    assert not torch.equal(saved["lm_head.weight"], saved["shared.weight"])
    theirs.lm_head.weight = torch.nn.Parameter(saved["lm_head.weight"])
    source, ids = list(range(5, 40)), [0, 9, 30, 12, 7]
    model = pe.load(convert(folder, tmp_path / "own.gguf", "f32"), kv_dtype="f32")
    tiny_towers.close(model.logits(ids, source=source), tiny_sources.states(theirs, source, ids)[1])


def test_a_sentencepiece_model_alone_gives_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    both = tiny_sources.make(T5, tmp_path / "both")
    want = AutoTokenizer.from_pretrained(both)
    for file in both.glob("tokenizer*.json"):
        file.unlink()
    tiny_sources.save_unigram(both, alone=True)
    model = pe.load(convert(both, tmp_path / "alone.gguf"))
    for text in (*tiny.TEXTS, "  two  blanks ", "The <extra_id_0> fox <extra_id_1> dog", "\uff21\ufb01 \u00bd"):                # wide letters, a ligature, a fraction: the map of characters
        assert model.tokenize(text) == want(text)["input_ids"], text


def test_positions_have_no_end_but_the_context(tmp_path: Path) -> None:
    """Distances beyond the farthest bucket share its bias, in prompts and answers of any length."""
    folder = tiny_sources.make(T5, tmp_path / "hf")
    theirs = tiny_sources.reference(T5, folder)
    rng = np.random.default_rng(5)
    source, ids = rng.integers(3, 180, 700).tolist(), [0, *rng.integers(3, 180, 600).tolist()]
    model = pe.load(convert(folder, tmp_path / "long.gguf", "f32"), n_ctx=1024, kv_dtype="f32")
    hidden, logits = tiny_sources.states(theirs, source, ids)
    tiny_towers.close(model.hidden(source), hidden)
    tiny_towers.close(model.logits(ids, source=source), logits)


def test_a_table_of_no_use_is_refused(tmp_path: Path) -> None:
    folder = tiny_sources.make(T5, tmp_path / "hf", relative_attention_num_buckets=16, relative_attention_max_distance=8)
    with pytest.raises(InvalidModelError, match="no such buckets reach a distance of 8"):
        pe.load(convert(folder, tmp_path / "short.gguf"))


def test_other_feed_forwards_are_refused(tmp_path: Path) -> None:
    folder = tiny_sources.make(T5, tmp_path / "hf", feed_forward_proj="gated-silu")
    with pytest.raises(UnsupportedModelError, match="gated-silu"):
        convert(folder, tmp_path / "silu.gguf")


@pytest.mark.parametrize("name", ["MT5", "UMT5"])
def test_kin_of_other_names(name: str, tmp_path: Path) -> None:
    """mT5 is T5 1.1; in UMT5 each layer has a table of its own."""
    case = replace(T5, config_class=f"{name}Config", model_class=f"{name}ForConditionalGeneration")
    folder = tiny_sources.make(case, tmp_path / "hf")
    source, ids = list(range(5, 70)), [0, 9, 30, 12, 7, *range(20, 60)]
    hidden, logits = tiny_sources.states(tiny_sources.reference(case, folder), source, ids)
    with pe.load(convert(folder, tmp_path / "kin.gguf", "f32"), kv_dtype="f32") as model:
        tiny_towers.close(model.hidden(source), hidden)
        tiny_towers.close(model.logits(ids, source=source), logits)


def test_files_of_llama_cpp_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have neither the farthest distance nor a scale of the head, and a table for attention across that nobody reads."""
    from converters import t5
    from converters.contract import Constant

    folder = tiny_sources.make(T5, tmp_path / "hf", relative_attention_max_distance=128)
    source, ids = list(range(5, 90)), [0, 9, 30, 12, 7]
    want = pe.load(convert(folder, tmp_path / "ours.gguf", "f32"), kv_dtype="f32").logits(ids, source=source)
    keys, tensors = t5.T5.write_keys, t5.T5.tensors

    def written(self, out) -> None:
        keys(self, out)
        for name in ("logit_scale", "attention.relative_max_distance"):
            del out.kv_data[0][f"t5.{name}"]

    def listed(self):
        yield from tensors(self)
        yield Constant("dec.blk.0.cross_attn_rel_b.weight", np.ones((16, 3), np.float32))

    monkeypatch.setattr(t5.T5, "write_keys", written)
    monkeypatch.setattr(t5.T5, "tensors", listed)
    theirs = pe.load(convert(folder, tmp_path / "theirs.gguf", "f32"), kv_dtype="f32")
    assert np.array_equal(theirs.logits(ids, source=source), want)


def test_the_plan_of_a_published_size(tmp_path: Path) -> None:
    """Flan-T5 large, of a file without data: weights of both halves, caches of both attentions, a prompt's run."""
    d, f, heads, n, vocab = 1024, 2816, 16, 24, 32128
    keys = {"context_length": 512, "embedding_length": d, "feed_forward_length": f, "block_count": n, "attention.head_count": heads,
            "attention.key_length": 64, "attention.relative_buckets_count": 32, "attention.layer_norm_rms_epsilon": 1e-6, "decoder_start_token_id": 0}
    tensors = [("token_embd.weight", (vocab, d), "Q8_0"), ("output.weight", (vocab, d), "Q8_0")]
    for half, names in (("enc", ("attn",)), ("dec", ("attn", "cross_attn"))):
        tensors.append((f"{half}.output_norm.weight", (d,), "F32"))
        for b in (f"{half}.blk.{i}" for i in range(n)):
            tensors += [(f"{b}.{name}_{part}.weight", (d, d), "Q8_0") for name in names for part in "qkvo"]
            tensors += [(f"{b}.{name}_norm.weight", (d,), "F32") for name in (*names, "ffn")]
            tensors += [(f"{b}.ffn_{part}.weight", shape, "Q8_0") for part, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f)))]
        tensors.append((f"{half}.blk.0.attn_rel_b.weight", (32, heads), "F32"))
    path = hollow.write_headers(tmp_path / "flan-t5-large.gguf", "t5", {f"t5.{k}": v for k, v in keys.items()}, tensors, 0)
    plan = pe.plan(path)
    assert plan.n_layers == n and (plan.n_ctx, plan.n_seq) == (512, 4)
    caches = {i.detail: i.nbytes for i in plan.items if i.purpose == "kv" and i.layer == n - 1}
    assert caches == {"4 x all 512 positions": 4 * 512 * 2 * d * 2, "4 x the source: 512 rows": 4 * 512 * 2 * d * 2}
    matrices = n * (4 * d * d + 3 * d * f)                           # of the encoder, in blocks of 34 bytes for 32
    layers = sum(i.nbytes for i in plan.items if i.purpose == "encoder" and i.layer is not None)
    assert matrices * 34 / 32 <= layers <= 1.02 * matrices * 34 / 32
    decoder = n * (8 * d * d + 3 * d * f) + vocab * d
    assert decoder * 34 / 32 <= plan.of("weights") <= 1.02 * decoder * 34 / 32 and plan.max_ctx == 512
    longer = pe.plan(path, n_ctx=2048)
    assert longer.of("kv") > 3.9 * plan.of("kv") and longer.of("encoder") > plan.of("encoder")
