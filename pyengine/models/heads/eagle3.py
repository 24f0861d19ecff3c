"""EAGLE-3 heads: one layer that goes on from what three of a decoder's layers, a low, a middle and a high one, took.

Paper arXiv:2503.01840. Keys and tensors as llama.cpp's converter writes them (`conversion/llama.py`), for checkpoints of the authors and of
`speculators`. Files have q and k with their rows permuted, so that the rotation is the interleaved one.

    state   fc [what the layers took, one beside another], of a row that the decoder has read; some have a norm before fc
    row     e = norm(embedding of the token), g = norm(the state before it)
            x = the state, or g with `norm_before_residual`, + attention [e, g];  x + feed-forward(norm(x)): the next state
    logits  output (norm(state)), of fewer tokens than the decoder has: `d2t` says which

The embedding, and the output head where all tokens have a row, are the decoder's unless the file has them.
Axes: h rows, D hidden, T hidden of the decoder, H/K query/KV heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyengine import ops
from pyengine.errors import InvalidModelError, RequestError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.llama import FeedForward
from pyengine.nn.ahead import Ahead
from pyengine.nn.batch import Batch
from pyengine.nn.decoder import DecoderConfig
from pyengine.nn.layers import Embedding, Linear, RMSNorm
from pyengine.nn.rope import Rope, rope


def read(h: Hparams, n_logits: int) -> DecoderConfig:
    """Read the keys "eagle3.*". Raises: InvalidModelError."""
    if h.size("block_count") != 1:
        raise InvalidModelError(f"{h.key('block_count')} is {h.size('block_count')}: a head of EAGLE-3 has one layer")
    d_model, n_heads = h.size("embedding_length"), h.size("attention.head_count")
    return DecoderConfig(1, d_model, h.size("feed_forward_length"), n_heads, h.size("attention.head_count_kv", n_heads),
                         h.size("attention.key_length", d_model // n_heads), n_logits, h.size("context_length"), h.number("attention.layer_norm_rms_epsilon", above=0.0))


class Head(Ahead):
    """A head beside its decoder. w: its layer is "ahead.0". Raises: InvalidModelError; RequestError for another decoder's."""

    origin = "eagle3"

    def __init__(self, h: Hparams, w: Weights, decoder: Any):
        d, own = decoder.config, w["ahead", 0]
        shape = w["output"].shape("weight")
        c = self.config = read(h, shape[0] if shape else d.vocab_size)
        self.width, self.n_logits, self.own = c.d_model, c.vocab_size, [(c.n_kv_heads, c.head_dim)]
        if decoder.position_axes != 1:
            raise RequestError("draft: a head of EAGLE-3 has positions on one axis, and this model on several (M-RoPE)")
        if h.size("target_hidden_size") != d.d_model:
            raise RequestError(f"draft: the head was made for hidden states of {h.size('target_hidden_size')} numbers, and this model's have {d.d_model}")
        layers = h.need("extract_layers" if "extract_layers" in h else "target_layers", np.ndarray).tolist()
        if not layers or not all(type(i) is int and 0 <= i < d.n_layers for i in layers):
            raise RequestError(f"draft: the head reads what layers {layers} take, and this model has {d.n_layers} layers")
        self.layers, self.raw = layers, not h.get("norm_before_residual", False, bool)
        self.fc = Linear(w["fc"], len(layers) * d.d_model, c.d_model)
        self.fc_norm = RMSNorm(w["enc", "output_norm"], len(layers) * d.d_model, c.eps) if h.get("norm_before_fc", False, bool) else None
        self.embedding_norm, self.state_norm, self.ffn_norm = (RMSNorm(own[name], c.d_model, c.eps) for name in ("attn_norm", "attn_norm_2", "ffn_norm"))
        self.q = Linear(own["attn_q"], 2 * c.d_model, c.n_heads * c.head_dim)
        self.k, self.v = (Linear(own[name], 2 * c.d_model, c.n_kv_heads * c.head_dim) for name in ("attn_k", "attn_v"))
        self.out, self.ffn = Linear(own["attn_output"], c.n_heads * c.head_dim, c.d_model), FeedForward(own, c)
        self.norm, self.rope = RMSNorm(w["output_norm"], c.d_model, c.eps), rope(h, w, c.head_dim, interleaved=True)
        self._bind_tokens(w, decoder)

    def _bind_tokens(self, w: Weights, decoder: Any) -> None:
        """Bind the embedding, the output head, and which tokens it has."""
        c, d = self.config, decoder.config
        rows, d2t = w["token_embd"].shape("weight"), w.optional("d2t", (c.vocab_size,))
        if (rows is None or "output" not in w) and c.d_model != d.d_model:
            raise RequestError(f"draft: the head shares the model's embedding or output head, but has {c.d_model} numbers in a row, and the model {d.d_model}")
        if rows is not None and rows[0] < decoder.n_ids:
            raise RequestError(f"draft: the head has an embedding of {rows[0]} tokens, and this model of {decoder.n_ids}")
        self.embed = decoder.embed if rows is None else Embedding(w["token_embd"], rows[0], c.d_model)
        self.head = Linear(w["output"], c.d_model, c.vocab_size) if "output" in w else decoder.head
        if d2t is not None:
            self.tokens = np.array(d2t.source.array(d2t.name)).reshape(-1)
            if self.tokens.dtype.kind not in "iu" or self.tokens.min() < 0 or len(set(self.tokens.tolist())) != c.vocab_size:
                raise InvalidModelError(f"{d2t.source.path}: tensor 'd2t': must have another token for each of {c.vocab_size} rows of the output head")
            if self.tokens.max() >= d.vocab_size:
                raise RequestError(f"draft: the head drafts token {self.tokens.max()}, and this model has {d.vocab_size}")
        elif c.vocab_size != d.vocab_size:
            raise RequestError(f"draft: the head drafts {c.vocab_size} tokens without saying which (d2t), and this model has {d.vocab_size}")

    def states(self, last: Tensor, inner: Sequence[Tensor]) -> Tensor:
        """Return the states [m, D] of rows. Raises: RequestError for a decoder that does not tell what its layers take."""
        if not inner:
            raise RequestError("draft: this model's architecture does not tell what its layers take, which a head of EAGLE-3 goes on from")
        x = ops.concat([inner[i] for i in self.layers], axis=1) if len(self.layers) > 1 else inner[self.layers[0]]               # [m, 3 T]
        return self.fc(x if self.fc_norm is None else self.fc_norm(x))

    def __call__(self, batch: Batch, before: Tensor, caches: Sequence[Any]) -> Tensor:
        """Return the states [h, D] of rows behind those whose states are `before` [h, D]."""
        c, turn = self.config, self.rope.at(batch.n_ctx)
        state, angles = self.state_norm(before), turn.table(batch.positions)
        x = ops.concat([self.embedding_norm(self.embed(batch.ids, batch.media)), state], axis=1)                                # [h, 2 D]
        q = self.q(x).reshape(-1, c.n_heads, c.head_dim)                                       # [h, H, E]
        k, v = (f(x).reshape(-1, c.n_kv_heads, c.head_dim) for f in (self.k, self.v))          # [h, K, E]
        y = caches[0].attend(turn(q, angles), turn(k, angles), v, scale=c.head_dim**-0.5)
        x = (before if self.raw else state) + self.out(y)
        return x + self.ffn(self.ffn_norm(x))

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [x, n_logits] of what follows rows with states x [x, D]."""
        return self.head(self.norm(x))

    def ropes(self, n_ctx: int) -> list[Rope]:
        """Return that of its layer's keys."""
        return [self.rope.at(n_ctx)]
