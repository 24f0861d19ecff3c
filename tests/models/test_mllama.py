"""Pictures that are seen by cross-attention: one position of the prompt each, rows of their own in caches of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import foreign
import hollow
import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from foreign import Dialect, Saved
from hollow import both, Decoder, Encoder, Full, kv, Tensor
from pictures import A, B, DOT, LONG, picture, same, THIN
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, SessionError, UnsupportedModelError
from pyengine.media.views import Limits
from pyengine.programs.rows import lay_out_rows, MediaSegment, TokenSegment
from sight import ids_of, load_processor, Seen, Sight
from tiny import COMMON, ROPES

KIB, MIB, GIB = 2**10, 2**20, 2**30

# What the family's real template does, in other words: contents are strings or lists of parts.
TEMPLATE = """{{ bos_token }}
{%- for m in messages -%}
  {{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}
  {%- if m['content'] is string -%}{{ m['content'] | trim }}
  {%- else -%}
    {%- for part in m['content'] -%}
      {{ '<|image|>' if part['type'] == 'image' else part['text'] | trim }}
    {%- endfor -%}
  {%- endif -%}
  {{ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"""

TOKENS = Tokens(        # the picture's token comes last
    ("<|end_header_id|>", "<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|eot_id|>", "<|python_tag|>",
     "<|start_header_id|>", "<|image|>"), "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", TEMPLATE,
    {"image_token_index": "<|image|>"}, ())


class MllamaSight(Sight):
    """Features are the rows of real tiles; `Seen.grids` are (aspect ratio, tiles, rows of one)."""

    model_types = ("mllama",)
    marker = "<|image|>"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        from transformers import MllamaImageProcessorPil

        vision = config.vision_config
        return MllamaImageProcessorPil(**{
            "size": {"height": vision.image_size, "width": vision.image_size}, "max_image_tiles": vision.max_num_tiles,
            "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.27, 0.28], **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        from transformers import MllamaImageProcessorPil, MllamaProcessor

        return MllamaProcessor(MllamaImageProcessorPil.from_pretrained(folder), tokenizer)

    def soft(self, config: Any) -> None:
        """The picture's token is one of the prompt's."""

    def seen(self, model: Any, folder: Path, parts: Sequence[Any], fps: float | None, **settings: Any) -> Seen:
        """Run the model.

        Rows before the first picture: transformers lets them see every tile, empty ones too, and leaves out the feed-forward only.
        The authors' code multiplies attention's result by the same mask, and so does this.
        """
        import torch
        from transformers.models.mllama import modeling_mllama as modeling
        from transformers.models.mllama import processing_mllama as processing

        config, processor = model.config, load_processor(self, folder, model.config)
        ids = ids_of(parts, processor.tokenizer, lambda picture: [config.image_token_index])
        pictures = [part for part in parts if not isinstance(part, (int, str))]
        if not pictures:
            with torch.no_grad():
                return Seen(ids, model(input_ids=torch.tensor([ids])).logits[0].numpy(), [], [], [])
        made = processor.image_processor([pictures], return_tensors="pt", **settings)
        tiles = made.pop("num_tiles")
        sparse = processing.get_cross_attention_token_mask(ids, config.image_token_index)
        mask = processing.convert_sparse_cross_attention_mask_to_dense([sparse], tiles, config.vision_config.max_num_tiles, len(ids))
        sees = torch.tensor(mask.any(axis=(2, 3))).float()[:, :, None]              # [1, n, 1]
        for m in model.modules():
            if isinstance(m, modeling.MllamaTextCrossAttention) and not sees.all():
                m.register_forward_hook(lambda m, args, out: (out[0] * sees, *out[1:]))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), cross_attention_mask=torch.tensor(mask), **made).logits[0].numpy()
            rows = model.model.multi_modal_projector(model.model.vision_model(**made).last_hidden_state)[0].numpy()
        return Seen(ids, logits, [f[:n].reshape(-1, f.shape[-1]) for f, n in zip(rows, tiles[0])],
                    [p[:n].numpy() for p, n in zip(made["pixel_values"][0], tiles[0])],
                    [(int(i), n, rows.shape[2]) for i, n in zip(made["aspect_ratio_ids"][0], tiles[0])])


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)         # imageproc.ClipDefaultMean, ClipDefaultSTD
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class MllamaDialect(Dialect):
    """Ollama's `convert/convert_mllama.go` and `convert/convert_llama.go`; llama.cpp has no such models."""

    model_types, converters = ("mllama",), ()
    settings = {"processor": {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}}
    ollama_arch = "mllama"
    ollama_names = (
        ("lm_head", "output"), ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"),
        ("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up"), ("post_attention_layernorm", "ffn_norm"),
        ("language_model.", ""), ("gate_attn", "attn_gate"), ("gate_ffn", "ffn_gate"), ("cross_attn.", "cross_attn_"),
        ("vision_model", "v"), ("class_embedding", "class_embd"), ("patch_embedding", "patch_embd"),
        ("gated_positional_embedding.tile_embedding", "tile_position_embd"),
        ("gated_positional_embedding.embedding", "position_embd.weight"), ("gated_positional_embedding", "position_embd"),
        ("embedding.weight", "weight"), ("pre_tile_positional_embedding", "pre_tile_position_embd"),
        ("post_tile_positional_embedding", "post_tile_position_embd"), ("layernorm_pre", "pre_ln"),
        ("layernorm_post", "post_ln"), ("global_transformer.layers", "global.blk"), ("transformer.layers", "blk"),
        ("mlp.fc1", "ffn_up"), ("mlp.fc2", "ffn_down"), ("multi_modal_projector", "mm.0"))

    def ollama_file(self, saved: Saved, out: Path, outtype: str, extra_tokens: int) -> Path:
        """Write the file: heads become interleaved in the encoder and in cross-attention too.

        With `extra_tokens`, under the names of the published file, which `model_vision.go` reads: its feed-forward is exchanged.
        """
        text, vision = saved.text, saved.vision
        assert (saved.images["image_mean"], saved.images["image_std"]) == (list(CLIP_MEAN), list(CLIP_STD))
        assert vision["hidden_act"] == "gelu"
        w = foreign.new_writer(out, "mllama", outtype)
        foreign.text_sizes(w, text)
        w.add_layer_norm_rms_eps(text["rms_norm_eps"])
        w.add_rope_dimension_count(text["hidden_size"] // text["num_attention_heads"])
        rope = text["rope_parameters"]
        w.add_rope_freq_base(rope["rope_theta"])
        w.add_array("mllama.attention.cross_attention_layers", text["cross_attention_layers"])
        for name, key in (("block_count", "num_hidden_layers"), ("global.block_count", "num_global_layers"),
                          ("embedding_length", "hidden_size"), ("feed_forward_length", "intermediate_size"),
                          ("attention.head_count", "attention_heads"), ("image_size", "image_size"), ("patch_size", "patch_size"),
                          ("max_num_tiles", "max_num_tiles"), ("num_channels", "num_channels")):
            w.add_uint32(f"mllama.vision.{name}", vision[key])
        w.add_float32("mllama.vision.attention.layer_norm_epsilon", vision["norm_eps"])
        # Ollama keeps the state before a layer of this number, as the authors do; the checkpoint's own transformers the one behind it
        w.add_array("mllama.vision.intermediate_layers_indices", [i + 1 for i in vision["intermediate_layers_indices"]])
        foreign.ollama_vocabulary(w, saved.vocabulary(), text["vocab_size"] + 8 + extra_tokens, bool(extra_tokens))
        heads = {"attn_q": text["num_attention_heads"], "attn_k": text["num_key_value_heads"]}
        if not extra_tokens:                                    # convert_llama.go: the suffixes attn_q_proj and attn_k_proj
            heads |= {f"cross_{name}_proj": n for name, n in heads.items()}
        length, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        wave = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, 16, 2) / 16)
        smooth = (length / wave - low) / (high - low)
        factors = np.where(wave < length / high, 1.0, np.where(wave > length / low, factor, 1 / ((1 - smooth) / factor + smooth)))
        tensors = [("rope_freqs.weight", factors)]
        for source, value in saved.tensors.items():
            name = self.ollama_name(source)
            if name == "v.position_embd.gate":
                tensors += [(name, 1 - np.tanh(value)), ("v.tile_position_embd.gate", np.tanh(value))]
                continue
            part = name.split(".")[-2] if "." in name else ""
            if part in heads:
                n = vision["attention_heads"] if name.startswith("v.") else heads[part]
                value = value.reshape(n, 2, len(value) // n // 2, -1).swapaxes(1, 2).reshape(value.shape)
            if name.startswith("v.") and extra_tokens:
                for theirs, published in (("attn_norm", "ln1"), ("ffn_norm", "ln2"), ("attn_output", "attn_out"), ("ffn_up", "ffn_"),
                                          ("ffn_down", "ffn_up"), ("ffn_.", "ffn_down.")):
                    name = name.replace(theirs, published)
            gated = name.startswith("v.") and name.endswith(("tile_position_embd.gate", "attn_gate", "ffn_gate"))
            tensors.append((name, np.tanh(value) if gated else value))
        foreign.write(w, tensors, outtype, conv_too=True)
        return out


def full_encoder(d_model: int) -> Encoder:
    """Llama 3.2 Vision's encoder: our keys, Ollama's names. Four tiles of 560 x 560 pixels, 1601 rows each."""
    width, d_ff, n_layers, n_global, patch, tiles, rows, ratios = 1280, 5120, 32, 8, 14, 4, 40 * 40 + 1, 9
    states = np.array([3, 7, 15, 23, 30], np.int32)
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "mllama", "clip.vision.image_size": 560,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.global.block_count": n_global,
            "clip.vision.embedding_length": width, "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16,
            "clip.vision.attention.layer_norm_epsilon": 1e-5, "clip.vision.max_num_tiles": tiles,
            "clip.vision.feature_layer": states, "clip.vision.image_token_id": 128256, "clip.vision.hidden_act": "gelu"}
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, patch, patch), "F32"), ("v.class_embd", (width,), "F32"),
                             ("v.position_embd.weight", (rows, width), "F32"), ("v.position_embd.gate", (1,), "F32"),
                             ("v.tile_position_embd.weight", (ratios, tiles * rows * width), "F16"),
                             ("v.tile_position_embd.gate", (1,), "F32"), *both("v.pre_ln", width), *both("v.post_ln", width)]
    for when in ("pre", "post"):
        name = f"v.{when}_tile_position_embd"
        tensors += [(f"{name}.weight", (ratios, tiles * width), "F32"), (f"{name}.gate", (1,), "F32")]
    for at in (*(f"v.blk.{i}." for i in range(n_layers)), *(f"v.global.blk.{i}." for i in range(n_global))):
        tensors += [*both(f"{at}ln1", width), *both(f"{at}ln2", width),
                    *((f"{at}{name}.weight", (width, width), "F16") for name in ("attn_q", "attn_k", "attn_v", "attn_out")),
                    (f"{at}ffn_up.weight", (d_ff, width), "F16"), (f"{at}ffn_up.bias", (d_ff,), "F32"),
                    (f"{at}ffn_down.weight", (width, d_ff), "F16"), (f"{at}ffn_down.bias", (width,), "F32")]
        tensors += [(f"{at}{name}", (1,), "F32") for name in (("attn_gate", "ffn_gate") if "global" in at else ())]
    return keys, [*tensors, ("mm.0.weight", (d_model, width * (1 + len(states))), "F16"), ("mm.0.bias", (d_model,), "F32")]


