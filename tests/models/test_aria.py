"""Aria against transformers: pictures of their own shape, queries, squares that a picture is split into, experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from converters import convert
from hollow import both, Decoder, Encoder, Full, kv, Tensor, vit_layers
from oracle import encoder_of
from pictures import A, B, LONG, same, THIN
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.media.image import Image
from sight import of_any_backend, Run, Sight
from tiny import COMMON

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

# What the family's real template does, in other words.
TEMPLATE = """{%- for m in messages -%}
  {{ '<|im_start|>' + m['role'] + '\n' }}
  {%- if m['content'] is string -%}{{ m['content'] }}
  {%- else -%}{%- for part in m['content'] -%}{{ '<fim_prefix><|img|><fim_suffix>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
  {%- endif -%}
  {{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
TOKENS = Tokens(("<|im_start|>", "<|im_end|>", "<|img|>", "<fim_prefix>", "<fim_suffix>", "<pad>"), "<|im_start|>", "<|im_end|>", "<pad>", TEMPLATE,
                {"image_token_index": "<|img|>"}, named={"image_token": "<|img|>"})
QUERIES = {49: 5, 196: 9}


class AriaSight(Sight):
    """Pictures of 490 pixels, in patches of 70."""

    model_types, marker = ("aria",), "<fim_prefix><|img|><fim_suffix>"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        return transformers.AriaImageProcessorPil(**{"max_image_size": 490, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        from transformers.models.aria.processing_aria import AriaProcessor

        return of_any_backend(AriaProcessor)(transformers.AriaImageProcessorPil.from_pretrained(folder), tokenizer, size_conversion={490: 5, 980: 9})

    def part(self, processor: Any, config: Any, folder: Path, part: Any, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        """The processor has defaults of its own, which go before those of its images."""
        own = {name: getattr(processor.image_processor, name) for name in ("max_image_size", "split_image")}
        return super().part(processor, config, folder, part, **{**own, **settings})

    def chat(self, processor: Any, text: str, pictures: Any) -> list[int]:
        return processor(text=[text], images=[list(pictures)], add_special_tokens=False, return_tensors="pt", max_image_size=490)["input_ids"][0].tolist()

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        if not made:
            return Run({}, [], [], [])
        layer, inputs = model.config.vision_feature_layer, {name: torch.cat([m[name] for m in made]) for name in ("pixel_values", "pixel_mask")}
        features = [model.model.get_image_features(m["pixel_values"], m["pixel_mask"], vision_feature_layer=layer).pooler_output.flatten(0, 1) for m in made]
        return Run(inputs, features, [m["pixel_values"] for m in made], [])


TEXT = {**COMMON, "max_position_embeddings": 512, "moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 2, "pad_token_id": 0,
        "intermediate_size": 64}
VISION = {"model_type": "idefics3_vision", "hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": 490, "patch_size": 70}
KEYS = {"block_count": 3, "context_length": 512, "embedding_length": 96, "feed_forward_length": 64, "vocab_size": 512, "attention.head_count": 6,
        "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16, "attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "rope.dimension_count": 16, "rope.freq_base": 10000.0, "expert_count": 5, "expert_used_count": 2, "expert_shared_count": 2,
        "expert_feed_forward_length": 64}
SPLITS = [490 * n for pair in [(1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8), (2, 4), (2, 3), (2, 2), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (5, 1),
                               (6, 1), (7, 1), (8, 1)] for n in pair]
CLIP = {"has_vision_encoder": True, "projector_type": "aria", "use_silu": False, "use_gelu": True, "hidden_act": "gelu_pytorch_tanh", "image_size": 490,
        "patch_size": 70, "embedding_length": 80, "feed_forward_length": 100, "attention.head_count": 4, "projection_dim": 96, "block_count": 3,
        "resample": 3, "attention.layer_norm_epsilon": np.float32(1e-6), "projector.patch_to_query": [49, 5, 196, 9], "preproc_image_size": 490,
        "preproc_min_size": 336, "image_splitting": False, "image_grid_pinpoints": SPLITS, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


# of transformers 5, and of the first checkpoints
RENAMES = ((("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."), ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector.")), (("vision_tower.", "vision_tower.vision_model."),))


def text_tensor(name: str, value: np.ndarray, config: dict[str, Any]) -> Any:
    """Experts' matrices are [in, out] in the checkpoint, gate and up side by side."""
    block = f"blk.{name.split('.')[2]}" if "layers" in name else ""
    if name.endswith("experts.fc1.weight"):
        return [(f"{block}.ffn_{part}_exps.weight", half.swapaxes(1, 2)) for part, half in zip(("gate", "up"), np.split(value, 2, axis=2))]
    if name.endswith("experts.fc2.weight"):
        return f"{block}.ffn_down_exps.weight", value.swapaxes(1, 2)
    return (f"{block}.ffn_gate_inp.weight" if "router" in name else None), value


@dataclass(frozen=True)
class AriaDecoder(Decoder):
    """64 experts and a feed-forward as wide as two of them in each layer."""

    n_experts: int = 64

    def tensors(self, dtype: str) -> Iterator[Tensor]:
        d, f, n = self.d_model, self.d_ff, self.n_experts
        for name, shape, kind in super().tensors(dtype):
            if ".ffn_" not in name or "norm" in name:
                yield name, shape, kind
        for i in range(self.n_layers):
            yield f"blk.{i}.ffn_gate_inp.weight", (n, d), "F32"
            for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
                yield f"blk.{i}.ffn_{name}_exps.weight", (n, *shape), dtype
                yield f"blk.{i}.ffn_{name}_shexp.weight", (2 * shape[0], d) if name != "down" else (d, 2 * f), dtype


def encoder(d_model: int) -> Encoder:
    """So400m over up to 70 x 70 patches, and 256 queries."""
    width, d_ff, n = 1152, 4304, 27
    keys = {**{f"clip.vision.{name}": value for name, value in CLIP.items() if name not in ("has_vision_encoder", "projector_type", "use_silu", "use_gelu")},
            "clip.has_vision_encoder": True, "clip.projector_type": "aria", "clip.use_gelu": True, "clip.vision.image_size": 980, "clip.vision.patch_size": 14,
            "clip.vision.embedding_length": width, "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16,
            "clip.vision.block_count": n, "clip.vision.projection_dim": d_model, "clip.vision.preproc_image_size": 980,
            "clip.vision.projector.patch_to_query": [1225, 128, 4900, 256], "clip.vision.attention.layer_norm_epsilon": 1e-6}
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, 14, 14), "F32"), ("v.patch_embd.bias", (width,), "F32"),
                             ("v.position_embd.weight", (4900, width), "F32"), ("mm.query.weight", (256, width), "F32"), *both("mm.ln_q", width),
                             *both("mm.ln_kv", width), *both("mm.ln_post", width), ("mm.ffn_up.weight", (d_model, width), "F16"),
                             ("mm.ffn_down.weight", (d_model, d_model), "F16")]
    for name in ("q", "k", "v"):
        tensors += [(f"mm.{name}.weight", (width, width), "F16")]
    for name in ("attn_q", "attn_k", "attn_v", "attn_out", "out"):
        tensors += [(f"mm.{name}.weight", (width, width), "F16"), (f"mm.{name}.bias", (width,), "F32")]
    return keys, tensors + vit_layers(n, width, d_ff)


SEEING = Case(
    "aria", "aria", "AriaConfig", "AriaForConditionalGeneration", "llama-bpe", {"tie_word_embeddings": False, "projector_patch_to_query_dict": QUERIES},
    {**TEXT, "model_type": "aria_text"}, VISION, TOKENS, AriaSight(), experts_axis=1, cached_as="llama",
    converted=Converted({"general.architecture": "aria", "tokenizer.chat_template": TEMPLATE}, clip=CLIP, clip_tokens={"image_token_id": "<|img|>"},
                        renames=RENAMES),
    full={"aria": Full(AriaDecoder("aria", 28, 2560, 1664, 20, 20, 128, 100352, 65536, keys={
        "expert_count": 64, "expert_used_count": 6, "expert_shared_count": 2, "expert_feed_forward_length": 1664}),
        ("<fim_prefix>", "<|img|>", "<fim_suffix>"), encoder)})

ALONE = Case(
    "aria_text", "aria", "AriaTextConfig", "AriaTextForCausalLM", "llama-bpe", TEXT, experts_axis=1, cached_as="llama",
    variants={"aria_text": {}, "aria_text-other": {"attention_bias": True, "tie_word_embeddings": True, "moe_topk": 3, "moe_num_shared_experts": 1}},
    converted=Converted(KEYS, names="DEEPSEEK", tensor=text_tensor, runs={}))

CASES = (SEEING, ALONE)

SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (900, 700), (490, 490), (1, 1), (131, 130)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]


@pytest.mark.parametrize("options", [{}, {"max_image_size": 980}, {"split_image": True}, {"split_image": True, "max_image_size": 980}])
def test_pixels_of_squares(tiny_gguf, options: dict[str, Any]) -> None:
    """Patches without a pixel of the picture are left out; the others have transformers' bits and lie in its buckets."""
    path, folder = tiny_gguf("aria")
    ours, theirs = encoder_of(path), transformers.AriaImageProcessorPil.from_pretrained(folder)
    for pixels in PICTURES[:: 1 if not options else 2]:
        want = theirs(pixels, return_tensors="np", input_data_format="channels_last", **options)
        found = ours.process(Image(pixels, options))
        views, side = found.views, options.get("max_image_size", 490) // 70
        assert len(views) == len(want["pixel_values"])
        for view, square, mask in zip(views, want["pixel_values"], want["pixel_mask"]):
            there = mask.reshape(side, 70, side, 70).any((1, 3))
            patches = square.reshape(3, side, 70, side, 70).transpose(1, 3, 0, 2, 4)[there]
            assert np.array_equal(view.inputs["patches"], patches.reshape(len(patches), -1))
            assert view.grid[1:] == (there.any(1).sum(), there.any(0).sum()) and len(view.inputs["queries"]) == QUERIES[side * side]


@pytest.mark.parametrize("options", [{"split_image": True}, {"max_image_size": 980}, {"split_image": True, "max_image_size": 980}])
def test_options_are_those_of_transformers(tiny_gguf, options: dict[str, Any]) -> None:
    path, folder = tiny_gguf("aria")
    model = pe.load(path, n_ctx=256, kv_dtype="f32")
    for picture in (A, THIN, LONG):
        want = tiny.hf_seen(folder, [5, picture, "what?"], **options)
        same(model.logits([5, pe.open_image(picture, **options), "what?"]), want.logits)
        same(model.encode_image(pe.open_image(picture, **options)), want.features[0])


@pytest.mark.parametrize("config", [
    {"vision_feature_layer": -2}, {"vision_config": {"image_size": 350, "hidden_act": "gelu"}}, {"tie_word_embeddings": True},
    {"text_config": {"moe_topk": 1, "moe_num_shared_experts": 1, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}}])
def test_variants(tiny_gguf, config: dict[str, Any]) -> None:
    path, folder = tiny_gguf("aria", **config)
    want = tiny.hf_seen(folder, [5, A, "and", B, 6])
    model = pe.load(path, n_ctx=256, kv_dtype="f32", n_batch=5)
    same(model.logits([5, A, "and", B, 6]), want.logits)
    same(model.encode_image(B), want.features[1])


def test_what_is_refused(tiny_gguf, tmp_path) -> None:
    path, folder = tiny_gguf("aria")
    model = pe.load(path, n_ctx=128, kv_dtype="f32")
    for media, text in [(pe.open_image(PICTURES[0], max_image_size=500), "one of 490, 980"), (pe.open_image(PICTURES[0], split_image=1), "True or False"),
                        (pe.open_image(PICTURES[0], zoom=1), "max_image_size, split_image"), ([PICTURES[0]] * 2, "not videos")]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
    with pytest.raises(ContextOverflowError, match="takes 7 positions, but the context holds 6"):
        pe.load(path, n_ctx=6).logits([PICTURES[0]])
    for config, error, text in [({"vision_feature_layer": [-1, -2]}, UnsupportedModelError, "one of 3 layers"),
                                ({"projector_patch_to_query_dict": {196: 9}}, InvalidModelError, "queries for"),
                                ({"text_config": {"mlp_bias": True}}, UnsupportedModelError, "mlp_bias")]:
        with pytest.raises(error, match=text):
            convert(tiny.make_checkpoint("aria", tmp_path / "c", **config), tmp_path / "m.gguf")


def test_the_plan_of_the_published_model(full_size) -> None:
    path, mmproj = full_size("aria")
    plan = pe.plan(path, n_ctx=4096, mmproj=mmproj)
    assert kv(plan) == {"Full": 28 * 2 * 20 * 128 * 4096 * 2} and plan.picture == 256
