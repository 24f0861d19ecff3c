"""Llama 4 whole: a text decoder with experts and chunked attention, a vision encoder over tiles, image processor, special tokens.

Follows transformers 5.23: `modeling_llama4.py`, `image_processing_llama4.py`, `processing_llama4.py`. Three layers of four rotate
queries and keys and see their own chunk of the context only; the fourth has no positions, sees everything, and its queries grow
with distance (`ops.temperature`). Scout scales rotated queries and keys to unit root-mean-square, Maverick does not. A layer's
feed-forward is dense, or one expert of many, chosen by its score, whose sigmoid multiplies the expert's input, plus a shared one.

    picture -> a canvas of up to 16 tiles that fits it best, and the whole picture in one tile more
    tile -> patches in groups of 2 x 2, a class row behind them -> encoder -> groups joined to one row -> adapter -> projector
    prompt: start (tile, separator)... image tile end

The decoder sees soft tokens as it sees text: causally, and across borders of chunks not at all.

Pixels are scaled in bfloat16, as Meta's code and transformers do. transformers has only a torchvision processor, which differs by
1/255 here and there: pictures are resized by Pillow, as for all models, to the sizes that transformers computes. llama.cpp (in
llama-cpp-python 0.3.36) fits canvases of 3 x 3, leaves out the picture token, and gives the rows of a tile column by column.

llama.cpp hard-codes the chunk (8192), the temperature's floor and scale, and the layers without positions (every fourth): files that
carry them as keys are believed, others get those constants.
Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size; in the encoder P patches of a tile, V hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.media.views import Limits, Processed, View
from pyengine.nn.batch import Batch
from pyengine.errors import ContextOverflowError, InvalidModelError, UnsupportedModelError
from pyengine.graph.graph import Graph
from pyengine.files.hparams import Hparams
from pyengine.cache.policy import Chunked, Full, Policy
from pyengine.nn.cache import LayerCache
from pyengine.models.architecture import Architecture, Encoder, EncoderFiles
from pyengine.nn.encoder import (
    by_table, cut_patches, EncoderAttention, EncoderFeedForward, grouped, head_count, levels, mean_and_std, only_pictures,
    PIXELS, projector_type, resample_filter, special_token, TILES, whole_option)
from pyengine.nn.decoder import common, DecoderConfig, per_layer, used_experts
from pyengine.nn.layers import constant, Embedding, Experts, LayerNorm, Linear, mlp_width, RMSNorm
from pyengine.nn.rope import Rope, rope
from pyengine.graph.tensor import Tensor
from pyengine.files.weights import DerivedRef, pages, Weights

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

# Constants of files without the key; transformers' Llama4TextConfig, Llama4VisionConfig and Llama4ImageProcessor
CHUNK, FLOOR, TEMPERATURE = 8192, 8192, 0.1
NO_ROPE_EVERY = 4
ROPE_BASE = 500_000.0
GROUP = 2                            # pixel_shuffle_ratio 0.5
MAX_TILES = 16
HALF, BILINEAR = (0.5, 0.5, 0.5), 2  # mean and deviation; Pillow's number of the filter


# ---- decoder ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata; `d_ff` is that of dense layers."""

    n_experts: int                   # 0: all layers are dense
    n_used: int
    rotated: tuple[bool, ...]        # per layer: queries and keys have positions
    chunked: tuple[bool, ...]
    chunk: int
    floor: int                       # of the temperature of layers without positions
    temperature: float               # 0: none
    qk_norm: bool

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys "llama4.*"."""
        numbers, n_experts = common(h, w), h.get("expert_count", 0, int)
        if "attention.sliding_window" in h and not h.window() and "attention.chunked_layers" not in h:
            raise UnsupportedModelError(f"{h.key('attention.sliding_window')} names no window, so nothing is chunked, and no key says which layers "
                                        "have positions")
        rotated = per_layer(h, "rope.layers", tuple((i + 1) % NO_ROPE_EVERY != 0 for i in range(numbers["n_layers"])))
        return cls(
            **numbers,
            n_experts=n_experts,
            n_used=used_experts(h) if n_experts else 0,
            rotated=rotated,
            chunked=per_layer(h, "attention.chunked_layers", rotated),
            chunk=h.size("attention.chunk_size", CHUNK),
            floor=h.size("attention.temperature_length", FLOOR),
            temperature=h.number("attention.temperature_scale", TEMPERATURE),
            qk_norm=h.get("use_qk_norm", True, bool),
        )


class FeedForward:
    """down(silu(gate(x)) * up(x)); `kind` ends the tensors' names."""

    def __init__(self, w: Weights, c: Config, kind: str = ""):
        d_ff = mlp_width(w, c.d_model, (f"ffn_up{kind}", f"ffn_down{kind}"))
        self.gate, self.up = (Linear(w[f"ffn_{n}{kind}"], c.d_model, d_ff) for n in ("gate", "up"))
        self.down = Linear(w[f"ffn_down{kind}"], d_ff, c.d_model)

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D] -> [m, D]
        return self.down(ops.silu(self.gate(x)) * self.up(x))


