"""Molmo: Qwen 2 or OLMo 2 under the authors' names, q, k and v in one matrix and up and gate in another, beside CLIP: projector "molmo" in GGUF.
MolmoE: OLMoE so.

Follows the authors' `config_molmo.py`, `modeling_molmo.py`, `preprocessing_molmo.py` (allenai/Molmo-7B-D-0924), `config_molmoe.py`,
`modeling_molmoe.py` (allenai/MolmoE-1B-0924), whose config has the names of training. What the code fixes and no
config.json has to say has their names: `vision_backbone`, `vit_layers`. Tokens for pictures have rows of the embedding and none of the output
head. Axes: V encoder width, F its feed-forward width, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, malformed_is
from .contract import FLOAT32, Entry, Stack, converts, linear, supported
from .decoder import Decoder, Tensors
from .tokenizer import Vocabulary, special_ids
from .vision import feed_forward, image_settings, square, write_encoder_keys

# the authors' MolmoConfig, FullMolmoConfig and VisionBackboneConfig as MolmoForCausalLM sets them, MolmoImageProcessor
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50304, "embedding_size": 50304, "additional_vocab_size": 128, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "clip_qkv": None, "qkv_bias": False, "weight_tying": False, "attention_layer_norm": False, "norm_after": False, "layer_norm_type": "rms",
    "vit_layers": [-2, -9], "image_pooling_2d": "attention-meanq", "image_padding_embed": "pad_and_partial_pad", "image_projector": "mlp",
    "image_pooling_h": 2, "image_pooling_w": 2, "vision_backbone": {}, "moe_num_experts": None}
# MolmoE's names, and the settings of its code that must be so
TRAINING = {"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "num_hidden_layers": "n_layers"}
FIXED: dict[str, Any] = {
    "include_bias": False, "rope": True, "scale_logits": False, "activation_type": "swiglu", "normalize_input_embeds": False, "use_cls_feature": False,
    "moe_shared_expert": False, "moe_interleave": False, "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": None,
    "multi_query_attention": None, "moe_dropless": True, "attention_layer_norm_with_affine": True, "layer_norm_with_affine": True, "alibi": False}
VISION: dict[str, Any] = {
    "image_default_input_size": [336, 336], "image_patch_size": 14, "image_emb_dim": 1024, "image_num_heads": 16, "image_num_key_value_heads": 16,
    "image_num_layers": 23, "image_mlp_dim": 4096, "image_mlp_activations": "quick_gelu", "image_num_pos": 577, "image_norm_eps": 1e-5,
    "image_model_type": "openai"}
IMAGES: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 2, "max_crops": 12,
    "overlap_margins": [4, 4], "base_image_input_size": [336, 336], "image_token_length_w": 12, "image_token_length_h": 12, "image_patch_size": 14,
    "image_padding_mask": True}
TOKENS = {"image": "<|image|>", "image_start": "<im_start>", "image_end": "<im_end>", "image_row": "<im_col>", "image_patch": "<im_patch>"}
# the text model by (norm_after, attention_layer_norm), that with experts
TEXTS = {(False, False): "Qwen2ForCausalLM", (True, True): "Olmo2ForCausalLM"}
EXPERTS = (False, True), "OlmoeForCausalLM"
# The pictures of all messages stand before the first word, as `preprocessing_molmo.py` puts them.
TEMPLATE = (
    "{%- for m in messages -%}{%- if m['content'] is not string -%}{%- for part in m['content'] -%}{%- if part['type'] == 'image' -%}"
    "{{ '<|image|>' }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{{ ' ' + m['role'] | capitalize + ': ' }}{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}"
    "{%- for part in m['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' Assistant:' }}{%- endif -%}")
TOWER, POOL, PROJECTOR = "model.vision_backbone.image_vit", "model.vision_backbone.image_pooling_2d", "model.vision_backbone.image_projector"


def renamed(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a config that has the names of training under those of the published dense models. Raises: UnsupportedModelError."""
    own = Config(config, {**FIXED, "mlp_hidden_size": None, "mlp_ratio": 4, "max_position_embeddings": None, "max_sequence_length": 1024,
                          "vision_backbone": None, "rope_impl": "cockatoo"}, file)
    for name, value in FIXED.items():
        own.refuse_unless(name, value)
    if own.get("vision_backbone") is None:
        raise UnsupportedModelError(f"{file}: 'vision_backbone' is missing: a text model alone is not known by these names")
    return {**config, **{new: config[old] for new, old in TRAINING.items() if old in config}, "rope_impl": own.need("rope_impl"),
            "intermediate_size": own.get("mlp_hidden_size") or own.count("mlp_ratio") * own.count("d_model"),
            "max_position_embeddings": own.get("max_position_embeddings") or own.count("max_sequence_length"),
            "vision_backbone": {**own.need("vision_backbone"), "image_mlp_activations": VISION["image_mlp_activations"]}}    # the code's, whatever is said


