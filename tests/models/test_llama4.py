"""Llama 4 whole, against transformers: chunks and their borders, temperature, experts, tiles of pictures, and its variants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import foreign
import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from foreign import Dialect, LlamaCpp, Saved, Tensors, vision_name
from hollow import both, Decoder, Encoder, Full, kv, Tensor, vit_layers
from oracle import Planned
from pictures import picture, same
from pyengine.cache.policy import Chunked, Full as FullCache
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.files.model_files import open_files
from pyengine.models import llama4
from pyengine.programs.bound import bind
from sight import of_any_backend, Run, Sight
from tiny import COMMON

KIB, MIB, GIB = 2**10, 2**20, 2**30

# 56 pixels a tile, 4 soft tokens; canvases of 1, 1 x 2, 3 x 1, 1 x 4 and 4 x 4 tiles
ONE, WIDE, TALL, ROW = picture(50, 56), picture(40, 97, 1), picture(150, 29, 2), picture(40, 170)
LARGE, DOT = picture(240, 260), picture(1, 1)
PROMPTS: dict[str, list[Any]] = {
    "text": np.random.default_rng(0).integers(0, 390, 120).tolist(),
    "one tile": ["what is ", ONE, " this?"],
    "tiles": [5, WIDE, "and", TALL, "differ how?", 6],
    "side by side": [ONE, DOT, ROW],
    "sixteen tiles and the whole": ["look at ", LARGE, " and ", WIDE],
}

# What the family's real template does, in other words: contents are strings or lists of parts.
TEMPLATE = """{{ bos_token }}
{%- for m in messages -%}
  {{ '<|header_start|>' + m['role'] + '<|header_end|>\n\n' }}
  {%- if m['content'] is string -%}{{ m['content'] }}
  {%- else -%}
    {%- for part in m['content'] -%}{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
  {%- endif -%}
  {{ '<|eot|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{%- endif -%}"""

TOKENS = Tokens(
    ("<|image_end|>", "<|begin_of_text|>", "<|tile_y_separator|>", "<|patch|>", "<|eot|>", "<|image_start|>",
     "<|header_start|>", "<|tile_x_separator|>", "<|header_end|>", "<|image|>", "<|finetune_right_pad|>"), "<|begin_of_text|>",
    "<|eot|>", "<|finetune_right_pad|>", TEMPLATE,
    {"boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>", "image_token_index": "<|patch|>"})


@cache
def llama4_images() -> Any:
    """Return transformers' Llama4ImageProcessor, which is a torchvision one only, with Pillow's resizing.

    What it takes from torchvision is written out here: padding with zeros, and normalization in the picture's own dtype.
    """
    import sys
    import types
    from unittest import mock

    import torch
    from PIL import Image
    from transformers import image_processing_backends  # noqa: F401  looks for torchvision, before there seems to be one

    def pad(images: Any, padding: Sequence[int], fill: Sequence[int]) -> Any:
        assert not any(fill) and not any(padding[:2])
        return torch.nn.functional.pad(images, (0, padding[2], 0, padding[3]))

    v2 = types.ModuleType("torchvision.transforms.v2")
    v2.functional = types.SimpleNamespace(pad=pad)
    names = ("torchvision", "torchvision.transforms")
    with mock.patch.dict(sys.modules, {**{n: types.ModuleType(n) for n in names}, v2.__name__: v2}):
        from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    class Llama4Images(Llama4ImageProcessor):
        def resize(self, image: Any, size: Any, resample: Any = None, **_: Any) -> Any:
            pictures = [Image.fromarray(i.permute(1, 2, 0).numpy()).resize((size.width, size.height), resample) for i in image]
            return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])

        def normalize(self, image: Any, mean: Any, std: Any, **_: Any) -> Any:
            mean, std = (torch.tensor(x, dtype=image.dtype).view(-1, 1, 1) for x in (mean, std))
            return (image - mean) / std

    return Llama4Images


class Llama4Sight(Sight):
    """Pictures are tiles, of which the last is the whole one; `Seen.pixels` are [tiles, 3, h, w], numbers that bfloat16 holds."""

    model_types = ("llama4",)
    marker = "<|image|>"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        side = config.vision_config.image_size
        return llama4_images()(**{"size": {"height": side, "width": side}, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        from transformers import Llama4Processor

        return of_any_backend(Llama4Processor)(llama4_images().from_pretrained(folder), tokenizer)

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        pixels = [m["pixel_values"].float() for m in made]
        if not pixels:
            return Run({}, [], [], [])
        rows = [model.get_image_features(p, return_dict=True).last_hidden_state.flatten(0, 1) for p in pixels]
        return Run({"pixel_values": torch.cat(pixels)}, [model.multi_modal_projector(r) for r in rows], pixels, [])


class Llama4Dialect(Dialect):
    """llama.cpp's `conversion/llama4.py`; Ollama's `convert/convert_llama4.go`."""

    model_types = ("llama4",)
    arch, names, projector = "llama4", gguf.MODEL_ARCH.LLAMA4, "llama4"
    feed_forward = "intermediate_size_mlp"
    ollama_arch = "llama4"
    ollama_names = (
        ("model.layers", "blk"), ("input_layernorm", "attn_norm"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("post_attention_layernorm", "ffn_norm"),
        ("vision_model", "v"), ("multi_modal_projector", "mm"), ("patch_embedding.linear", "patch_embedding"))

    def assume(self, saved: Saved) -> None:
        text = saved.text
        assert [bool(r) for r in text["no_rope_layers"]] == [i % 4 != 3 for i in range(text["num_hidden_layers"])]
        assert text["attention_chunk_size"] == text["floor_scale"] == 8192 and text["attn_scale"] == 0.1
        assert text["use_qk_norm"] == (text["num_local_experts"] != 128)
        assert saved.vision["rope_parameters"]["rope_theta"] == 1e4

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        text = saved.text
        foreign.head_sizes(w, text)
        w.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
        w.add_rope_dimension_count(text["head_dim"])
        w.add_expert_feed_forward_length(text["intermediate_size"])
        w.add_expert_count(text["num_local_experts"])
        w.add_expert_used_count(text["num_experts_per_tok"])
        w.add_interleave_moe_layer_step(text["interleave_moe_layer_step"])

    def text_tensors(self, saved: Saved) -> Tensors:
        if saved.text["rope_parameters"]["rope_type"] == "llama3":
            yield "rope_freqs.weight", foreign.llama3_factors(saved.text)
        yield from super().text_tensors(saved)

    def text_tensor(self, saved: Saved, source: str, value: np.ndarray) -> Tensors:
        if ".experts." not in source:
            yield from super().text_tensor(saved, source, value)
            return
        # [experts, in, out]; gate and up side by side
        parts = zip(("gate_proj", "up_proj"), np.split(value, 2, axis=2)) if "gate_up" in source else [("down_proj", value)]
        for part, matrices in parts:
            name = self.text_name(source.rpartition(".")[0] + f".{part}")
            yield f"{name}.weight", matrices.swapaxes(1, 2)

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        w.add_vision_attention_layernorm_eps(1e-5)
        w.add_vision_use_gelu(True)
        w.add_vision_projector_scale_factor(int(1 / saved.vision["pixel_shuffle_ratio"]))

    def vision_tensor(self, saved: Saved, source: str, value: np.ndarray, legacy: bool) -> Tensors:
        if source == "multi_modal_projector.linear_1.weight":
            yield "mm.model.fc.weight", value
            return
        name = vision_name(source + ".weight" if source.endswith("positional_embedding_vlm") else source)
        yield name if legacy else name.replace("attn_post_norm", "ln2"), value

    def ollama_keys(self, w: gguf.GGUFWriter, saved: Saved) -> tuple[dict[str, int], float | None]:
        """The dense layers' width has a key of its own; nothing about chunks and temperature."""
        text, vision = saved.text, saved.vision
        self.assume(saved)
        w.add_layer_norm_rms_eps(text["rms_norm_eps"])
        w.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
        w.add_rope_dimension_count(text["hidden_size"] // text["num_attention_heads"])
        foreign.head_sizes(w, text)
        for name, key in (("intermediate_size", "intermediate_size_mlp"), ("intermediate_size_moe", "intermediate_size"),
                          ("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok"),
                          ("interleave_moe_layer_step", "interleave_moe_layer_step")):
            w.add_uint32(f"llama4.{name}", text[key])
        w.add_bool("llama4.use_qk_norm", text["use_qk_norm"])
        w.add_float32("llama4.vision.rope.freq_base", vision["rope_parameters"]["rope_theta"])
        w.add_float32("llama4.vision.layer_norm_epsilon", vision["norm_eps"])
        w.add_float32("llama4.vision.pixel_shuffle_ratio", vision["pixel_shuffle_ratio"])
        return {"block_count": vision["num_hidden_layers"], "feed_forward_length": vision["intermediate_size"],
                "image_size": vision["image_size"], "attention.head_count": vision["num_attention_heads"]}, None


class Llama4LlamaCpp(LlamaCpp):
    """It leaves out the token before the whole picture, and goes through a tile's columns, not through its rows.

    Its pixel shuffle (`clip.cpp`, `build_llama4`) leaves out the last of transformers' two transpositions.
    """

    def ids(self, seen: Any, soft: int | None) -> list[int | None]:
        return [seen.ids[0], *[None] * 4, seen.ids[-1]]

    def rows(self, rows: np.ndarray, seen: Any) -> np.ndarray:
        side = int(len(rows) ** 0.5)
        return rows[np.arange(len(rows)).reshape(side, side).T.reshape(-1)]


@dataclass(frozen=True)
class Llama4Decoder(Decoder):
    """Experts in every layer; `d_ff` is the width of each and of the one that all tokens go through."""

    n_experts: int = 16

    def tensors(self, dtype: str) -> Iterator[Tensor]:
        """List the decoder's tensors; the router stays in F32."""
        for name, shape, kind in super().tensors(dtype):
            block, _, part = name.removesuffix(".weight").rpartition(".")
            if part in ("ffn_gate", "ffn_up", "ffn_down"):
                yield f"{block}.{part}_shexp.weight", shape, kind
                yield f"{block}.{part}_exps.weight", (self.n_experts, *shape), kind
            else:
                yield name, shape, kind
            if part == "ffn_norm":
                yield f"{block}.ffn_gate_inp.weight", (self.n_experts, self.d_model), "F32"

    def metadata(self) -> dict[str, Any]:
        """Return its keys."""
        return {**super().metadata(), "llama4.expert_count": self.n_experts, "llama4.expert_used_count": 1,
                "llama4.expert_feed_forward_length": self.d_ff, "llama4.interleave_moe_layer_step": 1}


def full_encoder(d_model: int) -> Encoder:
    """Llama 4's encoder: keys and tensors of llama.cpp's projector file. 336 x 336 pixels a tile, 144 soft tokens."""
    width, d_ff, n_layers, patch, side, adapter = 1408, 5632, 34, 14, 24, 4096
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "llama4", "clip.use_gelu": True, "clip.vision.image_size": 336,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width,
            "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16, "clip.vision.projector.scale_factor": 2,
            "clip.vision.attention.layer_norm_epsilon": 1e-5, "clip.vision.projection_dim": d_model}
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3 * patch * patch), "F16"), ("v.class_embd", (width,), "F32"),
                             ("v.position_embd.weight", (side * side + 1, width), "F16"), *both("v.pre_ln", width),
                             *both("v.post_ln", width), ("mm.model.mlp.1.weight", (adapter, 4 * width), "F16"),
                             ("mm.model.mlp.2.weight", (adapter, adapter), "F16"), ("mm.model.fc.weight", (d_model, adapter), "F16")]
    return keys, tensors + vit_layers(n_layers, width, d_ff)


ASSUMED = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}
# chunks of 24 and steps of temperature every 10 tokens; layers 1 and 3 have experts, layer 3 no positions
TEXT_CONFIG = {
    **COMMON, "vocab_size": 520, "num_hidden_layers": 5, "head_dim": 16, "max_position_embeddings": 512,
    "intermediate_size": 64, "intermediate_size_mlp": 160, "num_local_experts": 5, "interleave_moe_layer_step": 2,
    "attention_chunk_size": 24, "floor_scale": 10, "attn_scale": 0.4, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 16.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 1.0, "original_max_position_embeddings": 64}}

