"""Gemma 4: a text decoder of sliding and global layers, dense or with experts beside the dense feed-forward, and its vision encoder.

Follows transformers 5.23 `modeling_gemma4.py`; keys and tensors as in llama.cpp's `conversion/gemma.py`.

    attention   scale 1; norms of each head's queries, keys and values (those without a weight); global layers have heads and rope of
                their own, of which a part of the frequencies is 0, and may use their keys before the norm as values
    sharing     the last layers read the keys and values of the last earlier layer of their kind, and have no cache
    layer       x + norm(attention), x + norm(feed-forward), x + what the layer's own embedding gives, all times one number
    experts     chosen from the residual stream by a norm of its own; norm(dense) + norm(experts) is the feed-forward

    encoder     a picture at its own aspect ratio, as large as a number of soft tokens allows; a row for each patch of 16 x 16 pixels, with
                position embeddings and rope of both axes, bounded products, norms as in the decoder; a mean over each 3 x 3 patches
    video       frames of a smaller budget, each behind its time in minutes and seconds

Where pictures are bidirectional, their soft tokens see each other in sliding layers only; windows limit backwards only. The smallest
models, of widths 1536 and 2560, are causal throughout: llama.cpp's files do not say so, and it goes by these widths, as we do without a key.
differs from llama.cpp: the encoder's activation is the authors', the tanh form of GELU, where a file names none; budgets are the processor's.
Audio is not read. Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size, F feed-forward width, P width of a layer's own
embedding; in the encoder n patches, t soft tokens, V hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.cache.policy import Full, Policy, Sliding
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import DerivedRef, Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim, Tensor
from pyengine.media.views import Limits, Piece, Processed, View
from pyengine.models.architecture import Architecture, Encoder, EncoderFiles
from pyengine.nn.batch import Batch
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import DecoderConfig, last_of_kind, per_layer, sizes, used_experts, vocab_size
from pyengine.nn.encoder import by_table, head_count, known_activation, n_layers, resample_filter, special_token, whole_option
from pyengine.nn.layers import ClippedLinear, constant, Embedding, Experts, Linear, mlp_width, PatchEmbedding, RMSNorm, scalar
from pyengine.nn.per_layer import PerLayerEmbedding, PerLayerGate
from pyengine.nn.rope import Rope, rope, Rotary

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

LOCAL_ROPE_BASE = 10_000.0           # transformers Gemma4TextConfig: rope_theta of sliding layers
VISION_ROPE_BASE, POOL = 100.0, 3    # Gemma4VisionConfig
BUDGETS = 70, 140, 280, 560, 1120    # image_processing_pil_gemma4.py: soft tokens of a picture, at most
BUDGET, VIDEO_BUDGET, FRAMES = 280, 70, 32         # of the image processor, of the video processor
LIST_FPS = 24.0                      # processing_gemma4.py: of frames without a rate
BICUBIC = 3                          # Pillow's number
CAUSAL_WIDTHS = 1536, 2560           # llama.cpp, mtmd_decode_use_non_causal: decoders whose pictures are causal


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata; `d_ff`, `n_kv_heads` and `head_dim` are the largest of all layers."""

    window: int
    sliding: tuple[bool, ...]                # per layer, as the next three
    heads: tuple[tuple[int, int], ...]       # (key/value heads, elements of a head)
    owners: tuple[int, ...]                  # whose keys and values it reads
    widths: tuple[int, ...]                  # of its dense feed-forward
    d_own: int                               # width of a layer's own embedding; 0: none
    n_experts: int                           # 0: none
    n_used: int
    d_expert: int
    final_softcap: float                     # 0: none

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys "gemma4.*"."""
        n_layers = h.size("block_count")
        if ("blk", n_layers - 1) not in w:
            raise InvalidModelError(f"{h.key('block_count')} is {n_layers}, but no tensor is named blk.{n_layers - 1}")
        sliding = per_layer(h, "attention.sliding_window_pattern", (True,) * n_layers)
        n_shared, n_experts = h.get("attention.shared_kv_layers", 0, int), h.get("expert_count", 0, int)
        if not 0 <= n_shared < n_layers:
            raise InvalidModelError(f"{h.key('attention.shared_kv_layers')} is {n_shared} of {n_layers} layers")
        head_dims = {slides: h.size(f"attention.key_length{'_swa' if slides else ''}") for slides in set(sliding)}
        kv_heads, widths = (sizes(h, name, n_layers) for name in ("attention.head_count_kv", "feed_forward_length"))
        heads = tuple((n, head_dims[slides]) for n, slides in zip(kv_heads, sliding))
        return cls(
            n_layers=n_layers, d_model=h.size("embedding_length"), d_ff=max(widths), n_heads=h.size("attention.head_count"),
            n_kv_heads=max(kv_heads), head_dim=max(head_dims.values()), vocab_size=vocab_size(w), n_ctx_train=h.size("context_length"),
            eps=h.number("attention.layer_norm_rms_epsilon", above=0.0),
            window=h.need("attention.sliding_window", int) and h.window(),
            sliding=sliding,
            heads=heads,
            owners=last_of_kind(list(zip(sliding, heads)), n_layers - n_shared, h.key("attention.shared_kv_layers")),
            widths=widths,
            d_own=h.get("embedding_length_per_layer_input", 0, int),
            n_experts=n_experts,
            n_used=used_experts(h) if n_experts else 0,
            d_expert=h.size("expert_feed_forward_length") if n_experts else 0,
            final_softcap=h.number("final_logit_softcapping", 0.0),
        )


def rotations(h: Hparams, w: Weights, c: Config) -> tuple[Rotary, Rope]:
    """Read the rotary embeddings of global and of sliding layers. Raises: InvalidModelError."""
    sizes_of = dict(zip(c.sliding, (head_dim for _, head_dim in c.heads)))
    n_rot, base = h.size("rope.dimension_count_swa", sizes_of.get(True, c.head_dim)), h.number("rope.freq_base_swa", LOCAL_ROPE_BASE, above=0.0)
    if n_rot % 2 or n_rot > sizes_of.get(True, n_rot):
        raise InvalidModelError(f"{h.key('rope.dimension_count_swa')} is {n_rot}, but a head has {sizes_of[True]} elements")
    local = Rope((1 / base ** (np.arange(0, n_rot, 2, dtype=np.float32) / np.float32(n_rot))).astype(np.float32), 1.0, False)
    return rope(h, w, sizes_of.get(False, c.head_dim), interleaved=False), local


class Attention:
    """Queries, and keys and values of the layer's own or an earlier one's."""

    def __init__(self, w: Weights, c: Config, number: int):
        (kv_heads, self.head_dim), self.eps = c.heads[number], c.eps
        wide, narrow = c.n_heads * self.head_dim, kv_heads * self.head_dim
        self.q, self.q_norm = Linear(w["attn_q"], c.d_model, wide), RMSNorm(w["attn_q_norm"], self.head_dim, c.eps)
        self.out = Linear(w["attn_output"], wide, c.d_model)
        self.owner = c.owners[number] == number
        if self.owner:
            self.k, self.k_norm = Linear(w["attn_k"], c.d_model, narrow), RMSNorm(w["attn_k_norm"], self.head_dim, c.eps)
            keys_are_values = not c.sliding[number] and "attn_v" not in w
            self.v = None if keys_are_values else Linear(w["attn_v"], c.d_model, narrow)
        else:                                                                      # published files have weights that nothing reads
            for name, shape in (("attn_k", (narrow, c.d_model)), ("attn_v", (narrow, c.d_model)), ("attn_k_norm", (self.head_dim,))):
                w[name].optional("weight", shape)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> tuple[Tensor, LayerCache]:
        """Attend: x [m, D] -> [m, D], and the cache with what this layer has written to it."""
        q = self.q_norm(self.q(x).reshape(-1, self.q.weight.shape[0] // self.head_dim, self.head_dim))         # [m, H, E]
        if self.owner:
            k = self.k(x).reshape(-1, self.k.weight.shape[0] // self.head_dim, self.head_dim)                  # [m, K, E]
            v = k if self.v is None else self.v(x).reshape(-1, *k.shape[1:])                                   # [m, K, E]
            cache = cache.append(rope(self.k_norm(k), angles), ops.rms_norm(v, eps=self.eps))
        return self.out(cache.read(rope(q, angles), scale=1.0)), cache


class FeedForward:
    """down(gelu(gate x) * up x)."""

    def __init__(self, w: Weights, d_model: int, d_ff: int):
        self.gate, self.up, self.down = (Linear(w[f"ffn_{name}"], *shape) for name, shape in (
            ("gate", (d_model, d_ff)), ("up", (d_model, d_ff)), ("down", (d_ff, d_model))))

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D] -> [m, D]
        return self.down(ops.gelu_tanh(self.gate(x)) * self.up(x))


class Mixture:
    """Experts that a router picks for each row; the gates add up to 1, and each is then multiplied by its expert's number."""

    def __init__(self, w: Weights, c: Config):
        self.n_used, root = c.n_used, np.float32(c.d_model**-0.5)
        scale = w["ffn_gate_inp"].tensor("scale", (c.d_model,))
        self.scale, self.eps = constant(DerivedRef(scale.name, scale.shape, (scale,), lambda a: a * root)), c.eps
        self.router = Linear(w["ffn_gate_inp"], c.d_model, c.n_experts)
        self.norm = RMSNorm(w["pre_ffw_norm_2"], c.d_model, c.eps)
        self.experts = Experts(w, c.n_experts, c.d_model, c.d_expert, activation="gelu_tanh")
        factors = w["ffn_down_exps"].tensor("scale", (c.n_experts,))               # a matrix of one number for each expert
        self.factors = constant(factors._replace(shape=(c.n_experts, 1, 1)))

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D] -> [m, D]
        scores = self.router(ops.rms_norm(x, self.scale, eps=self.eps))            # [m, experts]
        chosen, gates = ops.top_experts(scores, n_used=self.n_used, gate="softmax", normed=True)     # [m, u] each
        gates = ops.expert_linear(gates.reshape(-1, 1), [self.factors], chosen).reshape(-1, self.n_used)
        return self.experts(self.norm(x), chosen, gates)


