"""InternVL 2, 2.5 and 3, of transformers and of the authors: a text model of another name beside InternViT, projector "internvl" in GGUF.

Follows transformers `configuration_internvl.py`, `image_processing_pil_got_ocr2.py`, and the authors' `configuration_internvl_chat.py`,
`modeling_intern_vit.py`, whose names of tensors are turned into those of transformers. Keys and names as llama.cpp's
`conversion/internvl.py` has them. Axes: V encoder width, F its feed-forward width, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as QT
from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, malformed_is
from .contract import FLOAT32, Entry, converts, linear, supported
from .decoder import Tensors
from .tokenizer import special_ids
from .vision import attention, feed_forward, image_settings, square, video_settings, write_encoder_keys

# transformers' InternVLConfig, InternVLVisionConfig, the authors' InternVisionConfig, and the processors' settings
DEFAULTS: dict[str, Any] = {"downsample_ratio": 0.5, "projector_hidden_act": "gelu", "vision_feature_layer": -1, "select_layer": -1,
                            "vision_feature_select_strategy": "default", "ps_version": "v2", "min_dynamic_patch": 1, "max_dynamic_patch": 12}
VISION: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "num_channels": 3,
                          "image_size": [448, 448], "patch_size": [14, 14], "hidden_act": "gelu", "layer_norm_eps": 1e-6, "norm_type": "layer_norm",
                          "attention_bias": False, "use_qk_norm": False, "use_absolute_position_embeddings": True, "use_mean_pooling": True}
IMAGES: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "min_patches": 1, "max_patches": 12}
TEXTS = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "internlm2": "InternLM2ForCausalLM", "phi3": "Phi3ForCausalLM"}
TOKENS = {"image_start": "<img>", "image": "<IMG_CONTEXT>", "image_end": "</img>"}
MATRICES = {QT.F16: QT.F32, QT.BF16: QT.F32, QT.Q8_0: QT.F32}
TOWER = "vision_tower"


@converts("InternVLForConditionalGeneration", "InternVLChatModel")
class InternVl:
    projector, special = "internvl", TOKENS
    renames = ((r"^model\.language_model\.", "model."), (r"^language_model\.", ""), (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
               # the authors' names
               (r"^vision_model\.", f"{TOWER}."), (r"\.embeddings\.class_embedding$", ".embeddings.cls_token"),
               (r"\.embeddings\.position_embedding$", ".embeddings.position_embeddings"),
               (r"\.embeddings\.patch_embedding\.", ".embeddings.patch_embeddings.projection."), (r"^(vision_tower\.encoder\.)layers\.", r"\1layer."),
               (r"^(vision_tower\.encoder\.layer\.\d+\.)attn\.proj\.", r"\1attention.projection_layer."),
               (r"^(vision_tower\.encoder\.layer\.\d+\.)attn\.", r"\1attention."), (r"^(vision_tower\.encoder\.layer\.\d+\.)norm1\.", r"\1layernorm_before."),
               (r"^(vision_tower\.encoder\.layer\.\d+\.)norm2\.", r"\1layernorm_after."), (r"^(vision_tower\.encoder\.layer\.\d+\.)ls([12])$", r"\1lambda_\2"),
               (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."), (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
               (r"^mlp1\.3\.", "multi_modal_projector.linear_2."))

    def __init__(self, config: dict[str, Any], file: Path):
        r = self.root = Config(config, DEFAULTS, file)
        self.authors = "InternVLForConditionalGeneration" not in config["architectures"]
        text = r.need("llm_config" if self.authors else "text_config")
        kind = self.text_kind(text)
        if kind not in TEXTS:
            raise UnsupportedModelError(f"{file}: the text model is {kind!r}; this converter knows {', '.join(TEXTS)}")
        tied = text.get("tie_word_embeddings", False) if self.authors else config.get("tie_word_embeddings", True)
        self.text = supported()[TEXTS[kind]]({**text, "architectures": [TEXTS[kind]], "tie_word_embeddings": tied}, file)
        self.arch, self.vocab_size, self.d_model = self.text.arch, self.text.vocab_size, self.text.d_model
        for name, *allowed in (("projector_hidden_act", "gelu"), ("vision_feature_layer", -1), ("select_layer", -1), ("ps_version", "v2"),
                               ("vision_feature_select_strategy", "default")):
            r.refuse_unless(name, *allowed)
        self.read_encoder(r.need("vision_config"))
        self.images = image_settings(file.parent, IMAGES)
        if not self.authors:
            self.check_videos()
        with malformed_is(f"{file.parent}: a value of the tokenizer's files is of the wrong kind"):
            self.tokens = dict(zip(self.special, special_ids(file.parent, list(self.special.values()))))

    def check_videos(self) -> None:
        """Raise UnsupportedModelError where frames are not treated as the whole of a picture."""
        side = {"height": self.image_size, "width": self.image_size}
        videos = video_settings(self.root.file.parent, {**IMAGES, "size": side})
        for name in ("image_mean", "image_std", "resample"):
            videos.refuse_unless(name, self.images.need(name))
        videos.refuse_unless("size", side)

    def text_kind(self, text: dict[str, Any]) -> str:
        """Return the kind of the text model, a key of TEXTS."""
        return str(text.get("model_type", "qwen2"))

    def read_encoder(self, config: dict[str, Any]) -> None:
        """Read the encoder's sizes. Raises: UnsupportedModelError."""
        file, own = self.root.file, dict(config)
        if self.authors:                                     # their names of the same settings
            own |= {"attention_bias": config.get("qkv_bias", False), "use_qk_norm": config.get("qk_normalization", False)}
        own |= {name: square(Config(config, VISION, file), name) for name in ("image_size", "patch_size")}
        v = self.vision = Config(own, VISION, file)
        for name, *allowed in (("num_channels", 3), ("norm_type", "layer_norm", "rms_norm"), ("use_absolute_position_embeddings", True)):
            v.refuse_unless(name, *allowed)
        self.v_model, self.v_ff, self.v_layers, self.v_heads, self.image_size, self.patch_size = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"))
        self.group = round(1 / self.root.need("downsample_ratio"))
        if self.image_size // self.patch_size % self.group:
            raise InvalidModelError(f"{file}: {self.image_size // self.patch_size} patches along a side are no groups of {self.group}")

    def write_keys(self, out: GGUFWriter) -> None:
        self.text.write_keys(out)
        write_encoder_keys(
            out, self.vision, self.images, projector=self.projector, image_size=self.image_size, d_model=self.v_model, d_ff=self.v_ff,
            n_layers=self.v_layers, n_heads=self.v_heads, eps=self.vision.need("layer_norm_eps"), d_text=self.d_model)
        out.add_vision_projector_scale_factor(self.group)
        least, most = (("min_dynamic_patch", "max_dynamic_patch"), ("min_patches", "max_patches"))[not self.authors]
        numbers = self.root if self.authors else self.images
        out.add_uint32("clip.vision.preproc_min_tiles", numbers.count(least))
        out.add_uint32("clip.vision.preproc_max_tiles", numbers.count(most))
        for name, token in self.tokens.items():
            out.add_uint32(f"clip.vision.{name}_token_id", token)

    def unused(self) -> set[str]:
        return self.text.unused() | {f"{TOWER}.embeddings.mask_token"}

    def norm(self, name: str, source: str, n: int, bias: bool = True) -> Iterator[Entry]:
        """List a norm's weight and, where it has one, its bias."""
        for part in ("weight", "bias")[: 1 + bias]:
            yield Entry(f"{name}.{part}", f"{source}.{part}", (n,))

    def queries(self, b: str, m: str) -> Iterator[Entry]:
        """List what attention has: the authors' q, k and v are one matrix."""
        v, bias = self.v_model, bool(self.vision.need("attention_bias"))
        if not self.authors:
            yield from attention(b, f"{m}.attention", v, bias=bias, out="projection_layer") if bias else self.without_biases(b, f"{m}.attention")
            return
        for i, name in enumerate(("attn_q", "attn_k", "attn_v")):
            yield Entry(f"{b}.{name}.weight", f"{m}.attention.qkv.weight", (v, v), stored=(3 * v, v), first_row=i * v)
            if bias:
                yield Entry(f"{b}.{name}.bias", f"{m}.attention.qkv.bias", (v,), stored=(3 * v,), first_row=i * v)
        yield from linear(f"{b}.attn_out", f"{m}.attention.projection_layer", v, v, True)

    def without_biases(self, b: str, m: str) -> Iterator[Entry]:
        """List attention of which only the output has a bias."""
        for name, theirs in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"), ("attn_out", "projection_layer")):
            yield from linear(f"{b}.{name}", f"{m}.{theirs}", self.v_model, self.v_model, name == "attn_out")

    def tensors(self) -> Tensors:
        yield from self.text.tensors()
        v, d, p, n, at = self.v_model, self.d_model, self.patch_size, (self.image_size // self.patch_size) ** 2, f"{TOWER}.embeddings"
        yield Entry("v.class_embd", f"{at}.cls_token", (1, 1, v), instead=MATRICES)
        yield Entry("v.patch_embd.weight", f"{at}.patch_embeddings.projection.weight", (v, 3, p, p), instead=FLOAT32)
        yield Entry("v.patch_embd.bias", f"{at}.patch_embeddings.projection.bias", (v,))
        yield Entry("v.position_embd.weight", f"{at}.position_embeddings", (1, n + 1, v), instead=MATRICES)
        biased = self.vision.need("norm_type") == "layer_norm"
        for i in range(self.v_layers):
            b, m = f"v.blk.{i}", f"{TOWER}.encoder.layer.{i}"
            yield from self.norm(f"{b}.ln1", f"{m}.layernorm_before", v, biased)
            yield from self.queries(b, m)
            if self.vision.need("use_qk_norm"):
                for part in "qk":
                    yield from self.norm(f"{b}.attn_{part}_norm", f"{m}.attention.{part}_norm", v, False)
            yield from self.norm(f"{b}.ln2", f"{m}.layernorm_after", v, biased)
            yield from feed_forward(b, f"{m}.mlp", v, self.v_ff, {"ffn_up": "fc1", "ffn_down": "fc2"})
            for k in (1, 2):
                yield Entry(f"{b}.ls{k}.weight", f"{m}.lambda_{k}", (v,))
        if not self.vision.need("use_mean_pooling") and not self.authors:
            yield from self.norm("v.post_ln", f"{TOWER}.layernorm", v)
        yield from self.norm("mm.model.mlp.0", "multi_modal_projector.layer_norm", v * self.group**2)
        yield from self.products(d, True)

    def products(self, units: int, bias: bool) -> Iterator[Entry]:
        """List the projector's products, with so many units between."""
        mm, d = "multi_modal_projector", self.d_model
        yield from linear("mm.model.mlp.1", f"{mm}.linear_1", units, self.v_model * self.group**2, bias)
        yield from linear("mm.model.mlp.3", f"{mm}.linear_2", d, units, bias)
