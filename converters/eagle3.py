"""EAGLE-3 heads, which draft for another model: `eagle3` in GGUF, of the authors' checkpoints and of `speculators`.

arXiv:2503.01840. Keys and names as llama.cpp's `conversion/llama.py` has them. Which layers' inputs a head reads follows from the model that it drafts for,
`--base`, unless its own config says: there the second layer, the middle and the last but two, as in the authors' code, vLLM and SGLang.
Axes: D hidden, T hidden of the model, H/K heads.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, RequestError

from .checkpoint import Checkpoint
from .contract import Constant, Entry, converts, linear
from .decoder import Decoder, Tensors
from .llama import DEFAULTS, ROPE_BASE
from .rope import interleaved_rows, rope_tensors, write_rope_scaling

LAYERS = "eagle_aux_hidden_state_layer_ids"        # vLLM: the layers whose inputs are read; within "eagle_config", as SGLang has it, whose outputs
FIRST, LAST = 2, 3


@converts("LlamaForCausalLMEagle3", "Eagle3Speculator", "Eagle3DraftModel")
class Eagle3(Decoder):
    arch = "eagle3"
    renames = ((r"^(midlayer|layers\.0)\.", "model.layers.0."), (r"^(norm|embed_tokens)\.", r"model.\1."))
    defaults, rope_base = {**DEFAULTS, "norm_before_residual": False, "norm_before_fc": False}, ROPE_BASE

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__({**config, **(config.get("transformer_layer_config") or {})}, file)
        c = self.config
        c.refuse_unless("num_hidden_layers", 1)
        c.refuse_unless("hidden_act", "silu")
        c.refuse_unless("fc_norm", False, None)
        c.refuse_unless("norm_output", False, None)
        self.n_drafted = c.count("draft_vocab_size") if c.get("draft_vocab_size") else self.vocab_size
        inputs, outputs = c.get(LAYERS), (c.get("eagle_config") or {}).get(LAYERS)
        self.layers = [int(i) for i in inputs] if inputs else [int(i) + 1 for i in outputs] if outputs else None
        self.d_target = c.count("target_hidden_size") if c.get("target_hidden_size") else self.d_model
        self.names: Collection[str] = ()

    def read_base(self, config: dict[str, Any]) -> None:
        """Take what a head's own config leaves open from the config of the model that it drafts for."""
        text = {**config, **(config.get("text_config") or {})}
        n = int(text["num_hidden_layers"])
        self.layers, self.vocab_size = self.layers or [FIRST, n // 2, n - LAST], int(text["vocab_size"])
        self.d_target = self.config.get("target_hidden_size") or int(text["hidden_size"])

    def look(self, names: Collection[str]) -> None:
        self.names = names

    def write_keys(self, out: GGUFWriter) -> None:
        if self.layers is None:
            raise RequestError(f"{self.config.file}: does not say which layers of the model it reads; give --base, the folder of the model that it drafts for")
        super().write_keys(out)
        out.add_rope_dimension_count(self.head_dim)
        write_rope_scaling(out, self.rope, self.config, ("linear", "llama3", "yarn"))
        out.add_array(f"{self.arch}.target_layers", self.layers)
        out.add_uint32(f"{self.arch}.target_hidden_size", self.d_target)
        for name in ("norm_before_residual", "norm_before_fc"):
            out.add_bool(f"{self.arch}.{name}", bool(self.config.get(name)))

    def unused(self) -> set[str]:
        return {"d2t", "t2d"}                               # d2t is read here

    def tensors(self) -> Tensors:
        d, m, n_layers = self.d_model, "model.layers.0", len(self.layers or (0, 0, 0))
        rows = interleaved_rows(self.n_heads, self.head_dim), interleaved_rows(self.n_kv_heads, self.head_dim)
        bias = self.config.need("attention_bias")
        yield from linear("fc", "fc", d, n_layers * self.d_target, "fc.bias" in self.names)
        if self.config.get("norm_before_fc"):
            yield self.norm("enc.output_norm", "input_norm", n_layers * self.d_target)
        for name, source in (("attn_norm", "input_layernorm"), ("attn_norm_2", "hidden_norm"), ("ffn_norm", "post_attention_layernorm")):
            yield self.norm(f"blk.0.{name}", f"{m}.{source}", d)
        for name, source, width, order in (("attn_q", "q_proj", self.q_width, rows[0]), ("attn_k", "k_proj", self.kv_width, rows[1]),
                                           ("attn_v", "v_proj", self.kv_width, None)):
            yield from linear(f"blk.0.{name}", f"{m}.self_attn.{source}", width, 2 * d, bias, order)
        yield from linear("blk.0.attn_output", f"{m}.self_attn.o_proj", d, self.q_width, bias)
        yield from self.gated("blk.0", f"{m}.mlp", self.d_ff, self.config.need("mlp_bias"))
        yield self.norm("output_norm", "model.norm", d)
        if "model.embed_tokens.weight" in self.names:
            yield Entry("token_embd.weight", "model.embed_tokens.weight", (self.vocab_size, d))
        if "lm_head.weight" in self.names:
            yield Entry("output.weight", "lm_head.weight", (self.n_drafted, d))
        yield from rope_tensors(self.rope, self.config, self.head_dim)
        if "d2t" in self.names:
            yield Constant("d2t", self.drafted())

    def drafted(self) -> np.ndarray:
        """Return the token of each row of the output head: a checkpoint has how far it is from the row's number."""
        checkpoint = Checkpoint(self.config.file.parent)
        stored = checkpoint.tensors["d2t"]
        if stored.dtype != "I64" or stored.shape != (self.n_drafted,):
            raise InvalidModelError(f"{checkpoint.folder}: tensor 'd2t' is {stored.dtype} of shape {stored.shape}; I64 of shape ({self.n_drafted},) is expected")
        found = checkpoint.read("d2t", 0, self.n_drafted) + np.arange(self.n_drafted)
        if found.min() < 0 or found.max() >= self.vocab_size or len(np.unique(found)) != len(found):
            raise InvalidModelError(f"{checkpoint.folder}: tensor 'd2t' does not name another of {self.vocab_size} tokens for each of {self.n_drafted} rows")
        return found