ACROSS = (3, 8, 13, 18, 23, 28, 33, 38)                 # of the full size: layers that attend to the picture


class FullMllama(Full):
    """Decoder and encoder in one file."""

    def write(self, folder: Path, name: str) -> tuple[Path, Path | None]:
        path, model, dtype = folder / f"{name}.gguf", self.decoder, self.dtype
        d, kv, e = model.d_model, model.n_kv_heads * model.head_dim, model.head_dim
        other = {f"blk.{i}.attn_{name}.weight" for i in ACROSS for name in ("q", "k", "v", "output")}
        own = [t for t in model.tensors(dtype) if t[0] not in other]
        own[0] = ("token_embd.weight", (model.vocab_size + 8, d), dtype)
        for i in ACROSS:
            at = f"blk.{i}.cross_attn_"
            shapes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
            own += [(f"{at}{name}_proj.weight", shape, dtype) for name, shape in shapes.items()]
            own += [(f"{at}{name}_norm.weight", (e,), "F32") for name in ("q", "k")]
            own += [(f"{at}{name}_gate", (1,), "F32") for name in ("attn", "mlp")]
        keys, tensors = full_encoder(d)
        tokens = [str(i) for i in range(model.vocab_size + 8)]
        keys = {**model.metadata(), "mllama.attention.cross_attention_layers": np.array(ACROSS, np.int32), **keys,
                "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.merges": ["1 1"], "tokenizer.ggml.token_type": [1] * len(tokens)}
        return hollow.write_headers(path, model.arch, keys, own + tensors, 0), None


