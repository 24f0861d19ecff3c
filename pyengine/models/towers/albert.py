"""ALBERT: BERT's post-norm layers, of which a few are used again and again; tokens narrower than the layers.

Lan et al. 2019, arXiv:1909.11942. Follows transformers `modeling_albert.py`. llama.cpp has no ALBERT: names are those of its `bert`, with keys for
the groups. Layer i of n is group i * groups // n, which is all layers of the group one after the other.
Axes: m rows of all texts, D hidden, E width of a token.
"""

from __future__ import annotations

from pyengine.errors import InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import SentenceTower, Towers
from pyengine.nn.encoder import known_activation
from pyengine.nn.layers import Embedding, LayerNorm, Linear, mlp_width
from pyengine.nn.text_encoder import PartEmbedding, PostNormBlock, table, TextHeads
from pyengine.nn.texts import Texts


class Text(SentenceTower):
    """The one tower."""

    separators = 1

    def __init__(self, h: Hparams, w: Weights):
        d, eps, act = h.size("embedding_length"), h.number("attention.layer_norm_epsilon", 1e-12, above=0.0), known_activation(h, "hidden_act", "gelu_new")
        self.n_ids, e = table(w, "token_embd")
        self.width, self.n_ctx = d, h.size("context_length")
        self.tokens, self.places = Embedding(w["token_embd"], self.n_ids, e), Embedding(w["position_embd"], self.n_ctx, e)
        self.parts, self.norm = PartEmbedding(w, e), LayerNorm(w["token_embd_norm"], e, eps)
        self.into = Linear(w["token_embd_proj"], e, d)
        n, groups, inner = h.size("block_count"), h.size("layer_groups"), h.size("layers_per_group", 1)
        if groups > n:
            raise InvalidModelError(f"{h.key('layer_groups')} is {groups} for {n} layers")
        sizes = d, mlp_width(w["blk", 0], d), h.size("attention.head_count")
        shared = [[PostNormBlock(w["blk", g * inner + j], sizes, eps, act) for j in range(inner)] for g in range(groups)]
        self.blocks = [block for i in range(n) for block in shared[int(i / (n / groups))]]         # as AlbertTransformer divides
        self.hold(TextHeads(h, w, d, act=act, eps=eps))

    def declare(self, texts: Texts) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.parts(self.tokens(texts.ids) + self.places(texts.positions), texts)       # [m, E]
        x = self.into(self.norm(x))                                                        # [m, D]
        for block in self.blocks:
            x = block(x, texts)
        return self.heads(texts, x)


class Model(Towers):
    """An albert encoder."""

    def __init__(self, h: Hparams, w: Weights):
        self.read_texts(Text(h, w))
