"""EmbeddingGemma: Gemma 3's layers, which here see what stands behind a row too; the mean of a text's rows, and two layers behind it.

Vera et al. 2025, arXiv:2509.20354. Follows transformers `modeling_gemma3.py` with `use_bidirectional_attention`; files are llama.cpp's
`gemma-embedding`, whose `dense_2` and `dense_3` a file may lack (its converter writes them when it is told to). A layer with a window sees half
of it on each side.
Axes: m rows of all texts, D hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import SentenceTower, Towers
from pyengine.models.gemma3 import Block, Config, LOCAL_ROPE_BASE
from pyengine.nn.layers import Embedding, RMSNorm
from pyengine.nn.rope import plain_rope, rope
from pyengine.nn.text_encoder import TextHeads
from pyengine.nn.texts import Texts


class Near(NamedTuple):
    """What stands in the place of a layer's cache: the rows of the run, of which each sees those of its text, or of a window of it."""

    texts: Texts
    window: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        """Attend with q [m, H, E] to k, v [m, K, E]; returns [m, H * E]."""
        return self.texts.attend(q, k, v, window=self.window, **more)


class Text(SentenceTower):
    """The one tower."""

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.width, self.n_ids, self.n_ctx = c.d_model, c.vocab_size, h.size("context_length")
        self.tokens = Embedding(w["token_embd"], c.vocab_size, c.d_model, scale=c.d_model**0.5)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        half = c.window // 2
        self.sliding = [half > 0 and slides for slides in c.sliding]
        self.windows = (half,) if any(self.sliding) else ()
        self.ropes = rope(h, w, c.head_dim, interleaved=False).at(self.n_ctx), plain_rope(h.number("rope.freq_base_swa", LOCAL_ROPE_BASE, above=0.0), c.head_dim)
        self.hold(TextHeads(h, w, c.d_model))

    def declare(self, texts: Texts) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.tokens(texts.ids)                                                         # [m, D]
        angles = [r.table(texts.positions.reshape(1, -1)) for r in self.ropes]
        for block, slides in zip(self.blocks, self.sliding):
            x = block(x, self.ropes[slides], angles[slides], Near(texts, self.windows[0] if slides else 0))
        return self.heads(texts, self.norm(x))


class Model(Towers):
    """A gemma-embedding encoder."""

    def __init__(self, h: Hparams, w: Weights):
        self.read_texts(Text(h, w))