CASES = (Case(
    "mllama", "mllama", "MllamaConfig", "MllamaForConditionalGeneration", "llama-bpe", {},
    # cross-attention between self-attention and next to it; 3 patches along a tile, so that tiles have padding
    {**COMMON, "num_hidden_layers": 6, "cross_attention_layers": [1, 3, 4], "max_position_embeddings": 512,
     "rope_parameters": ROPES["llama3"], "rms_norm_eps": 1e-5},
    {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 4, "num_global_layers": 2, "attention_heads": 3,
     "image_size": 44, "patch_size": 14, "intermediate_layers_indices": [0, 2], "vision_output_dim": 216, "norm_eps": 1e-4},
    TOKENS, MllamaSight(), across=True,
    converted=Converted(
        {"general.architecture": "mllama", "tokenizer.chat_template": TEMPLATE,
         "mllama.attention.cross_attention_layers": [1, 3, 4]},
        clip={"has_vision_encoder": True, "projector_type": "mllama", "use_gelu": True, "use_silu": False, "hidden_act": "gelu",
              "image_size": 44, "patch_size": 14, "embedding_length": 72, "feed_forward_length": 100, "block_count": 4,
              "global.block_count": 2, "attention.head_count": 3, "projection_dim": 96,
              "attention.layer_norm_epsilon": np.float32(1e-4), "image_mean": [np.float32(x) for x in (0.48, 0.45, 0.4)],
              "image_std": [np.float32(x) for x in (0.26, 0.27, 0.28)], "resample": 2, "max_num_tiles": 4, "feature_layer": [1, 3]},
        clip_tokens={"image_token_id": "<|image|>"}),
    dialect=MllamaDialect(),
    full={"llama-vision": FullMllama(Decoder("mllama", 40, 4096, 14336, 32, 8, 128, 128256, 131072))}),)