class Block:
    """Attention and feed-forward; each has a norm before and after, and is added to its input."""

    def __init__(self, w: Weights, c: Config, number: int):
        self.attention, self.ffn = Attention(w, c, number), FeedForward(w, c.d_model, c.widths[number])
        self.attn_norm, self.attn_post, self.ffn_norm, self.ffn_post = (
            RMSNorm(w[name], c.d_model, c.eps) for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"))
        self.mixture = Mixture(w, c) if c.n_experts else None
        if self.mixture:
            self.dense_post, self.mixture_post = (RMSNorm(w[f"post_ffw_norm_{n}"], c.d_model, c.eps) for n in (1, 2))
        self.own = PerLayerGate(w, c.d_model, c.d_own, c.eps) if c.d_own else None
        self.scale = scalar(w, "layer_output_scale.weight") if "layer_output_scale" in w else None

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache, own: Tensor | None) -> tuple[Tensor, LayerCache]:
        """Apply the layer: x [m, D] -> [m, D], and its cache."""
        attended, cache = self.attention(self.attn_norm(x), rope, angles, cache)
        x = x + self.attn_post(attended)
        y = self.ffn(self.ffn_norm(x))
        if self.mixture:
            y = self.dense_post(y) + self.mixture_post(self.mixture(x))
        x = x + self.ffn_post(y)
        if self.own:
            x = x + self.own(x, own)
        return (x if self.scale is None else x * self.scale), cache


