"""nomic-embed-text v1 and v1.5: `nomic-bert` in GGUF; v2, with experts: `nomic-bert-moe`. Follows transformers `configuration_nomic_bert.py`, and the configs
and names of the authors' own code, in which q, k and v are one matrix, and which alone has v2."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import UnsupportedModelError

from .contract import converts, Entry, FLOAT32, layer_norm, linear, Stack
from .decoder import Tensors
from .rope import rope_parameters
from .text_encoder import TextEncoder

# transformers' NomicBertConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {"vocab_size": 30528, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
                            "hidden_act": "silu", "max_position_embeddings": 2048, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
                            "tie_word_embeddings": True}
AUTHORS = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_inner": "intermediate_size",
           "n_positions": "max_position_embeddings", "layer_norm_epsilon": "layer_norm_eps", "rotary_emb_base": "rope_theta"}
# switches of the authors' configs, as this architecture has them
FIXED = {"activation_function": "swiglu", "causal": False, "prenorm": False, "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
         "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "use_rms_norm": None}
MIXED = {**FIXED, "activation_function": "gelu", "qkv_proj_bias": True, "mlp_fc1_bias": True, "mlp_fc2_bias": True, "moe_normalize_expert_weights": False,
         "expert_choice_router": False, "num_shared_experts": 0}


@converts("NomicBertModel", "NomicBertForMaskedLM", "NomicBertForPreTraining", "NomicBertForSequenceClassification")
class NomicBert(TextEncoder):
    arch: str = "nomic-bert"
    renames = ((r"^(nomic_bert|bert)\.", ""), (r"^encoder\.layers\.", "layers."), (r"^emb_ln\.", "embeddings.LayerNorm."), (r"\battn\.out_proj\.", "self_attn.o_proj."),
               (r"\bfc11\.", "up_proj."), (r"\bfc12\.", "gate_proj."), (r"\bfc2\.", "down_proj."), (r"\bnorm1\.", "post_attention_layernorm."),
               (r"\bnorm2\.", "post_mlp_layernorm."))
    defaults = DEFAULTS
    masked = ("cls.predictions.transform.dense", "cls.predictions.transform.layer_norm", "cls.predictions.decoder", "cls.predictions.bias")
    classes = "pooler.dense", "classifier"

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__({AUTHORS.get(name, name): value for name, value in config.items()}, file)
        c = self.config
        self.every = c.get("moe_every_n_layers") or 0                            # layers, of which the second has experts; 0: there are none
        if self.every:
            self.arch, self.n_experts, self.n_used = "nomic-bert-moe", c.count("num_experts"), c.count("moe_top_k")
        c.refuse_unless("hidden_act", "gelu" if self.every and "hidden_act" in config else "silu")
        for name, value in (MIXED if self.every else FIXED).items():
            if name in config and config[name] not in (value, None, False if value is None else value):
                raise UnsupportedModelError(f"{file}: '{name}' is {config[name]!r}; this converter knows {value!r}")
        self.n_types, self.fused = c.count("type_vocab_size"), False
        self.n_ctx = min(self.n_ctx, c.get("max_trained_positions") or (2048 if "n_positions" in config else self.n_ctx))
        self.rope = rope_parameters(c, 1000.0)
        if self.rope["rope_type"] != "default":
            raise UnsupportedModelError(f"{file}: rope scaling of this architecture has no key")

    def look(self, names: Collection[str]) -> None:
        super().look(names)
        self.fused = "layers.0.attn.Wqkv.weight" in names

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_token_type_count(self.n_types)
        out.add_rope_freq_base(self.rope["rope_theta"])
        if self.every:
            out.add_moe_every_n_layers(self.every)
            out.add_expert_count(self.n_experts)
            out.add_expert_used_count(self.n_used)

    def tensors(self) -> Tensors:
        d, bias = self.width, bool(self.every)
        yield Entry("token_embd.weight", "embeddings.word_embeddings.weight", (self.vocab_size, d))
        yield Entry("token_types.weight", "embeddings.token_type_embeddings.weight", (self.n_types, d), instead=FLOAT32)
        yield from layer_norm("token_embd_norm", "embeddings.LayerNorm", d)
        for i in range(self.n_layers):
            b, m = f"blk.{i}", f"layers.{i}"
            if self.fused:
                yield from linear(f"{b}.attn_qkv", f"{m}.attn.Wqkv", 3 * d, d, bias)
            else:
                for part in "qkv":
                    yield from linear(f"{b}.attn_{part}", f"{m}.self_attn.{part}_proj", d, d, bias)
            yield from linear(f"{b}.attn_output", f"{m}.self_attn.o_proj", d, d, bias)
            yield from layer_norm(f"{b}.attn_output_norm", f"{m}.post_attention_layernorm", d)
            yield from self.mixture(b, f"{m}.mlp") if self.every and i % self.every == 1 else self.feed_forward(b, f"{m}.mlp")
            yield from layer_norm(f"{b}.layer_output_norm", f"{m}.post_mlp_layernorm", d)
        yield from self.heads()

    def feed_forward(self, b: str, m: str) -> Tensors:
        """List a layer's feed-forward, which is gated where there are no experts."""
        d, f = self.width, self.d_ff
        if not self.every:
            yield from linear(f"{b}.ffn_gate", f"{m}.gate_proj", f, d)
        yield from linear(f"{b}.ffn_up", f"{m}.fc1" if self.every else f"{m}.up_proj", f, d, bool(self.every))
        yield from linear(f"{b}.ffn_down", f"{m}.down_proj", d, f, bool(self.every))

    def mixture(self, b: str, m: str) -> Tensors:
        """List a layer's router and experts, each of whose matrices lies behind the one before it; the second ones are transposed."""
        d, f, n = self.width, self.d_ff, self.n_experts
        yield Entry(f"{b}.ffn_gate_inp.weight", f"{m}.router.layer.weight", (n, d), instead=FLOAT32)
        for name, theirs, shape in (("ffn_up_exps", "w1", (f, d)), ("ffn_down_exps", "w2", (d, f))):
            yield Stack(f"{b}.{name}.weight", tuple(Entry(f"{b}.{name}.{e}", f"{m}.experts.mlp.{theirs}", shape, stored=(n * f, d), first_row=e * f,
                                                          turned=theirs == "w2") for e in range(n)))
        yield Entry(f"{b}.ffn_exps.bias", f"{m}.experts.bias", (d,))