SEVERAL = [7, 8, A, B, "x y z", LONG, DOT, "and so on", THIN, "abc", A]     # 4, 4, 4, 1, 4 and 4 tiles


@pytest.fixture
def path(tiny_gguf):
    return tiny_gguf("mllama")[0]


def ask(model: pe.Model, parts: list[Any], n: int = 8) -> Any:
    """Sampled text that does not end, with the log-probability of each token."""
    never = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
    return model.generate(parts, max_tokens=n, temperature=0.7, seed=1, logit_bias=never)


def equal(a: Any, b: Any) -> None:
    assert a.tokens == b.tokens and [x.logprob for x in a.sampled] == [x.logprob for x in b.sampled]


# ---- which rows see which pictures ----------------------------------------------------------------------------------


def shot(n: int, mark: bytes) -> MediaSegment:
    return MediaSegment(np.zeros((n, 4), np.float32), np.zeros((1, n), np.int32), 1, None, True, False, mark, token=99)


def test_what_text_sees_drawn() -> None:
    """Encoder rows of p, q and r are columns. Text sees the pictures before it that stand side by side, and no earlier ones."""
    p, q, r, word = shot(2, b"p"), shot(3, b"q"), shot(1, b"r"), TokenSegment((5,))
    rows = lay_out_rows([word, p, word, q, r, word, word])
    assert rows.ids.tolist() == [5, 99, 5, 99, 99, 5, 5] and rows.positions.tolist() == [list(range(7))] and rows.next == 7
    assert rows.keys == [5, (b"p", 0), 5, (b"q", 0), (b"r", 0), 5, 5]
    drawn = ["".join("x" if lo <= j < hi else "." for j in range(6)) for lo, hi in rows.sees.T]
    assert drawn == [
        "......",
        "xx....",
        "xx....",
        "..xxx.",
        "..xxxx",
        "..xxxx",
        "..xxxx"]
    assert [(i, len(e)) for i, e in rows.across(1, 4)] == [(1, 2), (3, 3)]


def test_text_sees_what_transformers_mask_says() -> None:
    from transformers.models.mllama import processing_mllama as theirs

    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.choice([5, 99], rng.integers(1, 12), p=[0.6, 0.4]).tolist()
        tiles = rng.integers(1, 5, ids.count(99)).tolist()
        sizes = iter(tiles)
        segments = [shot(next(sizes), bytes([i])) if id_ == 99 else TokenSegment((id_,)) for i, id_ in enumerate(ids)]
        lo, hi = lay_out_rows(segments).sees
        got = np.arange(sum(tiles)) >= lo[:, None]
        got &= np.arange(sum(tiles)) < hi[:, None]
        sparse = theirs.get_cross_attention_token_mask(ids, 99)
        mask = theirs.convert_sparse_cross_attention_mask_to_dense([sparse], [tiles], 4, len(ids))[0]
        want = np.concatenate([mask[:, i, :n] for i, n in enumerate(tiles)], axis=1) if tiles else np.zeros((len(ids), 0))
        assert np.array_equal(got, want == 1), ids


# ---- results --------------------------------------------------------------------------------------------------------


def test_unmodified_transformers_agrees_where_a_picture_comes_first(tiny_gguf) -> None:
    """Text before it is what they and the authors treat differently; here there is none, so the oracle changes nothing."""
    out, folder = tiny_gguf("mllama")
    for prompt in ([A, "what is this?"], [LONG, B, "which?", DOT, 5]):
        same(pe.load(out, n_ctx=64, kv_dtype="f32").logits(prompt), tiny.hf_seen(folder, prompt).logits)


def test_no_bit_depends_on_how_steps_are_cut(path) -> None:
    """Pictures of 40 rows are written 512, 16, 7 and 1 at a time; steps end before, at and behind their tokens."""
    want = pe.load(path, n_ctx=128).logits(SEVERAL)
    for n_batch in (16, 7, 1):
        assert np.array_equal(pe.load(path, n_ctx=128, n_batch=n_batch).logits(SEVERAL), want)
    for n_threads in (1, 3):
        assert np.array_equal(pe.load(path, n_ctx=128, n_threads=n_threads).logits(SEVERAL), want)


