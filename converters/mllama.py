"""Llama 3.2 Vision: a llama decoder with cross-attention layers, and its tiled encoder: `mllama` in one file.

llama.cpp knows no such model. Tensors have the names that Ollama reads (`model/models/mllama`), and the encoder's gates are stored
as what they multiply with; keys of the encoder are clip.vision.*, as in our other files. Follows transformers
`configuration_mllama.py`, `image_processing_pil_mllama.py`. Axes: V encoder width, F its feed-forward width, D text width, T tiles,
P rows of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from pyengine.errors import InvalidModelError

from .checkpoint import Config
from .contract import FLOAT32, NO_BLOCKS, Constant, Entry, converts, linear
from .llama import DEFAULTS as LLAMA
from .llama import Llama
from .vision import attention, feed_forward, image_settings, write_encoder_keys

# transformers' MllamaConfig, MllamaTextConfig, MllamaVisionConfig and MllamaImageProcessorPil where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"image_token_index": 128_256}
TEXT: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 40, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38]}
VISION: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_global_layers": 8, "attention_heads": 16,
    "num_channels": 3, "image_size": 448, "patch_size": 14, "hidden_act": "gelu", "norm_eps": 1e-5, "max_num_tiles": 4,
    "intermediate_layers_indices": [3, 7, 15, 23, 30]}
IMAGES: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2, "do_pad": True}
EXTRA_ROWS = 8              # of the embedding, beyond the output head's: MllamaTextModel


@converts("MllamaForConditionalGeneration")
class Mllama(Llama):
    arch = "mllama"
    defaults, rope_base = {**LLAMA, **TEXT}, 500_000.0       # MllamaTextConfig.default_theta
    renames = ((r"^model\.language_model\.", "model."), (r"^language_model\.model\.", "model."),
               (r"^language_model\.lm_head\.", "lm_head."), (r"^model\.(vision_model|multi_modal_projector)\.", r"\1."))

    def __init__(self, config: dict[str, Any], file: Path):
        self.root = Config(config, DEFAULTS, file)
        text = {k: v for k, v in (config.get("text_config") or {}).items() if v is not None}
        super().__init__({**text, "architectures": config["architectures"], "tie_word_embeddings": False}, file)
        self.n_head, self.vocab_size = self.vocab_size, self.vocab_size + EXTRA_ROWS
        self.across = sorted(self.config.need("cross_attention_layers"))
        v = self.vision = Config(config.get("vision_config") or {}, VISION, file)
        v.refuse_unless("num_channels", 3)
        self.v_model, self.v_ff, self.v_layers, self.v_global, self.v_heads, self.tiles = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_global_layers", "attention_heads", "max_num_tiles"))
        self.image_size, self.patch_size = v.count("image_size"), v.count("patch_size")
        self.tile_rows = (self.image_size // self.patch_size) ** 2 + 1
        self.ratios = [[y, x] for y in range(1, self.tiles + 1) for x in range(1, self.tiles + 1) if x * y <= self.tiles]
        if v.get("supported_aspect_ratios") not in (None, self.ratios):
            raise InvalidModelError(f"{file}: 'supported_aspect_ratios' are not those of {self.tiles} tiles, {self.ratios}")
        self.states = self._states()

    def _states(self) -> list[int]:
        """Count the layers that have run when each state is kept.

        The authors, and transformers up to 4.53, count the layers before it; later versions take the state behind that layer
        (`MllamaVisionEncoder.forward`). A checkpoint means what the version that saved it did.
        """
        found = re.match(r"(\d+)\.(\d+)", str(self.root.get("transformers_version") or ""))
        behind = int(found is not None and (int(found[1]), int(found[2])) >= (4, 54))
        return [i + behind if i >= 0 else self.v_layers + 1 + i for i in self.vision.need("intermediate_layers_indices")]

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_array("mllama.attention.cross_attention_layers", self.across)
        geometry = {"max_image_tiles": self.tiles, "size": {"height": self.image_size, "width": self.image_size}}
        images = image_settings(self.root.file.parent, {**IMAGES, **geometry})
        for name, value in {**geometry, "do_pad": True}.items():
            images.refuse_unless(name, value)
        write_encoder_keys(
            out, self.vision, images, projector="mllama", image_size=self.image_size, d_model=self.v_model, d_ff=self.v_ff,
            n_layers=self.v_layers, n_heads=self.v_heads, eps=self.vision.need("norm_eps"), d_text=self.d_model)
        out.add_uint32("clip.vision.global.block_count", self.v_global)
        out.add_uint32("clip.vision.max_num_tiles", self.tiles)
        out.add_array("clip.vision.feature_layer", self.states)
        out.add_uint32("clip.vision.image_token_id", self.root.token("image_token_index", "image_token_id"))

    def tensors(self) -> Iterator[Entry | Constant]:
        d, q, kv, e = self.d_model, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.head_dim
        for entry in super().tensors():
            if entry.name == "output.weight":
                yield Entry(entry.name, "lm_head.weight", (self.n_head, d))
            elif not any(entry.name.startswith(f"blk.{i}.attn_") and ".attn_norm." not in entry.name for i in self.across):
                yield entry
        for i in self.across:
            b, m = f"blk.{i}.cross_attn", f"model.layers.{i}.cross_attn"
            for name, shape in (("q_proj", (q, d)), ("k_proj", (kv, d)), ("v_proj", (kv, d)), ("o_proj", (d, q))):
                yield Entry(f"{b}_{name}.weight", f"{m}.{name}.weight", shape)
            for name in ("q_norm", "k_norm"):
                yield Entry(f"{b}_{name}.weight", f"{m}.{name}.weight", (e,))
            for name in ("attn_gate", "mlp_gate"):
                yield Entry(f"{b}_{name}", f"{m}_{name}", (1,))
        yield from self.vision_tensors()
        yield from linear("mm.0", "multi_modal_projector", d, self.v_model * (1 + len(self.states)), bias=True)

    def vision_tensors(self) -> Iterator[Entry]:
        v, p, n = self.v_model, self.patch_size, len(self.ratios) + 1
        yield Entry("v.patch_embd.weight", "vision_model.patch_embedding.weight", (v, 3, p, p), instead=FLOAT32)
        yield Entry("v.class_embd", "vision_model.class_embedding", (v,))
        own = "vision_model.gated_positional_embedding"
        yield Entry("v.position_embd.weight", f"{own}.embedding", (self.tile_rows, v), instead=FLOAT32)
        yield Entry("v.position_embd.gate", f"{own}.gate", (1,), make=lambda g: 1 - np.tanh(g))
        # added, and large: narrow, but never in blocks
        yield Entry("v.tile_position_embd.weight", f"{own}.tile_embedding.weight", (n, self.tiles * self.tile_rows * v),
                    instead=NO_BLOCKS)
        yield Entry("v.tile_position_embd.gate", f"{own}.gate", (1,), make=np.tanh)
        for when in ("pre", "post"):
            own = f"vision_model.{when}_tile_positional_embedding"
            yield Entry(f"v.{when}_tile_position_embd.weight", f"{own}.embedding.weight", (n, self.tiles * v), instead=FLOAT32)
            yield Entry(f"v.{when}_tile_position_embd.gate", f"{own}.gate", (1,), make=np.tanh)
            yield from _norm(f"v.{when}_ln", f"vision_model.layernorm_{when}", v)
        for i in range(self.v_layers):
            yield from self._layer(f"v.blk.{i}", f"vision_model.transformer.layers.{i}")
        for i in range(self.v_global):
            b, m = f"v.global.blk.{i}", f"vision_model.global_transformer.layers.{i}"
            yield from self._layer(b, m)
            yield Entry(f"{b}.attn_gate", f"{m}.gate_attn", (1,), make=np.tanh)
            yield Entry(f"{b}.ffn_gate", f"{m}.gate_ffn", (1,), make=np.tanh)

    def _layer(self, b: str, m: str) -> Iterator[Entry]:
        v = self.v_model
        yield from _norm(f"{b}.ln1", f"{m}.input_layernorm", v)
        yield from attention(b, f"{m}.self_attn", v)
        yield from _norm(f"{b}.ln2", f"{m}.post_attention_layernorm", v)
        yield from feed_forward(b, f"{m}.mlp", v, self.v_ff, {"ffn_up": "fc1", "ffn_down": "fc2"})


def _norm(name: str, source: str, n: int) -> Iterator[Entry]:
    for part in ("weight", "bias"):
        yield Entry(f"{name}.{part}", f"{source}.{part}", (n,))