# ---- vision encoder ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of the encoder and the processors."""

    n_layers: int
    width: int
    d_ff: int
    n_heads: int
    eps: float
    act: str                         # of ops.unary
    rope_base: float
    patch: int                       # side in pixels
    pool: int                        # side in patches of what becomes one soft token
    budget: int                      # soft tokens of a picture, at most
    video_budget: int                # and of a frame
    frames: int                      # taken of a video file
    resample: int                    # Pillow's number of the filter
    bidirectional: bool              # soft tokens see each other

    @property
    def largest(self) -> int:
        """The larger of both budgets."""
        return max(self.budget, self.video_budget)

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.vision.*"."""
        width, budgets = v.size("vision.embedding_length"), {}
        for name, usual in (("max_soft_tokens", BUDGET), ("video_max_soft_tokens", VIDEO_BUDGET)):
            budgets[name] = v.size(f"vision.{name}", usual)
            if budgets[name] not in BUDGETS:
                raise InvalidModelError(f"{v.key(f'vision.{name}')} is {budgets[name]}; one of {BUDGETS} is needed")
        return cls(
            n_layers=n_layers(v, w),
            width=width,
            d_ff=mlp_width(w["v", "blk", 0], width),
            n_heads=head_count(v, width),
            eps=v.number("vision.attention.layer_norm_epsilon", above=0.0),
            act=known_activation(v, "vision.hidden_act", "gelu_pytorch_tanh"),
            rope_base=v.number("vision.rope.freq_base", VISION_ROPE_BASE, above=0.0),
            patch=v.size("vision.patch_size"),
            pool=v.size("vision.projector.scale_factor", POOL),
            budget=budgets["max_soft_tokens"],
            video_budget=budgets["video_max_soft_tokens"],
            frames=v.size("vision.num_frames", FRAMES),
            resample=resample_filter(v, BICUBIC),
            bidirectional=v.get("vision.bidirectional", h.size("embedding_length") not in CAUSAL_WIDTHS, bool),
        )


