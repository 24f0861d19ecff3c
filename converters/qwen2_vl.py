"""Qwen2-VL and Qwen2.5-VL: Qwen 2 with M-RoPE, and an encoder that takes pictures and videos at their own size.

`qwen2vl` in GGUF, projectors "qwen2vl_merger" and "qwen2.5vl_merger". Follows transformers `configuration_qwen2_vl.py`,
`configuration_qwen2_5_vl.py`, `image_processing_pil_qwen2_vl.py`, `video_processing_qwen2_vl.py`. The encoder's fused
q/k/v and the frames of its patch convolution are stored apart, as llama.cpp has them. Axes: V encoder width,
F its feed-forward width, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config
from .contract import FLOAT32, Entry, converts, linear
from .qwen2 import Qwen2
from .vision import GATED, feed_forward, image_settings, pixel_limits, video_settings, write_encoder_keys, write_video_keys

# transformers' Qwen2VLConfig, Qwen2VLTextConfig, Qwen2VLVisionConfig and Qwen2VLImageProcessorPil,
# Qwen2VLVideoProcessor where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"image_token_id": 151_655, "video_token_id": 151_656, "vision_start_token_id": 151_652,
                            "vision_end_token_id": 151_653, "tie_word_embeddings": False}
TEXT: dict[str, Any] = {
    "vocab_size": 152_064, "hidden_size": 8192, "intermediate_size": 29_568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 80,
}
VISION: dict[str, Any] = {
    "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4, "num_heads": 16,
    "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}
VISION_25: dict[str, Any] = {
    "depth": 32, "hidden_size": 3584, "hidden_act": "silu", "intermediate_size": 3420, "num_heads": 16,
    "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 4,
    "window_size": 112, "out_hidden_size": 3584, "fullatt_block_indexes": (7, 15, 23, 31),
}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGES: dict[str, Any] = {**CLIP, "resample": 3, "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}}
VIDEOS: dict[str, Any] = {**CLIP, "resample": 3, "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
                          "min_frames": 4, "max_frames": 768, "do_sample_frames": False}
ROPE_BASE = 1_000_000.0     # Qwen2VLTextConfig.default_theta
SECTIONS = (16, 24, 24)     # pairs of a head that turn with time, height and width, where the config is silent
VISION_ROPE_BASE = 10_000.0
EPS = 1e-6                  # of the encoder's norms: transformers has no setting for it
IMAGE_SIZE = 560            # llama.cpp's key must be there; nothing depends on it


@converts("Qwen2VLForConditionalGeneration")
class Qwen2VL(Qwen2):
    arch = "qwen2vl"
    projector = "qwen2vl_merger"
    renames = ((r"^model\.language_model\.", "model."), (r"^language_model\.model\.", "model."),
               (r"^language_model\.lm_head\.", "lm_head."), (r"^model\.visual\.", "visual."))
    defaults, rope_base = TEXT, ROPE_BASE
    vision_defaults, mlp = VISION, {"ffn_up": "fc1", "ffn_down": "fc2"}

    def __init__(self, config: dict[str, Any], file: Path):
        r = self.root = Config(config, DEFAULTS, file)
        text = config.get("text_config") or config      # early checkpoints have one flat config
        # what saved either level before transformers 5 is believed
        tied = bool(r.need("tie_word_embeddings") or text.get("tie_word_embeddings"))
        super().__init__({**text, "tie_word_embeddings": tied}, file)
        if self.rope["rope_type"] == "mrope":
            self.rope["rope_type"] = "default"
        self.sections = [int(n) for n in self.rope.get("mrope_section") or SECTIONS]
        if len(self.sections) != 3 or 2 * sum(self.sections) != self.head_dim:
            raise InvalidModelError(f"{file}: 'mrope_section' is {self.sections}; three numbers that sum to half "
                                    f"of a head's {self.head_dim} are expected")
        v = self.vision = Config(config.get("vision_config") or {}, self.vision_defaults, file)
        v.refuse_unless("in_channels", 3)
        self.v_layers, self.v_heads = v.count("depth"), v.count("num_heads")
        self.patch_size, self.n_frames, self.merge = (
            v.count(n) for n in ("patch_size", "temporal_patch_size", "spatial_merge_size"))
        self.v_model, self.v_ff, d_out = self.widths()
        if d_out != self.d_model:
            raise InvalidModelError(f"{file}: the encoder gives {d_out} values a token, the text model has {self.d_model}")
        rope = v.get("rope_parameters") or {}
        if rope.get("rope_type", "axial") not in ("axial", "default"):
            raise UnsupportedModelError(f"{file}: rope '{rope['rope_type']}' of the encoder; this converter knows 'axial'")
        self.v_rope_base = float(rope.get("rope_theta") or VISION_ROPE_BASE)

    def widths(self) -> tuple[int, int, int]:
        """Return the encoder's width, its feed-forward width and the width that it gives to the text model."""
        v = self.vision
        return v.count("embed_dim"), int(v.count("embed_dim") * v.need("mlp_ratio")), v.count("hidden_size")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_rope_dimension_sections([*self.sections, 0])
        folder = self.root.file.parent
        images, videos = image_settings(folder, IMAGES), video_settings(folder, VIDEOS)
        write_encoder_keys(
            out, self.vision, images, projector=self.projector, image_size=IMAGE_SIZE, d_model=self.v_model,
            d_ff=self.v_ff, n_layers=self.v_layers, n_heads=self.v_heads, eps=EPS, d_text=self.d_model)
        out.add_vision_spatial_merge_size(self.merge)
        out.add_uint32("clip.vision.temporal_patch_size", self.n_frames)
        out.add_float32("clip.vision.rope.freq_base", self.v_rope_base)
        least, most = pixel_limits(images)
        out.add_vision_min_pixels(least)
        out.add_vision_max_pixels(most)
        write_video_keys(out, videos)
        for key, name in (("image_token_id", "image_token_id"), ("video_token_id", "video_token_id"),
                          ("image_start_token_id", "vision_start_token_id"),
                          ("image_end_token_id", "vision_end_token_id")):
            out.add_uint32(f"clip.vision.{key}", self.root.token(name))

    def vision_norm(self, name: str, source: str) -> Iterator[Entry]:
        """List the parameters of one of the encoder's norms."""
        for part in ("weight", "bias"):
            yield Entry(f"{name}.{part}", f"{source}.{part}", (self.v_model,))

    def tensors(self) -> Iterator[Entry]:
        yield from super().tensors()
        v, p, merged = self.v_model, self.patch_size, self.v_model * self.merge ** 2
        for t in range(self.n_frames):
            yield Entry("v.patch_embd.weight" + (f".{t}" if t else ""), "visual.patch_embed.proj.weight", (v, 3, p, p),
                        stored=(v, 3, self.n_frames, p, p), frame=t, instead=FLOAT32)
        for i in range(self.v_layers):
            b, m = f"v.blk.{i}", f"visual.blocks.{i}"
            yield from self.vision_norm(f"{b}.ln1", f"{m}.norm1")
            for j, part in enumerate("qkv"):
                yield Entry(f"{b}.attn_{part}.weight", f"{m}.attn.qkv.weight", (v, v), stored=(3 * v, v), first_row=j * v)
                yield Entry(f"{b}.attn_{part}.bias", f"{m}.attn.qkv.bias", (v,), stored=(3 * v,), first_row=j * v)
            yield from linear(f"{b}.attn_out", f"{m}.attn.proj", v, v, bias=True)
            yield from self.vision_norm(f"{b}.ln2", f"{m}.norm2")
            yield from feed_forward(b, f"{m}.mlp", v, self.v_ff, self.mlp)
        yield from self.vision_norm("v.post_ln", "visual.merger.ln_q")
        yield from linear("mm.0", "visual.merger.mlp.0", merged, merged, bias=True)
        yield from linear("mm.2", "visual.merger.mlp.2", self.d_model, merged, bias=True)


