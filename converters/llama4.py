"""Llama 4 (Scout, Maverick): experts, chunked attention, layers without positions; an encoder over tiles of a picture.

`llama4` in GGUF, projector "llama4". Follows transformers `configuration_llama4.py`, `image_processing_llama4.py`. Matrices of
experts are transposed, and gate and up are cut apart; rows of q and k stay where they are, as the checkpoint's rope is the
interleaved one already. Axes: D text width, F feed-forward width, V encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, malformed_is, read_json
from .contract import FLOAT32, Constant, Entry, converts, linear
from .decoder import Decoder, Tensors
from .rope import rope_tensors, write_rope_scaling
from .vision import attention, feed_forward, image_settings, write_encoder_keys

# transformers' Llama4TextConfig, Llama4VisionConfig, Llama4Config and Llama4ImageProcessor where a checkpoint may be silent
TEXT: dict[str, Any] = {
    "vocab_size": 202_048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16_384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_experts_per_tok": 1,
    "num_local_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True, "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
    "attention_bias": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 768, "hidden_act": "gelu", "num_hidden_layers": 34, "num_attention_heads": 16, "num_channels": 3,
    "intermediate_size": 5632, "vision_output_dim": 7680, "image_size": 448, "patch_size": 14, "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096, "projector_output_dim": 4096,
}
DEFAULTS: dict[str, Any] = {"boi_token_index": 200_080, "eoi_token_index": 200_081}
IMAGES: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2,
                          "size": {"height": 336, "width": 336}, "max_patches": 16, "resize_to_max_canvas": False}
ROPE_BASE = 500_000.0       # Llama4TextConfig.default_theta
VISION_ROPE_BASE = 10_000.0
EPS = 1e-5                  # of the encoder's norms: torch's default, whatever the config says
# tokens that no config names: key of the file, the text that Llama4Processor writes
TOKENS = {"image_marker": "<|image|>", "tile_x_separator": "<|tile_x_separator|>", "tile_y_separator": "<|tile_y_separator|>"}


@converts("Llama4ForCausalLM")
class Llama4Text(Decoder):
    arch = "llama4"
    renames = ((r"^language_model\.", ""),)
    defaults, rope_base, width = TEXT, ROPE_BASE, "intermediate_size_mlp"

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        c.refuse_unless("hidden_act", "silu")
        self.d_expert, self.n_experts, self.step = (
            c.count(n) for n in ("intermediate_size", "num_local_experts", "interleave_moe_layer_step"))
        every = c.count("no_rope_layer_interval")
        self.rotated = self.per_layer("no_rope_layers", c.get("no_rope_layers") or [(i + 1) % every for i in range(self.n_layers)])
        kinds = c.get("layer_types") or ["chunked_attention" if r else "full_attention" for r in self.rotated]
        if not set(kinds) <= {"chunked_attention", "full_attention"}:
            raise UnsupportedModelError(f"{file}: 'layer_types' has {', '.join(sorted(set(kinds)))}; this converter knows "
                                        "chunked_attention and full_attention")
        self.chunked = self.per_layer("layer_types", [k == "chunked_attention" for k in kinds])
        mixed = c.get("moe_layers")
        self.mixed = set(range(self.step - 1, self.n_layers, self.step) if mixed is None else mixed)

    def per_layer(self, name: str, values: Sequence[Any]) -> list[bool]:
        """Return a switch for each layer. Raises InvalidModelError for another number of them."""
        if len(values) != self.n_layers:
            raise InvalidModelError(f"{self.config.file}: '{name}' has {len(values)} entries for {self.n_layers} layers")
        return [bool(v) for v in values]

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        c = self.config
        out.add_expert_feed_forward_length(self.d_expert)
        out.add_expert_count(self.n_experts)
        out.add_expert_used_count(c.count("num_experts_per_tok"))
        out.add_interleave_moe_layer_step(self.step)
        out.add_rope_dimension_count(self.head_dim)
        write_rope_scaling(out, self.rope, c, ("linear", "llama3", "yarn"))
        # what llama.cpp hard-codes; names are Ollama's and, for other models, llama.cpp's where they have one
        out.add_array("llama4.rope.layers", self.rotated)
        out.add_array("llama4.attention.chunked_layers", self.chunked)
        if any(self.chunked):
            out.add_uint32("llama4.attention.chunk_size", c.count("attention_chunk_size"))
        out.add_uint32("llama4.attention.temperature_length", c.count("floor_scale"))
        out.add_float32("llama4.attention.temperature_scale", c.need("attn_scale") if c.get("attn_temperature_tuning") else 0.0)
        out.add_bool("llama4.use_qk_norm", bool(c.need("use_qk_norm")))

    def constants(self) -> Iterator[Constant]:
        yield from rope_tensors(self.rope, self.config, self.head_dim)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", self.d_model)
        yield from self.attention(b, f"{m}.self_attn", self.config.need("attention_bias"))
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", self.d_model)
        yield from self.mixture(b, f"{m}.feed_forward") if i in self.mixed else self.gated(b, f"{m}.feed_forward", self.d_ff)

    def mixture(self, name: str, source: str) -> Iterator[Entry]:
        """List the router, the experts and the one that all tokens go through."""
        n, d, f = self.n_experts, self.d_model, self.d_expert
        yield Entry(f"{name}.ffn_gate_inp.weight", f"{source}.router.weight", (n, d), instead=FLOAT32)
        for part, first in (("gate", 0), ("up", f)):
            yield Entry(f"{name}.ffn_{part}_exps.weight", f"{source}.experts.gate_up_proj", (n, f, d), stored=(n, d, 2 * f),
                        first_column=first)
        yield Entry(f"{name}.ffn_down_exps.weight", f"{source}.experts.down_proj", (n, d, f), stored=(n, f, d), first_column=0)
        yield from self.gated(name, f"{source}.shared_expert", f, kind="_shexp")


@converts("Llama4ForConditionalGeneration")
class Llama4(Llama4Text):
    renames = ((r"^model\.(language_model|vision_model|multi_modal_projector)\.", r"\1."), (r"^language_model\.", ""))

    def __init__(self, config: dict[str, Any], file: Path):
        self.root = Config(config, DEFAULTS, file)
        super().__init__(config.get("text_config") or {}, file)       # its tie_word_embeddings counts, not the root's
        v = self.vision = Config(config.get("vision_config") or {}, VISION, file)
        v.refuse_unless("num_channels", 3)
        self.v_model, self.v_ff, self.v_layers, self.v_heads, self.v_out = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projector_output_dim"))
        self.image_size, self.patch_size = v.count("image_size"), v.count("patch_size")
        self.group = round(1 / v.need("pixel_shuffle_ratio"))
        side = self.image_size // self.patch_size
        self.n_patches = side * side
        if side % self.group or self.v_ff != self.v_model * self.group**2:
            raise InvalidModelError(f"{file}: {side} x {side} patches of {self.v_model} values cannot be shuffled in groups of "
                                    f"{self.group} x {self.group} to an adapter of {self.v_ff}")
        for name in ("projector_input_dim", "vision_output_dim"):
            v.refuse_unless(name, self.v_out)
        rope = v.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise UnsupportedModelError(f"{file}: rope '{rope['rope_type']}' of the encoder; this converter knows 'default'")
        self.v_rope_base = float(rope.get("rope_theta") or v.get("rope_theta") or VISION_ROPE_BASE)

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        folder = self.root.file.parent
        images = image_settings(folder, IMAGES)
        images.refuse_unless("size", {"height": self.image_size, "width": self.image_size})
        write_encoder_keys(
            out, self.vision, images, projector="llama4", image_size=self.image_size, d_model=self.v_model, d_ff=self.v_ff,
            n_layers=self.v_layers, n_heads=self.v_heads, eps=EPS, d_text=self.d_model)
        out.add_vision_projector_scale_factor(self.group)
        out.add_float32("clip.vision.rope.freq_base", self.v_rope_base)
        out.add_uint32("clip.vision.max_tiles", images.count("max_patches"))
        out.add_bool("clip.vision.resize_to_max_canvas", bool(images.need("resize_to_max_canvas")))
        out.add_uint32("clip.vision.image_start_token_id", self.root.token("boi_token_index", "boi_token_id"))
        out.add_uint32("clip.vision.image_end_token_id", self.root.token("eoi_token_index", "eoi_token_id"))
        with malformed_is(f"{folder / 'tokenizer.json'}: 'added_tokens' is of the wrong kind"):
            ids = {t["content"]: int(t["id"]) for t in read_json(folder / "tokenizer.json").get("added_tokens") or ()}
        for key, text in TOKENS.items():
            if text in ids:
                out.add_uint32(f"clip.vision.{key}_token_id", ids[text])

    def tensors(self) -> Iterator[Entry | Constant]:
        yield from super().tensors()
        v, f = self.v_model, self.v_ff

        def norm(name: str, source: str) -> Iterator[Entry]:
            for part in ("weight", "bias"):
                yield Entry(f"{name}.{part}", f"{source}.{part}", (v,))

        yield Entry("v.patch_embd.weight", "vision_model.patch_embedding.linear.weight", (v, 3 * self.patch_size**2),
                    instead=FLOAT32)
        yield Entry("v.class_embd", "vision_model.class_embedding", (v,))
        yield Entry("v.position_embd.weight", "vision_model.positional_embedding_vlm", (self.n_patches + 1, v), instead=FLOAT32)
        yield from norm("v.pre_ln", "vision_model.layernorm_pre")
        for i in range(self.v_layers):
            b, m = f"v.blk.{i}", f"vision_model.model.layers.{i}"
            yield from norm(f"{b}.ln1", f"{m}.input_layernorm")
            yield from attention(b, f"{m}.self_attn", v, bias=True)
            yield from norm(f"{b}.ln2", f"{m}.post_attention_layernorm")
            yield from feed_forward(b, f"{m}.mlp", v, f, {"ffn_up": "fc1", "ffn_down": "fc2"})
        yield from norm("v.post_ln", "vision_model.layernorm_post")
        yield from linear("mm.model.mlp.1", "vision_model.vision_adapter.mlp.fc1", self.v_out, f)
        yield from linear("mm.model.mlp.2", "vision_model.vision_adapter.mlp.fc2", self.v_out, self.v_out)
        yield from linear("mm.model.fc", "multi_modal_projector.linear_1", self.d_model, self.v_out)
