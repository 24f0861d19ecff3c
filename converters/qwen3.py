"""Qwen3: qwen2's layout without biases, and a norm of each head's queries and keys: `qwen3` in GGUF.

Follows transformers `configuration_qwen3.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import Config
from .contract import converts
from .decoder import Tensors
from .qwen2 import Qwen2

# transformers' Qwen3Config where a config.json may be silent
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
                            "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128}


@converts("Qwen3ForCausalLM")
class Qwen3(Qwen2):
    arch = "qwen3"
    defaults = DEFAULTS

    def __init__(self, config: dict[str, Any], file: Path):
        c = Config(config, self.defaults, file)
        c.refuse_unless("use_sliding_window", False)
        c.refuse_unless("attention_bias", False)
        super().__init__(config, file)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", self.d_model)
        yield from self.attention(b, f"{m}.self_attn", head_norms=True)
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", self.d_model)
        yield from self.feed_forward(b, f"{m}.mlp")

    def feed_forward(self, b: str, m: str) -> Tensors:
        """Yield what stands behind the second norm."""
        yield from self.gated(b, m, self.d_ff)
