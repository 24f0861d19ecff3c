"""ALBERT: `albert` in GGUF, names of which are ours after llama.cpp's `bert`. Follows transformers `configuration_albert.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import converts, Entry, layer_norm, linear
from .decoder import Tensors
from .text_encoder import TextEncoder

# transformers' AlbertConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {"vocab_size": 30000, "embedding_size": 128, "hidden_size": 4096, "num_hidden_layers": 12, "num_hidden_groups": 1,
                            "num_attention_heads": 64, "intermediate_size": 16384, "inner_group_num": 1, "hidden_act": "gelu_new",
                            "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "position_embedding_type": "absolute",
                            "tie_word_embeddings": True}
LAYER = (("attn_q", "attention.query"), ("attn_k", "attention.key"), ("attn_v", "attention.value"), ("attn_output", "attention.dense"))


@converts("AlbertModel", "AlbertForMaskedLM", "AlbertForPreTraining", "AlbertForSequenceClassification")
class Albert(TextEncoder):
    arch = "albert"
    renames = ((r"^albert\.", ""),)
    defaults = DEFAULTS
    masked = "predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias"
    classes = "pooler", "classifier"
    also = "sop_classifier.classifier.weight", "sop_classifier.classifier.bias"

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        c.refuse_unless("hidden_act", "gelu_new", "gelu", "gelu_pytorch_tanh", "relu")
        c.refuse_unless("position_embedding_type", "absolute")
        self.head_width = c.count("embedding_size")
        self.groups, self.inner, self.n_types = (c.count(n) for n in ("num_hidden_groups", "inner_group_num", "type_vocab_size"))

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_token_type_count(self.n_types)
        out.add_uint32(f"{self.arch}.layer_groups", self.groups)
        out.add_uint32(f"{self.arch}.layers_per_group", self.inner)
        out.add_string(f"{self.arch}.hidden_act", self.config.need("hidden_act"))

    def tensors(self) -> Tensors:
        d, f, e = self.width, self.d_ff, self.head_width
        for ours, theirs, n in (("token_embd", "word", self.vocab_size), ("position_embd", "position", self.n_ctx), ("token_types", "token_type", self.n_types)):
            yield Entry(f"{ours}.weight", f"embeddings.{theirs}_embeddings.weight", (n, e))
        yield from layer_norm("token_embd_norm", "embeddings.LayerNorm", e)
        yield from linear("token_embd_proj", "encoder.embedding_hidden_mapping_in", d, e, True)
        for g in range(self.groups):
            for j in range(self.inner):
                b, m = f"blk.{g * self.inner + j}", f"encoder.albert_layer_groups.{g}.albert_layers.{j}"
                for ours, theirs in LAYER:
                    yield from linear(f"{b}.{ours}", f"{m}.{theirs}", d, d, True)
                yield from layer_norm(f"{b}.attn_output_norm", f"{m}.attention.LayerNorm", d)
                yield from linear(f"{b}.ffn_up", f"{m}.ffn", f, d, True)
                yield from linear(f"{b}.ffn_down", f"{m}.ffn_output", d, f, True)
                yield from layer_norm(f"{b}.layer_output_norm", f"{m}.full_layer_layer_norm", d)
        yield from self.heads()
