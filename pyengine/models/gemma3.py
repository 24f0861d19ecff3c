"""Gemma 3: a text decoder of five sliding-window layers, then one global, and so on; SigLIP encoder, 256 soft tokens a picture.

Paper arXiv:2503.19786. Follows transformers `modeling_gemma3.py`, `processing_gemma3.py` and `image_processing_pil_gemma3.py`.
Norm weights in GGUF files already hold 1 + w. A picture's soft tokens attend to each other in both directions and to all that
is before them; in sliding layers the window limits backwards only. Soft tokens are not multiplied by sqrt(D).
differs: nothing. llama.cpp hard-codes the layer pattern (every 6th global), the local rope base (10,000), the query scale and the
pooling; files that carry them as keys are believed, others get those constants.
Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size, F feed-forward width; in the encoder P patches, V hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.media.views import Limits, Processed, View
from pyengine.nn.batch import Batch
from pyengine.errors import InvalidModelError, RequestError
from pyengine.graph.graph import Graph
from pyengine.files.hparams import Hparams
from pyengine.cache.policy import Full, Policy, Sliding
from pyengine.nn.cache import LayerCache
from pyengine.models.architecture import Architecture, Encoder, EncoderFiles
from pyengine.nn.decoder import common, DecoderConfig, per_layer
from pyengine.nn.encoder import (
    by_table, cut_patches, EncoderAttention, EncoderFeedForward, levels, mean_and_std, only_pictures, PIXELS, resample_filter,
    special_token)
from pyengine.nn.layers import ACTIVATIONS, constant, Embedding, LayerNorm, Linear, mlp_width, PatchEmbedding, RMSNorm
from pyengine.nn.rope import plain_rope, Rope, rope
from pyengine.graph.tensor import Tensor
from pyengine.files.weights import DerivedRef, pages, Weights

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

HEAD_DIM = 256                       # transformers Gemma3TextConfig.head_dim
GLOBAL_EVERY = 6                     # transformers Gemma3TextConfig.sliding_window_pattern
LOCAL_ROPE_BASE = 10_000.0           # transformers Gemma3TextConfig.rope_local_base_freq
HALF, BILINEAR = (0.5, 0.5, 0.5), 2  # transformers Gemma3ImageProcessor: mean and deviation, Pillow's number of the filter


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata."""

    window: int
    sliding: tuple[bool, ...]        # per layer
    attn_scale: float
    attn_softcap: float              # 0: none
    final_softcap: float

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys "gemma3.*"."""
        numbers = common(h, w, head_dim=HEAD_DIM)
        return cls(
            **numbers,
            window=h.need("attention.sliding_window", int) and h.window(),
            sliding=_pattern(h, numbers["n_layers"]),
            attn_scale=h.number("attention.scale", numbers["head_dim"] ** -0.5),
            attn_softcap=h.number("attn_logit_softcapping", 0.0),
            final_softcap=h.number("final_logit_softcapping", 0.0),
        )


def _pattern(h: Hparams, n_layers: int) -> tuple[bool, ...]:
    """Read which layers slide: a list of booleans, or a period whose last layer is global."""
    period = h.get("attention.sliding_window_pattern", GLOBAL_EVERY, int, np.ndarray)
    if isinstance(period, int):
        return tuple((i + 1) % period != 0 if period else True for i in range(n_layers))
    return per_layer(h, "attention.sliding_window_pattern", (True,) * n_layers)


class Block:
    """Attention and gated feed-forward; each has a norm before and after, and is added to its input."""

    def __init__(self, w: Weights, c: Config):
        self.c = c
        self.attn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps)
        self.q = Linear(w["attn_q"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.q_norm = RMSNorm(w["attn_q_norm"], c.head_dim, c.eps)
        self.k_norm = RMSNorm(w["attn_k_norm"], c.head_dim, c.eps)
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)
        self.attn_post = RMSNorm(w["post_attention_norm"], c.d_model, c.eps)
        self.ffn_norm = RMSNorm(w["ffn_norm"], c.d_model, c.eps)
        self.gate = Linear(w["ffn_gate"], c.d_model, c.d_ff)
        self.up = Linear(w["ffn_up"], c.d_model, c.d_ff)
        self.down = Linear(w["ffn_down"], c.d_ff, c.d_model)
        self.ffn_post = RMSNorm(w["post_ffw_norm"], c.d_model, c.eps)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + self.attn_post(self.attend(self.attn_norm(x), rope, angles, cache))
        h = self.ffn_norm(x)
        return x + self.ffn_post(self.down(ops.gelu_tanh(self.gate(h)) * self.up(h)))     # [m, D]

    def attend(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        c = self.c
        q = self.q_norm(self.q(x).reshape(-1, c.n_heads, c.head_dim))             # [m, H, E]
        k = self.k_norm(self.k(x).reshape(-1, c.n_kv_heads, c.head_dim))           # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        y = cache.attend(rope(q, angles), rope(k, angles), v, scale=c.attn_scale, softcap=c.attn_softcap)
        return self.out(y)


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of the encoder and the image processor, from the keys "clip.vision.*"."""

    image_size: int
    patch_size: int
    n_layers: int
    width: int
    n_heads: int
    eps: float
    act: str                         # of `ops.unary`
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int                    # Pillow's number of the filter
    n_tokens: int                    # soft tokens of one picture
    pan_and_scan: bool
    min_crop_size: int
    max_crops: int
    min_ratio: float

    @classmethod
    def read(cls, v: Hparams) -> VisionConfig:
        """Read "clip.vision.*". Defaults are those of llama.cpp's files: `Gemma3ImageProcessor`, `Gemma3Processor`, pooling by 4 x 4."""
        side = v.size("vision.image_size", most=PIXELS) // v.size("vision.patch_size")
        pool = v.size("vision.projector.scale_factor", 4)
        mean, std = mean_and_std(v, HALF, HALF)
        act = v.get("vision.hidden_act", "gelu_pytorch_tanh", str)
        if act not in ACTIVATIONS:
            raise InvalidModelError(f"{v.key('vision.hidden_act')} is {act!r}; known are {', '.join(ACTIVATIONS)}")
        return cls(
            image_size=v.size("vision.image_size", most=PIXELS),
            patch_size=v.size("vision.patch_size"),
            n_layers=v.size("vision.block_count"),
            width=v.size("vision.embedding_length"),
            n_heads=v.size("vision.attention.head_count"),
            eps=v.number("vision.attention.layer_norm_epsilon", above=0.0),
            act=ACTIVATIONS[act],
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            resample=resample_filter(v, BILINEAR),
            n_tokens=v.size("vision.tokens_per_image", max(1, side // pool) ** 2),
            pan_and_scan=bool(v.get("vision.pan_and_scan", False)),
            min_crop_size=v.size("vision.pan_and_scan_min_crop_size", 256),
            max_crops=v.size("vision.pan_and_scan_max_num_crops", 4),
            min_ratio=v.number("vision.pan_and_scan_min_ratio_to_activate", 1.2),
        )


def crops(width: int, height: int, c: VisionConfig) -> list[tuple[int, int, int, int]]:
    """Find the boxes (x0, y0, x1, y1) of pan and scan, which cut a long picture along its long side, or none.

    As `Gemma3ImageProcessorPil.pan_and_scan`: a picture at least `min_ratio` times longer than wide is cut into as many pieces as
    its ratio says, rounded half up, at least 2 and at most `max_crops`, unless pieces would be smaller than `min_crop_size`.
    """
    long, short = max(width, height), min(width, height)
    if long / short < c.min_ratio:
        return []
    n = min(long // c.min_crop_size, int(long / short + 0.5))
    n = min(c.max_crops, max(2, n))
    step = -(-long // n)
    if min(step, short) < c.min_crop_size:
        return []
    spans = [(i * step, min((i + 1) * step, long)) for i in range(n)]
    return [(a, 0, b, height) if width >= height else (0, a, width, b) for a, b in spans]


class VisionBlock:
    """SigLIP's layer: attention over all patches and a feed-forward, each behind a layer norm and added to its input."""

    def __init__(self, w: Weights, c: VisionConfig):
        self.norm1, self.norm2 = LayerNorm(w["ln1"], c.width, c.eps), LayerNorm(w["ln2"], c.width, c.eps)
        self.attention = EncoderAttention(w, c.width, c.n_heads)
        self.feed_forward = EncoderFeedForward(w, c.width, mlp_width(w, c.width), c.act)

    def __call__(self, x: Tensor, lo: np.ndarray, hi: np.ndarray) -> Tensor:            # [P, V]
        x = x + self.attention(self.norm1(x), lo, hi)
        return x + self.feed_forward(self.norm2(x))


class Vision(Encoder):
    """SigLIP over one square picture, average pooling, projection; and what a picture becomes in a prompt.

    Patches are computed in the order of the pooled windows, so that pooling is a mean over neighbours: attention does not care,
    and position embeddings are put into the same order when they are loaded.
    """

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(v)
        if c.width % c.n_heads:
            raise InvalidModelError(f"{v.key('vision.attention.head_count')} is {c.n_heads}, which does not divide {c.width}")
        side, tokens = c.image_size // c.patch_size, math.isqrt(c.n_tokens)
        self.pool = side // tokens if tokens else 0
        if not self.pool or tokens * tokens != c.n_tokens or (side - self.pool) // self.pool + 1 != tokens:
            raise InvalidModelError(f"{v.key('vision')}: {side} x {side} patches cannot be pooled to {c.n_tokens} soft tokens")
        self.start, self.end = (special_token(v, f"image_{name}", token, f"<{name}_of_image>") for name in ("start", "end"))
        self.markers = {"image": (self.start,)}
        self.atomic_rows = c.n_tokens
        self.order = _pooling_order(side, tokens, self.pool)
        self.levels = levels(c.mean, c.std, "float32")                                  # [3, 256]
        v_, d_model = w["v"], h.size("embedding_length")
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch_size)
        position = v_["position_embd"].tensor("weight", (side * side, c.width))
        self.position = constant(DerivedRef(position.name, position.shape, (position,), self._ordered))
        self.blocks = [VisionBlock(v_["blk", i], c) for i in range(c.n_layers)]
        self.norm = LayerNorm(v_["post_ln"], c.width, c.eps)
        self.soft_norm = RMSNorm(w["mm", "soft_emb_norm"], c.width, c.eps)
        projection = w["mm", "input_projection"].tensor("weight", (c.width, d_model))       # HF's layout: x @ weight
        self.projection = constant(DerivedRef(projection.name, (d_model, c.width), (projection,), lambda a: a.T))

    def _ordered(self, position: np.ndarray) -> np.ndarray:
        return np.take(position, self.order, axis=0, out=pages(position.shape), mode="clip")

    def most_rows(self, n_ctx: int) -> int:
        """Return the soft tokens of one run."""
        return self.config.n_tokens

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of one run, whatever the picture's size."""
        return self.config.n_tokens

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Resize to the encoder's square, whatever the aspect ratio; with pan and scan, crops of long pictures too.

        Options of the image: pan_and_scan (bool). Raises: RequestError for videos.
        """
        only_pictures(media, "pan_and_scan")
        c = self.config
        wanted = media.options.get("pan_and_scan", c.pan_and_scan)
        if not isinstance(wanted, bool):
            raise RequestError(f"pan_and_scan={wanted!r}: must be True or False")
        boxes = crops(*media.size, c) if wanted else []
        views = [self._view(media.pixels), *(self._view(media.pixels[y0:y1, x0:x1]) for x0, y0, x1, y1 in boxes)]
        first, *rest = [("\n\n", self.start, view, self.end, "\n\n") for view in views]
        parts: list[str | int | View] = list(first)
        if rest:                                                                        # Gemma3Processor.replace_image_token
            parts = ["Here is the original image ", *first, " and here are some crops to help you see better "]
            for i, crop in enumerate(rest):
                parts += [" ", *crop] if i else crop
        return Processed(tuple(parts), media.size, (c.image_size, c.image_size))

    def _view(self, pixels: np.ndarray) -> View:
        """Make one run of the encoder over pixels [h, w, 3]."""
        n = self.config.n_tokens
        rows = np.arange(n, dtype=np.int32)[None]
        return View(lambda: {"patches": self._patches(pixels)}, {}, rows, n, causal=False, atomic=True)

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        """Cut patches: pixels uint8 [h, w, 3] -> F32 [P, 3 * p * p] in pooling order."""
        from pyengine.media.image import resize                                        # Pillow takes 20 ms to import

        c, p = self.config, self.config.patch_size
        side = c.image_size // p
        x = resize(pixels, c.image_size, c.image_size, c.resample)[: side * p, : side * p]
        x = cut_patches(x, side, p)[self.order]
        return by_table(self.levels, x).reshape(len(x), -1)

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the soft tokens [n_tokens, D] of "patches" [P, 3 * p * p]."""
        c, n = self.config, len(self.order)
        lo, hi = np.zeros(n, np.int32), np.full(n, n, np.int32)
        x = self.patch(g.input("patches", (n, 3 * c.patch_size**2))) + self.position    # [P, V]
        for block in self.blocks:
            x = block(x, lo, hi)
        x = ops.slice(self.norm(x), axis=0, start=0, stop=c.n_tokens * self.pool**2)
        x = ops.transpose(x.reshape(c.n_tokens, self.pool**2, c.width), axes=(0, 2, 1))
        x = ops.reduce(ops.contiguous(x), kind="mean")                                  # [n_tokens, V]
        return ops.linear(self.soft_norm(x), [self.projection])[0]


def _pooling_order(side: int, tokens: int, pool: int) -> np.ndarray:
    """Return the numbers of patches, window by window; those that pooling drops (a side that `pool` does not divide) come last."""
    grid = np.arange(side * side).reshape(side, side)
    used = tokens * pool
    windows = grid[:used, :used].reshape(tokens, pool, tokens, pool).transpose(0, 2, 1, 3).reshape(-1)
    return np.concatenate([windows, np.setdiff1d(grid, windows)])


class Model(Architecture):
    """A gemma3 decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model, scale=c.d_model**0.5)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=False)
        self.rope_local = plain_rope(h.number("rope.freq_base_swa", LOCAL_ROPE_BASE, above=0.0), c.head_dim)

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind SigLIP, where the files hold it."""
        return {"image": Vision(files)}

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Sliding(self.config.window) if slides and self.config.window else Full() for slides in self.config.sliding]

    def ropes(self, n_ctx: int) -> list[Rope]:
        """Return the rotary embedding of each layer's keys."""
        return [self.rope_local if slides else self.rope.at(n_ctx) for slides in self.config.sliding]

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embed(batch.ids, batch.media)                                                # [m, D]
        angles = {slides: (r, r.table(batch.positions)) for slides, r in ((True, self.rope_local), (False, self.rope.at(batch.n_ctx)))}
        for block, slides, cache in zip(self.blocks, self.config.sliding, caches):
            x = block(x, *angles[slides], cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        y, cap = self.head(x), self.config.final_softcap
        return ops.softcap(y, cap=cap) if cap else y
