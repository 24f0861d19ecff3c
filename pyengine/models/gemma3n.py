"""Gemma 3n: several residual streams of which one goes through each layer, per-layer embeddings, caches that later layers share.

Follows transformers `modeling_gemma3n.py`; keys and tensors as in llama.cpp's `conversion/gemma.py`. AltUp: arXiv:2301.13310, LAuReL:
arXiv:2411.07501.

    streams     N of width D: the embedding, and projections of it that are as large; a layer predicts all of them from all, sends the
                active one through attention and feed-forward, and corrects all of them by what has become of it
    attention   that of Gemma 4: scale 1, norms of each head's queries, keys and values; the last layers read the caches of earlier ones
    laurel      a product of low rank beside attention
    sparsity    in some layers only gates that are larger than most, by a normal distribution's measure, count
    end         the mean of the streams, projected back and as large as the first

differs from llama.cpp: the deviation is that of all gates, not an estimate from them, and each layer's cutoff is the file's.
Sounds are not read. Rows of the per-layer table that a checkpoint lacks, those of pictures' and sounds' tokens, are zeros as in llama.cpp's
files, where they stand in a text (transformers takes its first row); those of a picture take its first row.
Axes: m rows of the batch, N streams, D hidden, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyengine import ops
from pyengine.cache.policy import Full, Policy, Sliding
from pyengine.errors import InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import encoders
from pyengine.models.architecture import Architecture, Encoder, EncoderFiles
from pyengine.models.gemma4 import Attention
from pyengine.nn.batch import Batch
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import common, DecoderConfig, last_of_kind, per_layer
from pyengine.nn.layers import constant, Embedding, Linear, RMSNorm
from pyengine.nn.per_layer import PerLayerEmbedding, PerLayerGate
from pyengine.nn.rope import Rope, rope

LOCAL_ROPE_BASE = 10_000.0           # transformers Gemma3nTextConfig.default_theta
LEAST = 1e-5                         # mean square of a projected stream, at least


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata."""

    window: int
    sliding: tuple[bool, ...]        # per layer, as the next three
    heads: tuple[tuple[int, int], ...]
    owners: tuple[int, ...]
    cutoffs: tuple[float, ...]       # deviations above the mean from which on gates count; -inf: all do
    d_own: int                       # width of a layer's own embedding
    n_streams: int
    active: int                      # the stream that goes through layers
    rank: int                        # of the product beside attention
    final_softcap: float             # 0: none

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys "gemma3n.*"."""
        numbers = common(h, w)
        n = numbers["n_layers"]
        sliding, n_shared = per_layer(h, "attention.sliding_window_pattern", (True,) * n), h.get("attention.shared_kv_layers", 0, int)
        cutoffs = h.need("activation_sparsity_scale", np.ndarray)
        streams, active, shape = h.size("altup.num_inputs"), h.need("altup.active_idx", int), w["blk", 0, "laurel_l"].shape("weight")
        if not 0 <= n_shared < n or len(cutoffs) != n or not 0 <= active < streams or streams < 2 or shape is None or len(shape) != 2:
            raise InvalidModelError(f"{h.key('attention.shared_kv_layers')}: {n_shared} of {n} layers share caches, {len(cutoffs)} have a sparsity, stream {active} of {streams} "
                                    f"is active, and laurel_l has shape {shape}: no such model can be")
        return cls(
            **numbers,
            window=h.need("attention.sliding_window", int) and h.window(),
            sliding=sliding,
            heads=((numbers["n_kv_heads"], numbers["head_dim"]),) * n,
            owners=last_of_kind(sliding, n - n_shared, h.key("attention.shared_kv_layers")),
            cutoffs=tuple(float(s) for s in cutoffs),
            d_own=h.size("embedding_length_per_layer_input"),
            n_streams=streams,
            active=active,
            rank=shape[0],
            final_softcap=h.number("final_logit_softcapping", 0.0),
        )


def magnitude(x: Tensor) -> Tensor:
    """Return the mean square [.., 1] of rows [.., D]."""
    return ops.reduce(ops.unary(x, kind="square"), kind="mean").reshape(-1, *x.shape[1:-1], 1)


def as_large(x: Tensor, size: Tensor) -> Tensor:
    """Scale rows [.., D] to the root of the mean square `size` [m, 1 ..]."""
    least = np.full((1,), LEAST, np.float32)
    own = ops.unary(ops.binary(magnitude(x), least, kind="max"), kind="sqrt")
    return x * ops.unary(size, kind="sqrt") / own


class Streams:
    """AltUp of one layer: all streams [m, N, D] predicted from all, and corrected by what the layer has made of the active one."""

    def __init__(self, w: Weights, c: Config):
        self.c, n = c, c.n_streams
        self.norm, self.router = RMSNorm(w["altup_router_norm"], c.d_model, c.eps), Linear(w["altup_router"], c.d_model, n)
        self.prediction, self.correction = Linear(w["altup_predict_coef"], n, n * n), Linear(w["altup_correct_coef"], n, n)

    def modalities(self, x: Tensor) -> Tensor:                                     # [m, D] -> [m, N]
        """Return how a row is divided."""
        return ops.tanh(self.router(ops.scale(self.norm(x), factor=1 / self.c.d_model)))

    def predict(self, streams: Tensor) -> Tensor:                                  # [m, N, D]
        """Add to each stream a mixture of all, with numbers that follow from the active one."""
        n, y = self.c.n_streams, streams
        factors = self.prediction(self.modalities(one_of(streams, self.c.active))).reshape(-1, n, n)         # [m, to, from]
        for i in range(n):
            y = y + ops.slice(factors, axis=2, start=i, stop=i + 1) * ops.slice(streams, axis=1, start=i, stop=i + 1)
        return y

    def correct(self, streams: Tensor, activated: Tensor) -> Tensor:               # [m, N, D], [m, D] -> [m, N, D]
        """Add to each stream a part of what is new in the activated one."""
        c = self.c
        new = (activated - one_of(streams, c.active)).reshape(-1, 1, c.d_model)
        return streams + new * ops.scale(self.correction(self.modalities(activated)), factor=1.0, offset=1.0).reshape(-1, c.n_streams, 1)


def one_of(streams: Tensor, i: int) -> Tensor:
    """Return stream i [m, D] of all [m, N, D]."""
    return ops.contiguous(ops.slice(streams, axis=1, start=i, stop=i + 1)).reshape(-1, streams.shape[2])


class FeedForward:
    """down(gelu(gate x) * up x), of which a cutoff leaves the largest gates, less the cutoff itself."""

    def __init__(self, w: Weights, c: Config, number: int):
        self.gate, self.up, self.down = (Linear(w[f"ffn_{name}"], *shape) for name, shape in (
            ("gate", (c.d_model, c.d_ff)), ("up", (c.d_model, c.d_ff)), ("down", (c.d_ff, c.d_model))))
        self.cutoff = c.cutoffs[number]

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D] -> [m, D]
        gate = self.gate(x)                                                        # [m, F]
        if np.isfinite(self.cutoff):
            centred = gate - ops.reduce(gate, kind="mean").reshape(-1, 1)
            gate = ops.relu(centred - ops.scale(ops.unary(magnitude(centred), kind="sqrt"), factor=self.cutoff))
        return self.down(ops.gelu_tanh(gate) * self.up(x))


class Block:
    """One layer over all streams."""

    def __init__(self, w: Weights, c: Config, number: int):
        self.c, self.streams, self.attention, self.ffn = c, Streams(w, c), Attention(w, c, number), FeedForward(w, c, number)
        self.attn_norm, self.attn_post, self.ffn_norm, self.ffn_post, self.laurel_post = (RMSNorm(w[name], c.d_model, c.eps) for name in (
            "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "laurel_post_norm"))
        self.left, self.right = Linear(w["laurel_l"], c.d_model, c.rank), Linear(w["laurel_r"], c.rank, c.d_model)
        self.own = PerLayerGate(w, c.d_model, c.d_own, c.eps)
        self.scale = constant(w["altup_correct_scale"].tensor("weight", (c.d_model,)))
        self.others = (np.arange(c.n_streams, dtype=np.float32) > 0).astype(np.float32)[:, None]             # [N, 1]: all but the first

    def __call__(self, streams: Tensor, rope: Rope, angles: Tensor, cache: LayerCache, own: Tensor) -> tuple[Tensor, LayerCache]:
        """Apply the layer: streams [m, N, D] -> [m, N, D], and its cache."""
        predicted = self.streams.predict(streams)
        active = one_of(predicted, self.c.active)                                  # [m, D]
        x = self.attn_norm(active)
        laurel = x + self.laurel_post(self.right(self.left(x)))
        attended, cache = self.attention(x, rope, angles, cache)
        x = ops.scale(active + self.attn_post(attended) + laurel, factor=2**-0.5)
        x = x + self.ffn_post(self.ffn(self.ffn_norm(x)))
        corrected = self.streams.correct(predicted, x)
        added = self.own(one_of(corrected, self.c.active) * self.scale, own)       # [m, D]
        return corrected + added.reshape(-1, 1, self.c.d_model) * self.others, cache


class Model(Architecture):
    """A gemma3n decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model, scale=c.d_model**0.5)
        self.own = PerLayerEmbedding(w, c.vocab_size, c.d_model, c.n_layers, c.d_own, c.eps)
        self.into, self.back = (w[name].tensor("weight", (c.n_streams - 1, c.d_model, c.d_model))._replace(shape=((c.n_streams - 1) * c.d_model, c.d_model))
                                for name in ("altup_proj", "altup_unembd_proj"))
        self.blocks = [Block(w["blk", i], c, i) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=False)
        base = h.number("rope.freq_base_swa", LOCAL_ROPE_BASE, above=0.0)
        self.rope_local = Rope((1 / base ** (np.arange(0, c.head_dim, 2, dtype=np.float32) / np.float32(c.head_dim))).astype(np.float32), 1.0, False)

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind MobileNet-V5, where the files hold it."""
        return encoders.beside(files)

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Sliding(self.config.window) if slides and self.config.window else Full() for slides in self.config.sliding]

    def cache_owners(self) -> list[int]:
        """Return the number of the layer whose keys and values each layer reads."""
        return list(self.config.owners)

    def ropes(self, n_ctx: int) -> list[Rope]:
        """Return the rotary embedding of each layer's keys."""
        return [self.rope_local if slides else self.rope.at(n_ctx) for slides in self.config.sliding]

    def forward(self, batch: Batch, caches: list[LayerCache | None]) -> Tensor:
        """Return last hidden states [m, D]."""
        c, x = self.config, self.embed(batch.ids, batch.media)                     # [m, D]
        own, first = self.own(x, batch), x.reshape(-1, 1, c.d_model)
        more = ops.linear(x, [constant(self.into)])[0].reshape(-1, c.n_streams - 1, c.d_model)
        streams = ops.concat([first, as_large(more, magnitude(first))], axis=1)    # [m, N, D]
        angles = {slides: (r, r.table(batch.positions)) for slides, r in ((True, self.rope_local), (False, self.rope.at(batch.n_ctx)))}
        held: list[LayerCache] = []
        for block, slides, owner, cache, vectors in zip(self.blocks, c.sliding, c.owners, caches, own):
            streams, filled = block(streams, *angles[slides], held[owner] if cache is None else cache, vectors)
            held.append(filled)
        total = one_of(streams, 0)
        size = magnitude(total)                                                    # [m, 1]
        for i in range(1, c.n_streams):
            back = constant(self.back.rows((i - 1) * c.d_model, c.d_model))
            total = total + as_large(ops.linear(one_of(streams, i), [back])[0], size)
        return self.norm(ops.scale(total, factor=1 / c.n_streams))

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        y, cap = self.head(x), self.config.final_softcap
        return ops.softcap(y, cap=cap) if cap else y
