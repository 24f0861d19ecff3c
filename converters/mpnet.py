"""MPNet: `mpnet` in GGUF, names of which are ours after llama.cpp's `bert`. Follows transformers `configuration_mpnet.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bert import Bert, OLD_NORMS
from .contract import converts, Entry, FLOAT32
from .decoder import Tensors

# transformers' MPNetConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {"vocab_size": 30527, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
                            "hidden_act": "gelu", "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "relative_attention_num_buckets": 32,
                            "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}
BUCKETS = 32                         # MPNetEncoder.compute_position_bias counts with these whatever the config says


@converts("MPNetModel", "MPNetForMaskedLM", "MPNetForSequenceClassification")
class MPNet(Bert):
    arch = "mpnet"
    renames = ((r"^mpnet\.", ""), *OLD_NORMS)
    defaults = DEFAULTS
    masked = "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"
    classes = "classifier.dense", "classifier.out_proj"
    also = "pooler.dense.weight", "pooler.dense.bias"
    layer = (("attn_q", "attention.attn.q"), ("attn_k", "attention.attn.k"), ("attn_v", "attention.attn.v"), ("attn_output", "attention.attn.o"),
             ("ffn_up", "intermediate.dense"), ("ffn_down", "output.dense"))
    norms = ("attn_output_norm", "attention.LayerNorm"), ("layer_output_norm", "output.LayerNorm")
    skipped = 2                      # MPNetEmbeddings.padding_idx, and that row

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__({**config, "type_vocab_size": 0}, file)
        self.config.refuse_unless("relative_attention_num_buckets", BUCKETS)
        self.n_ctx -= self.skipped

    def tensors(self) -> Tensors:
        yield from super().tensors()
        yield Entry("attn_rel_b.weight", "encoder.relative_attention_bias.weight", (BUCKETS, self.n_heads), instead=FLOAT32)
