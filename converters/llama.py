"""Llama 2 and 3, and models of the same layout (SmolLM, Mistral, Ministral): `llama` in GGUF.

Follows transformers `configuration_llama.py`, `configuration_mistral.py`. Axes: D hidden, F feed-forward, H/K heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import Constant, converts
from .decoder import Decoder, Tensors, write_window
from .rope import interleaved_rows, rope_tensors, write_rope_scaling

# transformers' LlamaConfig and MistralConfig where a config.json may be silent; both share these
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
                            "attention_bias": False, "mlp_bias": False}
ROPE_BASE = 10_000.0        # PreTrainedConfig.default_theta
MISTRAL_WINDOW = 4096       # MistralConfig.sliding_window, when the key is absent and not null


@converts("LlamaForCausalLM", "MistralForCausalLM")
class Llama(Decoder):
    arch = "llama"
    defaults, rope_base = DEFAULTS, ROPE_BASE

    def __init__(self, config: dict[str, Any], file: Path):
        mistral = "MistralForCausalLM" in config["architectures"]
        super().__init__(config, file, {"sliding_window": MISTRAL_WINDOW} if mistral else {})
        self.config.refuse_unless("hidden_act", "silu")
        self.window = self.config.get("sliding_window") if mistral else None

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_rope_dimension_count(self.head_dim)
        write_rope_scaling(out, self.rope, self.config, ("linear", "llama3", "yarn", "longrope"))
        write_window(out, self.window, [True] * self.n_layers)

    def constants(self) -> Iterator[Constant]:
        yield from rope_tensors(self.rope, self.config, self.head_dim)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        rows = interleaved_rows(self.n_heads, self.head_dim), interleaved_rows(self.n_kv_heads, self.head_dim)
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", self.d_model)
        yield from self.attention(b, f"{m}.self_attn", self.config.need("attention_bias"), rows=rows)
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", self.d_model)
        yield from self.feed_forward(b, m)

    def feed_forward(self, b: str, m: str) -> Tensors:
        """List the feed-forward of one layer, named b in the file and m in the checkpoint."""
        yield from self.gated(b, f"{m}.mlp", self.d_ff, self.config.need("mlp_bias"))
