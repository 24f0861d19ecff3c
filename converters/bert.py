"""BERT and encoders of its shape: RoBERTa and XLM-R, DistilBERT; `bert` in GGUF, with llama.cpp's names. Heads of classes and of masked models.

Follows transformers `modeling_bert.py`, `modeling_roberta.py`, `modeling_distilbert.py`. RoBERTa's positions begin behind the padding token's number:
the rows before are left out, as llama.cpp does. BertModel's pooler stands before the scores of classes only, as llama.cpp's `cls`; vectors are
made without it. Values of attention stay F16 in a file of Q8_0: of all-MiniLM-L6-v2 the smallest cosine of 250 sentences with those of F32 is 0.9995 so,
and 0.9988 without; no other matrix counts as much. Rows of positions and parts are F32, which llama.cpp can add.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import converts, Entry, FLOAT32, layer_norm, linear, NO_BLOCKS
from .decoder import Tensors
from .text_encoder import TextEncoder
from .tokenizer import Vocabulary

# transformers' configs where a config.json may be silent
DEFAULTS: dict[str, Any] = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
                            "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 1,
                            "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}
DISTIL = {**DEFAULTS, "num_hidden_layers": 6, "type_vocab_size": 0, "sinusoidal_pos_embds": False}
DISTIL_NAMES = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "hidden_dim": "intermediate_size",
                "activation": "hidden_act"}
OLD_NORMS = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))


@converts("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification")
class Bert(TextEncoder):
    arch = "bert"
    renames = ((r"^bert\.", ""), *OLD_NORMS)
    defaults = DEFAULTS
    masked = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder", "cls.predictions.bias")
    classes = "pooler.dense", "classifier"
    also = "cls.seq_relationship.weight", "cls.seq_relationship.bias"
    # of a layer, by ours
    layer = (("attn_q", "attention.self.query"), ("attn_k", "attention.self.key"), ("attn_v", "attention.self.value"),
             ("attn_output", "attention.output.dense"), ("ffn_up", "intermediate.dense"), ("ffn_down", "output.dense"))
    norms = ("attn_output_norm", "attention.output.LayerNorm"), ("layer_output_norm", "output.LayerNorm")
    where = "encoder.layer"
    skipped = 0                                              # rows of the positions that stand for no position

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        self.n_types = int(c.get("type_vocab_size") or 0)
        for name, *allowed in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("is_decoder", False), ("add_cross_attention", False)):
            c.refuse_unless(name, *allowed)

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_token_type_count(max(1, self.n_types))

    def tensors(self) -> Tensors:
        d, f, stored = self.width, self.d_ff, (self.n_ctx + self.skipped, self.width)
        yield Entry("token_embd.weight", "embeddings.word_embeddings.weight", (self.vocab_size, d))
        yield Entry("position_embd.weight", "embeddings.position_embeddings.weight", (self.n_ctx, d), stored=stored, first_row=self.skipped, instead=FLOAT32)
        if self.n_types:
            yield Entry("token_types.weight", "embeddings.token_type_embeddings.weight", (self.n_types, d), instead=FLOAT32)
        yield from layer_norm("token_embd_norm", "embeddings.LayerNorm", d)
        sizes = {"ffn_up": (f, d), "ffn_down": (d, f)}
        for i in range(self.n_layers):
            for ours, theirs in self.layer:
                for entry in linear(f"blk.{i}.{ours}", f"{self.where}.{i}.{theirs}", *sizes.get(ours, (d, d)), True):
                    yield replace(entry, instead=NO_BLOCKS) if ours == "attn_v" else entry         # see the module's docstring
            for ours, theirs in self.norms:
                yield from layer_norm(f"blk.{i}.{ours}", f"{self.where}.{i}.{theirs}", d)
        yield from self.heads()


@converts("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification", "XLMRobertaModel", "XLMRobertaForMaskedLM",
          "XLMRobertaForSequenceClassification", "CamembertModel", "CamembertForMaskedLM", "CamembertForSequenceClassification")
class Roberta(Bert):
    renames = ((r"^roberta\.", ""), *OLD_NORMS)
    masked = "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"
    classes = "classifier.dense", "classifier.out_proj"
    also = "pooler.dense.weight", "pooler.dense.bias"

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.skipped = self.config.token("pad_token_id") + 1
        self.n_ctx -= self.skipped

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Name llama.cpp's tokenizer of these models, which puts two tokens between the parts of a pair."""
        vocabulary.pre = "roberta-bpe" if vocabulary.pre == "gpt-2" else vocabulary.pre
        vocabulary.add_sep = True


@converts("DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification")
class DistilBert(Bert):
    renames = ((r"^distilbert\.", ""), *OLD_NORMS)
    defaults = DISTIL
    masked = "vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias"
    classes, class_act = ("pre_classifier", "classifier"), "relu"
    layer = (("attn_q", "attention.q_lin"), ("attn_k", "attention.k_lin"), ("attn_v", "attention.v_lin"), ("attn_output", "attention.out_lin"),
             ("ffn_up", "ffn.lin1"), ("ffn_down", "ffn.lin2"))
    norms = ("attn_output_norm", "sa_layer_norm"), ("layer_output_norm", "output_layer_norm")
    where = "transformer.layer"

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__({DISTIL_NAMES.get(name, name): value for name, value in config.items()}, file)
