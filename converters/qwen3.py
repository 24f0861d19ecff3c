"""Qwen3: qwen2's layout without biases, and a norm of each head's queries and keys: `qwen3` in GGUF.

Follows transformers `configuration_qwen3.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, PoolingType

from pyengine.errors import UnsupportedModelError

from .checkpoint import Config
from .contract import converts, Entry
from .decoder import Tensors
from .qwen2 import Qwen2
from .tokenizer import token_numbers, Vocabulary
from .towers import class_names

# transformers' Qwen3Config where a config.json may be silent
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
                            "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128}


# the prompt of a checkpoint that ranks, in llama.cpp's form; its words are the authors' (Qwen3-Reranker's model card)
RERANK = ("<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the answer can "
          'only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n'
          "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
RANKS = "qwen3-reranker"                     # what llama.cpp's converter knows such a checkpoint by, in its folder's or its own name


SCORED = "Qwen3ForSequenceClassification"


@converts("Qwen3ForCausalLM", "Qwen3Model", SCORED)
class Qwen3(Qwen2):
    arch = "qwen3"
    renames = ((r"^(?=(embed_tokens|layers|norm)\.)", "model."),)         # checkpoints that were saved without the output head (Qwen3-Embedding)
    defaults = DEFAULTS

    def __init__(self, config: dict[str, Any], file: Path):
        c = Config(config, self.defaults, file)
        c.refuse_unless("use_sliding_window", False)
        c.refuse_unless("attention_bias", False)
        super().__init__(config, file)
        self.scored = config.get("architectures") == [SCORED]                    # it ranks by a row of its own
        plain = self.scored or config.get("architectures") == ["Qwen3Model"]     # saved without its output head
        self.tied = self.tied or plain
        names = str(config.get("_name_or_path", "")), file.parent.name
        self.named = any(RANKS in name.lower() for name in names)
        self.ranks = self.named or self.scored
        self.folder = file.parent
        self.labels = class_names(config, file) if self.scored else ["yes", "no"]
        if self.scored and len(self.labels) != 1:
            raise UnsupportedModelError(f"{file}: a head of {len(self.labels)} classes; a head of one score, which ranks texts, is supported")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        if self.ranks:
            out.add_pooling_type(PoolingType.RANK)
            out.add_array(f"{self.arch}.classifier.output_labels", self.labels)

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Give the prompt by which a checkpoint ranks."""
        if self.ranks:
            named = vocabulary.chat_template
            named = named if isinstance(named, list) else [{"name": "default", "template": named}] if named else []
            own = [t for t in named if t["name"] == "rerank"] if self.scored else []
            if not own and not self.named:
                raise UnsupportedModelError(f"{self.folder}: it is not said how a query and a document are put together; name such a chat template \"rerank\", "
                                            "with {query} and {document} in it")
            vocabulary.chat_template = [*(t for t in named if t["name"] != "rerank"), *(own or [{"name": "rerank", "template": RERANK}])]

    def tensors(self) -> Tensors:
        yield from super().tensors()
        if self.scored:
            yield Entry("cls.output.weight", "score.weight", (1, self.d_model))
        elif self.ranks:
            head = "model.embed_tokens.weight" if self.tied else "lm_head.weight"
            yield Entry("cls.output.weight", head, (2, self.d_model), np.array(token_numbers(self.folder, ("yes", "no"))), stored=(self.vocab_size, self.d_model))

    def layer(self, i: int, b: str, m: str) -> Tensors:
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", self.d_model)
        yield from self.attention(b, f"{m}.self_attn", head_norms=True)
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", self.d_model)
        yield from self.feed_forward(b, f"{m}.mlp")

    def feed_forward(self, b: str, m: str) -> Tensors:
        """Yield what stands behind the second norm."""
        yield from self.gated(b, m, self.d_ff)
