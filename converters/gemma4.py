"""Gemma 4 with its vision encoder: pictures at their own aspect ratio, pooled to a budget of soft tokens; videos as frames.

`gemma4` in GGUF, projector "gemma4v". Follows transformers `configuration_gemma4.py`, `image_processing_pil_gemma4.py`,
`video_processing_gemma4.py`; an encoder of sound is left out. Axes: V encoder width, F its feed-forward width, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from pyengine.errors import UnsupportedModelError

from .checkpoint import Checkpoint, Config
from .contract import FLOAT32, Entry, converts
from .decoder import Tensors
from .gemma4_text import Gemma4Text
from .vision import GATED, image_settings, video_settings, write_encoder_keys

# transformers' Gemma4Config, Gemma4VisionConfig, Gemma4ImageProcessorPil and Gemma4VideoProcessor where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"boi_token_id": 255_999, "eoi_token_id": 258_882, "image_token_id": 258_880, "video_token_id": 258_884,
                            "tie_word_embeddings": True}
VISION: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "attention_bias": False, "pooling_kernel_size": 3, "patch_size": 16,
    "position_embedding_size": 10_240, "use_clipped_linears": False, "standardize": False}
IMAGES: dict[str, Any] = {"do_normalize": False, "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "resample": 3, "max_soft_tokens": 280}
VIDEOS: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "resample": 3, "max_soft_tokens": 70, "num_frames": 32}
IMAGE_SIZE, ROPE_BASE = 224, 100.0                 # llama.cpp's files have such a size, which nothing reads
BOUNDS = "input_min", "input_max", "output_min", "output_max"


@converts("Gemma4ForConditionalGeneration")
class Gemma4(Gemma4Text):
    renames = ((r"^model\.language_model\.", "model."), (r"^model\.(vision_tower|embed_vision|audio_tower|embed_audio)\.", r"\1."))

    def __init__(self, config: dict[str, Any], file: Path):
        r = self.root = Config(config, DEFAULTS, file)
        text = config.get("text_config") or {}
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", r.need("tie_word_embeddings")))
        super().__init__({**text, "tie_word_embeddings": tied}, file)
        v = self.vision = Config({**r.need("vision_config"), "hidden_act": r.need("vision_config").get("hidden_activation", "gelu_pytorch_tanh")},
                                 VISION, file)
        self.v_model, self.v_ff, self.v_layers, self.v_heads, self.patch_size, self.places = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "position_embedding_size"))
        v.refuse_unless("attention_bias", False)
        v.refuse_unless("num_key_value_heads", self.v_heads)
        if v.count("head_dim") * self.v_heads != self.v_model:
            raise UnsupportedModelError(f"{file}: heads of {v.count('head_dim')} elements that are not as wide as the encoder have no key")
        self.v_rope = {"rope_type": "axial", "rope_theta": ROPE_BASE, **(v.get("rope_parameters") or {})}
        if self.v_rope["rope_type"] != "axial":
            raise UnsupportedModelError(f"{file}: the encoder's rope is {self.v_rope['rope_type']!r}; this converter knows 'axial'")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        v, folder = self.vision, self.root.file.parent
        out.add_uint32(f"{self.arch}.media_token_id", self.config.token("pad_token_id"))
        images, videos = image_settings(folder, IMAGES), video_settings(folder, VIDEOS, old=False)
        write_encoder_keys(
            out, v, images, projector="gemma4v", image_size=IMAGE_SIZE, d_model=self.v_model, d_ff=self.v_ff, n_layers=self.v_layers,
            n_heads=self.v_heads, eps=v.need("rms_norm_eps"), d_text=self.d_model)
        pool = v.count("pooling_kernel_size")
        for settings in (images, videos):
            for name, value in (("patch_size", self.patch_size), ("pooling_kernel_size", pool), ("resample", images.need("resample"))):
                settings.refuse_unless(name, value, None)
        videos.refuse_unless("image_mean", [0.0] * 3, [0] * 3)
        videos.refuse_unless("image_std", [1.0] * 3, [1] * 3)
        out.add_vision_projector_scale_factor(pool)
        out.add_float32("clip.vision.rope.freq_base", float(self.v_rope["rope_theta"]))
        out.add_uint32("clip.vision.max_soft_tokens", images.count("max_soft_tokens"))
        out.add_uint32("clip.vision.video_max_soft_tokens", videos.count("max_soft_tokens"))
        out.add_uint32("clip.vision.num_frames", videos.count("num_frames"))
        out.add_bool("clip.vision.bidirectional", self.config.get("use_bidirectional_attention") == "vision")
        for key, name in (("image", "image_token_id"), ("video", "video_token_id"), ("image_start", "boi_token_id"), ("image_end", "eoi_token_id")):
            out.add_uint32(f"clip.vision.{key}_token_id", self.root.token(name))

    def unused(self) -> set[str]:
        tensors = Checkpoint(self.root.file.parent).tensors
        return super().unused() | {name.removeprefix("model.") for name in tensors if "audio_tower." in name or "embed_audio." in name}

    def tensors(self) -> Tensors:
        yield from super().tensors()
        v, f, p = self.v_model, self.v_ff, self.patch_size
        yield Entry("v.patch_embd.weight", "vision_tower.patch_embedder.input_proj.weight", (v, 3, p, p), stored=(v, p * p * 3), instead=FLOAT32,
                    make=lambda a: np.ascontiguousarray(a.reshape(-1, p, p, 3).transpose(0, 3, 1, 2)))
        yield Entry("v.position_embd.weight", "vision_tower.patch_embedder.position_embedding_table", (2, self.places, v), instead=FLOAT32)
        for i in range(self.v_layers):
            b, m = f"v.blk.{i}", f"vision_tower.encoder.layers.{i}"
            for name, source in (("ln1", "input_layernorm"), ("attn_post_norm", "post_attention_layernorm"), ("ln2", "pre_feedforward_layernorm"),
                                 ("ffn_post_norm", "post_feedforward_layernorm")):
                yield self.norm(f"{b}.{name}", f"{m}.{source}", v)
            for name in ("q", "k"):
                yield self.norm(f"{b}.attn_{name}_norm", f"{m}.self_attn.{name}_norm", v // self.v_heads)
            for name, source in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"), ("attn_out", "o_proj")):
                yield from self.product(f"{b}.{name}", f"{m}.self_attn.{source}", v, v)
            for name, source in GATED.items():
                shape, axis = ((v, f), 1) if name == "ffn_down" else ((f, v), 0)
                yield from self.product(f"{b}.{name}", f"{m}.mlp.{source}", *shape, units=axis)
        if self.vision.need("standardize"):
            for name in ("std_bias", "std_scale"):
                yield Entry(f"v.{name}", f"vision_tower.{name}", (v,))
        yield Entry("mm.input_projection.weight", "embed_vision.embedding_projection.weight", (self.d_model, v))

    def product(self, name: str, source: str, n_out: int, n_in: int, units: int | None = None) -> Iterator[Entry]:
        """List a matrix, and the bounds of what goes in and comes out. units: the axis of a feed-forward's units, as `vision.feed_forward` pads them."""
        yield Entry(f"{name}.weight", f"{source}.linear.weight", (n_out, n_in), units=units)
        for bound in BOUNDS if self.vision.need("use_clipped_linears") else ():
            yield Entry(f"{name}.{bound}", f"{source}.{bound}", (1,), stored=())
