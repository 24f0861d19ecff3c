"""Qwen3-VL against transformers: the grid of positions, features behind the first layers, positions that take turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted
from oracle import encoder_of
from pictures import same
from pyengine.errors import RequestError
from pyengine.media.image import Image
from sight import of_any_backend
from test_qwen2vl import QwenSight, TOKENS
from tiny import COMMON

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")


class Qwen3Sight(QwenSight):
    """Pictures only."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        return super().images(config, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

        return of_any_backend(Qwen3VLProcessor)(transformers.Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer, None)


TEXT = {**COMMON, "head_dim": 32, "vocab_size": 520, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [5, 5, 4]}}
VISION = {"depth": 4, "hidden_size": 80, "intermediate_size": 100, "num_heads": 4, "out_hidden_size": 96, "patch_size": 14, "num_position_embeddings": 36,
          "deepstack_visual_indexes": [0, 2]}
CLIP = {"has_vision_encoder": True, "projector_type": "qwen3vl_merger", "use_gelu": True, "use_silu": False, "hidden_act": "gelu_pytorch_tanh",
        "image_size": 84, "patch_size": 14, "embedding_length": 80, "feed_forward_length": 100, "block_count": 4, "attention.head_count": 4,
        "attention.layer_norm_epsilon": np.float32(1e-6), "projection_dim": 96, "spatial_merge_size": 2, "rope.freq_base": 1e4, "resample": 3,
        "is_deepstack_layers": [True, False, True, False], "image_min_pixels": 3136, "image_max_pixels": 50176, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP_TOKENS = {"image_token_id": "<|image_pad|>", "image_start_token_id": "<|vision_start|>", "image_end_token_id": "<|vision_end|>"}


def case(kind: str, arch: str, name: str, text: dict[str, Any]) -> Case:
    return Case(kind, arch, f"{name}Config", f"{name}ForConditionalGeneration", "qwen2", {"tie_word_embeddings": False}, {**TEXT, **text}, VISION, TOKENS,
                Qwen3Sight(), mrope=True, cached_as="qwen2_5_vl",
                converted=Converted({"general.architecture": arch, f"{arch}.rope.dimension_sections": [5, 5, 4, 0], f"{arch}.n_deepstack_layers": 2},
                                    clip=CLIP, clip_tokens=CLIP_TOKENS))


CASES = (case("qwen3_vl", "qwen3vl", "Qwen3VL", {}),)

SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (112, 112), (36, 12), (56, 28)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]


def test_pixels_are_bit_for_bit_those_of_transformers(tiny_gguf) -> None:
    path, folder = tiny_gguf("qwen3_vl")
    ours, theirs = encoder_of(path), transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    for pixels in PICTURES:
        made = theirs(pixels, return_tensors="np", input_data_format="channels_last")
        (view,) = ours.process(Image(pixels)).views
        assert np.array_equal(view.inputs["patches"], made["pixel_values"])
        assert [1, *(2 * n for n in view.grid[1:])] == made["image_grid_thw"][0].tolist()


def test_the_grid_of_positions_is_interpolated_as_transformers_does(tiny_gguf) -> None:
    import torch
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    ours = encoder_of(tiny_gguf("qwen3_vl")[0])
    for pixels in PICTURES:
        (view,) = ours.process(Image(pixels)).views
        indices, weights = get_vision_interpolation_indices_and_weights(torch.tensor([[1, 2 * view.grid[1], 2 * view.grid[2]]]), 6, align_corners=True,
                                                                       spatial_merge_size=2)
        inputs = view.inputs
        assert np.array_equal(np.stack([inputs[f"tap{i}"] for i in range(4)], 1), indices.numpy())
        assert np.array_equal(np.concatenate([inputs[f"weight{i}"] for i in range(4)], 1), weights.numpy())


def test_options_and_what_is_refused(tiny_gguf) -> None:
    path, folder = tiny_gguf("qwen3_vl")
    model = pe.load(path, n_ctx=128, kv_dtype="f32")
    want = tiny.hf_seen(folder, [5, PICTURES[4], 6], max_pixels=10_000)
    same(model.logits([5, pe.open_image(PICTURES[4], max_pixels=10_000), 6]), want.logits)
    for media, text in [(pe.open_image(PICTURES[0], pan_and_scan=True), "max_pixels"), ([PICTURES[0]] * 2, "not videos")]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
