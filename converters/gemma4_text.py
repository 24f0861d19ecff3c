"""Gemma 4, text only: sliding and global layers with heads of their own, caches that later layers share, per-layer embeddings, experts.

`gemma4` in GGUF. Follows transformers `configuration_gemma4.py`, `modeling_gemma4.py`; keys and names as llama.cpp's `conversion/gemma.py`
has them, but for gate and up of experts, which are two tensors here. Axes: D hidden, F feed-forward, H/K heads, P per-layer width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import read_json
from .contract import FLOAT32, Constant, Entry, converts, linear
from .decoder import Decoder, Tensors, write_window
from .rope import rope_parameters
from .tokenizer import Vocabulary

# transformers' Gemma4TextConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "sliding_window": 512, "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256, "attention_k_eq_v": False, "num_kv_shared_layers": 0, "enable_moe_block": False, "use_double_wide_mlp": False,
    "pad_token_id": 0,
}
PATTERN = 6                                        # every 6th layer is global, and the last, where there is no list
GLOBAL_BASE, LOCAL_BASE = 1_000_000.0, 10_000.0
GLOBAL_PART = 0.25                                 # of a global head's frequencies that turn
NOT_TURNED = 1e30                                  # divides the others: llama.cpp's number
SHARED = ("k_proj", "v_proj", "k_norm", "v_norm")  # of layers that read other layers' caches: no weight of theirs is used


@converts("Gemma4ForCausalLM")
class Gemma4Text(Decoder):
    arch = "gemma4"
    defaults, rope_base = DEFAULTS, GLOBAL_BASE

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        c.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
        c.refuse_unless("attention_bias", False)
        c.refuse_unless("use_bidirectional_attention", "vision", None)
        kinds = c.get("layer_types") or ["sliding_attention" if (i + 1) % PATTERN else "full_attention" for i in range(self.n_layers)]
        self.sliding = [kind == "sliding_attention" for kind in [*kinds[:-1], "full_attention"]]
        if len(kinds) != self.n_layers or set(kinds) - {"sliding_attention", "full_attention"}:
            raise InvalidModelError(f"{file}: 'layer_types' must name a kind of attention for each of {self.n_layers} layers")
        self.heads = self.read_heads(kinds)
        self.n_own = self.read_own()
        self.widths = [self.d_ff * (2 if c.need("use_double_wide_mlp") and i >= self.n_own else 1) for i in range(self.n_layers)]
        self.d_per_layer = c.count("hidden_size_per_layer_input") if c.get("hidden_size_per_layer_input") else 0
        if self.d_per_layer:
            c.refuse_unless("vocab_size_per_layer_input", self.vocab_size)
        self.n_experts = c.count("num_experts") if c.need("enable_moe_block") else 0
        self.d_expert = c.count("moe_intermediate_size") if self.n_experts else 0
        self.local_rope = rope_parameters(c, LOCAL_BASE, "sliding_attention", scaled=False)
        if self.local_rope["rope_type"] != "default" or self.rope["rope_type"] != "proportional":
            raise UnsupportedModelError(f"{file}: rope of sliding layers must be 'default' and of global layers 'proportional'")

    def read_own(self) -> int:
        """Return how many layers, the first ones, have caches. Raises: InvalidModelError."""
        n_shared = self.config.need("num_kv_shared_layers")
        n_own = self.n_layers - n_shared
        if not 0 <= n_shared < self.n_layers or set(self.sliding[n_own:]) - set(self.sliding[:n_own]):
            raise InvalidModelError(f"{self.config.file}: 'num_kv_shared_layers' is {n_shared}: layers of all kinds are needed before those")
        return n_own

    def read_heads(self, kinds: list[str]) -> list[tuple[int, int]]:
        """Return each layer's (key/value heads, elements of a head): global layers may have others, in two spellings of the config."""
        c = self.config
        if c.get("per_layer_config") is None:
            heads = c.get("num_global_key_value_heads") if c.need("attention_k_eq_v") else None
            wide = (self.n_kv_heads if heads is None else c.count("num_global_key_value_heads"), c.count("global_head_dim"))
            return [(self.n_kv_heads, self.head_dim) if slides else wide for slides in self.sliding]
        of_layer = {int(i): values for i, values in c.need("per_layer_config").items()}
        found = [(of_layer.get(i, {}).get("num_key_value_heads", self.n_kv_heads), of_layer.get(i, {}).get("head_dim", self.head_dim))
                 for i in range(self.n_layers)]
        if any(type(n) is not int or n < 1 for pair in found for n in pair):
            raise InvalidModelError(f"{c.file}: 'per_layer_config' gives {found}, which are no heads")
        if any(len({pair for pair, slides in zip(found, self.sliding) if slides is kind}) > 1 for kind in (True, False)):
            raise UnsupportedModelError(f"{c.file}: 'per_layer_config' makes layers of one kind differ, for which there is no key")
        return found

    def read_rope(self) -> dict[str, Any]:
        found = rope_parameters(self.config, self.rope_base, "full_attention", part=True)
        if not self.config.get("rope_parameters"):
            found |= {"rope_type": "proportional", "partial_rotary_factor": GLOBAL_PART}
        if found.get("factor", 1.0) != 1.0:
            raise UnsupportedModelError(f"{self.config.file}: 'factor' of global layers' rope has no key")
        return found

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        c = self.config
        for add in (out.add_key_length_swa, out.add_value_length_swa, out.add_rope_dimension_count_swa):
            add(self.head_dim)
        out.add_rope_dimension_count(self.heads[-1][1])
        out.add_rope_freq_base_swa(self.local_rope["rope_theta"])
        write_window(out, c.count("sliding_window"), self.sliding)
        if not any(self.sliding):
            out.add_sliding_window(c.count("sliding_window"))
            out.add_sliding_window_pattern(self.sliding)
        out.add_shared_kv_layers(self.n_layers - self.n_own)
        out.add_embedding_length_per_layer_input(self.d_per_layer)
        if c.get("final_logit_softcapping") is not None:
            out.add_final_logit_softcapping(c.need("final_logit_softcapping"))
        if self.n_experts:
            out.add_expert_count(self.n_experts)
            out.add_expert_used_count(c.count("top_k_experts"))
            out.add_expert_feed_forward_length(self.d_expert)

    def layer_sizes(self) -> tuple[list[int], list[int], int]:
        return self.widths, [heads for heads, _ in self.heads], self.heads[-1][1]

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Write a tokenizer with byte fallback by its merges: they need not follow from scores of tokens."""
        merges = read_json(self.config.file.parent / "tokenizer.json").get("model", {}).get("merges")
        if merges and vocabulary.model == "llama":
            vocabulary.model = vocabulary.pre = "gemma4"
            vocabulary.merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]

    def unused(self) -> set[str]:
        names = [f"model.layers.{i}.self_attn.{name}.weight" for i in range(self.n_own, self.n_layers) for name in SHARED]
        return super().unused() | set(names)

    def constants(self) -> Iterator[Constant]:
        half = self.heads[-1][1] // 2
        turned = int(self.rope["partial_rotary_factor"] * self.heads[-1][1] // 2)
        yield Constant("rope_freqs.weight", np.array([1.0] * turned + [NOT_TURNED] * (half - turned), np.float32))

    def tensors(self) -> Tensors:
        yield from super().tensors()
        if self.d_per_layer:
            wide = self.n_layers * self.d_per_layer
            yield Entry("per_layer_token_embd.weight", "model.embed_tokens_per_layer.weight", (self.vocab_size, wide))
            yield from linear("per_layer_model_proj", "model.per_layer_model_projection", wide, self.d_model)
            yield self.norm("per_layer_proj_norm", "model.per_layer_projection_norm", self.d_per_layer)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, (kv_heads, head_dim) = self.d_model, self.heads[i]
        for name, source in (("attn_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm"),
                             ("ffn_norm", "pre_feedforward_layernorm"), ("post_ffw_norm", "post_feedforward_layernorm")):
            yield self.norm(f"{b}.{name}", f"{m}.{source}", d)
        attn = f"{m}.self_attn"
        yield from linear(f"{b}.attn_q", f"{attn}.q_proj", self.n_heads * head_dim, d)
        yield self.norm(f"{b}.attn_q_norm", f"{attn}.q_norm", head_dim)
        if i < self.n_own:
            yield from linear(f"{b}.attn_k", f"{attn}.k_proj", kv_heads * head_dim, d)
            yield self.norm(f"{b}.attn_k_norm", f"{attn}.k_norm", head_dim)
            if self.sliding[i] or not self.config.need("attention_k_eq_v"):
                yield from linear(f"{b}.attn_v", f"{attn}.v_proj", kv_heads * head_dim, d)
        yield from linear(f"{b}.attn_output", f"{attn}.o_proj", d, self.n_heads * head_dim)
        yield from self.gated(b, f"{m}.mlp", self.widths[i])
        yield Entry(f"{b}.layer_output_scale.weight", f"{m}.layer_scalar", (1,))
        if self.d_per_layer:
            yield from linear(f"{b}.inp_gate", f"{m}.per_layer_input_gate", self.d_per_layer, d)
            yield from linear(f"{b}.proj", f"{m}.per_layer_projection", d, self.d_per_layer)
            yield self.norm(f"{b}.post_norm", f"{m}.post_per_layer_input_norm", d)
        if self.n_experts:
            yield from self.experts(b, m)

    def experts(self, b: str, m: str) -> Tensors:
        """List a layer's experts, what chooses them, and the norms around both feed-forwards."""
        d, f, n = self.d_model, self.d_expert, self.n_experts
        yield self.norm(f"{b}.pre_ffw_norm_2", f"{m}.pre_feedforward_layernorm_2", d)
        for k in (1, 2):
            yield self.norm(f"{b}.post_ffw_norm_{k}", f"{m}.post_feedforward_layernorm_{k}", d)
        yield Entry(f"{b}.ffn_gate_inp.weight", f"{m}.router.proj.weight", (n, d), instead=FLOAT32)
        yield Entry(f"{b}.ffn_gate_inp.scale", f"{m}.router.scale", (d,))
        yield Entry(f"{b}.ffn_down_exps.scale", f"{m}.router.per_expert_scale", (n,))
        for part, first in (("gate", 0), ("up", f)):
            yield Entry(f"{b}.ffn_{part}_exps.weight", f"{m}.experts.gate_up_proj", (n, f, d), stored=(n, 2 * f, d), middle=first)
        yield Entry(f"{b}.ffn_down_exps.weight", f"{m}.experts.down_proj", (n, d, f))
