"""Gemma 4's assistants: a few small layers that read the caches of a Gemma 4 decoder, and have none of their own.

Follows transformers 5.23 `modeling_gemma4_assistant.py` and its SinglePositionMultiTokenCandidateGenerator; keys and
tensors as in llama.cpp's `conversion/gemma.py` (Gemma4AssistantModel).

    row   pre [the decoder's embedding of the token, the state before it] -> Gemma 4's layers -> norm; its output head, and post, the next state

The state of a row that the decoder has read is its last hidden state. Each layer reads the keys and values of the decoder's last layer of
its kind that has a cache: all tokens before, or those before in the window of the token's place. All tokens of a draft stand at the place of the first.
differs: transformers' window is one or two tokens longer, by how the text was read; ours is the decoder's, as llama.cpp's. The smallest
assistants' table of clusters, by which they look at a part of the tokens only, is left out, as llama.cpp's converter does: all are looked at.
Axes: h rows, D hidden of the decoder, W of the assistant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyengine import ops
from pyengine.errors import RequestError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import gemma4
from pyengine.nn.ahead import Ahead
from pyengine.nn.batch import Batch
from pyengine.nn.decoder import per_layer, sizes, vocab_size
from pyengine.nn.layers import Linear, RMSNorm

CLUSTERS, ORDER = "masked_embd_centroids", "masked_embd_ordering"


def read(h: Hparams, w: Weights) -> gemma4.Config:
    """Read the keys "gemma4-assistant.*". Raises: InvalidModelError, UnsupportedModelError."""
    h.refuse(embedding_length_per_layer_input="an embedding of each layer", expert_count="a mixture of experts",
             final_logit_softcapping="a bound of the logits")
    n_layers = h.size("block_count")
    sliding = per_layer(h, "attention.sliding_window_pattern", (True,) * n_layers)
    of_kind = {slides: h.size(f"attention.key_length{'_swa' if slides else ''}") for slides in set(sliding)}
    kv_heads, widths = (sizes(h, name, n_layers) for name in ("attention.head_count_kv", "feed_forward_length"))
    return gemma4.Config(
        n_layers=n_layers, d_model=h.size("embedding_length"), d_ff=max(widths), n_heads=h.size("attention.head_count"), n_kv_heads=max(kv_heads),
        head_dim=max(of_kind.values()), vocab_size=vocab_size(w), n_ctx_train=h.size("context_length"), eps=h.number("attention.layer_norm_rms_epsilon", above=0.0),
        window=h.window(), sliding=sliding, heads=tuple((n, of_kind[slides]) for n, slides in zip(kv_heads, sliding)), owners=(-1,) * n_layers,
        widths=widths, d_own=0, n_experts=0, n_used=0, d_expert=0, final_softcap=0.0)


class Head(Ahead):
    """An assistant beside its decoder. w: its layers are "ahead.0" and so on. Raises: RequestError for another decoder's."""

    origin = "assistant"

    def __init__(self, h: Hparams, w: Weights, decoder: Any):
        if not isinstance(decoder, gemma4.Model):
            raise RequestError("draft: an assistant of Gemma 4 reads the caches of a Gemma 4, and this is another model")
        c, d = read(h, w), decoder.config
        self.config, self.decoder, self.width, self.n_logits = c, decoder, d.d_model, c.vocab_size
        if h.size("embedding_length_out") != d.d_model:
            raise RequestError(f"draft: the assistant was made for hidden states of {h.size('embedding_length_out')} numbers, and this model's have {d.d_model}")
        last = dict(zip(d.sliding, d.owners))                # of each kind, the cache that the last layer reads
        for slides, shape in zip(c.sliding, c.heads):
            if slides not in last or d.heads[last[slides]] != shape or c.n_heads % shape[0] or slides and c.window != d.window:
                raise RequestError(f"draft: the assistant reads {shape[0]} key/value heads of {shape[1]} elements, as this model's layers of that kind do not have them")
        kinds = sorted(set(c.sliding))
        self.reads, self.places = [last[slides] for slides in kinds], [kinds.index(slides) for slides in c.sliding]
        self.pre, self.post = Linear(w["nextn", "pre_projection"], 2 * d.d_model, c.d_model), Linear(w["nextn", "post_projection"], c.d_model, d.d_model)
        self.blocks = [gemma4.Block(w["ahead", i], c, i) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)           # tied if absent
        self.rope, self.rope_local = gemma4.rotations(h, w, c)
        w[CLUSTERS].leave_out()
        w.optional(ORDER, (c.vocab_size,))

    def __call__(self, batch: Batch, before: Tensor, caches: Sequence[Any]) -> Tensor:
        """Return last hidden states [h, W]."""
        x = self.pre(ops.concat([self.decoder.embed(batch.ids), before], axis=1))               # [h, W]
        angles = {slides: (r, r.table(batch.positions)) for slides, r in ((True, self.rope_local), (False, self.rope.at(batch.n_ctx)))}
        for block, slides, place in zip(self.blocks, self.config.sliding, self.places):
            x, _ = block(x, *angles[slides], caches[place], None)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [x, vocab] of last hidden states [x, W]."""
        return self.head(x)

    def following(self, x: Tensor) -> Tensor:
        """Return states [x, D] in place of the decoder's last hidden ones."""
        return self.post(x)