class VisionAttention:
    """Attention of patches to those of their picture; heads have norms, of values without a weight, and half of each turns with either axis."""

    def __init__(self, w: Weights, c: VisionConfig):
        self.n_heads, self.head_dim, self.eps = c.n_heads, c.width // c.n_heads, c.eps
        self.q, self.k, self.v, self.out = (ClippedLinear(w[f"attn_{name}"], c.width, c.width) for name in ("q", "k", "v", "out"))
        self.q_norm, self.k_norm = (RMSNorm(w[f"attn_{name}_norm"], self.head_dim, c.eps) for name in ("q", "k"))
        self.products = "int8" if all(p.weight.dtype.block > 1 for p in (self.q, self.k, self.v, self.out)) else "float"

    def __call__(self, x: Tensor, angles: Tensor, lo: Tensor, hi: Tensor) -> Tensor:       # [n, V] -> [n, V]
        q, k, v = (f(x).reshape(-1, self.n_heads, self.head_dim) for f in (self.q, self.k, self.v))         # [n, H, E]
        q, k = (self._turned(norm(t), angles) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        k, v = (ops.transpose(t, axes=(1, 0, 2)) for t in (k, ops.rms_norm(v, eps=self.eps)))               # [H, n, E], views
        return self.out(ops.attention(q, k, v, lo, hi, scale=1.0, products=self.products))

    def _turned(self, t: Tensor, angles: Tensor) -> Tensor:
        """Rotate heads [x x' y y'] as [x y x' y'], whose halves make the pairs: queries and keys alike, so their products are the same."""
        t = ops.transpose(t.reshape(-1, self.n_heads, 2, 2, self.head_dim // 4), axes=(0, 1, 3, 2, 4))
        return ops.rope(ops.contiguous(t).reshape(-1, self.n_heads, self.head_dim), angles)                 # [n, H, E]


class VisionBlock:
    """Attention and gated feed-forward; each has a norm before and after, and is added to its input."""

    def __init__(self, w: Weights, c: VisionConfig):
        self.attention, self.act = VisionAttention(w, c), c.act
        self.attn_norm, self.attn_post, self.ffn_norm, self.ffn_post = (
            RMSNorm(w[name], c.width, c.eps) for name in ("ln1", "attn_post_norm", "ln2", "ffn_post_norm"))
        self.gate, self.up = (ClippedLinear(w[f"ffn_{name}"], c.width, c.d_ff) for name in ("gate", "up"))
        self.down = ClippedLinear(w["ffn_down"], c.d_ff, c.width)

    def __call__(self, x: Tensor, angles: Tensor, lo: Tensor, hi: Tensor) -> Tensor:       # [n, V]
        x = x + self.attn_post(self.attention(self.attn_norm(x), angles, lo, hi))
        y = self.ffn_norm(x)
        return x + self.ffn_post(self.down(ops.unary(self.gate(y), kind=self.act) * self.up(y)))


class Vision(Encoder):
    """Encoder, pooling, projection, processors and special tokens. Nothing about a picture is kept here.

    Patches come in the order of the pooled squares, so that pooling is a mean over neighbours: attention does not care.
    """

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v, w)
        self.start, self.end = (special_token(v, f"image_{name}", token, text) for name, text in (("start", "<|image>"), ("end", "<image|>")))
        self.markers = {"image": (special_token(v, "image", token, "<|image|>"),)}
        try:
            self.markers["video"] = (special_token(v, "video", token, "<|video|>"),)
        except InvalidModelError:                                                              # of a vocabulary without one, as in the first files
            pass
        self.atomic_rows = c.largest if c.bidirectional else 0
        self.levels = np.tile(2 * ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)), (3, 1))       # [3, 256]
        half = c.width // c.n_heads // 2
        inv_freq = 1.0 / c.rope_base ** (np.arange(0, half, 2, dtype=np.float32) / np.float32(half))
        self.inv_freq = np.concatenate([inv_freq, inv_freq]).astype(np.float32)                # of columns, then of lines: [E / 2]
        self.axes = np.repeat(np.arange(2, dtype=np.int32), len(inv_freq))
        for sound in (w["a"], w["mm", "a"]):
            sound.leave_out()                                                                  # of models that hear, which this one does not
        v_ = w["v"]
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch)
        shape = v_["position_embd"].shape("weight")
        self.n_places = shape[1] if shape is not None and len(shape) == 3 else 0
        if self.n_places < c.largest * c.pool:                                                 # a line of the longest picture
            raise InvalidModelError(f"v.position_embd.weight has shape {shape}: [2, {c.largest * c.pool} or more, {c.width}] is needed")
        table = v_["position_embd"].tensor("weight", (2, self.n_places, c.width))
        self.places = constant(table._replace(shape=(2 * self.n_places, c.width)))             # columns, then lines
        self.blocks = [VisionBlock(v_["blk", i], c) for i in range(c.n_layers)]
        shift, factor = (v_.optional(f"std_{name}", (c.width,)) for name in ("bias", "scale"))
        self.standard = (constant(shift), constant(factor)) if shift and factor else None
        self.projection = Linear(w["mm", "input_projection"], c.width, h.size("embedding_length"))

    def most_rows(self, n_ctx: int) -> int:
        """Return the soft tokens of the largest picture, which the context must hold."""
        return min(n_ctx, self.config.largest)

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the inputs and return rows for the decoder, F32 [t, D]."""
        c, group = self.config, self.config.pool**2
        n = Dim("t", rows) * group
        lo, hi, columns, lines = (g.input(name, (n,), "I32") for name in ("lo", "hi", "columns", "lines"))
        x = self.patch(g.input("patches", (n, 3 * c.patch**2)))                                # [n, V]
        x = x + ops.rows(self.places, columns) + ops.rows(self.places, lines)
        angles = ops.rope_table(g.input("positions", (2, n), "I32"), self.inv_freq, self.axes)  # [n, E]
        for block in self.blocks:
            x = block(x, angles, lo, hi)
        x = ops.contiguous(ops.transpose(x.reshape(-1, group, c.width), axes=(0, 2, 1)))       # [t, V, group]
        x = ops.scale(ops.reduce(x, kind="mean"), factor=c.width**0.5)                         # [t, V]
        if self.standard:
            x = (x - self.standard[0]) * self.standard[1]
        return self.projection(ops.rms_norm(x, eps=c.eps))                                     # [t, D]

    # -- processors -----------------------------------------------------------------------------------------------------------

    def grid(self, width: int, height: int, budget: int) -> tuple[int, int]:
        """Compute (lines, columns) of a picture's soft tokens: as many as the budget allows at its aspect ratio, rounded down.

        Source: `get_aspect_ratio_preserving_size` of transformers' `image_processing_pil_gemma4.py`.
        Raises: RequestError for a picture that is too long for the budget.
        """
        c, side = self.config, self.config.pool * self.config.patch
        factor = math.sqrt(budget * c.pool**2 * c.patch**2 / (height * width))
        lines, columns = (int(factor * n / side) for n in (height, width))
        if not lines and not columns:
            raise RequestError(f"a picture of {width} x {height} pixels: no soft token remains of it")
        if not lines:
            return 1, min(width // height, budget)
        return (lines, columns) if columns else (min(height // width, budget), 1)

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size."""
        return math.prod(self.grid(width, height, self.config.budget))

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Resize a picture, or a video's frames, and say what stands around their soft tokens.

        Options: max_soft_tokens, of a picture or a frame; num_frames, to take of a video: of a file 32 or all, of a list all.
        Raises: ContextOverflowError if its rows exceed the context, RequestError.
        """
        from pyengine.media.image import known_options                                         # Pillow takes 20 ms to import
        from pyengine.media.video import Video

        c, moving = self.config, isinstance(media, Video)
        known_options(media.options, "max_soft_tokens", *(["num_frames"] if moving else []))
        budget = media.options.get("max_soft_tokens", c.video_budget if moving else c.budget)
        allowed = [n for n in BUDGETS if n <= c.largest]
        if budget not in allowed:
            raise RequestError(f"max_soft_tokens={budget!r}: must be one of {', '.join(map(str, allowed))}")
        width, height = media.size
        lines, columns = self.grid(width, height, budget)
        rows, numbers = lines * columns, self._frames(media) if moving else [0]
        what = f"a {'video' if moving else 'picture'} of {width} x {height} pixels"
        if rows * len(numbers) > limits.n_ctx:
            raise ContextOverflowError(f"{what} takes {rows * len(numbers)} positions, but the context holds {limits.n_ctx}; load with a larger "
                                       f"n_ctx, or give a smaller max_soft_tokens{' or num_frames' if moving else ''}")
        if rows > limits.rows:
            raise RequestError(f"{what} takes {rows} soft tokens, but this model was planned for pictures of up to {limits.rows}; give a "
                               f"smaller max_soft_tokens, or load with images=({width}, {height})")
        side, parts = c.pool * c.patch, []
        if not moving:
            parts = [self.start, self._view(media, [0], lines, columns), self.end]
        run = max(1, limits.rows // rows)                                                      # frames of one run of the encoder
        for first in range(0, len(numbers), run) if moving else ():
            its = numbers[first : first + run]
            view = self._view(media, its, lines, columns)
            for i, number in enumerate(its):
                seconds = number / (media.fps or LIST_FPS)
                time = f"{' ' if parts else ''}{int(seconds // 60):02d}:{int(seconds % 60):02d} "
                parts += [time, self.start, Piece(view, i * rows, (i + 1) * rows), self.end]
        return Processed(tuple(parts), (width, height), (columns * side, lines * side))

    def _frames(self, video: Video) -> list[int]:
        """Choose the numbers of the frames to take. Source: transformers' `default_sample_indices_fn`."""
        total = len(video)
        n = whole_option(video, "num_frames", total) if "num_frames" in video.options or isinstance(video.frames, tuple) else self.config.frames
        return [i * total // n for i in range(n)] if n < total else list(range(total))

    def _view(self, media: Image | Video, numbers: Sequence[int], lines: int, columns: int) -> View:
        """Make a run of the encoder over pictures of lines x columns soft tokens each."""
        rows, free = len(numbers) * lines * columns, not self.config.bidirectional
        return View(lambda: self._inputs(media, numbers, lines, columns), {"t": rows}, np.arange(rows, dtype=np.int32)[None], rows,
                    (len(numbers), lines, columns), causal=free, atomic=not free)

    def _inputs(self, media: Image | Video, numbers: Sequence[int], lines: int, columns: int) -> dict[str, np.ndarray]:
        """Resize pictures to lines x columns soft tokens, and cut them into patches, those of a soft token one after another."""
        from pyengine.media.image import resize                                                # Pillow takes 20 ms to import
        from pyengine.media.video import Video

        c, k, p = self.config, self.config.pool, self.config.patch
        pictures = media.read(numbers) if isinstance(media, Video) else [media]
        pixels = np.stack([resize(picture.pixels, lines * k * p, columns * k * p, c.resample) for picture in pictures])
        n, each = len(pixels), lines * columns * k * k
        pixels = pixels.reshape(n, lines, k, p, columns, k, p, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(n * each, 3, p * p)
        y, x = np.divmod(np.arange(lines * columns), columns)
        inner = np.stack(np.divmod(np.arange(k * k), k)[::-1])                                 # [2, k * k]: column, line
        places = (np.stack([x, y])[..., None] * k + inner[:, None]).reshape(2, each).astype(np.int32)
        positions, first = np.tile(places, n), np.repeat(np.arange(n, dtype=np.int32) * each, each)
        return {"patches": by_table(self.levels, pixels).reshape(n * each, -1), "positions": positions, "columns": positions[0],
                "lines": positions[1] + np.int32(self.n_places), "lo": first, "hi": first + np.int32(each)}


# ---- decoder ----------------------------------------------------------------------------------------------------------------


class Model(Architecture):
    """A gemma4 decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.media_id = h.get("media_token_id", 0, int)                            # llama.cpp: the first row
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model, scale=c.d_model**0.5)
        self.own = PerLayerEmbedding(w, c.vocab_size, c.d_model, c.n_layers, c.d_own, c.eps) if c.d_own else None
        self.blocks = [Block(w["blk", i], c, i) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope, self.rope_local = rotations(h, w, c)

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the vision encoder, where the files hold it."""
        return {"image": Vision(files)}

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        window = self.config.window
        return [(Sliding(window) if window else Full()) if slides else Full(spans=False) for slides in self.config.sliding]

    def cache_shapes(self) -> list[tuple[int, int]]:
        """Return each layer's (key/value heads, elements of a head)."""
        return list(self.config.heads)

    def cache_owners(self) -> list[int]:
        """Return the number of the layer whose keys and values each layer reads."""
        return list(self.config.owners)

    def ropes(self, n_ctx: int) -> list[Rope]:
        """Return the rotary embedding of each layer's keys."""
        return [self.rope_local if slides else self.rope.at(n_ctx) for slides in self.config.sliding]

    def forward(self, batch: Batch, caches: list[LayerCache | None]) -> Tensor:
        """Return last hidden states [m, D]."""
        c, x = self.config, self.embed(batch.ids, batch.media)                     # [m, D]
        own = self.own(x, batch) if self.own else [None] * c.n_layers
        angles = {slides: (r, r.table(batch.positions)) for slides, r in ((True, self.rope_local), (False, self.rope.at(batch.n_ctx)))}
        held: list[LayerCache] = []
        for block, slides, owner, cache, vectors in zip(self.blocks, c.sliding, c.owners, caches, own):
            x, filled = block(x, *angles[slides], held[owner] if cache is None else cache, vectors)
            held.append(filled)
        batch.left(held)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        y, cap = self.head(x), self.config.final_softcap
        return ops.softcap(y, cap=cap) if cap else y