@converts("Qwen2_5_VLForConditionalGeneration")
class Qwen25VL(Qwen2VL):
    """Qwen2-VL with window attention, a gated feed-forward network, norms without bias, and positions in seconds."""
    projector = "qwen2.5vl_merger"
    vision_defaults, mlp = VISION_25, GATED

    def widths(self) -> tuple[int, int, int]:
        v = self.vision
        return v.count("hidden_size"), v.count("intermediate_size"), v.count("out_hidden_size")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_float32("clip.vision.tokens_per_second", float(self.vision.need("tokens_per_second")))
        out.add_uint32("clip.vision.window_size", self.vision.count("window_size"))
        full = sorted({int(i) for i in self.vision.need("fullatt_block_indexes") if 0 <= int(i) < self.v_layers})
        out.add_array("clip.vision.wa_layer_indexes", full)     # layers with full attention; nothing where there are none
        # llama.cpp's key: every n-th layer. Other lists have none, and llama.cpp then refuses the file.
        period = full[0] + 1 if full else self.v_layers + 1
        if full == list(range(period - 1, self.v_layers, period)):
            out.add_vision_n_wa_pattern(period)

    def vision_norm(self, name: str, source: str) -> Iterator[Entry]:
        yield Entry(f"{name}.weight", f"{source}.weight", (self.v_model,))
