"""Heads that predict further tokens of a decoder, for drafts: the contract, and the one that decoders bring in their own files (MTP).

A head is part of a decoder's step. It goes on from what the decoder made of a row, its state, and from the token behind that row; what it
makes of both stands for the state of the row that the decoder has not read, so it drafts any number of tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from pyengine import ops
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.batch import Batch
from pyengine.nn.layers import Embedding, Linear, RMSNorm
from pyengine.nn.rope import Rope


class Ahead(ABC):
    """A head, as a step has it.

    origin    what its drafts are called
    width     numbers of a state; n_logits: of what it says of the next token
    tokens    int64 [n_logits], the token that each of them stands for; None: the token of the same number
    own       (key/value heads, elements of a head) of each cache of its own, which sees everything: it reads every row that the decoder reads
    reads     where it has none, numbers of the decoder's caches that it reads: it runs for drafts only
    """

    origin: ClassVar[str]
    width: int
    n_logits: int
    tokens: np.ndarray | None = None
    own: Sequence[tuple[int, int]] = ()
    reads: Sequence[int] = ()

    def states(self, last: Tensor, inner: Sequence[Tensor]) -> Tensor:
        """Return the states [m, width] of rows. last: last hidden states [m, d_model]; inner: what each of the decoder's layers took, [m, d_model]."""
        return last

    @abstractmethod
    def __call__(self, batch: Batch, before: Tensor, caches: Sequence[Any]) -> Tensor:
        """Build the graph for h rows behind those whose states are `before` [h, width]; returns [h, D], what `logits` and `following` read.

        caches: its own, or those that it reads, as the decoder's layers leave them
        """

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Return logits [x, n_logits] of what may follow rows x [x, D]."""

    def following(self, x: Tensor) -> Tensor:
        """Return the states [x, width] of rows x [x, D], as if the decoder had read them."""
        return x

    def ropes(self, n_ctx: int) -> list[Rope]:
        """Return the rotary embedding of the keys of each cache of its own."""
        return []


class Mtp(Ahead):
    """A layer behind a decoder's last (MTP, "nextn" in files of llama.cpp).

        row j: eh_proj [norm(embedding of token j), norm(last hidden state of row j - 1)] -> a decoder's block -> norm -> output head

    What it gives is what token j + 1 may be. DeepSeek-V3, arXiv:2412.19437, section 2.2; transformers 5.23 `modeling_layers.py`
    (MtpLayer), which has the embedding and the output head of the decoder, as here unless the file holds others.
    w: the layer's scope; block: of the decoder's kind, bound there; decoder: has config, n_ids, embed, norm, head, rope and rotation;
    offset: added to the weights of the norms around the block.
    """

    origin = "mtp"

    def __init__(self, w: Weights, block: Any, decoder: Any, offset: float = 0.0):
        c, own = decoder.config, w["nextn"]
        self.block, self.decoder, self.width, self.n_logits, self.own = block, decoder, c.d_model, c.vocab_size, [(c.n_kv_heads, c.head_dim)]
        self.embedding_norm, self.hidden_norm = (RMSNorm(own[name], c.d_model, c.eps, offset) for name in ("enorm", "hnorm"))
        self.join = Linear(own["eh_proj"], 2 * c.d_model, c.d_model)
        self.norm = RMSNorm(own["shared_head_norm"], c.d_model, c.eps, offset) if "shared_head_norm" in own else decoder.norm
        self.embed = Embedding(own["embed_tokens"], decoder.n_ids, c.d_model) if "embed_tokens" in own else decoder.embed
        self.head = Linear(own["shared_head_head"], c.d_model, c.vocab_size) if "shared_head_head" in own else decoder.head

    def __call__(self, batch: Batch, before: Tensor, caches: Sequence[Any]) -> Tensor:
        """Return last hidden states [h, D] of rows behind those whose hidden states are `before` [h, D]."""
        x = ops.concat([self.embedding_norm(self.embed(batch.ids, batch.media)), self.hidden_norm(before)], axis=1)            # [h, 2 D]
        return self.norm(self.block(self.join(x), *self.decoder.rotation(batch), caches[0]))

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [x, vocab] of hidden states [x, D]."""
        return self.head(x)

    def ropes(self, n_ctx: int) -> list[Rope]:
        """Return the decoder's."""
        return [self.decoder.rope.at(n_ctx)]
