"""gpt-oss: sinks, biases, experts in MXFP4: `gpt-oss` in GGUF.

Follows transformers `configuration_gpt_oss.py`, `modeling_gpt_oss.py`, and for published checkpoints `integrations/mxfp4.py`: gate and up of an
expert lie in turns, one row each. Published experts are blocks of MXFP4, whose elements lie in another order in GGUF, and stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as QT
from gguf import GGUFWriter

from .contract import FLOAT32, Blocks, Entry, converts, linear
from .decoder import Decoder, Tensors, write_window
from .rope import write_rope_scaling

# transformers' GptOssConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": True, "head_dim": 64,
                            "sliding_window": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "num_local_experts": 128, "num_experts_per_tok": 4}
ROPE_BASE = 150_000.0
ALL, GATE, UP = slice(None), slice(0, None, 2), slice(1, None, 2)


@converts("GptOssForCausalLM")
class GptOss(Decoder):
    arch = "gpt-oss"
    defaults, rope_base = DEFAULTS, ROPE_BASE

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        for name, value in (("attention_bias", True), ("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
            c.refuse_unless(name, value)
        kinds = c.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(self.n_layers)]
        self.sliding = [kind == "sliding_attention" for kind in kinds]
        self.n_experts = c.count("num_local_experts")
        self.in_blocks = (c.get("quantization_config") or {}).get("quant_method") == "mxfp4"

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_rope_dimension_count(self.head_dim)
        write_rope_scaling(out, self.rope, self.config, ("yarn",), whole_ramp=False)
        write_window(out, self.config.count("sliding_window"), self.sliding)
        out.add_expert_count(self.n_experts)
        out.add_expert_used_count(self.config.count("num_experts_per_tok"))
        out.add_expert_feed_forward_length(self.d_ff)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, n, f = self.d_model, self.n_experts, self.d_ff
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield from self.attention(b, f"{m}.self_attn", bias=True)
        yield Entry(f"{b}.attn_sinks.weight", f"{m}.self_attn.sinks", (self.n_heads,))
        yield self.norm(f"{b}.post_attention_norm", f"{m}.post_attention_layernorm", d)
        yield from linear(f"{b}.ffn_gate_inp", f"{m}.mlp.router", n, d, True)
        for name, part in (("gate", GATE), ("up", UP)):
            yield from self.expert(f"{b}.ffn_{name}_exps", f"{m}.mlp.experts.gate_up_proj", (f, d), 2 * f, part)
        yield from self.expert(f"{b}.ffn_down_exps", f"{m}.mlp.experts.down_proj", (d, f), d, ALL)

    def expert(self, name: str, source: str, shape: tuple[int, int], rows: int, part: slice) -> Iterator[Entry | Blocks]:
        """List the matrices [n, k] of all experts and their biases: `part` of the `rows` that each has in the checkpoint."""
        e, (n, k) = self.n_experts, shape
        if self.in_blocks:
            yield Blocks(f"{name}.weight", (e, n, k), QT.MXFP4, ((f"{source}_blocks", (e, rows, k // 32, 16)), (f"{source}_scales", (e, rows, k // 32))),
                         blocks_of(part))
        else:
            yield Entry(f"{name}.weight", source, (e, n, k), stored=(e, k, rows), make=lambda v: np.ascontiguousarray(v[:, :, part].swapaxes(1, 2)))
        yield Entry(f"{name}.bias", f"{source}_bias", (e, n), stored=(e, rows), instead={**FLOAT32, QT.BF16: QT.F32},
                    make=lambda v: np.ascontiguousarray(v[:, part]))


def blocks_of(part: slice) -> Callable[..., np.ndarray]:
    """Return what makes ggml's blocks of MXFP4 (an exponent, then elements j and j + 16 in byte j) of rows of the checkpoint's, where
    elements 2 j and 2 j + 1 share byte j, and exponents have a tensor of their own."""
    def make(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
        b = blocks[:, part]                                                        # [1, n, k / 32, 16]
        codes = np.stack([b & 15, b >> 4], -1).reshape(*b.shape[:-1], 32)
        return np.concatenate([scales[:, part, :, None], codes[..., :16] | codes[..., 16:] << 4], -1)

    return make
