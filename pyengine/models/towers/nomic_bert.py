"""nomic-embed-text: BERT's post-norm layers with rotary positions, a gated feed-forward and no biases.

Nussbaum et al. 2024, arXiv:2402.01613. Follows transformers `modeling_nomic_bert.py`; files are llama.cpp's `nomic-bert`.
differs: nothing. The authors' longest texts have their positions scaled, which is in no file: texts end where training did.
Axes: m rows of all texts, D hidden.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import SentenceTower, Towers
from pyengine.nn.layers import Embedding, LayerNorm
from pyengine.nn.rope import plain_rope
from pyengine.nn.text_encoder import PartEmbedding, PostNormBlock, table, TextHeads
from pyengine.nn.texts import Texts


class Text(SentenceTower):
    """The one tower."""

    act: ClassVar[str] = "silu"

    def __init__(self, h: Hparams, w: Weights):
        d, eps, n_heads = h.size("embedding_length"), h.number("attention.layer_norm_epsilon", 1e-12, above=0.0), h.size("attention.head_count")
        self.width, self.n_ids, self.n_ctx = d, table(w, "token_embd")[0], h.size("context_length")
        self.tokens, self.norm = Embedding(w["token_embd"], self.n_ids, d), LayerNorm(w["token_embd_norm"], d, eps)
        self.parts = PartEmbedding(w, d) if "token_types" in w else None
        sizes = d, h.size("feed_forward_length"), n_heads
        self.blocks = [self.block(h, w["blk", i], i, sizes, eps) for i in range(h.size("block_count"))]
        self.rope = plain_rope(h.number("rope.freq_base", 1000.0, above=0.0), d // n_heads)           # transformers NomicBertConfig.default_theta
        self.hold(TextHeads(h, w, d, act=self.act, eps=eps))

    def block(self, h: Hparams, w: Weights, i: int, sizes: tuple[int, int, int], eps: float) -> PostNormBlock:
        """Bind layer i. sizes: (D, F, H)."""
        return PostNormBlock(w, sizes, eps, self.act, gated=True)

    def declare(self, texts: Texts) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.tokens(texts.ids)                                                         # [m, D]
        x = self.norm(self.parts(x, texts) if self.parts else x)
        rotate = partial(self.rope, table=self.rope.table(texts.positions.reshape(1, -1)))
        for block in self.blocks:
            x = block(x, texts, rotate)
        return self.heads(texts, x)


class Model(Towers):
    """A nomic-bert encoder."""

    def __init__(self, h: Hparams, w: Weights):
        self.read_texts(Text(h, w))
