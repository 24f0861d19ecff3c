"""MPNet (all-mpnet-base): BERT's post-norm layers, whose attention adds a number by the distance of two tokens, the same in every layer.

Song et al. 2020, arXiv:2004.09297. Follows transformers `modeling_mpnet.py`. llama.cpp has no MPNet: names are those of its `bert`, the table of
distances is `attn_rel_b`. Positions begin with row 0, as in `bert`.
differs: transformers' code counts no position for a padding token within a text; here every token has one.
Axes: m rows of all texts, D hidden.
"""

from __future__ import annotations

from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import SentenceTower, Towers
from pyengine.nn.layers import Embedding, LayerNorm, mlp_width
from pyengine.nn.relative_bias import RelativeBias
from pyengine.nn.text_encoder import PostNormBlock, table, TextHeads
from pyengine.nn.texts import Texts

BUCKETS, FARTHEST = 32, 128                                  # transformers `MPNetEncoder.relative_position_bucket`


class Text(SentenceTower):
    """The one tower."""

    separators = 2

    def __init__(self, h: Hparams, w: Weights):
        d, eps, n_heads = h.size("embedding_length"), h.number("attention.layer_norm_epsilon", 1e-12, above=0.0), h.size("attention.head_count")
        self.width, self.n_ids, self.n_ctx = d, table(w, "token_embd")[0], h.size("context_length")
        self.tokens, self.places = Embedding(w["token_embd"], self.n_ids, d), Embedding(w["position_embd"], self.n_ctx, d)
        self.norm, self.distances = LayerNorm(w["token_embd_norm"], d, eps), RelativeBias(w["attn_rel_b"], n_heads, BUCKETS, FARTHEST, bidirectional=True)
        sizes = d, mlp_width(w["blk", 0], d), n_heads
        self.blocks = [PostNormBlock(w["blk", i], sizes, eps, "gelu") for i in range(h.size("block_count"))]
        self.hold(TextHeads(h, w, d, eps=eps))

    def declare(self, texts: Texts) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.norm(self.tokens(texts.ids) + self.places(texts.positions))               # [m, D]
        for block in self.blocks:
            x = block(x, texts, bias=self.distances.bias, at=texts.positions)
        return self.heads(texts, x)


class Model(Towers):
    """An mpnet encoder."""

    def __init__(self, h: Hparams, w: Weights):
        self.read_texts(Text(h, w))