def halved_rows(n: int, head_dim: int) -> np.ndarray:
    """Return the order of n rows in which neighbours of a head lie half of it apart: [a0 b0 a1 b1 ..] -> [a0 a1 .. b0 b1 ..]."""
    return np.arange(n).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).ravel()


@converts("MolmoForCausalLM", "OLMoForCausalLM")
class Molmo:
    renames: tuple[tuple[str, str], ...] = ()

    def __init__(self, config: dict[str, Any], file: Path):
        trained = "d_model" in config or "OLMoForCausalLM" in (config.get("architectures") or ())
        r = self.root = Config(renamed(config, file) if trained else config, DEFAULTS, file)
        self.pairs_apart = trained and r.get("rope_impl") == "cockatoo"                        # neighbours turn together, not halves of a head
        for name, *allowed in (("clip_qkv", None), ("weight_tying", False), ("layer_norm_type", "rms"), ("image_projector", "mlp"),
                               ("image_pooling_2d", "attention-meanq", "attention_meanq"), ("image_padding_embed", "pad_and_partial_pad"),
                               ("image_pooling_h", 2), ("image_pooling_w", 2), ("rope_scaling", None), *([] if trained else [("moe_num_experts", None, 0)])):
            r.refuse_unless(name, *allowed)
        kind = bool(r.need("norm_after")), bool(r.need("attention_layer_norm"))
        self.n_experts = r.count("moe_num_experts") if trained else 0
        name = dict([EXPERTS]).get(kind) if trained else TEXTS.get(kind)
        if name is None:
            known = "the second alone, with experts" if trained else "both or none"
            raise UnsupportedModelError(f"{file}: 'norm_after' is {kind[0]} and 'attention_layer_norm' {kind[1]}; this converter knows {known}")
        self.after = kind[0]
        self.n_head, self.extra = r.count("embedding_size") if r.get("embedding_size") else r.count("vocab_size"), r.count("additional_vocab_size")
        if r.count("intermediate_size") % 2:
            raise InvalidModelError(f"{file}: 'intermediate_size' counts the rows of two matrices, so {r.need('intermediate_size')} cannot be")
        self.text: Decoder = supported()[name]({
            **{name: r.get(name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                                              "max_position_embeddings", "rope_theta")},
            **({"num_experts": self.n_experts, "num_experts_per_tok": r.count("moe_top_k")} if trained else {}),
            "architectures": [name], "vocab_size": self.n_head, "intermediate_size": r.count("intermediate_size") // 2,
            "rms_norm_eps": r.need("layer_norm_eps"), "tie_word_embeddings": False}, file)
        self.arch, self.vocab_size, self.d_model = self.text.arch, self.n_head + self.extra, self.text.d_model
        self.read_encoder()
        with malformed_is(f"{file.parent}: a value of the tokenizer's files is of the wrong kind"):
            self.tokens = dict(zip(TOKENS, special_ids(file.parent, list(TOKENS.values()))))
        self.patch_token = self.tokens.pop("image_patch")
        if self.patch_token >= self.vocab_size:
            raise InvalidModelError(f"{file}: the tokenizer's {TOKENS['image_patch']} is {self.patch_token}, the embedding has {self.vocab_size} rows")

    def read_encoder(self) -> None:
        """Read the encoder's sizes, which of its layers are taken, and what its processor does. Raises: UnsupportedModelError."""
        own, file = self.root.need("vision_backbone"), self.root.file
        v = self.vision = Config({**own, "hidden_act": own.get("image_mlp_activations", VISION["image_mlp_activations"]),
                                  "patch_size": own.get("image_patch_size", VISION["image_patch_size"])}, VISION, file)
        v.refuse_unless("image_model_type", "openai")
        self.v_model, self.v_ff, self.v_layers, self.v_heads, self.patch_size = (v.count(n) for n in (
            "image_emb_dim", "image_mlp_dim", "image_num_layers", "image_num_heads", "image_patch_size"))
        v.refuse_unless("image_num_key_value_heads", self.v_heads)
        self.image_size = square(v, "image_default_input_size")
        side = self.image_size // self.patch_size
        v.refuse_unless("image_num_pos", side**2 + 1)
        found = list(self.root.need("vit_layers"))
        self.features = [i + 1 if i >= 0 else self.v_layers + 1 + i for i in found]            # of a layer what it gives
        if not self.features or not all(1 <= i <= self.v_layers for i in self.features):
            raise InvalidModelError(f"{file}: 'vit_layers' is {found} for {self.v_layers} layers")
        s = self.images = image_settings(file.parent, IMAGES)
        if square(s, "base_image_input_size") != self.image_size:
            raise UnsupportedModelError(f"{s.file}: 'base_image_input_size' is {s.need('base_image_input_size')} for an encoder of {self.image_size} pixels")
        margins = s.need("overlap_margins")
        for name, *allowed in (("image_patch_size", self.patch_size), ("image_padding_mask", True), ("image_token_length_w", (side + 1) // 2),
                               ("image_token_length_h", (side + 1) // 2)):
            s.refuse_unless(name, *allowed)
        if len(margins) != 2 or side % 2 or any(type(n) is not int or n < 0 or n % 2 for n in margins) or sum(margins) >= side:
            raise UnsupportedModelError(f"{s.file}: 'overlap_margins' are {margins} in {side} patches; this converter knows even numbers that leave a window")

    def write_keys(self, out: GGUFWriter) -> None:
        self.text.write_keys(out)
        write_encoder_keys(
            out, self.vision, self.images, projector="molmo", image_size=self.image_size, d_model=self.v_model, d_ff=self.v_ff,
            n_layers=max(self.features), n_heads=self.v_heads, eps=self.vision.need("image_norm_eps"), d_text=self.d_model)
        out.add_vision_projector_scale_factor(2)
        out.add_array("clip.vision.feature_layer", self.features)
        out.add_array("clip.vision.preproc_overlap_margins", self.images.need("overlap_margins"))
        out.add_uint32("clip.vision.preproc_max_tiles", self.images.count("max_crops"))
        for name, token in self.tokens.items():
            out.add_uint32(f"clip.vision.{name}_token_id", token)

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Put the end token before every text where there is no token for its begin, and pictures before words: `preprocessing_molmo.py`."""
        special = vocabulary.special
        if "bos" not in special and "eos" in special:
            special["bos"] = special["eos"]
        vocabulary.add_bos, vocabulary.chat_template = "bos" in special, TEMPLATE

    def unused(self) -> set[str]:
        return {entry.source for i in range(max(self.features), self.v_layers) for entry in self.encoder_layer(i)}

    def expert_layer(self, i: int) -> Tensors:
        """List a layer of the decoder that has experts: attention and mixture are modules of their own."""
        t, d, b, m = self.text, self.d_model, f"blk.{i}", f"model.transformer.blocks.{i}"
        q, kv, f, at = t.q_width, t.kv_width, t.d_ff, f"{m}.attn"
        yield t.norm(f"{b}.attn_norm", f"{at}.attn_norm", d)
        for name, first, n in (("attn_q", 0, q), ("attn_k", q, kv), ("attn_v", q + kv, kv)):
            rows = first + halved_rows(n, t.head_dim) if self.pairs_apart and name != "attn_v" else None
            yield Entry(f"{b}.{name}.weight", f"{at}.att_proj.weight", (n, d), row_order=rows, stored=(q + 2 * kv, d), first_row=first)
        for name, n in (("q_norm", q), ("k_norm", kv)):
            yield Entry(f"{b}.attn_{name}.weight", f"{at}.{name}.weight", (n,), row_order=halved_rows(n, t.head_dim) if self.pairs_apart else None)
        yield from linear(f"{b}.attn_output", f"{at}.attn_out", d, q)
        yield t.norm(f"{b}.ffn_norm", f"{m}.mlp.ff_norm", d)
        yield Entry(f"{b}.ffn_gate_inp.weight", f"{m}.mlp.gate.weight", (self.n_experts, d), instead=FLOAT32)
        for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
            parts = tuple(Entry(name, f"{m}.mlp.experts.{e}.{name}_proj.weight", shape) for e in range(self.n_experts))
            yield Stack(f"{b}.ffn_{name}_exps.weight", parts)

    def layer(self, i: int) -> Iterator[Entry]:
        """List a layer of the decoder."""
        t, d, b, m, biased = self.text, self.d_model, f"blk.{i}", f"model.transformer.blocks.{i}", bool(self.root.need("qkv_bias"))
        names = ("post_attention_norm", "post_ffw_norm") if self.after else ("attn_norm", "ffn_norm")
        for name, theirs in zip(names, ("attn_norm", "ff_norm")):
            yield t.norm(f"{b}.{name}", f"{m}.{theirs}", d)
        q, kv, f = t.q_width, t.kv_width, t.d_ff
        for name, first, n in (("attn_q", 0, q), ("attn_k", q, kv), ("attn_v", q + kv, kv)):
            yield Entry(f"{b}.{name}.weight", f"{m}.att_proj.weight", (n, d), stored=(q + 2 * kv, d), first_row=first)
            if biased:
                yield Entry(f"{b}.{name}.bias", f"{m}.att_proj.bias", (n,), stored=(q + 2 * kv,), first_row=first)
        if self.after:
            for name, n in (("q_norm", q), ("k_norm", kv)):
                yield t.norm(f"{b}.attn_{name}", f"{m}.{name}", n)
        yield from linear(f"{b}.attn_output", f"{m}.attn_out", d, q)
        for name, first in (("ffn_up", 0), ("ffn_gate", f)):
            yield Entry(f"{b}.{name}.weight", f"{m}.ff_proj.weight", (f, d), stored=(2 * f, d), first_row=first)
        yield from linear(f"{b}.ffn_down", f"{m}.ff_out", d, f)

    def encoder_layer(self, i: int) -> Iterator[Entry]:
        """List a layer of the encoder."""
        b, m, v = f"v.blk.{i}", f"{TOWER}.transformer.resblocks.{i}", self.v_model
        for name, theirs in (("ln1", "attention_norm"), ("ln2", "ffn_norm")):
            for part in ("weight", "bias"):
                yield Entry(f"{b}.{name}.{part}", f"{m}.{theirs}.{part}", (v,))
        for name, theirs in (("attn_q", "wq"), ("attn_k", "wk"), ("attn_v", "wv"), ("attn_out", "wo")):
            yield from linear(f"{b}.{name}", f"{m}.attention.{theirs}", v, v, True)
        yield from feed_forward(b, f"{m}.feed_forward", v, self.v_ff, {"ffn_up": "w1", "ffn_down": "w2"})

    def tensors(self) -> Tensors:
        d, wte = self.d_model, "model.transformer.wte"
        parts = Entry("embedding", f"{wte}.embedding", (self.n_head, d)), Entry("new_embedding", f"{wte}.new_embedding", (self.extra, d))
        yield Stack("token_embd.weight", parts, joined=True)
        yield self.text.norm("output_norm", "model.transformer.ln_f", d)
        yield Entry("output.weight", "model.transformer.ff_out.weight", (self.n_head, d))
        for i in range(self.text.n_layers):
            yield from self.expert_layer(i) if self.n_experts else self.layer(i)
        yield from self.encoder_tensors()
        row = self.patch_token
        part, row = (parts[0], row) if row < self.n_head else (parts[1], row - self.n_head)
        yield Entry("mm.token_embd", part.source, (d,), stored=part.shape, first_row=row)

    def encoder_tensors(self) -> Iterator[Entry]:
        """List the encoder and its projector."""
        v, d, p, n, wide = self.v_model, self.d_model, self.patch_size, (self.image_size // self.patch_size) ** 2, self.v_model * len(self.features)
        yield Entry("v.class_embd", f"{TOWER}.class_embedding", (v,))
        yield Entry("v.position_embd.weight", f"{TOWER}.positional_embedding", (n + 1, v), instead=FLOAT32)
        yield Entry("v.patch_embd.weight", f"{TOWER}.patch_embedding.weight", (v, 3, p, p), stored=(v, 3 * p * p), instead=FLOAT32,
                    make=lambda a: np.ascontiguousarray(a.reshape(-1, p, p, 3).transpose(0, 3, 1, 2)))       # patches are flattened as y, x, colour
        for part in ("weight", "bias"):
            yield Entry(f"v.pre_ln.{part}", f"{TOWER}.pre_ln.{part}", (v,))
        for i in range(max(self.features)):
            yield from self.encoder_layer(i)
        for name, n_in in (("q", wide), ("k", wide), ("v", wide), ("o", v)):
            yield from linear(f"mm.attn_{name if name != 'o' else 'out'}", f"{POOL}.w{name}", v, n_in, True)
        yield Entry("mm.pad_embd", "model.vision_backbone.pad_embed", (2, wide), instead=FLOAT32)
        units = self.root.count("intermediate_size") // 2
        for name, theirs, shape in (("ffn_gate", "w1", (units, v)), ("ffn_up", "w3", (units, v)), ("ffn_down", "w2", (d, units))):
            yield Entry(f"mm.{name}.weight", f"{PROJECTOR}.{theirs}.weight", shape)
