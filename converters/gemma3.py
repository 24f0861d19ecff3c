"""Gemma 3 with its SigLIP encoder: pictures of one size, pooled to a fixed number of soft tokens.

`gemma3` in GGUF, projector "gemma3". Follows transformers `configuration_gemma3.py`, `configuration_siglip.py`,
`image_processing_pil_gemma3.py`, `processing_gemma3.py`. Axes: V encoder width, F its feed-forward width, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as QT
from gguf import GGUFWriter

from pyengine.errors import InvalidModelError

from .checkpoint import Config
from .contract import FLOAT32, NO_BLOCKS, Entry, converts
from .gemma3_text import Gemma3Text
from .vision import attention, feed_forward, image_settings, write_encoder_keys

# transformers' Gemma3Config, SiglipVisionConfig and Gemma3ImageProcessorPil where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"mm_tokens_per_image": 256, "boi_token_index": 255_999, "eoi_token_index": 256_000,
                            "image_token_index": 262_144, "tie_word_embeddings": True}
VISION: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}
IMAGES: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2}
# Gemma3Processor.images_kwargs: released preprocessor_config.json files leave these null
PAN_AND_SCAN: dict[str, Any] = {"do_pan_and_scan": False, "pan_and_scan_min_crop_size": 256,
                                "pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}
# SigLIP's pooling head, which Gemma does not use
HEAD = ("probe", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight",
        "attention.out_proj.bias", "layernorm.weight", "layernorm.bias", "mlp.fc1.weight", "mlp.fc1.bias",
        "mlp.fc2.weight", "mlp.fc2.bias")


@converts("Gemma3ForConditionalGeneration")
class Gemma3(Gemma3Text):
    renames = ((r"^model\.language_model\.", "model."), (r"^language_model\.model\.", "model."),
               (r"^language_model\.lm_head\.", "lm_head."), (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
               (r"^vision_tower\.vision_model\.", "vision_tower."))

    def __init__(self, config: dict[str, Any], file: Path):
        r = self.root = Config(config, DEFAULTS, file)
        text = config.get("text_config") or {}
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", r.need("tie_word_embeddings")))
        super().__init__({**text, "tie_word_embeddings": tied}, file)
        v = self.vision = Config(config.get("vision_config") or {}, VISION, file)
        v.refuse_unless("num_channels", 3)
        self.v_model, self.v_ff, self.v_layers, self.v_heads = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
        self.image_size, self.patch_size = v.count("image_size"), v.count("patch_size")
        side, self.n_tokens = self.image_size // self.patch_size, r.count("mm_tokens_per_image")
        self.n_patches = side * side
        self.pool = side // math.isqrt(self.n_tokens)       # patches along each side of a soft token
        if self.pool < 1 or (side // self.pool) ** 2 != self.n_tokens:
            raise InvalidModelError(f"{file}: {side} x {side} patches cannot be pooled to {self.n_tokens} tokens")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        images = image_settings(self.root.file.parent, {**IMAGES, **PAN_AND_SCAN})
        write_encoder_keys(
            out, self.vision, images, projector="gemma3", image_size=self.image_size, d_model=self.v_model,
            d_ff=self.v_ff, n_layers=self.v_layers, n_heads=self.v_heads, eps=self.vision.need("layer_norm_eps"),
            d_text=self.d_model)
        out.add_vision_projector_scale_factor(self.pool)
        out.add_uint32("clip.vision.tokens_per_image", self.n_tokens)
        out.add_bool("clip.vision.pan_and_scan", bool(images.need("do_pan_and_scan")))
        out.add_uint32("clip.vision.pan_and_scan_min_crop_size", images.count("pan_and_scan_min_crop_size"))
        out.add_uint32("clip.vision.pan_and_scan_max_num_crops", images.count("pan_and_scan_max_num_crops"))
        out.add_float32("clip.vision.pan_and_scan_min_ratio_to_activate",
                        images.need("pan_and_scan_min_ratio_to_activate"))
        out.add_uint32("clip.vision.image_token_id", self.root.token("image_token_index", "image_token_id"))
        out.add_uint32("clip.vision.image_start_token_id", self.root.token("boi_token_index", "boi_token_id"))
        out.add_uint32("clip.vision.image_end_token_id", self.root.token("eoi_token_index", "eoi_token_id"))

    def unused(self) -> set[str]:
        return super().unused() | {f"vision_tower.head.{name}" for name in HEAD}

    def tensors(self) -> Iterator[Entry]:
        yield from super().tensors()
        v, f = self.v_model, self.v_ff

        def norm(name: str, source: str) -> Iterator[Entry]:
            for part in ("weight", "bias"):
                yield Entry(f"{name}.{part}", f"{source}.{part}", (v,))

        embeddings = "vision_tower.embeddings"
        yield Entry("v.patch_embd.weight", f"{embeddings}.patch_embedding.weight",
                    (v, 3, self.patch_size, self.patch_size), instead=FLOAT32)
        yield Entry("v.patch_embd.bias", f"{embeddings}.patch_embedding.bias", (v,))
        yield Entry("v.position_embd.weight", f"{embeddings}.position_embedding.weight", (self.n_patches, v),
                    instead=FLOAT32)
        for i in range(self.v_layers):
            b, m = f"v.blk.{i}", f"vision_tower.encoder.layers.{i}"
            yield from norm(f"{b}.ln1", f"{m}.layer_norm1")
            yield from attention(b, f"{m}.self_attn", v, bias=True, out="out_proj")
            yield from norm(f"{b}.ln2", f"{m}.layer_norm2")
            yield from feed_forward(b, f"{m}.mlp", v, f, {"ffn_up": "fc1", "ffn_down": "fc2"})
        yield from norm("v.post_ln", "vision_tower.post_layernorm")
        yield Entry("mm.soft_emb_norm.weight", "multi_modal_projector.mm_soft_emb_norm.weight", (v,), add=1.0)
        # applied as x @ w: the only matrix of the file whose rows are inputs, so never in blocks; types as in llama.cpp's
        yield Entry("mm.input_projection.weight", "multi_modal_projector.mm_input_projection_weight", (v, self.d_model),
                    instead={**NO_BLOCKS, QT.BF16: QT.F32})
