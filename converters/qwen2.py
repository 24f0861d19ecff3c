"""Qwen 2 and 2.5: the llama layout with biases on q, k and v and half-split ("neox") rope: `qwen2` in GGUF.

Follows transformers `configuration_qwen2.py`. Axes: D hidden, F feed-forward, H/K heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .checkpoint import Config
from .contract import Entry, converts, linear
from .decoder import write_window
from .rope import rope_parameters, write_rope_scaling

# transformers' Qwen2Config where a config.json may be silent
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
                            "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
ROPE_BASE = 10_000.0        # PreTrainedConfig.default_theta


@converts("Qwen2ForCausalLM")
class Qwen2:
    arch = "qwen2"
    renames: Sequence[tuple[str, str]] = ()
    defaults, rope_base = DEFAULTS, ROPE_BASE

    def __init__(self, config: dict[str, Any], file: Path):
        c = self.config = Config(config, self.defaults, file)
        c.refuse_unless("hidden_act", "silu")
        self.vocab_size, self.d_model, self.d_ff = (
            c.count(n) for n in ("vocab_size", "hidden_size", "intermediate_size"))
        self.n_layers, self.n_heads = c.count("num_hidden_layers"), c.count("num_attention_heads")
        self.n_kv_heads = c.count("num_key_value_heads") if c.get("num_key_value_heads") else self.n_heads
        self.head_dim = c.count("head_dim") if c.get("head_dim") else self.d_model // self.n_heads
        self.window = c.get("sliding_window") if c.need("use_sliding_window") else None
        kinds = c.get("layer_types")
        if kinds is None:
            kinds = ["sliding_attention" if self.window is not None and i >= c.need("max_window_layers")
                     else "full_attention" for i in range(self.n_layers)]
        self.sliding = [kind == "sliding_attention" for kind in kinds]
        self.tied = c.need("tie_word_embeddings")
        self.rope = rope_parameters(c, self.rope_base)

    def write_keys(self, out: GGUFWriter) -> None:
        c = self.config
        out.add_block_count(self.n_layers)
        out.add_context_length(c.count("max_position_embeddings"))
        out.add_embedding_length(self.d_model)
        out.add_feed_forward_length(self.d_ff)
        out.add_head_count(self.n_heads)
        out.add_head_count_kv(self.n_kv_heads)
        out.add_key_length(self.head_dim)
        out.add_value_length(self.head_dim)
        out.add_layer_norm_rms_eps(c.need("rms_norm_eps"))
        out.add_rope_dimension_count(self.head_dim)
        out.add_rope_freq_base(self.rope["rope_theta"])
        write_rope_scaling(out, self.rope, c, ("linear", "yarn"))
        write_window(out, self.window, self.sliding)

    def unused(self) -> set[str]:
        return {"lm_head.weight"} if self.tied else set()

    def tensors(self) -> Iterator[Entry]:
        d, f = self.d_model, self.d_ff
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        yield Entry("token_embd.weight", "model.embed_tokens.weight", (self.vocab_size, d))
        yield Entry("output_norm.weight", "model.norm.weight", (d,))
        if not self.tied:
            yield Entry("output.weight", "lm_head.weight", (self.vocab_size, d))
        for i in range(self.n_layers):
            b, m = f"blk.{i}", f"model.layers.{i}"
            yield Entry(f"{b}.attn_norm.weight", f"{m}.input_layernorm.weight", (d,))
            yield from linear(f"{b}.attn_q", f"{m}.self_attn.q_proj", q, d, bias=True)
            yield from linear(f"{b}.attn_k", f"{m}.self_attn.k_proj", kv, d, bias=True)
            yield from linear(f"{b}.attn_v", f"{m}.self_attn.v_proj", kv, d, bias=True)
            yield from linear(f"{b}.attn_output", f"{m}.self_attn.o_proj", d, q)
            yield Entry(f"{b}.ffn_norm.weight", f"{m}.post_attention_layernorm.weight", (d,))
            yield from linear(f"{b}.ffn_gate", f"{m}.mlp.gate_proj", f, d)
            yield from linear(f"{b}.ffn_up", f"{m}.mlp.up_proj", f, d)
            yield from linear(f"{b}.ffn_down", f"{m}.mlp.down_proj", d, f)
