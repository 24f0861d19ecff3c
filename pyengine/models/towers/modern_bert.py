"""ModernBERT: pre-norm layers without biases that see a window or, every third, the whole text; rotary positions with a base for each kind; GeGLU.

Warner et al. 2024, arXiv:2412.13663. Follows transformers `modeling_modernbert.py`; files are llama.cpp's `modern-bert`. A layer with a window
sees half of it on each side, the row in the middle not counted. The first layer has no norm before its attention.
differs: nothing. llama.cpp's converter writes no base of the windows' rotation, which is then 10,000.
Axes: m rows of all texts, D hidden, F feed-forward width, H heads, E head size.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from pyengine import ops
from pyengine.errors import InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import SentenceTower, Towers
from pyengine.nn.encoder import known_activation
from pyengine.nn.layers import Embedding, LayerNorm, Linear
from pyengine.nn.rope import plain_rope
from pyengine.nn.text_encoder import Rotate, table, TextAttention, TextHeads
from pyengine.nn.texts import Texts

EVERY = 3                                                    # transformers ModernBertConfig: global_attn_every_n_layers, as the next
GLOBAL_BASE, LOCAL_BASE = 160_000.0, 10_000.0


def sliding_layers(h: Hparams, n_layers: int) -> list[bool]:
    """Read which layers see a window: a list, or a period whose first layer sees all. Raises: InvalidModelError."""
    said = h.get("attention.sliding_window_pattern", EVERY, int, np.ndarray)
    if isinstance(said, int):
        return [bool(said) and i % said != 0 for i in range(n_layers)]
    if len(said) != n_layers:
        raise InvalidModelError(f"{h.key('attention.sliding_window_pattern')} has {len(said)} entries for {n_layers} layers")
    return [bool(s) for s in said]


class Block:
    """Attention and gated feed-forward, each behind a norm and added to its input."""

    def __init__(self, w: Weights, sizes: tuple[int, int, int], eps: float, act: str, window: int):
        d, d_ff, n_heads = sizes
        self.norm1 = LayerNorm(w["attn_norm"], d, eps, biased=None) if "attn_norm" in w else None
        self.attention = TextAttention(w, d, n_heads, window)
        self.norm2, self.act = LayerNorm(w["ffn_norm"], d, eps, biased=None), act
        self.gate, self.up = Linear.several(w["ffn_up"], d, (d_ff, d_ff))
        self.down = Linear(w["ffn_down"], d_ff, d)

    def __call__(self, x: Tensor, texts: Texts, rotate: Rotate) -> Tensor:                 # [m, D]
        x = x + self.attention(self.norm1(x) if self.norm1 else x, texts, rotate)
        y = self.norm2(x)
        return x + self.down(ops.unary(self.gate(y), kind=self.act) * self.up(y))


class Text(SentenceTower):
    """The one tower."""

    separators = 1

    def __init__(self, h: Hparams, w: Weights):
        d, n_heads, n_layers = h.size("embedding_length"), h.size("attention.head_count"), h.size("block_count")
        eps, act = h.number("attention.layer_norm_epsilon", 1e-5, above=0.0), known_activation(h, "hidden_act", "gelu")
        self.width, self.n_ids, self.n_ctx = d, table(w, "token_embd")[0], h.size("context_length")
        self.tokens, self.norm = Embedding(w["token_embd"], self.n_ids, d), LayerNorm(w["token_embd_norm"], d, eps, biased=None)
        half = h.window() // 2
        self.sliding = [half > 0 and slides for slides in sliding_layers(h, n_layers)]
        self.windows = (half,) if any(self.sliding) else ()
        sizes = d, h.size("feed_forward_length"), n_heads
        self.blocks = [Block(w["blk", i], sizes, eps, act, half if slides else 0) for i, slides in enumerate(self.sliding)]
        self.last_norm = LayerNorm(w["output_norm"], d, eps, biased=None)
        self.ropes = [plain_rope(h.number(name, base, above=0.0), d // n_heads)
                      for name, base in (("rope.freq_base", GLOBAL_BASE), ("rope.freq_base_swa", LOCAL_BASE))]
        self.hold(TextHeads(h, w, d, eps=eps, class_act="gelu"))

    def declare(self, texts: Texts) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.norm(self.tokens(texts.ids))                                              # [m, D]
        rotate = [partial(rope, table=rope.table(texts.positions.reshape(1, -1))) for rope in self.ropes]
        for block, slides in zip(self.blocks, self.sliding):
            x = block(x, texts, rotate[slides])
        return self.heads(texts, self.last_norm(x))


class Model(Towers):
    """A modern-bert encoder."""

    def __init__(self, h: Hparams, w: Weights):
        self.read_texts(Text(h, w))