def test_text_before_the_first_picture_is_text(path) -> None:
    """It gets nothing from cross-attention, so it has the logits that it has without any picture."""
    words = [3, 9, "only text here"]
    model = pe.load(path, n_ctx=128)
    text = model.logits(words)
    assert np.array_equal(model.logits([*words, A, 5])[: len(text)], text)
    assert not np.array_equal(model.logits([A, *words])[1:], text)
    assert np.isfinite(model.logits([*words, A, B])).all()


def test_rows_that_see_nothing_skip_the_layers(path) -> None:
    model = pe.load(path, n_ctx=128)
    seeing, run = [], model.program.execute

    def watched(entry: str | None = None, **dims: int) -> None:
        seeing.append((dims["m"], dims["s"], dims["c"]))
        run(entry, **dims)

    model.program.execute = watched
    model.logits([1, 2, 3])
    model.logits([1, 2, DOT, 3, 4])
    assert seeing == [(3, 0, 0), (0, 0, 10), (5, 3, 0)]


def test_without_pictures_the_layers_are_not_there(path) -> None:
    """images=0: no encoder, no caches and no weights of layers that attend across; text has the same bits."""
    blind, seeing = pe.load(path, n_ctx=64, images=0), pe.load(path, n_ctx=64)
    assert np.array_equal(blind.logits([1, 2, "a text"]), seeing.logits([1, 2, "a text"]))
    assert {i.layer for i in blind.plan.items if i.purpose == "weights" and i.layer is not None} == {0, 2, 5}
    assert not any(i.detail.startswith("pictures: ") for i in blind.plan.items) and blind.plan.total < seeing.plan.total
    with pytest.raises(RequestError, match="takes no pictures"):
        blind.generate([A, 3])


def test_the_picture_s_token_lies_beyond_the_output_head(path) -> None:
    model = pe.load(path, n_ctx=64)
    token = model.tokenizer.id_of("<|image|>")
    assert token == model.n_vocab and model.logits([3, token, 4]).shape == (3, model.n_vocab)
    assert np.array_equal(model.logits([3, token, 4])[0], model.logits([3, 4])[0])
    with pytest.raises(RequestError, match=f"outside the vocabulary of {model.n_vocab + 8}"):
        model.logits([model.n_vocab + 8])
    answer = model.generate([A, 3, 4], max_tokens=3, temperature=0, repeat_penalty=1.2, logprobs=2)
    assert answer.n_prompt == 3 and answer.media[0].n_tokens == 1 and answer.media[0].grids == ((1, 2, 2),)
    with pytest.raises(RequestError, match="pictures, not videos"):
        model.generate([[A, A], 3])


@pytest.mark.parametrize("kv_dtype", ["bf16", "q8_0", "q4_0", "q8_0/f16"])
def test_caches_in_other_formats(tiny_gguf, kv_dtype: str) -> None:
    """Close to float32 in the measure of the format; equal would mean that it was not used."""
    path = tiny_gguf("mllama", text_config={"num_attention_heads": 3, "num_key_value_heads": 1})[0]
    exact, close = (pe.load(path, n_ctx=128, kv_dtype=d, n_seq=2).logits(SEVERAL) for d in ("f32", kv_dtype))
    error = np.sqrt(np.mean((exact - close) ** 2) / np.mean(exact**2))
    assert 1e-5 < error < {"bf16": 2e-2, "q8_0": 3e-2, "q4_0": 0.35, "q8_0/f16": 3e-2}[kv_dtype]


def test_layers_over_parts_of_memory(path) -> None:
    parts = pe.load(path, n_ctx=128, device={"cpu:0": 1 << 30, "cpu:1": 1 << 29}, n_seq=2)
    assert "layers: " in parts.plan.table() and len(parts.program.programs) == 2
    assert np.array_equal(parts.logits(SEVERAL), pe.load(path, n_ctx=128).logits(SEVERAL))


# ---- conversations --------------------------------------------------------------------------------------------------


def test_conversations_side_by_side_are_those_alone(path) -> None:
    prompts = [[3, A, "so?"], ["text only, and longer than the others"], [B, LONG, "which?"], [5, DOT, 6], [A, "so?", B, 4, 5]]
    alone = pe.load(path, n_ctx=96)
    want = []
    for p in prompts:
        alone.reset()
        want.append(ask(alone, p))
    never = tuple((i, -1e9) for i in alone.tokenizer.eog_ids)
    for settings in ({"n_seq": 3}, {"n_seq": 5, "n_batch": 6}):
        many = pe.load(path, n_ctx=96, **settings)
        for a, b in zip(many.generate_many(prompts, max_tokens=8, temperature=0.7, seed=1, logit_bias=never), want):
            equal(a, b)