class Mixture:
    """The experts with the highest scores, fed with the input times the score's sigmoid, and one that all rows go through."""

    def __init__(self, w: Weights, c: Config):
        shape = w["ffn_up_exps"].shape("weight")
        if shape is None or len(shape) != 3:
            raise InvalidModelError(f"{w.place}: ffn_up_exps.weight must be a tensor of {c.n_experts} matrices")
        self.n_used = c.n_used
        self.router = Linear(w["ffn_gate_inp"], c.d_model, c.n_experts)
        self.experts = Experts(w, c.n_experts, c.d_model, shape[1])
        self.shared = FeedForward(w, c, "_shexp")

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D] -> [m, D]
        chosen, gates = ops.top_experts(self.router(x), n_used=self.n_used, gate="sigmoid")        # [m, used] each
        return self.experts(x, chosen, gates, scale_input=True) + self.shared(x)


@dataclass(frozen=True)
class Places:
    """Where rows stand: angles [m, E] for layers that rotate, and factors [m, 1] of queries for those that do not, or None."""

    angles: Tensor
    factors: Tensor | None


class Block:
    """Pre-norm grouped-query attention and feed-forward, each added to its input."""

    def __init__(self, w: Weights, c: Config, number: int):
        self.c, self.rotated = c, c.rotated[number]
        self.attn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps)
        self.q = Linear(w["attn_q"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)
        self.ffn_norm = RMSNorm(w["ffn_norm"], c.d_model, c.eps)
        self.feed_forward = Mixture(w, c) if "ffn_gate_inp" in w else FeedForward(w, c)

    def __call__(self, x: Tensor, rope: Rope, places: Places, cache: LayerCache) -> Tensor:        # [m, D]
        x = x + self.attend(self.attn_norm(x), rope, places, cache)
        return x + self.feed_forward(self.ffn_norm(x))                             # [m, D]

    def attend(self, x: Tensor, rope: Rope, places: Places, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        c = self.c
        q = self.q(x).reshape(-1, c.n_heads, c.head_dim)                           # [m, H, E]
        k = self.k(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        if self.rotated:
            q, k = rope(q, places.angles), rope(k, places.angles)
            if c.qk_norm:
                q, k = (ops.rms_norm(t, eps=c.eps) for t in (q, k))
        elif places.factors is not None:
            q = q * places.factors.reshape(-1, 1, 1)
        return self.out(cache.attend(q, k, v, scale=c.head_dim**-0.5))


# ---- vision encoder ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of the encoder and the image processor."""

    tile: int                        # side of a tile in pixels
    patch: int
    group: int                       # side in patches of what becomes one soft token
    n_layers: int
    width: int
    n_heads: int
    eps: float
    rope_base: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int                    # Pillow's number of the filter
    max_tiles: int
    largest_canvas: bool             # make pictures as large as the canvases allow

    @classmethod
    def read(cls, v: Hparams) -> VisionConfig:
        """Read "clip.vision.*"."""
        if (kind := projector_type(v)) != "llama4":
            raise UnsupportedModelError(f"{v.key('projector_type')} is {kind!r}; llama4 is supported")
        mean, std = mean_and_std(v, HALF, HALF)
        width = v.size("vision.embedding_length")
        c = cls(
            tile=v.size("vision.image_size", most=PIXELS),
            patch=v.size("vision.patch_size"),
            group=v.size("vision.projector.scale_factor", GROUP),
            n_layers=v.size("vision.block_count"),
            width=width,
            n_heads=head_count(v, width),
            eps=v.number("vision.attention.layer_norm_epsilon", above=0.0),
            rope_base=v.number("vision.rope.freq_base", 10_000.0, above=0.0),
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            resample=resample_filter(v, BILINEAR),
            max_tiles=v.size("vision.max_tiles", MAX_TILES, most=TILES),
            largest_canvas=v.get("vision.resize_to_max_canvas", False, bool),
        )
        if c.tile % (c.patch * c.group):
            raise InvalidModelError(f"{v.key('vision')}: tiles of {c.tile} pixels are no multiple of {c.group} patches of {c.patch}")
        return c


class VisionBlock:
    """Attention over all rows of a tile and an MLP, each behind a layer norm and added to its input."""

    def __init__(self, w: Weights, c: VisionConfig):
        self.norm1, self.norm2 = LayerNorm(w["ln1"], c.width, c.eps), LayerNorm(w["ln2"], c.width, c.eps)
        self.attention = EncoderAttention(w, c.width, c.n_heads)
        self.feed_forward = EncoderFeedForward(w, c.width, mlp_width(w, c.width), "gelu")

    def __call__(self, x: Tensor, angles: Tensor, lo: np.ndarray, hi: np.ndarray) -> Tensor:       # [P + 1, V]
        x = x + self.attention(self.norm1(x), lo, hi, lambda t: ops.rope(t, angles, interleaved=True))
        return x + self.feed_forward(self.norm2(x))


class Vision(Encoder):
    """The encoder of one tile, adapter, projector; and what a picture becomes in a prompt.

    Patches are put into groups on the host, so that a group's rows lie side by side and pixel shuffle is a reshape: attention does
    not care, and position embeddings are put into the same order when they are loaded. The class row is a patch of zeros, the
    last one, whose embedding is added with its position's.
    """

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(v)

        def special(key: str, text: str) -> int:
            return special_token(v, key, token, text)

        self.start, self.end = special("image_start", "<|image_start|>"), special("image_end", "<|image_end|>")
        self.across = special("tile_x_separator", "<|tile_x_separator|>")      # between tiles of a row
        self.down = special("tile_y_separator", "<|tile_y_separator|>")        # behind a row
        self.whole = special("image_marker", "<|image|>")                      # stands before the tile of the whole picture
        self.markers = {"image": (self.whole,)}
        side = c.tile // c.patch
        self.tile_rows = (side // c.group) ** 2
        self.order = grouped(side, c.group)
        self.levels = levels(c.mean, c.std, "bfloat16")
        d_model, n, d_group = h.size("embedding_length"), side * side, c.width * c.group**2
        self.patch = Linear(w["v.patch_embd"], 3 * c.patch**2, c.width)
        parts = w.tensor("v.position_embd.weight", (n + 1, c.width)), w.tensor("v.class_embd", (c.width,))
        self.position = constant(DerivedRef(parts[0].name, parts[0].shape, parts, self._positions))
        self.before, self.after = LayerNorm(w["v.pre_ln"], c.width, c.eps), LayerNorm(w["v.post_ln"], c.width, c.eps)
        self.blocks = [VisionBlock(w["v", "blk", i], c) for i in range(c.n_layers)]
        adapter = w["mm.model.mlp"]
        hidden = (adapter[1].shape("weight") or (0,))[0]
        self.first, self.second = Linear(adapter[1], d_group, hidden), Linear(adapter[2], hidden, hidden)
        self.projector = Linear(w["mm.model.fc"], hidden, d_model)
        half = c.width // c.n_heads // 2
        inv_freq = 1.0 / c.rope_base ** (np.arange(0, half, 2, dtype=np.float32) / half)
        self.inv_freq = np.concatenate([inv_freq, inv_freq]).astype(np.float32)                    # columns, then rows: [E / 2]
        self.axes = np.repeat(np.arange(2, dtype=np.int32), len(inv_freq))
        y, x = np.divmod(self.order, side)
        self.places = np.concatenate([np.stack([x, y]) + 1, np.zeros((2, 1))], axis=1).astype(np.int32)        # class row: angle 0

    def _positions(self, position: np.ndarray, cls: np.ndarray) -> np.ndarray:
        out = pages(position.shape)
        np.take(position, self.order, axis=0, out=out[:-1], mode="clip")
        out[-1] = position[-1] + cls
        return out

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of a tile, which a run is."""
        return self.tile_rows

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size, all tiles together."""
        rows, columns = canvas(height, width, self.config.tile, self.config.max_tiles, self.config.largest_canvas)
        return self.tile_rows * (rows * columns + (rows * columns > 1))

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the soft tokens [P / group^2, D] of "patches" [P + 1, 3 * p * p]."""
        c, n = self.config, len(self.order)
        lo, hi = np.zeros(n + 1, np.int32), np.full(n + 1, n + 1, np.int32)
        angles = ops.rope_table(self.places, self.inv_freq, self.axes)         # [P + 1, E]
        x = self.before(self.patch(g.input("patches", (n + 1, 3 * c.patch**2))) + self.position)   # [P + 1, V]
        for block in self.blocks:
            x = block(x, angles, lo, hi)
        x = ops.slice(self.after(x), axis=0, start=0, stop=n).reshape(self.tile_rows, c.width * c.group**2)
        return self.projector(ops.gelu(self.second(ops.gelu(self.first(x)))))  # [P / group^2, D]

    # -- processor ------------------------------------------------------------------------------------------------------------

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Fit a picture into a canvas of tiles; one tile more shows it whole, squeezed, unless one is all.

        Options of the image: max_tiles. Raises: RequestError for videos, ContextOverflowError if its rows exceed the context.
        """
        from pyengine.media.image import resize                                # Pillow takes 20 ms to import

        only_pictures(media, "max_tiles")
        c = self.config
        most = whole_option(media, "max_tiles", c.max_tiles)
        width, height = media.size
        rows, columns = canvas(height, width, c.tile, most, c.largest_canvas)
        n = rows * columns + (rows * columns > 1)
        if n * self.tile_rows > limits.n_ctx:
            raise ContextOverflowError(f"a picture of {width} x {height} pixels takes {n} tiles of {self.tile_rows} positions, but the "
                                       f"context holds {limits.n_ctx}; load with a larger n_ctx, or give a smaller max_tiles")
        h, w = fitted(height, width, (rows * c.tile, columns * c.tile), c.tile, c.largest_canvas)
        pixels = np.zeros((rows * c.tile, columns * c.tile, 3), np.uint8)      # black to the right and below
        pixels[:h, :w] = resize(media.pixels, h, w, c.resample)
        tiles = [self._view(pixels[y : y + c.tile, x : x + c.tile]) for y in range(0, rows * c.tile, c.tile)
                 for x in range(0, columns * c.tile, c.tile)]
        parts: list[str | int | View] = [self.start]
        if len(tiles) == 1:
            return Processed((self.start, self.whole, tiles[0], self.end), media.size, (w, h))
        for i, tile in enumerate(tiles):
            parts += [tile, self.across if (i + 1) % columns else self.down]
        parts += [self.whole, self._view(resize(media.pixels, c.tile, c.tile, c.resample)), self.end]
        return Processed(tuple(parts), media.size, (w, h))

    def _view(self, pixels: np.ndarray) -> View:
        """Make one run of the encoder over a tile [tile, tile, 3]."""
        rows = np.arange(self.tile_rows, dtype=np.int32)[None]
        return View(lambda: {"patches": self._patches(pixels)}, {}, rows, self.tile_rows)

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        """Cut patches: pixels uint8 [tile, tile, 3] -> F32 [P + 1, 3 * p * p], group by group."""
        p, side = self.config.patch, self.config.tile // self.config.patch
        x = cut_patches(pixels, side, p)[self.order]
        patches = pages((len(x) + 1, 3, p * p))
        by_table(self.levels, x, patches[:-1])
        return patches.reshape(len(patches), -1)


def canvas(height: int, width: int, tile: int, max_tiles: int, largest: bool) -> tuple[int, int]:
    """Choose the rows and columns of tiles of the canvas for a picture.

    The one to which it must be enlarged least (most with `largest`), or shrunk least where it fits none; of equals the smallest.
    Scales are compared in float32. Source: `get_best_fit` in transformers' `image_processing_llama4.py`.
    """
    grid = np.array([(y, x) for y in range(1, max_tiles + 1) for x in range(1, max_tiles // y + 1)])
    scales = ((grid * tile).astype(np.float32) / np.array([height, width], np.float32)).min(axis=1)
    fits = scales[scales >= 1]
    scale = scales.max() if largest or not len(fits) else fits.min()
    best = grid[scales == scale]
    rows, columns = best[best.prod(axis=1).argmin()].tolist()
    return rows, columns


def fitted(height: int, width: int, canvas: tuple[int, int], tile: int, largest: bool) -> tuple[int, int]:
    """Compute the height and width of a picture in its canvas: its shape kept, sides rounded down, and not enlarged beyond `tile`
    on either side unless `largest`.

    Source: `_preprocess` and `get_max_res_without_distortion` in transformers' `image_processing_llama4.py`, where a side of the
    canvas is a tensor, and so divided in float32, and a side of the picture is a number, divided in float64.
    """
    def scale(side: int, room: int) -> tuple[int, np.floating | float]:
        wanted = max(side, tile)
        return (room, np.float32(room) / np.float32(side)) if largest or room < wanted else (wanted, wanted / side)

    (h, scale_h), (w, scale_w) = scale(height, canvas[0]), scale(width, canvas[1])
    both = (scale_w, scale_h) if type(scale_w) is type(scale_h) else (np.float32(scale_w), np.float32(scale_h))
    if both[0] < both[1]:
        h = min(math.floor(type(scale_w)(height) * scale_w), h)
    else:
        w = min(math.floor(type(scale_h)(width) * scale_h), w)
    return max(h, 1), max(w, 1)


class Model(Architecture):
    """A llama4 decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model)
        self.blocks = [Block(w["blk", i], c, i) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=True, base=ROPE_BASE)

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder, where the files hold it."""
        return {"image": Vision(files)}

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Chunked(self.config.chunk) if chunked else Full() for chunked in self.config.chunked]

    def ropes(self, n_ctx: int) -> list[Rope]:
        """Return the rotary embedding of each layer's keys; the norm behind it does not see a rotation."""
        none = Rope(np.empty(0, np.float32), 1.0, True)
        return [self.rope.at(n_ctx) if rotated else none for rotated in self.config.rotated]

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        c = self.config
        x = self.embed(batch.ids, batch.media)                                     # [m, D]
        factors = None
        if c.temperature and not all(c.rotated):
            factors = ops.temperature(batch.positions, floor=c.floor, scale=c.temperature).reshape(-1, 1)      # [m, 1]
        rope = self.rope.at(batch.n_ctx)
        places = Places(rope.table(batch.positions), factors)
        for block, cache in zip(self.blocks, caches):
            x = block(x, rope, places, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x)
