"""T5, T5 1.1, Flan-T5, mT5 and UMT5: `t5` in GGUF. Follows transformers `configuration_t5.py`; names are llama.cpp's.

The farthest distance of the bias and what hidden states are multiplied by in front of the head are keys of ours: llama.cpp has 128 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from .checkpoint import Checkpoint, Config
from .contract import Entry, converts, linear
from .decoder import Tensors
from .generation import write_search

# transformers' T5Config where a config.json may be silent
DEFAULTS: dict[str, Any] = {"vocab_size": 32_128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "n_positions": 512,
                            "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
                            "feed_forward_proj": "relu", "decoder_start_token_id": 0, "is_decoder": False}
# MT5Config, UMT5Config
GATED: dict[str, Any] = {"vocab_size": 250_112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
SHARED = "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"       # the same; checkpoints have any of them


@converts("T5ForConditionalGeneration", "T5WithLMHeadModel", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration")
class T5:
    arch = "t5"
    renames = ((r"^transformer\.", ""),)

    def __init__(self, config: dict[str, Any], file: Path):
        kind = config.get("model_type", "t5")
        c = self.config = Config(config, {**DEFAULTS, **(GATED if kind in ("mt5", "umt5") else {})}, file)
        c.refuse_unless("feed_forward_proj", "relu", "gated-gelu", "gated-gelu_new")
        c.refuse_unless("is_decoder", False)
        self.vocab_size, self.d_model, self.d_ff = (c.count(name) for name in ("vocab_size", "d_model", "d_ff"))
        self.n_layers = c.count("num_layers")
        self.n_decoder_layers = c.count("num_decoder_layers") if c.get("num_decoder_layers") else self.n_layers
        self.n_heads, self.head_dim = c.count("num_heads"), c.count("d_kv")
        self.gated, self.each = c.get("feed_forward_proj") != "relu", kind == "umt5"
        self._read_head(file)

    def _read_head(self, file: Path) -> None:
        """Find out which of its names the embedding has, and whether the head is another matrix."""
        there = Checkpoint(file.parent)
        there.rename(self.renames)
        self.others = {name for name in (*SHARED, "lm_head.weight") if name in there.tensors}
        self.shared = next((name for name in SHARED if name in self.others), SHARED[0])
        self.others -= {self.shared}
        self.own_head = False
        if "lm_head.weight" in self.others and self.shared in there.tensors:
            rows = range(0, self.vocab_size, 4096)
            self.own_head = any(not np.array_equal(*(there.read(name, i, min(i + 4096, self.vocab_size)) for name in (self.shared, "lm_head.weight")))
                                for i in rows)
        said = self.config.get("scale_decoder_outputs")          # of transformers 5; before, it followed from the other
        scaled = self.config.get("tie_word_embeddings") is not False if said is None else bool(said)
        self.scaled = scaled and self.config.get("model_type") != "mt5"        # MT5ForConditionalGeneration.forward

    def write_keys(self, out: GGUFWriter) -> None:
        c = self.config
        out.add_context_length(c.count("n_positions"))
        out.add_embedding_length(self.d_model)
        out.add_feed_forward_length(self.d_ff)
        out.add_block_count(self.n_layers)
        out.add_decoder_block_count(self.n_decoder_layers)
        out.add_head_count(self.n_heads)
        out.add_key_length(self.head_dim)
        out.add_value_length(self.head_dim)
        out.add_layer_norm_eps(c.need("layer_norm_epsilon"))
        out.add_layer_norm_rms_eps(c.need("layer_norm_epsilon"))
        out.add_relative_attn_buckets_count(c.count("relative_attention_num_buckets"))
        out.add_uint32(f"{self.arch}.attention.relative_max_distance", c.count("relative_attention_max_distance"))
        out.add_decoder_start_token_id(c.token("decoder_start_token_id"))
        out.add_logit_scale(self.d_model**-0.5 if self.scaled else 1.0)
        write_search(c.file.parent, self.arch, out)

    def unused(self) -> set[str]:
        unread = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}        # of old checkpoints
        return unread | (self.others - {"lm_head.weight"} if self.own_head else self.others)

    def tensors(self) -> Tensors:
        yield Entry("token_embd.weight", self.shared, (self.vocab_size, self.d_model))
        if self.own_head:
            yield Entry("output.weight", "lm_head.weight", (self.vocab_size, self.d_model))
        for half, name, n in (("enc", "encoder", self.n_layers), ("dec", "decoder", self.n_decoder_layers)):
            yield Entry(f"{half}.output_norm.weight", f"{name}.final_layer_norm.weight", (self.d_model,))
            for i in range(n):
                yield from self._layer(i, f"{half}.blk.{i}", f"{name}.block.{i}.layer", half == "dec")

    def _layer(self, i: int, b: str, m: str, crosses: bool) -> Iterator[Entry]:
        """List a layer, b in the file and m in the checkpoint."""
        d, width = self.d_model, self.n_heads * self.head_dim
        attentions = [("attn", f"{m}.0.SelfAttention"), *([("cross_attn", f"{m}.1.EncDecAttention")] if crosses else [])]
        for k, (name, source) in enumerate(attentions):
            yield Entry(f"{b}.{name}_norm.weight", f"{m}.{k}.layer_norm.weight", (d,))
            for part in "qkv":
                yield from linear(f"{b}.{name}_{part}", f"{source}.{part}", width, d)
            yield from linear(f"{b}.{name}_o", f"{source}.o", d, width)
        if i == 0 or self.each:
            shape = self.config.count("relative_attention_num_buckets"), self.n_heads
            yield Entry(f"{b}.attn_rel_b.weight", f"{m}.0.SelfAttention.relative_attention_bias.weight", shape)
        last = len(attentions)
        yield Entry(f"{b}.ffn_norm.weight", f"{m}.{last}.layer_norm.weight", (d,))
        ups = {"ffn_gate": "wi_0", "ffn_up": "wi_1"} if self.gated else {"ffn_up": "wi"}
        for name, part in ups.items():
            yield from linear(f"{b}.{name}", f"{m}.{last}.DenseReluDense.{part}", self.d_ff, d)
        yield from linear(f"{b}.ffn_down", f"{m}.{last}.DenseReluDense.wo", d, self.d_ff)