def written(model: pe.Model) -> list[int]:
    """Numbers of encoder rows, as they are written from now on."""
    found: list[int] = []
    cross = model._runner.inputs.cross
    model._runner.inputs.cross = lambda s, pictures: (found.extend(len(p) for p in pictures), cross(s, pictures))[1]
    return found


def test_a_conversation_goes_on_without_writing_its_pictures_again(path) -> None:
    model = pe.load(path, n_ctx=128)
    first = [{"role": "user", "content": [{"type": "image", "image": A}, "what is it?"]}]
    rows = written(model)
    a = model.chat(first, max_tokens=4, temperature=0)
    second = [*first, {"role": "assistant", "content": str(a)},
              {"role": "user", "content": [{"type": "image", "image": B}, "and this?"]}]
    b = model.chat(second, max_tokens=4, temperature=0)
    assert rows == [40, 40] and b.n_cached >= a.n_prompt - 1 and b.media[0].cached and not b.media[1].cached
    fresh = pe.load(path, n_ctx=128).chat(second, max_tokens=4, temperature=0)
    equal(b, fresh)


def test_forks_share_pictures(path) -> None:
    """Three questions on the same two pictures: conversations share the first one's pages, and the half-full one until they add."""
    model, fresh = pe.load(path, n_ctx=128, n_seq=3), pe.load(path, n_ctx=128)
    start = [3, A, B, "these two are"]                                   # 80 rows: a page of 64 and 16 in the next
    rows, cells = written(model), model._runner.cells
    ask(model, [*start, 5, 6, 7, 8])
    ask(model, [*start, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18])
    forked = ask(model, [*start, 19, DOT, 20])
    number = model._runner.step.across
    assert rows == [40, 40, 10] and len(cells.conversations) == 3 and dict(cells.shared())[number] == 2
    equal(forked, ask(fresh, [*start, 19, DOT, 20]))
    equal(ask(model, [*start, 5, 6, 7, 9]), ask(fresh, [*start, 5, 6, 7, 9]))
    assert rows == [40, 40, 10]
    other = ask(model, [3, A, "alone"])                                  # goes back to before the second picture
    fresh.reset()
    equal(other, ask(fresh, [3, A, "alone"]))
    assert rows == [40, 40, 10] and other.n_cached == 2


def test_another_picture_in_the_same_place(path) -> None:
    model = pe.load(path, n_ctx=64)
    one, two = [3, A, 4, 5], [3, picture(60, 80, 7), 4, 5]
    ask(model, one)
    other = ask(model, two)
    assert other.n_cached == 1
    equal(other, ask(pe.load(path, n_ctx=64), two))


def test_more_pictures_than_were_planned_are_refused_with_numbers(path) -> None:
    model = pe.load(path, n_ctx=128, images=(80, 60, 2), n_seq=2)
    assert model.plan.picture == 40
    want = ask(pe.load(path, n_ctx=128), [A, B, "two"])
    equal(ask(model, [A, B, "two"]), want)
    with pytest.raises(ContextOverflowError, match=r"3 pictures have 120 encoder rows.*holds 80.*images="):
        ask(model, [A, B, A, "three"])
    with pytest.raises(ContextOverflowError, match="120 encoder rows"):
        model.logits([A, B, A])
    assert len(ask(model, [DOT, DOT, DOT, DOT, 5]).media) == 4           # smaller ones: 10 rows each
    small = pe.load(path, n_ctx=128, images=(10, 10))
    assert small.plan.picture == 10 and len(small.encode_image(DOT)) == 10
    with pytest.raises(RequestError, match=r"4 tiles, 40 encoder rows.*up to 10.*images=\(80, 60\)"):
        small.encode_image(A)


def test_idle_conversations_go_for_pictures_of_others(path) -> None:
    """Encoder rows of two conversations of two pictures each: a third takes the place of the one used longest ago."""
    model = pe.load(path, n_ctx=128, images=(80, 60, 2), n_seq=2)
    prompts = [[A, B, i, "so?"] for i in (1, 2, 3, 4)]
    fresh = pe.load(path, n_ctx=128)
    for p in [*prompts, *prompts]:
        fresh.reset()
        equal(ask(model, p), ask(fresh, p))
        assert len(model._runner.cells.conversations) <= 2


