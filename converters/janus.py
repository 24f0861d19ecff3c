"""Janus-Pro, what it reads pictures with: llama beside a SigLIP of its own, projector "janus_pro" in GGUF. What it draws with is left out.

Follows transformers `configuration_janus.py`, `image_processing_pil_janus.py`; keys and names as in llama.cpp's `conversion/januspro.py`.
Axes: V encoder width, F its feed-forward width, D text width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, malformed_is
from .contract import FLOAT32, Entry, converts, layer_norm, linear
from .decoder import Tensors
from .llama import Llama
from .tokenizer import special_ids
from .vision import attention, feed_forward, image_settings, tied_head, write_encoder_keys

# transformers' JanusConfig, JanusVisionConfig and JanusImageProcessorPil where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"image_token_id": 100_581}
VISION: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_channels": 3, "image_size": 384,
                          "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "mlp_ratio": 4.0, "attention_bias": True,
                          "use_qk_norm": False, "depth": 2}
IMAGES: dict[str, Any] = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
                          "size": {"height": 384, "width": 384}, "min_size": 14, "do_pad": True}
TOKENS = {"image_start": "<begin_of_image>", "image_end": "<end_of_image>"}      # the tokenizer's boi_token and eoi_token


@converts("JanusForConditionalGeneration")
class Janus(Llama):
    leaves = ((r"^(vqmodel|generation_\w+)\.", "the parts that draw pictures are left out: this model reads pictures only"),)
    renames = ((r"^model\.language_model\.", "model."), (r"^model\.(vision_model|aligner|vqmodel|generation_\w+)\.", r"\1."))

    def __init__(self, config: dict[str, Any], file: Path):
        r = self.root = Config(config, DEFAULTS, file)
        text = r.need("text_config")
        Config(text, {"model_type": "llama"}, file).refuse_unless("model_type", "llama")
        super().__init__({**text, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied_head(r)}, file)
        v = self.vision = Config(r.need("vision_config"), VISION, file)
        for name, *allowed in (("num_channels", 3), ("attention_bias", True), ("use_qk_norm", False), ("depth", 2)):
            v.refuse_unless(name, *allowed)
        self.v_model, self.v_layers, self.v_heads, self.patch_size, self.image_size = (v.count(n) for n in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"))
        self.v_ff = int(self.v_model * v.need("mlp_ratio"))
        if v.get("projection_dim") not in (None, self.d_model):
            raise InvalidModelError(f"{file}: 'projection_dim' is {v.get('projection_dim')} for a text model of width {self.d_model}")
        s = self.images = image_settings(file.parent, IMAGES)
        if s.need("size") != {"height": self.image_size, "width": self.image_size}:
            raise UnsupportedModelError(f"{s.file}: 'size' is {s.need('size')!r} for an encoder of {self.image_size} pixels")
        s.refuse_unless("do_pad", True)
        self.image_token = r.token("image_token_id", "image_token_index")
        with malformed_is(f"{file.parent}: a value of the tokenizer's files is of the wrong kind"):
            self.tokens = dict(zip(TOKENS, special_ids(file.parent, list(TOKENS.values()))))

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        write_encoder_keys(
            out, self.vision, self.images, projector="janus_pro", image_size=self.image_size, d_model=self.v_model, d_ff=self.v_ff,
            n_layers=self.v_layers, n_heads=self.v_heads, eps=self.vision.need("layer_norm_eps"), d_text=self.d_model)
        out.add_uint32("clip.vision.preproc_min_size", self.images.count("min_size"))
        for name, token in {"image": self.image_token, **self.tokens}.items():
            out.add_uint32(f"clip.vision.{name}_token_id", token)

    def tensors(self) -> Tensors:
        yield from super().tensors()
        v, d, p, n, at = self.v_model, self.d_model, self.patch_size, (self.image_size // self.patch_size) ** 2, "vision_model.embeddings"
        yield Entry("v.patch_embd.weight", f"{at}.patch_embedding.weight", (v, 3, p, p), instead=FLOAT32)
        yield Entry("v.patch_embd.bias", f"{at}.patch_embedding.bias", (v,))
        yield Entry("v.position_embd.weight", f"{at}.position_embedding.weight", (n, v), instead=FLOAT32)
        yield from layer_norm("v.post_ln", "vision_model.post_layernorm", v)
        for i in range(self.v_layers):
            b, m = f"v.blk.{i}", f"vision_model.encoder.layers.{i}"
            yield from layer_norm(f"{b}.ln1", f"{m}.layer_norm1", v)
            yield from layer_norm(f"{b}.ln2", f"{m}.layer_norm2", v)
            yield from attention(b, f"{m}.self_attn", v, bias=True, out="projection_layer")
            yield from feed_forward(b, f"{m}.mlp", v, self.v_ff, {"ffn_up": "fc1", "ffn_down": "fc2"})
        yield from linear("mm.0", "aligner.fc1", d, v, True)
        yield from linear("mm.1", "aligner.hidden_layers.0", d, d, True)
