"""Qwen3-VL: qwen3 with M-RoPE, an encoder at the picture's own size, and features for the decoder's first layers: `qwen3vl` in GGUF.

Projector "qwen3vl_merger". Follows transformers `configuration_qwen3_vl.py`, `configuration_qwen3_vl_moe.py`; keys and names as llama.cpp's
`conversion/qwen3vl.py` has them. Axes: V encoder width, F its feed-forward width, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, tensors_beside
from .contract import FLOAT32, Entry, converts, linear
from .decoder import Tensors
from .qwen3 import DEFAULTS as QWEN3
from .qwen3 import Qwen3
from .vision import feed_forward, image_settings, pixel_limits, video_settings, write_encoder_keys, write_video_keys

# transformers' Qwen3VLConfig, Qwen3VLVisionConfig, Qwen3VLMoeTextConfig and the image processor of published checkpoints
DEFAULTS: dict[str, Any] = {"image_token_id": 151_655, "video_token_id": 151_656, "vision_start_token_id": 151_652, "vision_end_token_id": 151_653, "tie_word_embeddings": False}
VISION: dict[str, Any] = {"depth": 27, "hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4304, "num_heads": 16, "in_channels": 3,
                          "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584, "num_position_embeddings": 2304,
                          "deepstack_visual_indexes": [8, 16, 24]}
IMAGES: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
VIDEOS: dict[str, Any] = {**IMAGES, "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768}, "min_frames": 4, "max_frames": 768,
                          "do_sample_frames": True, "fps": 2}                  # transformers' Qwen3VLVideoProcessor
SECTIONS = (24, 20, 20)
EPS, VISION_ROPE_BASE = 1e-6, 10_000.0


@converts("Qwen3VLForConditionalGeneration")
class Qwen3Vl(Qwen3):
    arch = "qwen3vl"
    vision_defaults, default_sections = VISION, SECTIONS
    renames = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
    root_defaults = DEFAULTS
    rope_base = 500_000.0       # Qwen3VLTextConfig.default_theta
    defaults = {**QWEN3, "vocab_size": 151_936}

    def __init__(self, config: dict[str, Any], file: Path):
        r = self.root = Config(config, self.root_defaults, file)
        text = r.need("text_config")
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))      # the root's counts, where it says anything
        super().__init__({**text, "tie_word_embeddings": tied}, file)
        if self.rope["rope_type"] == "mrope":
            self.rope["rope_type"] = "default"
        self.sections = [int(n) for n in self.rope.get("mrope_section") or self.default_sections]
        v = self.vision = Config(r.need("vision_config"), self.vision_defaults, file)
        for name, value in (("in_channels", 3), ("temporal_patch_size", 2)):
            v.refuse_unless(name, value)
        self.v_layers, self.v_heads, self.v_model, self.v_ff, self.patch_size, self.merge, d_out, places = (v.count(n) for n in (
            "depth", "num_heads", "hidden_size", "intermediate_size", "patch_size", "spatial_merge_size", "out_hidden_size", "num_position_embeddings"))
        self.deep, self.places = [int(i) for i in v.need("deepstack_visual_indexes")], places
        if d_out != self.d_model or self.deep != sorted(set(self.deep)) or any(not 0 <= i < self.v_layers for i in self.deep):
            raise InvalidModelError(f"{file}: the encoder gives {d_out} values a token for a text model of {self.d_model}, and layers {self.deep}")
        if round(places**0.5) ** 2 != places:
            raise UnsupportedModelError(f"{file}: 'num_position_embeddings' is {places}, which is no square")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_rope_dimension_sections([*self.sections, 0])
        out.add_uint32(f"{self.arch}.n_deepstack_layers", len(self.deep))
        images = image_settings(self.root.file.parent, IMAGES)
        write_encoder_keys(
            out, self.vision, images, projector="qwen3vl_merger", image_size=round(self.places**0.5) * self.patch_size, d_model=self.v_model,
            d_ff=self.v_ff, n_layers=self.v_layers, n_heads=self.v_heads, eps=EPS, d_text=self.d_model)
        out.add_vision_spatial_merge_size(self.merge)
        out.add_array("clip.vision.is_deepstack_layers", [i in self.deep for i in range(self.v_layers)])
        out.add_float32("clip.vision.rope.freq_base", float((self.vision.get("rope_parameters") or {}).get("rope_theta") or VISION_ROPE_BASE))
        least, most = pixel_limits(images)
        out.add_vision_min_pixels(least)
        out.add_vision_max_pixels(most)
        write_video_keys(out, video_settings(self.root.file.parent, VIDEOS))
        for key, name in (("image", "image_token_id"), ("video", "video_token_id"), ("image_start", "vision_start_token_id"), ("image_end", "vision_end_token_id")):
            out.add_uint32(f"clip.vision.{key}_token_id", self.root.token(name))

    def both(self, name: str, source: str, n: int) -> Iterator[Entry]:
        """List a layer norm."""
        for part in ("weight", "bias"):
            yield Entry(f"{name}.{part}", f"{source}.{part}", (n,))

    def tensors(self) -> Tensors:
        yield from super().tensors()
        v, d, p, wide = self.v_model, self.d_model, self.patch_size, self.v_model * self.merge**2
        for t in range(2):
            yield Entry("v.patch_embd.weight" + (f".{t}" if t else ""), "visual.patch_embed.proj.weight", (v, 3, p, p), stored=(v, 3, 2, p, p), frame=t,
                        instead=FLOAT32)
        yield Entry("v.patch_embd.bias", "visual.patch_embed.proj.bias", (v,))
        yield Entry("v.position_embd.weight", "visual.pos_embed.weight", (self.places, v), instead=FLOAT32)
        for i in range(self.v_layers):
            b, m = f"v.blk.{i}", f"visual.blocks.{i}"
            yield from self.both(f"{b}.ln1", f"{m}.norm1", v)
            yield from linear(f"{b}.attn_qkv", f"{m}.attn.qkv", 3 * v, v, True)
            yield from linear(f"{b}.attn_out", f"{m}.attn.proj", v, v, True)
            yield from self.both(f"{b}.ln2", f"{m}.norm2", v)
            yield from feed_forward(b, f"{m}.mlp", v, self.v_ff, {"ffn_up": "linear_fc1", "ffn_down": "linear_fc2"})
        yield from self.both("v.post_ln", "visual.merger.norm", v)
        for name, source in (("mm.0", "visual.merger.linear_fc1"), ("mm.2", "visual.merger.linear_fc2")):
            yield from linear(name, source, d if name == "mm.2" else wide, wide, True)
        for k, i in enumerate(self.deep):
            b, m = f"v.deepstack.{i}", f"visual.deepstack_merger_list.{k}"
            yield from self.both(f"{b}.norm", f"{m}.norm", wide)
            yield from linear(f"{b}.fc1", f"{m}.linear_fc1", wide, wide, True)
            yield from linear(f"{b}.fc2", f"{m}.linear_fc2", d, wide, True)


@converts("Qwen3VLMoeForConditionalGeneration")
class Qwen3VlMoe(Qwen3Vl):
    """The same with experts in every layer: gate and up in one tensor, the gate first, transposed in checkpoints before transformers 5."""

    arch = "qwen3vlmoe"
    defaults = {**Qwen3Vl.defaults, "decoder_sparse_step": 1, "moe_intermediate_size": 1408, "num_experts_per_tok": 4, "num_local_experts": 60,
                "norm_topk_prob": True, "mlp_only_layers": None}

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        for name, *allowed in (("decoder_sparse_step", 1), ("mlp_only_layers", None, []), ("norm_topk_prob", True)):
            c.refuse_unless(name, *allowed)
        self.n_experts = c.count("num_experts" if c.get("num_experts") is not None else "num_local_experts")
        self.d_expert = c.count("moe_intermediate_size")
        shapes = {t.shape for name, t in tensors_beside(file).items() if name.endswith("experts.gate_up_proj")}
        self.transposed = shapes == {(self.n_experts, self.d_model, 2 * self.d_expert)}

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_expert_count(self.n_experts)
        out.add_expert_used_count(self.config.count("num_experts_per_tok"))
        out.add_expert_feed_forward_length(self.d_expert)

    def feed_forward(self, b: str, m: str) -> Tensors:
        d, f, n = self.d_model, self.d_expert, self.n_experts
        yield Entry(f"{b}.ffn_gate_inp.weight", f"{m}.gate.weight", (n, d), instead=FLOAT32)
        for part, first in (("gate", 0), ("up", f)):
            place = {"stored": (n, d, 2 * f), "first_column": first} if self.transposed else {"stored": (n, 2 * f, d), "middle": first}
            yield Entry(f"{b}.ffn_{part}_exps.weight", f"{m}.experts.gate_up_proj", (n, f, d), **place)
        down = {"stored": (n, f, d), "first_column": 0} if self.transposed else {}
        yield Entry(f"{b}.ffn_down_exps.weight", f"{m}.experts.down_proj", (n, d, f), **down)