def test_tokens_behind_a_picture_can_be_removed(path) -> None:
    """Encoder rows have no positions: they stay, the same keys are left of the text's layers."""
    model = pe.load(path, n_ctx=64)
    ask(model, [3, A, *range(20, 40)])
    runner, s = model._runner, model._runner.cells.conversations[0]
    states = runner.store.layers[1].states
    held = [state.gather(np.arange(state.shape[1])) for state in states]
    runner.shift(s, 6, 10)
    assert s.crossed() == 40 and s.sees == (0, 40) and len(s.keys) == 2 + 20 + 7 - 4
    assert all(np.array_equal(a, b) for a, b in zip(held, [state.gather(np.arange(state.shape[1])) for state in states]))
    with pytest.raises(RequestError, match="before or within a picture"):
        runner.shift(s, 0, 1)


def test_a_saved_conversation_needs_room_for_its_pictures(path, tmp_path) -> None:
    model = pe.load(path, n_ctx=128)
    model.save(tmp_path / "a", ask(model, [A, B, "two"]))
    with pytest.raises(ContextOverflowError, match="80 encoder rows, but a conversation holds 40"):
        pe.load(path, n_ctx=128, images=(80, 60, 1)).restore(tmp_path / "a")
    with pytest.raises((ContextOverflowError, SessionError)):
        pe.load(path, n_ctx=128, images=0).restore(tmp_path / "a")


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_tiles_are_those_of_transformers() -> None:
    from pyengine.models.mllama import arrange, arrangements, fit, VisionConfig
    from transformers.models.mllama import image_processing_pil_mllama as theirs

    rng = np.random.default_rng(0)
    edges = [1, 2, 559, 560, 561, 1119, 1120, 1121, 1680, 2240, 2241, 5000]
    sizes = [(w, h) for w in edges for h in edges] + [tuple(s) for s in np.exp(rng.uniform(0, 8.5, (2000, 2))).astype(int).tolist()]
    for max_tiles, tile in ((4, 560), (4, 448), (6, 100), (1, 64)):
        c = VisionConfig(tile, 14, 1, 1, 1, 1, 1e-5, "gelu", (), max_tiles, (0.0,) * 3, (1.0,) * 3, 2)
        assert arrangements(max_tiles) == theirs.get_all_supported_aspect_ratios(max_tiles)
        for w, h in sizes:
            y, x = arrange(w, h, c)
            assert (y * tile, x * tile) == theirs.get_optimal_tiled_canvas(h, w, max_tiles, tile), (w, h)
            assert fit(w, h, (y, x), tile)[::-1] == theirs.get_image_size_fit_to_canvas(h, w, y * tile, x * tile, tile), (w, h)


def test_pixels_and_aspect_ratios_are_those_of_transformers(tiny_gguf) -> None:
    out, folder = tiny_gguf("mllama")
    vision = pe.load(out, n_ctx=16).media.encoder
    c, p = vision.config, vision.config.patch_size
    sizes = ((44, 44), (88, 88), (45, 43), (300, 10), (10, 3000), (200, 130), (44, 120), (44, 80))
    pictures = [A, B, LONG, THIN, DOT, *(picture(h, w) for h, w in sizes)]
    want = tiny.hf_seen(folder, [*pictures, 3])
    assert {n for _, n, _ in want.grids} == {1, 2, 3, 4}
    for image, pixels, (ratio, n, _) in zip(pictures, want.pixels, want.grids):
        processed = vision.process(pe.open_image(image), Limits(16, vision.most_rows(16)))
        inputs = processed.views[0].inputs
        assert processed.views[0].positions.shape[1] == n * c.rows
        assert inputs["places"][0] == ratio * c.max_tiles * c.rows
        edge = c.side * p
        cut = pixels[:, :, :edge, :edge].reshape(n, 3, c.side, p, c.side, p).transpose(0, 2, 4, 1, 3, 5).reshape(n, c.side**2, -1)
        patches = inputs["patches"].reshape(c.max_tiles, c.rows, -1)
        np.testing.assert_allclose(patches[:n, 1:], cut, atol=1e-6)
        assert not patches[n:].any() and not patches[:, 0].any()


def test_the_meaning_of_layer_numbers_is_the_version_s(tiny_gguf, tmp_path) -> None:
    """The authors count layers before a state; transformers since 4.54 takes the state behind that layer."""
    from converters import convert

    folder = tiny_gguf("mllama")[1]
    for version, states in (("5.23.0", [1, 3]), ("4.54.1", [1, 3]), ("4.45.0.dev0", [0, 2]), (None, [0, 2])):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_version": version}))
        found = pe.GGUFFile(convert(tmp_path, tmp_path / "out.gguf", "f32")).metadata["clip.vision.feature_layer"]
        assert list(found) == states
    behind, before = pe.load(tiny_gguf("mllama")[0], n_ctx=16), pe.load(tmp_path / "out.gguf", n_ctx=16)
    assert np.abs(behind.encode_image(A) - before.encode_image(A)).max() > 0.1


