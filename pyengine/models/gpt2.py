"""GPT-2 (124M to 1.5B) and models of its shape: positions are embeddings that are added, layer norms, one feed-forward matrix up and down.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Follows transformers `modeling_gpt2.py`. A context has at most as
many positions as the file has embeddings, and tokens cannot be removed from its middle.
Axes: m rows of the batch, D hidden, H heads, E head size, F feed-forward width.
"""

from __future__ import annotations

import numpy as np

from pyengine import ops
from pyengine.cache.policy import Full, Policy
from pyengine.errors import RequestError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import Architecture
from pyengine.nn.batch import Batch
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import common, DecoderConfig
from pyengine.nn.layers import Embedding, LayerNorm, Linear
from pyengine.nn.rope import Rope


class Block:
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, w: Weights, c: DecoderConfig):
        self.c = c
        self.attn_norm, self.ffn_norm = LayerNorm(w["attn_norm"], c.d_model, c.eps), LayerNorm(w["ffn_norm"], c.d_model, c.eps)
        self.q, self.k, self.v = Linear.several(w["attn_qkv"], c.d_model, (c.d_model,) * 3)
        self.out = Linear(w["attn_output"], c.d_model, c.d_model)
        self.up, self.down = Linear(w["ffn_up"], c.d_model, c.d_ff), Linear(w["ffn_down"], c.d_ff, c.d_model)

    def __call__(self, x: Tensor, cache: LayerCache) -> Tensor:                    # [m, D]
        x = x + self.attend(self.attn_norm(x), cache)
        return x + self.down(ops.gelu_tanh(self.up(self.ffn_norm(x))))             # [m, D]

    def attend(self, x: Tensor, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        q, k, v = (part(x).reshape(-1, self.c.n_heads, self.c.head_dim) for part in (self.q, self.k, self.v))      # [m, H, E] each
        return self.out(cache.attend(q, k, v, scale=self.c.head_dim**-0.5))


class Model(Architecture):
    """A gpt2 decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    absolute = True

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = DecoderConfig(**common(h, w, eps="attention.layer_norm_epsilon"))
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model)
        self.places = Embedding(w["position_embd"], c.n_ctx_train, c.d_model)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = LayerNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Full()] * self.config.n_layers

    def ropes(self, n_ctx: int) -> list[Rope]:
        """Return rotary embeddings that rotate nothing."""
        return [Rope(np.empty(0, np.float32), 1.0, False)] * self.config.n_layers

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]. Raises: RequestError for contexts that are larger than the positions of the file."""
        x = self.placed(self.embed(batch.ids), batch)
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache)
        return self.norm(x)

    def placed(self, x: Tensor, batch: Batch) -> Tensor:
        """Add the embeddings of their positions to a step's rows [m, D]. Raises: RequestError where the file has fewer than a context may need."""
        if batch.n_ctx > self.config.n_ctx_train:
            raise RequestError(f"n_ctx is {batch.n_ctx}, but the model has embeddings of {self.config.n_ctx_train} positions")
        return x + self.places(batch.positions.reshape(-1))

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x)
