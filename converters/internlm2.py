"""InternLM 2: llama's layout with names of its own, and q, k and v in one matrix, key head by key head: `internlm2` in GGUF.

Follows the authors' `configuration_internlm2.py`, `modeling_internlm2.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .contract import Entry, converts, linear
from .decoder import Tensors
from .llama import DEFAULTS, Llama
from .rope import interleaved_rows


@converts("InternLM2ForCausalLM")
class InternLm2(Llama):
    arch = "internlm2"
    defaults: dict[str, Any] = {**DEFAULTS, "bias": False}

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.config.refuse_unless("bias", False)

    def tensors(self) -> Tensors:
        yield Entry("token_embd.weight", "model.tok_embeddings.weight", (self.vocab_size, self.d_model))
        yield self.norm("output_norm", "model.norm", self.d_model)
        if not self.tied:
            yield Entry("output.weight", "output.weight", (self.vocab_size, self.d_model))
        yield from self.constants()
        for i in range(self.n_layers):
            yield from self.layer(i, f"blk.{i}", f"model.layers.{i}")

    def unused(self) -> set[str]:
        return {"output.weight"} if self.tied else set()

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, f, e = self.d_model, self.d_ff, self.head_dim
        group = self.n_heads // self.n_kv_heads                                    # queries, a key and a value of each key head
        rows = np.arange((group + 2) * self.n_kv_heads * e).reshape(self.n_kv_heads, group + 2, e)
        q, k, v = (rows[:, part].reshape(-1) for part in (np.s_[:group], group, group + 1))
        whole, source = (rows.size, d), f"{m}.attention.wqkv.weight"
        yield self.norm(f"{b}.attn_norm", f"{m}.attention_norm", d)
        yield Entry(f"{b}.attn_q.weight", source, (self.q_width, d), q[interleaved_rows(self.n_heads, e)], stored=whole)
        yield Entry(f"{b}.attn_k.weight", source, (self.kv_width, d), k[interleaved_rows(self.n_kv_heads, e)], stored=whole)
        yield Entry(f"{b}.attn_v.weight", source, (self.kv_width, d), v, stored=whole)
        yield from linear(f"{b}.attn_output", f"{m}.attention.wo", d, self.q_width)
        yield self.norm(f"{b}.ffn_norm", f"{m}.ffn_norm", d)
        for name, theirs, n, k_ in (("gate", "w1", f, d), ("up", "w3", f, d), ("down", "w2", d, f)):
            yield from linear(f"{b}.ffn_{name}", f"{m}.feed_forward.{theirs}", n, k_)