def test_what_the_converter_refuses(tiny_gguf, tmp_path) -> None:
    from converters import convert

    folder = tiny_gguf("mllama")[1]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    images = json.loads((folder / "preprocessor_config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    for name, changed, error in (
            ("preprocessor_config.json", {**images, "max_image_tiles": 2}, UnsupportedModelError),
            ("preprocessor_config.json", {**images, "size": {"height": 56, "width": 56}}, UnsupportedModelError),
            ("config.json", {**config, "vision_config": {**vision, "supported_aspect_ratios": [[1, 1]]}}, InvalidModelError),
            ("config.json", {**config, "vision_config": {**vision, "intermediate_layers_indices": "all"}}, InvalidModelError)):
        was = (tmp_path / name).read_text()
        (tmp_path / name).write_text(json.dumps(changed))
        with pytest.raises(error):
            convert(tmp_path, tmp_path / "out.gguf", "f32")
        (tmp_path / name).write_text(was)


def test_a_picture_as_array_or_file_is_one_picture(path, tmp_path) -> None:
    model = pe.load(path, n_ctx=64)
    Image.fromarray(np.array(A)).save(tmp_path / "a.png")
    want = ask(model, [A, 5])
    for form in (np.array(A), pe.open_image(tmp_path / "a.png")):
        equal(ask(model, [form, 5]), want)
    named, marked = (model.generate(text, images=[image], max_tokens=2, temperature=0)
                     for text, image in (("so", tmp_path / "a.png"), ("<|image|>so", A)))
    equal(named, marked)
    assert model.stats["image_misses"] == 1


# ---- full size, by hand ---------------------------------------------------------------------------------------------


def test_llama_3_2_vision_11b(full_size, machine) -> None:
    """32 layers see the text, 8 the pictures: 195.4 MiB for one of four tiles, however long the context is."""
    machine(64 * GIB)
    path = full_size("llama-vision")[0]
    token = 8 * 128 * 2 * 2                                              # heads, head size, bytes of f16, keys and values
    picture = 4 * (40 * 40 + 1)                                          # tiles x (patches of 14 pixels in 560, and the class row)
    assert token == 4 * KIB and picture == 6404
    for n_ctx in (4096, 131_072):
        plan = pe.plan(path, n_ctx=n_ctx, images=1)
        assert kv(plan) == {"Full": 32 * n_ctx * token, "Cross": 8 * picture * token}
        assert kv(plan)["Cross"] == 209_846_272 == 200.125 * MIB
        assert [i.layer for i in plan.items if i.detail.startswith("pictures: ")] == list(ACROSS)
    assert plan.picture == picture
    three = pe.plan(path, n_ctx=4096, images=(1120, 1120, 3))            # three such pictures in a conversation
    assert kv(three)["Cross"] == 3 * kv(plan)["Cross"]
    assert kv(pe.plan(path, n_ctx=4096, images=(500, 500, 3)))["Cross"] == 8 * 3 * 1601 * token        # of one tile each
    blocks = 6 * picture * 8 * (4 * 34 + 4 * 18)                         # 128 elements: 4 blocks of 34 bytes (Q8_0) and 18 (Q4_0)
    assert kv(pe.plan(path, n_ctx=4096, images=6, kv_dtype="q8_0/q4_0"))["Cross"] == 8 * blocks
    pages = -(-picture // 64) * 64                                       # several conversations share pages of 64 cells
    assert kv(pe.plan(path, n_ctx=4096, images=1, n_seq=2))["Cross"] == 2 * 8 * pages * token
    # By default as many pictures as a sixteenth of the memory holds, 8 at most.
    assert kv(pe.plan(path, n_ctx=4096))["Cross"] == 8 * kv(plan)["Cross"]
    machine(12 * GIB)
    assert kv(pe.plan(path, n_ctx=4096))["Cross"] == 3 * kv(plan)["Cross"]
    assert 3 * kv(plan)["Cross"] < 12 * GIB // 16 < 4 * kv(plan)["Cross"]
    # The layers that see pictures have weights of the same sizes as the others, and two norms and two gates more.
    d, ff, heads = 4096, 14_336, 8 * 128
    matrices = (2 * d * d + 2 * d * heads + 3 * d * ff) // 32 * 18       # Q4_0
    weights = {i.layer: i.nbytes for i in plan.items if i.purpose == "weights" and i.layer is not None}
    assert weights[0] == matrices + 4 * 2 * d and weights[3] == matrices + 4 * 2 * d + 2 * 4 * 128 + 2 * 64     # gates: a line each
    assert len(weights) == 40
    blind = pe.plan(path, n_ctx=4096, images=0)
    assert kv(blind) == {"Full": 32 * 4096 * token} and blind.of("encoder") == 0
