"""BERT and models of its shape (RoBERTa, XLM-R, DistilBERT; MiniLM, BGE, E5, GTE): post-norm layers that see the whole text, learned positions,
parts of a pair.

Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692; Sanh et al. 2019, arXiv:1910.01108; sentence vectors: Reimers & Gurevych
2019, arXiv:1908.10084. Follows transformers `modeling_bert.py`, `modeling_roberta.py`, `modeling_distilbert.py`; files are llama.cpp's `bert`, whose
positions begin with row 0 for all of them.
differs: RoBERTa's code counts no position for a padding token within a text; here every token has one.
Axes: m rows of all texts, D hidden.
"""

from __future__ import annotations

from pyengine.errors import UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import SentenceTower, Towers
from pyengine.nn.layers import Embedding, LayerNorm, mlp_width
from pyengine.nn.text_encoder import PartEmbedding, PostNormBlock, table, TextHeads
from pyengine.nn.texts import Texts


class Text(SentenceTower):
    """The one tower."""

    def __init__(self, h: Hparams, w: Weights):
        if h.get("attention.causal", False, bool):
            raise UnsupportedModelError(f"{h.key('attention.causal')}: texts that see what stands before them only are not supported here")
        d, eps = h.size("embedding_length"), h.number("attention.layer_norm_epsilon", 1e-12, above=0.0)
        self.width, self.n_ids, self.n_ctx = d, table(w, "token_embd")[0], h.size("context_length")
        self.tokens, self.places = Embedding(w["token_embd"], self.n_ids, d), Embedding(w["position_embd"], self.n_ctx, d)
        self.parts = PartEmbedding(w, d) if "token_types" in w else None
        self.norm = LayerNorm(w["token_embd_norm"], d, eps)
        sizes = d, mlp_width(w["blk", 0], d), h.size("attention.head_count")
        self.blocks = [PostNormBlock(w["blk", i], sizes, eps, "gelu") for i in range(h.size("block_count"))]
        self.hold(TextHeads(h, w, d, eps=eps))

    def declare(self, texts: Texts) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.tokens(texts.ids) + self.places(texts.positions)                          # [m, D]
        x = self.norm(self.parts(x, texts) if self.parts else x)
        for block in self.blocks:
            x = block(x, texts)
        return self.heads(texts, x)


class Model(Towers):
    """A bert encoder."""

    def __init__(self, h: Hparams, w: Weights):
        self.read_texts(Text(h, w))