SEEING = Case(
    "llama4", "llama4", "Llama4Config", "Llama4ForConditionalGeneration", "llama4", {}, TEXT_CONFIG,
    {"hidden_size": 80, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56,
     "patch_size": 14, "projector_input_dim": 72, "projector_output_dim": 72, "vision_output_dim": 72},
    TOKENS, Llama4Sight(), experts_axis=1, ring=True, prompts=PROMPTS,
    converted=Converted(
        {"general.architecture": "llama4", "tokenizer.ggml.pre": "llama4", "tokenizer.chat_template": TEMPLATE},
        clip={"has_vision_encoder": True, "projector_type": "llama4", "use_gelu": True, "use_silu": False, "image_size": 56,
              "hidden_act": "gelu", "patch_size": 14, "embedding_length": 80, "feed_forward_length": 320, "block_count": 3,
              "attention.head_count": 4, "projection_dim": 96, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2,
              "attention.layer_norm_epsilon": np.float32(1e-5), "projector.scale_factor": 2, "rope.freq_base": 1e4, "max_tiles": 16,
              "resize_to_max_canvas": False},
        clip_tokens={"image_start_token_id": "<|image_start|>", "image_end_token_id": "<|image_end|>",
                     "image_marker_token_id": "<|image|>", "tile_x_separator_token_id": "<|tile_x_separator|>",
                     "tile_y_separator_token_id": "<|tile_y_separator|>"},
        runs={"llama4": {"text_config": ASSUMED}, "llama4-plain": {"text_config": {
            **ASSUMED, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}}}),
    # 1.8e-3: pixels are rounded to bfloat16, but not by llama.cpp; 3e-4 without the rounding
    dialect=Llama4Dialect(), llama_cpp=Llama4LlamaCpp((56, 56), {"text_config": ASSUMED}, 3e-3),
    full={"llama4-scout": Full(Llama4Decoder("llama4", 48, 5120, 8192, 40, 8, 128, 202048, 10485760),
                               ("<|image_start|>", "<|image_end|>", "<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
                               full_encoder)})

TEXT = Case(
    "llama4_text", "llama4", "Llama4TextConfig", "Llama4ForCausalLM", "llama4", {**TEXT_CONFIG, **ASSUMED, "num_hidden_layers": 4},
    experts_axis=1, ring=True, cached_as="llama4", variants={},            # those of the seeing one are below
    converted=Converted(
        {"vocab_size": 520, "block_count": 4, "context_length": 512, "embedding_length": 96, "feed_forward_length": 160,
         "expert_feed_forward_length": 64, "expert_count": 5, "expert_used_count": 1, "interleave_moe_layer_step": 2,
         "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
         "attention.layer_norm_rms_epsilon": np.float32(1e-5), "rope.dimension_count": 16, "rope.freq_base": 5e3,
         "rope.layers": [True] * 3 + [False], "attention.chunked_layers": [True] * 3 + [False], "attention.chunk_size": 8192,
         "attention.temperature_length": 8192, "attention.temperature_scale": np.float32(0.1), "use_qk_norm": True},
        tensors={}, runs={}))

CASES = (SEEING, TEXT)

MAVERICK = {"use_qk_norm": False, "num_local_experts": 7}


VARIANTS: dict[str, dict[str, Any]] = {
    "Maverick": {"text_config": MAVERICK},
    "two experts a token": {"text_config": {"num_experts_per_tok": 2, "interleave_moe_layer_step": 1}},
    "no temperature": {"text_config": {"attn_temperature_tuning": False}},
    "the last layer has no positions": {"text_config": {"num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0]}},
    "full layers with positions": {"text_config": {"layer_types": [*["full_attention", "chunked_attention"] * 2, "full_attention"]}},
    "biases, tied, other experts": {"text_config": {"attention_bias": True, "moe_layers": [0, 4], "tie_word_embeddings": True}},
    "plain rope, odd chunk": {"text_config": {"attention_chunk_size": 7, "floor_scale": 3,
                                              "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tiny_gguf, variant: str) -> None:
    out, folder = tiny_gguf("llama4", **VARIANTS[variant])
    ids = PROMPTS["text"][:70]
    same(pe.load(out, n_ctx=128, kv_dtype="f32", n_batch=32).logits(ids), tiny.hf_seen(folder, ids).logits)


def test_the_text_model_alone(tiny_gguf) -> None:
    out, folder = tiny_gguf("llama4_text")
    ids = PROMPTS["text"][:70]
    model = pe.load(out, n_ctx=128, kv_dtype="f32")
    same(model.logits(ids), tiny.hf_logits(folder, ids))
    with pytest.raises(UnsupportedModelError, match="no image encoder"):
        model.encode_image(ONE)


def test_each_part_matters(tiny_gguf) -> None:
    """What a wrong constant would change, it changes in the oracle too: within 120 tokens chunks, temperature and norm all act."""
    ids = PROMPTS["text"]
    want = tiny.hf_seen(tiny_gguf("llama4")[1], ids).logits
    for key, value in (("attention_chunk_size", 64), ("floor_scale", 200), ("attn_scale", 0.1), ("use_qk_norm", False)):
        other = pe.load(tiny_gguf("llama4", text_config={key: value})[0], n_ctx=128, kv_dtype="f32").logits(ids)
        assert np.abs(other - want).max() > 0.01 * np.ptp(want), key


@pytest.mark.parametrize("n_batch", [1, 7, 32])
def test_any_cut_gives_the_same_bits(tiny_gguf, n_batch: int) -> None:
    """Rings of a chunk and a step, of any length, across borders of chunks."""
    path = tiny_gguf("llama4")[0]
    prompt = [*PROMPTS["text"][:40], WIDE, *PROMPTS["text"][40:80]]
    whole = pe.load(path, n_ctx=256).logits(prompt)
    assert np.array_equal(pe.load(path, n_ctx=256, n_batch=n_batch, n_threads=1).logits(prompt), whole)


def test_greedy_text_goes_on_as_transformers(tiny_gguf) -> None:
    """From within a chunk over its border, behind pictures, token after token."""
    out, folder = tiny_gguf("llama4")
    prompt = [5, WIDE, "and", ONE, 6]
    model = pe.load(out, n_ctx=256, kv_dtype="f32")
    never_end = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
    answer = model.generate(prompt, max_tokens=30, temperature=0, logit_bias=never_end)
    n = answer.n_prompt
    assert n // 24 < (n + 30) // 24
    want = tiny.hf_seen(folder, [*prompt, *answer.tokens]).logits
    masked = want[n - 1 : -1].copy()
    masked[:, list(model.tokenizer.eog_ids)] = -np.inf
    assert answer.tokens == masked.argmax(-1).tolist()


def test_conversations_that_share_a_beginning(tiny_gguf) -> None:
    """Forks and continued conversations, whose rings hold the last chunk only, give the bits of fresh ones."""
    path = tiny_gguf("llama4")[0]
    model = pe.load(path, n_ctx=256, n_seq=3, n_batch=16)
    text = PROMPTS["text"]
    prompts = [text[:60], [*text[:60], *text[80:100]], [*text[:50], *text[100:]], text[:40], text[:25]]
    cached = []
    for prompt in prompts:
        got = model.generate(prompt, max_tokens=4, temperature=0)
        cached.append(got.n_cached)
        fresh = pe.load(path, n_ctx=256, n_batch=16)
        assert got.tokens == fresh.generate(prompt, max_tokens=4, temperature=0).tokens
    # 40 tokens are gone from all rings where they begin a chunk; 24 are whole chunks, of which the next token sees nothing
    assert cached == [0, 60, 50, 0, 24]


def test_layers_ask_for_what_they_see(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama4")[0], n_ctx=200, n_batch=16)
    assert [type(g.policy) for g in model._runner.cells.groups] == [Chunked, FullCache]
    held = {i.layer: dict(i.factors) for i in model.plan.items if i.purpose == "kv" and i.layer is not None}
    cells = {n: next(v for k, v in f.items() if k == "cells") for n, f in held.items()}
    assert [cells[i] for i in range(5)] == [40, 40, 40, cells[3], 40] and cells[3] >= 200


def test_a_conversation_has_the_ids_of_transformers(tiny_gguf) -> None:
    out, folder = tiny_gguf("llama4")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "what is it?\n"},
                                     {"type": "image", "image": ONE}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "sure? "}, {"type": "image", "image": LARGE}]}]
    assert pe.load(out, n_ctx=512).chat_ids(messages) == tiny.hf_chat_ids(folder, messages, [WIDE, ONE, LARGE])


def test_tokens_of_the_tiles_without_keys_for_them(tiny_gguf) -> None:
    """Their texts name them, as in files of llama.cpp's converter."""
    model = pe.load(tiny_gguf("llama4")[0], n_ctx=256)
    v, token = model.media.encoder, model.tokenizer.id_of
    assert (v.start, v.end, v.across, v.down, v.whole) == tuple(map(token, (
        "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>")))


# ---- the image processor ----------------------------------------------------------------------------------------------------


def oracle_geometry(height: int, width: int, tile: int, most: int, largest: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of tiles, and size in the canvas, by transformers' own functions."""
    import torch
    from transformers.image_utils import SizeDict

    theirs = next(c for c in llama4_images().__mro__ if c.__name__ == "Llama4ImageProcessor")._preprocess.__globals__
    canvases = torch.tensor(theirs["find_supported_resolutions"](most, SizeDict(height=tile, width=tile)))
    best = theirs["get_best_fit"]((height, width), canvases, resize_to_max_canvas=largest)
    room = best if largest else (min(max(height, tile), best[0]), min(max(width, tile), best[1]))     # as `_preprocess` does
    size = theirs["get_max_res_without_distortion"]((height, width), room)
    return tuple((best // tile).tolist()), tuple(max(int(n), 1) for n in size)


sides = st.one_of(st.integers(1, 400), st.integers(1, 30).map(lambda n: 56 * n), st.integers(1, 9000))


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.sampled_from([56, 336]), st.sampled_from([1, 5, 12, 16]), st.booleans())
def test_canvases_and_sizes_are_those_of_transformers(height: int, width: int, tile: int, most: int, largest: bool) -> None:
    rows, columns = llama4.canvas(height, width, tile, most, largest)
    size = llama4.fitted(height, width, (rows * tile, columns * tile), tile, largest)
    assert ((rows, columns), size) == oracle_geometry(height, width, tile, most, largest)


@pytest.mark.parametrize("options", [{}, {"max_patches": 3}, {"resize_to_max_canvas": True, "image_mean": [0.4, 0.5, 0.6],
                                                              "image_std": [0.3, 0.5, 0.9]}])
def test_pixels_are_those_of_transformers(tiny_gguf, options: dict[str, Any]) -> None:
    """To the last bit: Pillow's resizing, padding, bfloat16."""
    out, folder = tiny_gguf("llama4", processor=options)
    vision = Planned(pe.load(out, n_ctx=512).media.encoder, 512)
    processor = llama4_images().from_pretrained(folder)
    for image in (ONE, WIDE, TALL, LARGE, DOT):
        want = processor(image, return_tensors="pt")["pixel_values"].float().numpy()               # [tiles, 3, 56, 56]
        views = vision.process(pe.open_image(image)).views
        assert len(views) == len(want) == vision.n_rows(*image.size) // 4
        for view, tile in zip(views, want):
            patches = tile.reshape(3, 4, 14, 4, 14).transpose(1, 3, 0, 2, 4).reshape(16, -1)[vision.order]
            assert np.array_equal(view.inputs["patches"], np.concatenate([patches, np.zeros((1, 588), np.float32)]))


def test_fewer_tiles_by_request(tiny_gguf) -> None:
    out, folder = tiny_gguf("llama4")
    model = pe.load(out, n_ctx=256, kv_dtype="f32")
    prompt = [3, pe.open_image(LARGE, max_tiles=4), 4]
    answer = model.generate(prompt, max_tokens=1, temperature=0)
    assert answer.media[0].views == 5 and answer.media[0].processed == (112, 103) and answer.media[0].n_tokens == 20
    same(model.logits(prompt), tiny.hf_seen(folder, [3, LARGE, 4], max_patches=4).logits)


def test_what_cannot_be_taken_says_so(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama4")[0], n_ctx=64)
    with pytest.raises(RequestError, match="pictures, not videos"):
        model.generate([[ONE, ONE], 3])
    for wrong in (0, 17, "all"):
        with pytest.raises(RequestError, match="max_tiles="):
            model.encode_image(pe.open_image(ONE, max_tiles=wrong))
    with pytest.raises(ContextOverflowError, match="17 tiles of 4 positions, but the context holds 64"):
        model.encode_image(LARGE)


def test_keys_that_cannot_be(tiny_gguf) -> None:
    path = tiny_gguf("llama4")[0]
    for key, value, error in (("llama4.rope.layers", np.array([True]), "1 entries for 5 layers"),
                              ("clip.vision.attention.head_count", 16, "multiple of 4 elements"),
                              ("clip.vision.patch_size", 15, "no multiple"), ("clip.vision.max_tiles", 5000, "max_tiles is 5000")):
        files = open_files(path)
        files.model.metadata._decoded[key] = value
        with pytest.raises(InvalidModelError, match=error):
            bind(files)


# ---- full size, by hand ---------------------------------------------------------------------------------------------------


def test_llama_4_scout_at_131072_tokens(full_size, machine) -> None:
    """4 KiB a token and layer in f16; 12 layers see everything, 36 their chunk of 8192, where a naive engine has 48 full ones."""
    machine(96 * GIB)
    token = 8 * 128 * 2 * 2                                              # heads, head size, bytes of f16, keys and values
    assert token == 4 * KIB
    path, mmproj = full_size("llama4-scout")
    plan = pe.plan(path, n_ctx=131_072, mmproj=mmproj)
    assert kv(plan) == {"Full": 12 * 131_072 * token, "Chunked": 36 * (8192 + 512) * token}
    assert kv(plan)["Full"] == 6 * GIB and 7.1 * GIB < sum(kv(plan).values()) < 7.2 * GIB
    assert 48 * 131_072 * token == 24 * GIB
    d, q, k, f = 5120, 40 * 128, 8 * 128, 8192
    attention = d * q + 2 * d * k + q * d
    expert = 3 * d * f                                                   # gate, up and down: 126 million weights
    shared = (attention + expert) // 32 * 18 + 4 * 16 * d + 4 * 2 * d    # Q4_0; router and norms in f32
    found = sorted(i.nbytes for i in plan.items if i.purpose == "weights" and i.layer is not None)
    assert found == [shared] * 48 + [16 * expert // 32 * 18] * 48
    rest = sum(i.nbytes for i in plan.items if i.purpose in ("weights", "mapped") and i.layer is None and "headers" not in i.detail)
    assert abs(rest - 2 * (202_048 * d // 32 * 18)) < MIB                # head and embedding
    assert 56 * GIB < plan.of("weights") + plan.of("mapped") < 57 * GIB  # 108 thousand million weights
    encoder = 2 * (4 * 1408**2 + 2 * 1408 * 5632) + 4 * (4 * 1408 + 5632 + 1408 + 4 * 1408)
    assert [i.nbytes for i in plan.items if i.purpose == "encoder" and i.layer is not None] == [encoder] * 34
    assert plan.picture == 24 * 24 // 4 == 144                           # of one tile, which is one run of the encoder
    kept = pe.plan(path, n_ctx=131_072, mmproj=mmproj, images=(1344, 1344, 3))
    assert next(i.nbytes for i in kept.items if "kept" in i.detail) == 3 * 17 * 144 * d * 4          # 4 x 4 tiles and the whole
