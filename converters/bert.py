"""BERT and sentence models of its shape: `bert` in GGUF. Follows transformers `modeling_bert.py`; pooling as sentence-transformers says it beside.

The layer behind the first token that BertModel calls its pooler makes no vectors here and is left out, as in llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, PoolingType

from .checkpoint import Config, malformed_is
from .contract import converts, Entry, layer_norm, linear
from .decoder import Tensors

# transformers' BertConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
                            "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
                            "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


def pooling(folder: Path, usual: PoolingType = PoolingType.MEAN) -> PoolingType:
    """Return what sentence-transformers' files beside a checkpoint say vectors are made of; `usual` without them.

    Raises: UnsupportedModelError for ways that files have no number for.
    """
    from pyengine.errors import UnsupportedModelError

    file = folder / "1_Pooling" / "config.json"
    if not file.exists():
        return usual
    with malformed_is(f"{file}: not a pooling"):
        said = json.loads(file.read_text(encoding="utf-8"))
        on = [name for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
    kinds = {"pooling_mode_mean_tokens": PoolingType.MEAN, "pooling_mode_cls_token": PoolingType.CLS, "pooling_mode_lasttoken": PoolingType.LAST}
    if len(on) != 1 or on[0] not in kinds:
        raise UnsupportedModelError(f"{file}: pools by {', '.join(on) or 'nothing'}; one of {', '.join(kinds)} is supported")
    return kinds[on[0]]


@converts("BertModel")
class Bert:
    arch = "bert"
    renames = ((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))

    def __init__(self, config: dict[str, Any], file: Path):
        c = self.config = Config(config, DEFAULTS, file)
        self.vocab_size, self.width, self.d_ff = (c.count(n) for n in ("vocab_size", "hidden_size", "intermediate_size"))
        self.n_layers, self.n_ctx = c.count("num_hidden_layers"), c.count("max_position_embeddings")
        self.n_types = c.count("type_vocab_size")
        self.pooling = pooling(file.parent)
        for name, *allowed in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("is_decoder", False), ("add_cross_attention", False)):
            c.refuse_unless(name, *allowed)

    def write_keys(self, out: GGUFWriter) -> None:
        out.add_block_count(self.n_layers)
        out.add_context_length(self.n_ctx)
        out.add_embedding_length(self.width)
        out.add_feed_forward_length(self.d_ff)
        out.add_head_count(self.config.count("num_attention_heads"))
        out.add_layer_norm_eps(self.config.need("layer_norm_eps"))
        out.add_causal_attention(False)
        out.add_pooling_type(self.pooling)

    def unused(self) -> set[str]:
        return {"pooler.dense.weight", "pooler.dense.bias"}

    def tensors(self) -> Tensors:
        d = self.width
        yield Entry("token_embd.weight", "embeddings.word_embeddings.weight", (self.vocab_size, d))
        yield Entry("position_embd.weight", "embeddings.position_embeddings.weight", (self.n_ctx, d))
        yield Entry("token_types.weight", "embeddings.token_type_embeddings.weight", (self.n_types, d))
        yield from layer_norm("token_embd_norm", "embeddings.LayerNorm", d)
        for i in range(self.n_layers):
            b, m = f"blk.{i}", f"encoder.layer.{i}"
            for ours, theirs in (("attn_q", "attention.self.query"), ("attn_k", "attention.self.key"), ("attn_v", "attention.self.value"),
                                 ("attn_output", "attention.output.dense")):
                yield from linear(f"{b}.{ours}", f"{m}.{theirs}", d, d, True)
            yield from layer_norm(f"{b}.attn_output_norm", f"{m}.attention.output.LayerNorm", d)
            yield from linear(f"{b}.ffn_up", f"{m}.intermediate.dense", self.d_ff, d, True)
            yield from linear(f"{b}.ffn_down", f"{m}.output.dense", d, self.d_ff, True)
            yield from layer_norm(f"{b}.layer_output_norm", f"{m}.output.LayerNorm", d)
