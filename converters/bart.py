"""BART: `bart`, which llama.cpp does not have; tensors are named as its T5's are. Follows transformers `configuration_bart.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .checkpoint import Config
from .contract import Entry, converts, layer_norm, linear
from .decoder import Tensors
from .generation import write_search

# transformers' BartConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50_265, "max_position_embeddings": 1024, "encoder_layers": 12, "encoder_ffn_dim": 4096, "encoder_attention_heads": 16,
    "decoder_layers": 12, "decoder_ffn_dim": 4096, "decoder_attention_heads": 16, "activation_function": "gelu", "d_model": 1024,
    "scale_embedding": False, "decoder_start_token_id": 2, "tie_word_embeddings": True}
EPS = 1e-5                           # torch's default
OFFSET = 2                           # BartLearnedPositionalEmbedding.offset


@converts("BartForConditionalGeneration")
class Bart:
    arch = "bart"
    renames = ()

    def __init__(self, config: dict[str, Any], file: Path):
        c = self.config = Config(config, DEFAULTS, file)
        c.refuse_unless("tie_word_embeddings", True)
        c.refuse_unless("activation_function", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu")
        self.vocab_size, self.d_model, self.n_ctx = (c.count(name) for name in ("vocab_size", "d_model", "max_position_embeddings"))
        self.biased = True
        self.halves = {half: {name: c.count(f"{half}coder_{name}") for name in ("layers", "ffn_dim", "attention_heads")} for half in ("en", "de")}

    def look(self, names: Collection[str]) -> None:
        """Find out whether the head has a bias. names: of the checkpoint's tensors."""
        self.biased = "final_logits_bias" in names

    def write_keys(self, out: GGUFWriter) -> None:
        c, encoder, decoder = self.config, self.halves["en"], self.halves["de"]
        out.add_context_length(self.n_ctx)
        out.add_embedding_length(self.d_model)
        out.add_block_count(encoder["layers"])
        out.add_decoder_block_count(decoder["layers"])
        out.add_feed_forward_length(encoder["ffn_dim"])
        out.add_head_count(encoder["attention_heads"])
        out.add_uint32(f"{self.arch}.decoder_feed_forward_length", decoder["ffn_dim"])
        out.add_uint32(f"{self.arch}.decoder_attention_head_count", decoder["attention_heads"])
        out.add_layer_norm_eps(EPS)
        out.add_string(f"{self.arch}.hidden_act", c.need("activation_function"))
        if c.get("scale_embedding"):
            out.add_embedding_scale(self.d_model**0.5)
        out.add_decoder_start_token_id(c.token("decoder_start_token_id"))
        write_search(c.file.parent, self.arch, out)

    def unused(self) -> set[str]:
        return {"lm_head.weight", *(f"model.{half}coder.{name}" for half in ("en", "de") for name in ("embed_tokens.weight", "version"))}

    def tensors(self) -> Tensors:
        yield Entry("token_embd.weight", "model.shared.weight", (self.vocab_size, self.d_model))
        if self.biased:
            yield Entry("output.bias", "final_logits_bias", (self.vocab_size,), stored=(1, self.vocab_size))
        for half, sizes in self.halves.items():
            b, m = f"{half}c", f"model.{half}coder"
            yield Entry(f"{b}.position_embd.weight", f"{m}.embed_positions.weight", (self.n_ctx + OFFSET, self.d_model))
            yield from layer_norm(f"{b}.token_embd_norm", f"{m}.layernorm_embedding", self.d_model)
            for i in range(sizes["layers"]):
                yield from self._layer(f"{b}.blk.{i}", f"{m}.layers.{i}", half == "de", sizes["ffn_dim"])

    def _layer(self, b: str, m: str, crosses: bool, d_ff: int) -> Iterator[Entry]:
        """List a layer, b in the file and m in the checkpoint."""
        d = self.d_model
        for name, source in (("attn", "self_attn"), *([("cross_attn", "encoder_attn")] if crosses else [])):
            for part, own in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
                yield from linear(f"{b}.{name}_{part}", f"{m}.{source}.{own}", d, d, True)
            yield from layer_norm(f"{b}.{name}_norm", f"{m}.{source}_layer_norm", d)
        yield from linear(f"{b}.ffn_up", f"{m}.fc1", d_ff, d, True)
        yield from linear(f"{b}.ffn_down", f"{m}.fc2", d, d_ff, True)
        yield from layer_norm(f"{b}.ffn_norm", f"{m}.final_layer_norm", d)
