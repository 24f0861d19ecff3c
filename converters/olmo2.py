"""OLMo 2: norms behind attention and feed-forward, q/k norms over all heads at once: `olmo2` in GGUF.

Follows transformers `configuration_olmo2.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import Constant, converts
from .decoder import Decoder, Tensors
from .rope import rope_tensors, write_rope_scaling

# transformers' Olmo2Config where a config.json may be silent
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "clip_qkv": None}
ROPE_BASE = 10_000.0


@converts("Olmo2ForCausalLM")
class Olmo2(Decoder):
    arch = "olmo2"
    defaults, rope_base = DEFAULTS, ROPE_BASE

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        for name, value in (("hidden_act", "silu"), ("attention_bias", False), ("clip_qkv", None)):
            self.config.refuse_unless(name, value)

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_rope_dimension_count(self.head_dim)
        write_rope_scaling(out, self.rope, self.config, ("linear", "llama3", "yarn"))

    def constants(self) -> Iterator[Constant]:
        yield from rope_tensors(self.rope, self.config, self.head_dim)

    def wide_norms(self, b: str, m: str) -> Tensors:
        """List the norms of queries and keys over all heads."""
        yield self.norm(f"{b}.attn_q_norm", f"{m}.q_norm", self.q_width)
        yield self.norm(f"{b}.attn_k_norm", f"{m}.k_norm", self.kv_width)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        yield from self.attention(b, f"{m}.self_attn")
        yield from self.wide_norms(b, f"{m}.self_attn")
        yield self.norm(f"{b}.post_attention_norm", f"{m}.post_attention_layernorm", self.d_model)
        yield from self.gated(b, f"{m}.mlp", self.d_ff)
        yield self.norm(f"{b}.post_ffw_norm", f"{m}.post_feedforward_layernorm", self.d_model)
