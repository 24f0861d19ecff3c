"""Aria: experts and a shared feed-forward, with SigLIP and queries beside it: `aria` in GGUF, projector "aria".

Follows transformers `configuration_aria.py`, `configuration_idefics3.py`, `image_processing_pil_aria.py`. Experts' matrices are [in, out] in the
checkpoint. Axes: V encoder width, F its feed-forward width, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, malformed_is
from .contract import FLOAT32, Entry, converts, layer_norm, linear
from .decoder import Decoder, Tensors
from .idefics3 import VISION
from .rope import write_rope_scaling
from .vision import behind_layers, image_settings, pre_norm_layer, write_encoder_keys

# transformers' AriaTextConfig, AriaConfig and AriaImageProcessorPil where a checkpoint may be silent
TEXT: dict[str, Any] = {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                        "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                        "attention_bias": False, "mlp_bias": False, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 2}
DEFAULTS: dict[str, Any] = {"vision_feature_layer": -1, "image_token_index": 9, "tie_word_embeddings": False}
QUERIES = {1225: 128, 4900: 256}         # by the number of patches
IMAGES: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3, "max_image_size": 980, "min_image_size": 336,
                          "split_image": False}
SPLITS = ((1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8), (2, 4), (2, 3), (2, 2), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (5, 1), (6, 1), (7, 1),
          (8, 1))                        # of 490 pixels, lines and columns
TOWER, PROJECTOR = "vision_tower", "multi_modal_projector"


@converts("AriaTextForCausalLM")
class AriaText(Decoder):
    arch = "aria"
    defaults, rope_base = TEXT, 10_000.0
    renames = ((r"\.experts\.fc1\.weight$", ".experts.gate_up_proj"), (r"\.experts\.fc2\.weight$", ".experts.down_proj"))

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        c.refuse_unless("hidden_act", "silu")
        c.refuse_unless("mlp_bias", False)
        self.n_experts, self.n_used, self.n_shared = (c.count(n) for n in ("moe_num_experts", "moe_topk", "moe_num_shared_experts"))

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_rope_dimension_count(self.head_dim)
        write_rope_scaling(out, self.rope, self.config, ("linear", "yarn"))
        out.add_expert_count(self.n_experts)
        out.add_expert_used_count(self.n_used)
        out.add_expert_shared_count(self.n_shared)
        out.add_expert_feed_forward_length(self.d_ff)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, f, n = self.d_model, self.d_ff, self.n_experts
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield from self.attention(b, f"{m}.self_attn", bias=bool(self.config.need("attention_bias")))
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", d)
        yield Entry(f"{b}.ffn_gate_inp.weight", f"{m}.mlp.router.weight", (n, d), instead=FLOAT32)
        both, down = f"{m}.mlp.experts.gate_up_proj", f"{m}.mlp.experts.down_proj"
        yield Entry(f"{b}.ffn_gate_exps.weight", both, (n, f, d), stored=(n, d, 2 * f), first_column=0)
        yield Entry(f"{b}.ffn_up_exps.weight", both, (n, f, d), stored=(n, d, 2 * f), first_column=f)
        yield Entry(f"{b}.ffn_down_exps.weight", down, (n, d, f), stored=(n, f, d), first_column=0)
        yield from self.gated(b, f"{m}.mlp.shared_experts", f * self.n_shared, kind="_shexp")


@converts("AriaForConditionalGeneration")
class Aria(AriaText):
    renames = (*AriaText.renames, (r"^model\.language_model\.", "model."), (r"^language_model\.model\.", "model."),
               (r"^language_model\.lm_head\.", "lm_head."), (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
               (r"^vision_tower\.vision_model\.", "vision_tower."))

    def __init__(self, config: dict[str, Any], file: Path):
        r = self.root = Config(config, DEFAULTS, file)
        text = r.need("text_config")
        Config(text, {"model_type": "aria_text"}, file).refuse_unless("model_type", "aria_text")
        super().__init__({**text, "tie_word_embeddings": config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))}, file)
        v = self.vision = Config(r.need("vision_config"), VISION, file)
        v.refuse_unless("num_channels", 3)
        self.v_model, self.v_ff, self.v_layers, self.v_heads, self.image_size, self.patch_size = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"))
        layer = r.need("vision_feature_layer")
        self.taken = layer if type(layer) is int and layer >= 0 else self.v_layers + 1 + layer if type(layer) is int else 0
        if not 1 <= self.taken <= self.v_layers:
            raise UnsupportedModelError(f"{file}: 'vision_feature_layer' is {layer!r}; this converter knows one of {self.v_layers} layers")
        with malformed_is(f"{file}: 'projector_patch_to_query_dict' is of the wrong kind"):
            self.queries = {int(n): int(count) for n, count in (r.get("projector_patch_to_query_dict") or QUERIES).items()}
        self.image_token = r.token("image_token_index", "image_token_id")
        self.read_images()

    def read_images(self) -> None:
        """Read what the image processor does. Raises: InvalidModelError."""
        s = self.images = image_settings(self.root.file.parent, IMAGES)
        self.longest, self.shortest = s.count("max_image_size"), s.count("min_image_size")
        with malformed_is(f"{s.file}: 'split_resolutions' is of the wrong kind"):
            self.splits = [int(n) for pair in s.get("split_resolutions") or [(490 * y, 490 * x) for y, x in SPLITS] for n in pair]
        if (self.longest // self.patch_size) ** 2 not in self.queries:
            raise InvalidModelError(f"{s.file}: 'max_image_size' is {self.longest}, but there are queries for {list(self.queries)} patches of "
                                    f"{self.patch_size} pixels")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        write_encoder_keys(
            out, self.vision, self.images, projector="aria", image_size=self.image_size, d_model=self.v_model, d_ff=self.v_ff, n_layers=self.taken,
            n_heads=self.v_heads, eps=self.vision.need("layer_norm_eps"), d_text=self.d_model)
        out.add_array("clip.vision.projector.patch_to_query", [n for pair in self.queries.items() for n in pair])
        out.add_vision_preproc_image_size(self.longest)
        out.add_uint32("clip.vision.preproc_min_size", self.shortest)
        out.add_bool("clip.vision.image_splitting", bool(self.images.need("split_image")))
        out.add_array("clip.vision.image_grid_pinpoints", self.splits)
        out.add_uint32("clip.vision.image_token_id", self.image_token)

    def unused(self) -> set[str]:
        behind = {entry.source for i in range(self.taken, self.v_layers) for entry in self.encoder_layer(i)}
        return super().unused() | behind | behind_layers(TOWER)

    def encoder_layer(self, i: int) -> Iterator[Entry]:
        """List a layer of the encoder."""
        return pre_norm_layer(f"v.blk.{i}", f"{TOWER}.encoder.layers.{i}", self.v_model, self.v_ff)

    def projector(self) -> Iterator[Entry]:
        """List the queries, their attention and its feed-forward; PyTorch keeps the three inner products in one matrix."""
        v, d, m = self.v_model, self.d_model, f"{PROJECTOR}.cross_attn"
        yield Entry("mm.query.weight", f"{PROJECTOR}.query", (max(self.queries.values()), v))
        yield from layer_norm("mm.ln_q", f"{m}.layer_norm", v)
        yield from layer_norm("mm.ln_kv", f"{m}.layer_norm_kv", v)
        for i, name in enumerate("qkv"):
            yield from linear(f"mm.{name}", f"{m}.{name}_proj", v, v)
            rows = np.arange(i * v, (i + 1) * v)
            yield Entry(f"mm.attn_{name}.weight", f"{m}.multihead_attn.in_proj_weight", (v, v), rows, stored=(3 * v, v))
            yield Entry(f"mm.attn_{name}.bias", f"{m}.multihead_attn.in_proj_bias", (v,), rows, stored=(3 * v,))
        yield from linear("mm.attn_out", f"{m}.multihead_attn.out_proj", v, v, bias=True)
        yield from linear("mm.out", f"{m}.linear", v, v, bias=True)
        yield from layer_norm("mm.ln_post", f"{PROJECTOR}.layer_norm", v)
        yield from linear("mm.ffn_up", f"{PROJECTOR}.feed_forward.linear_in", d, v)
        yield from linear("mm.ffn_down", f"{PROJECTOR}.feed_forward.linear_out", d, d)

    def tensors(self) -> Tensors:
        yield from super().tensors()
        v, p, n, at = self.v_model, self.patch_size, (self.image_size // self.patch_size) ** 2, f"{TOWER}.embeddings"
        yield Entry("v.patch_embd.weight", f"{at}.patch_embedding.weight", (v, 3, p, p), instead=FLOAT32)
        yield Entry("v.patch_embd.bias", f"{at}.patch_embedding.bias", (v,))
        yield Entry("v.position_embd.weight", f"{at}.position_embedding.weight", (n, v), instead=FLOAT32)
        for i in range(self.taken):
            yield from self.encoder_layer(i)
        yield from self.projector()
