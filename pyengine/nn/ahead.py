"""A head that predicts the token after the next one (MTP, "nextn" in files of llama.cpp): one layer behind a decoder's last.

    row j: eh_proj [norm(embedding of token j), norm(last hidden state of row j - 1)] -> a decoder's block -> norm -> output head

What it gives is what token j + 1 may be. Its own last hidden state stands for the decoder's where it goes on from a token that the decoder
has not read, so one layer drafts any number of tokens. DeepSeek-V3, arXiv:2412.19437, section 2.2; transformers 5.23
`modeling_layers.py` (MtpLayer), which has the embedding and the output head of the decoder, as here unless the file holds others.
"""

from __future__ import annotations

from typing import Any

from pyengine import ops
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.layers import Embedding, Linear, RMSNorm


class Ahead:
    """See the module's docstring. w: the layer's scope; block: of the decoder's kind, bound there; decoder: has config, n_ids, embed, norm and head."""

    def __init__(self, w: Weights, block: Any, decoder: Any):
        c, own = decoder.config, w["nextn"]
        self.block = block
        self.embedding_norm, self.hidden_norm = (RMSNorm(own[name], c.d_model, c.eps) for name in ("enorm", "hnorm"))
        self.join = Linear(own["eh_proj"], 2 * c.d_model, c.d_model)
        self.norm = RMSNorm(own["shared_head_norm"], c.d_model, c.eps) if "shared_head_norm" in own else decoder.norm
        self.embed = Embedding(own["embed_tokens"], decoder.n_ids, c.d_model) if "embed_tokens" in own else decoder.embed
        self.head = Linear(own["shared_head_head"], c.d_model, c.vocab_size) if "shared_head_head" in own else decoder.head

    def __call__(self, ids: Tensor, media: Tensor | None, before: Tensor, *place: Any) -> Tensor:
        """Return last hidden states [h, D] of rows with these ids [h] behind those whose hidden states are `before` [h, D].

        place: what the block takes besides: the rotation, its angles, the cache
        """
        x = ops.concat([self.embedding_norm(self.embed(ids, media)), self.hidden_norm(before)], axis=1)        # [h, 2 D]
        return self.norm(self.block(self.join(x), *place))

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [x, vocab] of hidden states [x, D]."""
        return self.head(x)
