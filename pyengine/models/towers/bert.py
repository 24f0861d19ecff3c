"""BERT and models of its shape (MiniLM, BGE, E5, GTE): post-norm layers that see the whole text, learned positions, parts of a pair.

Devlin et al. 2018, arXiv:1810.04805; sentence vectors: Reimers & Gurevych 2019, arXiv:1908.10084. Follows transformers `modeling_bert.py`; files
are llama.cpp's `bert`.
Axes: m rows of all texts, p texts, D hidden, H heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyengine import ops
from pyengine.errors import InvalidModelError, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import HIDDEN, TextTower, Towers, VECTORS
from pyengine.nn.encoder import products_of
from pyengine.nn.layers import Embedding, LayerNorm, Linear, mlp_width
from pyengine.nn.texts import POOLINGS, Texts

# llama.cpp's enum llama_pooling_type (include/llama.h)
_IN_FILES = {0: "mean", 1: "mean", 2: "cls", 3: "last"}      # 0 says that no vectors are made: of hidden states their mean is usual


@dataclass(frozen=True)
class Config:
    """Numbers of a bert file."""

    n_layers: int
    width: int
    d_ff: int
    n_heads: int
    n_ctx: int
    eps: float


class Block:
    """Attention and feed-forward, each added to its input and then normalized."""

    def __init__(self, w: Weights, c: Config):
        d, self.n_heads = c.width, c.n_heads
        self.q, self.k, self.v = Linear.several(w["attn_qkv"], d, (d,) * 3) if "attn_qkv" in w else [Linear(w[f"attn_{n}"], d, d) for n in "qkv"]
        self.out = Linear(w["attn_output"], d, d)
        self.norm1, self.norm2 = LayerNorm(w["attn_output_norm"], d, c.eps), LayerNorm(w["layer_output_norm"], d, c.eps)
        self.up, self.down = Linear(w["ffn_up"], d, c.d_ff), Linear(w["ffn_down"], c.d_ff, d)

    def __call__(self, x: Tensor, texts: Texts) -> Tensor:                                 # [m, D]
        x = self.norm1(x + self.attend(x, texts))
        return self.norm2(x + self.down(ops.gelu(self.up(x))))

    def attend(self, x: Tensor, texts: Texts) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        head_dim = x.shape[1] // self.n_heads
        q, k, v = (part(x).reshape(-1, self.n_heads, head_dim) for part in (self.q, self.k, self.v))       # [m, H, E] each
        return self.out(texts.attend(q, k, v, scale=head_dim**-0.5, products=products_of(self.q, self.k, self.v, self.out)))


class Text(TextTower):
    """The one tower."""

    def __init__(self, h: Hparams, w: Weights):
        if h.get("attention.causal", False, bool):
            raise UnsupportedModelError(f"{h.key('attention.causal')}: texts that see what stands before them only are not supported here")
        d = self.width = self.d_out = h.size("embedding_length")
        self.config = c = Config(h.size("block_count"), d, mlp_width(w["blk", 0], d), h.size("attention.head_count"), h.size("context_length"),
                                 h.number("attention.layer_norm_epsilon", 1e-12))
        shape = w["token_embd"].shape("weight")
        if shape is None or len(shape) != 2:
            raise InvalidModelError(f"{w!r}: 'token_embd.weight' is no matrix of the file")
        self.n_ids, self.n_ctx = shape[0], c.n_ctx
        said = h.get("pooling_type", 0, int)
        if said not in _IN_FILES:
            raise UnsupportedModelError(f"{h.key('pooling_type')} is {said}; of this architecture {', '.join(POOLINGS[:3])} are supported")
        self.pooling = _IN_FILES[said]
        self.tokens, self.places = Embedding(w["token_embd"], self.n_ids, d), Embedding(w["position_embd"], c.n_ctx, d)
        n_types = (w["token_types"].shape("weight") or (2, d))[0] if "token_types" in w else 0
        self.types = Embedding(w["token_types"], n_types, d) if n_types else None
        self.norm = LayerNorm(w["token_embd_norm"], d, c.eps)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]

    def declare(self, texts: Texts) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.tokens(texts.ids) + self.places(texts.positions)                          # [m, D]
        x = x + self.types(texts.types) if self.types else x
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, texts)
        return {HIDDEN: x, VECTORS: texts.pooled(x, self.pooling)}


class Model(Towers):
    """A bert encoder."""

    def __init__(self, h: Hparams, w: Weights):
        self.text = Text(h, w)
