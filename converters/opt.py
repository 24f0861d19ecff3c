"""OPT and Galactica: `opt` in GGUF, which llama.cpp does not have. Follows transformers `configuration_opt.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from .contract import Constant, Entry, converts, layer_norm, linear
from .decoder import Decoder, Tensors

# transformers' OPTConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12,
                            "max_position_embeddings": 2048, "activation_function": "relu", "do_layer_norm_before": True,
                            "_remove_final_layer_norm": False, "word_embed_proj_dim": None, "enable_bias": True,
                            "layer_norm_elementwise_affine": True, "tie_word_embeddings": True}
EPS = 1e-5                                      # of torch's LayerNorm
PADDING = 2                                     # rows of the table of positions that no token takes


@converts("OPTForCausalLM")
class Opt(Decoder):
    arch = "opt"
    defaults, rope_base, width = DEFAULTS, 10_000.0, "ffn_dim"
    renames = ((r"^model\.decoder\.", ""), (r"^decoder\.", ""))

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.d_token = self.config.count("word_embed_proj_dim") if self.config.get("word_embed_proj_dim") else self.d_model
        self.biases, self.pre_norm, self.affine = (bool(self.config.need(name)) for name in (
            "enable_bias", "do_layer_norm_before", "layer_norm_elementwise_affine"))
        self.config.refuse_unless("activation_function", "relu", "gelu", "gelu_new", "silu")
        self.config.refuse_unless("_remove_final_layer_norm", False, *([] if self.pre_norm else [True]))

    def write_keys(self, out: GGUFWriter) -> None:
        self.write_sizes(out, self.d_ff)
        out.add_layer_norm_eps(EPS)
        out.add_string("opt.hidden_activation", self.config.need("activation_function"))
        out.add_bool("opt.pre_norm", self.pre_norm)
        if self.d_token != self.d_model:
            out.add_uint32("opt.embedding_length_token", self.d_token)

    def tensors(self) -> Tensors:
        d, narrow, n = self.d_model, self.d_token, self.config.count("max_position_embeddings")
        yield Entry("token_embd.weight", "embed_tokens.weight", (self.vocab_size, narrow))
        yield Entry("position_embd.weight", "embed_positions.weight", (n, d), stored=(n + PADDING, d), first_row=PADDING)
        if narrow != d:
            yield from linear("token_embd_proj", "project_in", d, narrow)
            yield from linear("output_proj", "project_out", narrow, d)
        if self.pre_norm:
            yield from self.both("output_norm", "final_layer_norm")
        if not self.tied:
            yield Entry("output.weight", "lm_head.weight", (self.vocab_size, narrow))
        for i in range(self.n_layers):
            yield from self.layer(i, f"blk.{i}", f"layers.{i}")

    def both(self, name: str, source: str) -> Iterator[Entry | Constant]:
        """List a layer norm; one without weights of its own changes nothing."""
        if self.affine:
            yield from layer_norm(name, source, self.d_model)
        else:
            yield Constant(f"{name}.weight", np.ones(self.d_model, np.float32))
            yield Constant(f"{name}.bias", np.zeros(self.d_model, np.float32))

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, f = self.d_model, self.d_ff
        yield from self.both(f"{b}.attn_norm", f"{m}.self_attn_layer_norm")
        yield from self.both(f"{b}.ffn_norm", f"{m}.final_layer_norm")
        for name, source, n_out, n_in in (("attn_q", "self_attn.q_proj", d, d), ("attn_k", "self_attn.k_proj", d, d), ("attn_v", "self_attn.v_proj", d, d),
                                          ("attn_output", "self_attn.out_proj", d, d), ("ffn_up", "fc1", f, d), ("ffn_down", "fc2", d, f)):
            yield from linear(f"{b}.{name}", f"{m}.{source}", n_out, n_in, self.biases)
