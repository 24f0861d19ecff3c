"""LLaVA 1.5 and LLaVA-NeXT, Granite Vision: a text model of another name with CLIP or SigLIP beside it, projector "mlp" in GGUF.

Follows transformers `configuration_llava.py`, `configuration_llava_next.py`, `configuration_clip.py`, `configuration_siglip.py` and the image
processors of both. Keys and names as in llama.cpp's `convert_image_encoder_to_gguf.py`; layers behind the last one that is taken are left
out. Axes: V encoder width, F its feed-forward width, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config
from .contract import FLOAT32, Entry, converts, linear, supported
from .decoder import Tensors
from .vision import attention, feed_forward, image_settings, write_encoder_keys

# transformers' LlavaConfig, LlavaNextConfig, CLIPVisionConfig, SiglipVisionConfig and image processors where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
                            "multimodal_projector_bias": True, "image_token_index": 32_000, "tie_word_embeddings": False}
CLIP: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3,
                        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP: dict[str, Any] = {**CLIP, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
IMAGES: dict[str, Any] = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
                          "do_center_crop": True, "do_pad": False, "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# text models by their model_type: the class that converts them alone
TEXTS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "granite": "GraniteForCausalLM", "qwen2": "Qwen2ForCausalLM"}
TOWER = "vision_tower"


@converts("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
class Llava:
    renames = ((r"^model\.language_model\.", "model."), (r"^language_model\.model\.", "model."), (r"^language_model\.lm_head\.", "lm_head."),
               (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"), (r"^vision_tower\.vision_model\.", "vision_tower."))

    def __init__(self, config: dict[str, Any], file: Path):
        r = self.root = Config(config, DEFAULTS, file)
        self.tiled = "LlavaNextForConditionalGeneration" in config["architectures"]
        text = r.need("text_config")
        kind = text.get("model_type", "llama")
        if kind not in TEXTS:
            raise UnsupportedModelError(f"{file}: the text model is {kind!r}; this converter knows {', '.join(TEXTS)}")
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", r.need("tie_word_embeddings")))
        self.text = supported()[TEXTS[kind]]({**text, "architectures": [TEXTS[kind]], "tie_word_embeddings": tied}, file)
        self.arch, self.vocab_size, self.d_model = self.text.arch, self.text.vocab_size, self.text.d_model
        self.read_encoder(r.need("vision_config"))
        self.read_images()
        r.refuse_unless("projector_hidden_act", "gelu")
        self.biases, self.image_token = bool(r.need("multimodal_projector_bias")), r.token("image_token_index", "image_token_id")

    def read_encoder(self, config: dict[str, Any]) -> None:
        """Read the encoder's sizes and which of its layers are taken. Raises: UnsupportedModelError."""
        kind, file = config.get("model_type", "clip_vision_model"), self.root.file
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise UnsupportedModelError(f"{file}: the encoder is {kind!r}; this converter knows clip_vision_model and siglip_vision_model")
        self.clip = kind == "clip_vision_model"
        v = self.vision = Config(config, CLIP if self.clip else SIGLIP, file)
        v.refuse_unless("num_channels", 3)
        self.v_model, self.v_ff, self.v_layers, self.v_heads, self.patch_size, self.image_size = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"))
        self.root.refuse_unless("vision_feature_select_strategy", "default" if self.clip else "full")     # the class token's row is left out
        found = self.root.need("vision_feature_layer")
        layers = [found] if isinstance(found, int) else list(found)
        self.features = [i if i >= 0 else self.v_layers + 1 + i for i in layers]
        if not self.features or not all(0 <= i <= self.v_layers for i in self.features):
            raise InvalidModelError(f"{file}: 'vision_feature_layer' is {found} for {self.v_layers} layers")

    def read_images(self) -> None:
        """Read what the image processor does. Raises: UnsupportedModelError for what no key expresses."""
        s = self.images = image_settings(self.root.file.parent, {**IMAGES, "image_grid_pinpoints": PINPOINTS})
        size = s.need("size")
        sides = {size} if isinstance(size, int) else {size.get("shortest_edge"), size.get("height"), size.get("width")} - {None}
        if sides != {self.image_size}:
            raise UnsupportedModelError(f"{s.file}: 'size' is {size!r} for an encoder of {self.image_size} pixels")
        if not self.tiled and not s.need("do_pad") and not s.need("do_center_crop"):
            raise UnsupportedModelError(f"{s.file}: pictures are neither padded nor cut; this converter knows 'do_pad' and 'do_center_crop'")
        if self.tiled and self.root.get("image_grid_pinpoints") not in (None, s.get("image_grid_pinpoints")):
            raise UnsupportedModelError(f"{s.file}: 'image_grid_pinpoints' differ from those of {self.root.file.name}")

    def write_keys(self, out: GGUFWriter) -> None:
        self.text.write_keys(out)
        write_encoder_keys(
            out, self.vision, self.images, projector="mlp", image_size=self.image_size, d_model=self.v_model, d_ff=self.v_ff,
            n_layers=max(1, *self.features), n_heads=self.v_heads, eps=self.vision.need("layer_norm_eps"), d_text=self.d_model)
        out.add_array("clip.vision.feature_layer", self.features)
        out.add_string("clip.vision.image_aspect_ratio", "anyres" if self.tiled else "pad" if self.images.need("do_pad") else "crop")
        if self.tiled:
            out.add_array("clip.vision.image_grid_pinpoints", [int(n) for pair in self.images.need("image_grid_pinpoints") for n in pair])
            out.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
        out.add_uint32("clip.vision.image_token_id", self.image_token)

    def unused(self) -> set[str]:
        left = {f"{TOWER}.embeddings.position_ids"} | {f"{TOWER}.post_layernorm.{part}" for part in ("weight", "bias")}
        left |= {entry.source for i in range(max(1, *self.features), self.v_layers) for entry in self.layer(i)}
        left |= {f"{TOWER}.head.{name}" for name in ("probe", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight",
                                                     "attention.out_proj.bias", "layernorm.weight", "layernorm.bias", "mlp.fc1.weight",
                                                     "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")}
        return self.text.unused() | left

    def both(self, name: str, source: str) -> Iterator[Entry]:
        """List a layer norm."""
        for part in ("weight", "bias"):
            yield Entry(f"{name}.{part}", f"{source}.{part}", (self.v_model,))

    def layer(self, i: int) -> Iterator[Entry]:
        """List a layer of the encoder."""
        b, m, v = f"v.blk.{i}", f"{TOWER}.encoder.layers.{i}", self.v_model
        yield from self.both(f"{b}.ln1", f"{m}.layer_norm1")
        yield from attention(b, f"{m}.self_attn", v, bias=True, out="out_proj")
        yield from self.both(f"{b}.ln2", f"{m}.layer_norm2")
        yield from feed_forward(b, f"{m}.mlp", v, self.v_ff, {"ffn_up": "fc1", "ffn_down": "fc2"})

    def tensors(self) -> Tensors:
        yield from self.text.tensors()
        v, d, p, n = self.v_model, self.d_model, self.patch_size, (self.image_size // self.patch_size) ** 2
        at = f"{TOWER}.embeddings"
        yield Entry("v.patch_embd.weight", f"{at}.patch_embedding.weight", (v, 3, p, p), instead=FLOAT32)
        if self.clip:
            yield Entry("v.class_embd", f"{at}.class_embedding", (v,))
            yield from self.both("v.pre_ln", f"{TOWER}.pre_layrnorm")
        else:
            yield Entry("v.patch_embd.bias", f"{at}.patch_embedding.bias", (v,))
        yield Entry("v.position_embd.weight", f"{at}.position_embedding.weight", (n + self.clip, v), instead=FLOAT32)
        for i in range(max(1, *self.features)):
            yield from self.layer(i)
        yield from linear("mm.0", "multi_modal_projector.linear_1", d, v * len(self.features), self.biases)
        yield from linear("mm.2", "multi_modal_projector.linear_2", d, d, self.biases)
        if self.tiled:
            yield Entry("model.image_newline", "image_newline", (d,))
