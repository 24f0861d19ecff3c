"""Llama 3.2 Vision: a llama decoder, every fifth layer of which attends to a picture's patches instead of the text.

Paper arXiv:2407.21783, section 7. Follows transformers `modeling_mllama.py`, `image_processing_pil_mllama.py` and
`processing_mllama.py`. A picture is one token of the prompt. Cut into up to four tiles, it goes through 32 local and 8 gated global
layers of the encoder; the last state and five earlier ones, side by side, become one row for each patch and tile. Rows of text from
the picture's token to the next picture's see all of them; pictures side by side are seen together.

The encoder always computes all tiles: tiles that are empty are not masked as keys (the authors' mask forbids empty to see empty
only), so every patch sees them.
differs: text before the first picture skips the cross-attention layers, as in the authors' code
(meta-llama/llama-models, `multimodal/model.py`: the mask multiplies what attention gives); transformers masks the feed-forward only
and shows such a row every tile. The numbers of the five earlier states count the layers before them, as the authors, Ollama and
transformers up to 4.53 do; later ones take the state behind the layer, and the converter writes the numbers that a checkpoint's
version meant.
Tensors have the names and values of Ollama's published file (llama.cpp has no such model), as far as its `model/models/mllama` shows
them: the encoder's gates hold their tanh, position_embd.gate 1 - tanh, the decoder's are as trained.
Axes: m rows of the batch, s of them that see a picture, c encoder rows, D hidden, H/K query/KV heads, E head size; in the encoder
T tiles, P patches of one and its class row, N = T P + padding, V hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine import ops
from pyengine.media.views import Limits, Processed, View
from pyengine.nn.batch import Across, Batch
from pyengine.errors import InvalidModelError, RequestError
from pyengine.graph.graph import Graph
from pyengine.files.hparams import Hparams
from pyengine.cache.policy import Cross, Full, Policy
from pyengine.nn.cache import CrossCache
from pyengine.models.architecture import Architecture, Encoder, EncoderFiles
from pyengine.nn.decoder import embedded
from pyengine.nn.encoder import (
    by_table, EncoderAttention, EncoderFeedForward, levels, mean_and_std, only_pictures, resample_filter, special_token)
from pyengine.models.llama import Block, FeedForward
from pyengine.models.llama import Config as TextConfig
from pyengine.nn.layers import ACTIVATIONS, constant, Embedding, LayerNorm, Linear, mlp_width, PatchEmbedding, RMSNorm, scalar
from pyengine.nn.rope import rope
from pyengine.graph.tensor import Tensor
from pyengine.files.weights import DerivedRef, pages, Weights

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

MULTIPLE = 8                         # rows of a tile are padded to it: MllamaVisionModel.forward
NORM_EPS = 1e-5                      # of the norms before and behind the local layers: torch's default
# preprocessor_config.json of meta-llama/Llama-3.2-11B-Vision, for files without the keys; the filter by Pillow's number
MEAN, STD, BILINEAR = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 2


def numbers(h: Hparams, name: str, below: int) -> tuple[int, ...]:
    """Read an array of whole numbers from 0 up to `below`. Raises: InvalidModelError."""
    value = h.need(name, np.ndarray)
    if value.dtype.kind not in "iu" or len(value) > below or np.any(value < 0) or np.any(value >= below):
        raise InvalidModelError(f"{h.key(name)} is {value.tolist()}; at most {below} numbers from 0 to {below - 1} are needed")
    return tuple(int(i) for i in value)


class CrossBlock:
    """Cross-attention, with normed queries and keys where the file has norms, and a gated feed-forward; each is weighed by the tanh of a
    number."""

    def __init__(self, w: Weights, c: TextConfig, interleaved: bool):
        """Bind the weights. interleaved: the halves of q's and k's heads are, as for a rotation, but not those of their norms."""
        self.c = c
        self.attn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps)
        self.q = Linear(w["cross_attn_q_proj"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["cross_attn_k_proj"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["cross_attn_v_proj"], c.d_model, c.n_kv_heads * c.head_dim)
        self.out = Linear(w["cross_attn_o_proj"], c.n_heads * c.head_dim, c.d_model)
        self.q_norm, self.k_norm = (RMSNorm(w[name], c.head_dim, c.eps) if name in w else None for name in ("cross_attn_q_norm", "cross_attn_k_norm"))
        if interleaved and self.q_norm:
            for norm in (self.q_norm, self.k_norm):
                ref = norm.weight.node.source
                norm.weight = constant(DerivedRef(ref.name, ref.shape, (ref,), lambda a: a.reshape(2, -1).T.reshape(-1)))
        self.attn_weight, self.ffn_weight = (self.weight(w, name) for name in ("cross_attn_attn_gate", "cross_attn_mlp_gate"))
        self.ffn_norm = RMSNorm(w["ffn_norm"], c.d_model, c.eps)
        self.ffn = FeedForward(w, c)

    @staticmethod
    def weight(w: Weights, name: str) -> Tensor:
        """Bind the tanh of a gate, [1]."""
        gate = w.tensor(name, (1,))
        return constant(DerivedRef(gate.name, (1,), (gate,), np.tanh))

    def __call__(self, x: Tensor, across: Across, cache: CrossCache) -> Tensor:         # [m, D]
        c, seeing = self.c, across.pick(x)                                         # [s, D]
        q = self.q(self.attn_norm(seeing)).reshape(-1, c.n_heads, c.head_dim)                          # [s, H, E]
        k = self.k(across.states).reshape(-1, c.n_kv_heads, c.head_dim)                                # [c, K, E]
        q, k = (norm(y) if norm else y for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        v = self.v(across.states).reshape(-1, c.n_kv_heads, c.head_dim)                                # [c, K, E]
        seeing = seeing + self.out(cache.attend(q, k, v, scale=c.head_dim**-0.5)) * self.attn_weight
        return across.put(x, seeing + self.ffn(self.ffn_norm(seeing)) * self.ffn_weight)


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of the encoder and the image processor, from the keys "clip.vision.*"."""

    image_size: int                  # pixels along a tile
    patch_size: int
    n_layers: int
    n_global: int
    width: int
    n_heads: int
    eps: float
    act: str                         # of `ops.unary`
    states: tuple[int, ...]          # layers behind which a state is kept
    max_tiles: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int                    # Pillow's number of the filter

    @classmethod
    def read(cls, v: Hparams) -> VisionConfig:
        """Read "clip.vision.*"."""
        act = v.get("vision.hidden_act", "gelu", str)                              # MllamaVisionConfig
        if act not in ACTIVATIONS:
            raise InvalidModelError(f"{v.key('vision.hidden_act')} is {act!r}; known are {', '.join(ACTIVATIONS)}")
        n_layers = v.size("vision.block_count")
        mean, std = mean_and_std(v, MEAN, STD)
        c = cls(
            image_size=v.size("vision.image_size"),
            patch_size=v.size("vision.patch_size"),
            n_layers=n_layers,
            n_global=v.size("vision.global.block_count"),
            width=v.size("vision.embedding_length"),
            n_heads=v.size("vision.attention.head_count"),
            eps=v.number("vision.attention.layer_norm_epsilon", above=0.0),
            act=ACTIVATIONS[act],
            states=numbers(v, "vision.feature_layer", n_layers + 1),
            max_tiles=v.size("vision.max_num_tiles"),
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            resample=resample_filter(v, BILINEAR),
        )
        if c.width % c.n_heads or c.patch_size > c.image_size or c.max_tiles > 64:
            raise InvalidModelError(f"{v.key('vision')}: {c.n_heads} heads of {c.width}, patches of {c.patch_size} in tiles of "
                                    f"{c.image_size}, {c.max_tiles} tiles: no such encoder is possible")
        return c

    @property
    def side(self) -> int:
        """Patches along a tile."""
        return self.image_size // self.patch_size

    @property
    def rows(self) -> int:
        """P: patches of a tile, and the class row."""
        return self.side**2 + 1

    @property
    def padding(self) -> int:
        """Rows of zeros that pad all tiles; never none, for no square is 7 modulo 8."""
        return self.max_tiles * (-self.rows % MULTIPLE)


def arrangements(max_tiles: int) -> list[tuple[int, int]]:
    """List (rows, columns) of tiles that a picture may be cut into; the number of an aspect ratio counts them from 1."""
    return [(y, x) for y in range(1, max_tiles + 1) for x in range(1, max_tiles + 1) if x * y <= max_tiles]


def arrange(width: int, height: int, c: VisionConfig) -> tuple[int, int]:
    """Choose (rows, columns) of tiles for a picture of width x height pixels: `get_optimal_tiled_canvas`.

    The canvas that enlarges it least, else the one that shrinks it least; of several the smallest, then the first.
    """
    scales = {(y, x): min(y * c.image_size / height, x * c.image_size / width) for y, x in arrangements(c.max_tiles)}
    larger = [s for s in scales.values() if s >= 1]
    best = min(larger) if larger else max(scales.values())
    return min((a for a, s in scales.items() if s == best), key=lambda a: a[0] * a[1])


def fit(width: int, height: int, tiles: tuple[int, int], tile: int) -> tuple[int, int]:
    """Compute (width, height) of a picture within its canvas, in its own proportions: `get_image_size_fit_to_canvas`."""
    x, y = min(max(width, tile), tiles[1] * tile), min(max(height, tile), tiles[0] * tile)
    by_x, by_y = x / width, y / height
    if by_x < by_y:
        return x, min(int(height * by_x) or 1, y)
    return min(int(width * by_y) or 1, x), y


class VisionBlock:
    """Attention and a feed-forward, each behind a layer norm and added to its input; in global layers weighed by a number."""

    def __init__(self, w: Weights, c: VisionConfig, is_global: bool):
        self.norm1, self.norm2 = LayerNorm(w["ln1"], c.width, c.eps), LayerNorm(w["ln2"], c.width, c.eps)
        self.attention = EncoderAttention(w, c.width, c.n_heads)
        self.feed_forward = EncoderFeedForward(w, c.width, mlp_width(w, c.width), c.act)
        self.attn_weight, self.ffn_weight = (scalar(w, name) if is_global else None for name in ("attn_gate", "ffn_gate"))

    def __call__(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:                    # [N, V]
        y = self.attention(self.norm1(x), lo, hi)
        x = x + (y if self.attn_weight is None else y * self.attn_weight)
        y = self.feed_forward(self.norm2(x))
        return x + (y if self.ffn_weight is None else y * self.ffn_weight)


class Vision(Encoder):
    """The encoder over all tiles of one picture, and what a picture becomes in a prompt.

    Rows are those of tile 0, tile 1 .. and then all padding, so the rows that hold picture are the first ones. They see all rows;
    the others, empty tiles and padding, see those only.
    """

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(v)
        self.token = special_token(v, "image", token, "<|image|>")
        self.markers = {"image": (self.token,)}
        self.all_rows = c.max_tiles * c.rows                                            # of all tiles
        self.levels = levels(c.mean, c.std, "float32")                                  # [3, 256]
        v_, n = w["v"], len(arrangements(c.max_tiles)) + 1
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch_size)
        own = (v_["position_embd"].tensor("weight", (c.rows, c.width)), v_["position_embd"].tensor("gate", (1,)),
               v_.tensor("class_embd", (c.width,)))
        self.position = constant(DerivedRef(own[0].name, own[0].shape, own, _with_class))
        tiled = v_["tile_position_embd"].tensor("weight", (n, self.all_rows * c.width))
        if c.width % tiled.dtype.block:
            raise InvalidModelError(f"{tiled.name}: blocks of {tiled.dtype.name} do not divide rows of {c.width}")
        self.tile_position = constant(tiled._replace(shape=(n * self.all_rows, c.width)))
        self.tile_weight = scalar(v_["tile_position_embd"], "gate")
        self.pre_tile, self.post_tile = (self._tile_table(v_[f"{when}_tile_position_embd"], n) for when in ("pre", "post"))
        self.pre_norm, self.post_norm = LayerNorm(v_["pre_ln"], c.width, NORM_EPS), LayerNorm(v_["post_ln"], c.width, NORM_EPS)
        self.blocks = [VisionBlock(v_["blk", i], c, False) for i in range(c.n_layers)]
        self.global_blocks = [VisionBlock(v_["global", "blk", i], c, True) for i in range(c.n_global)]
        self.projector = Linear(w["mm", 0], c.width * (1 + len(c.states)), h.size("embedding_length"))

    def _tile_table(self, w: Weights, n: int) -> Tensor:
        """Bind an embedding [n aspect ratios, T * V] times its weight as rows [n * T + 1, V], the last of zeros."""
        c = self.config
        table, weight = w.tensor("weight", (n, c.max_tiles * c.width)), w.tensor("gate", (1,))
        zeros = np.zeros((1, c.width), np.float32)
        return constant(DerivedRef(table.name, (n * c.max_tiles + 1, c.width), (table, weight),
                                   lambda a, g: np.concatenate([(a * g).reshape(-1, c.width), zeros])))

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of a picture that fills all tiles."""
        return self.all_rows

    def n_rows(self, width: int, height: int) -> int:
        """Return the rows of a picture of that size."""
        y, x = arrange(width, height, self.config)
        return y * x * self.config.rows

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Resize into the best canvas of tiles, pad it with black. Raises: RequestError for videos, and beyond the plan."""
        only_pictures(media)
        c = self.config
        width, height = media.size
        tiles = arrange(width, height, c)
        n = tiles[0] * tiles[1] * c.rows
        if n > limits.rows:
            raise RequestError(f"a picture of {width} x {height} pixels takes {tiles[0] * tiles[1]} tiles, {n} encoder rows, but "
                               f"the model was loaded for up to {limits.rows}; load with images=({width}, {height})")
        view = View(lambda: self._inputs(media.pixels, tiles), {}, np.zeros((1, n), np.int32), 1, (1, *tiles), token=self.token)
        return Processed((view,), media.size, fit(width, height, tiles, c.image_size))

    def _inputs(self, pixels: np.ndarray, tiles: tuple[int, int]) -> dict[str, np.ndarray]:
        """Make the inputs: pixels uint8 [h, w, 3] -> the encoder graph's inputs."""
        from pyengine.media.image import resize                                        # Pillow takes 20 ms to import

        c, (y, x), size, p = self.config, tiles, self.config.image_size, self.config.patch_size
        width, height = fit(pixels.shape[1], pixels.shape[0], tiles, size)
        canvas = np.zeros((y * size, x * size, 3), np.uint8)
        canvas[:height, :width] = resize(pixels, height, width, c.resample)
        used = c.side * p                                                               # an edge that fills no patch is not seen
        tiled = canvas.reshape(y, size, x, size, 3).transpose(0, 2, 1, 3, 4).reshape(y * x, size, size, 3)[:, :used, :used]
        tiled = tiled.reshape(y * x, c.side, p, c.side, p, 3).transpose(0, 1, 3, 5, 2, 4).reshape(y * x, c.side**2, 3, p * p)
        patches = pages((c.max_tiles, c.rows, 3, p * p))                                # zeros, as class rows and empty tiles are
        by_table(self.levels, tiled, patches[: y * x, 1:])
        first = (arrangements(c.max_tiles).index(tiles) + 1) * c.max_tiles
        tile = np.arange(first, first + c.max_tiles, dtype=np.int32)                    # rows of the tables of tiles
        before = np.repeat(tile, c.rows)
        behind = np.concatenate([before, np.repeat(tile, c.padding // c.max_tiles)])
        before[:: c.rows] = (len(arrangements(c.max_tiles)) + 1) * c.max_tiles          # class rows get none: the row of zeros
        n_real, n = y * x * c.rows, len(behind)
        return {"patches": patches.reshape(-1, 3 * p * p), "before": before, "behind": behind,
                "places": first * c.rows + np.arange(c.max_tiles * c.rows, dtype=np.int32),
                "hi": np.where(np.arange(n) < n_real, n, n_real).astype(np.int32)}

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare rows F32 [N, D] of "patches" [T P, 3 p p], with zeros for class rows and empty tiles; the picture's own first.

        before [T P], behind [N], places [T P]: rows of the tables of tiles; hi [N]: how many rows each one sees.
        """
        c = self.config
        n = self.config.max_tiles * c.rows
        total = n + c.padding
        lo, hi = g.constant(np.zeros(total, np.int32)), g.input("hi", (total,), "I32")
        x = self.patch(g.input("patches", (n, 3 * c.patch_size**2)))                    # [T P, V]
        x = (x.reshape(c.max_tiles, c.rows, c.width) + self.position).reshape(n, c.width)
        x = x + ops.rows(self.pre_tile, g.input("before", (n,), "I32"))
        x = x + ops.rows(self.tile_position, g.input("places", (n,), "I32")) * self.tile_weight
        x = ops.concat([self.pre_norm(x), g.constant(np.zeros((c.padding, c.width), np.float32))], axis=0)      # [N, V]
        states = [x]                                                                    # after this many layers
        for block in self.blocks:
            states.append(block(states[-1], lo, hi))
        x = self.post_norm(states[-1]) + ops.rows(self.post_tile, g.input("behind", (total,), "I32"))
        for block in self.global_blocks:
            x = block(x, lo, hi)
        if c.states:                                                                    # [element 0 of each, element 1 of each ..]
            kept = ops.concat([states[n].reshape(total, c.width, 1) for n in c.states], axis=2)
            x = ops.concat([x, kept.reshape(total, -1)], axis=1)                        # [N, V * (1 + states)]
        return self.projector(x)


def _with_class(position: np.ndarray, weight: np.ndarray, class_row: np.ndarray) -> np.ndarray:
    """Multiply position embeddings [P, V] by their weight, and add the class row's own embedding."""
    out = position * weight
    out[0] += class_row
    return out


class Model(Architecture):
    """An mllama decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    block: Any = Block
    interleaved = True               # pairs of the rotation

    def __init__(self, h: Hparams, w: Weights):
        h.refuse(expert_count="a mixture of experts")
        c = self.config = self.read(h, w)
        self.across = numbers(h, "attention.cross_attention_layers", c.n_layers)
        self._n_ids = embedded(w, c.vocab_size)
        self.embed = Embedding(w["token_embd"], self._n_ids, c.d_model)
        interleaved = h.get("attention.cross_interleaved", False, bool)
        self.blocks = [CrossBlock(w["blk", i], c, interleaved) if i in self.across else self.block(w["blk", i], c)
                       for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)
        self.rope = rope(h, w, c.head_dim, interleaved=self.interleaved)

    @staticmethod
    def read(h: Hparams, w: Weights) -> Any:
        """Read the keys below the architecture's name."""
        return TextConfig.read(h, w)

    def embedded(self, batch: Batch) -> Tensor:
        """Return what the first layer gets [m, D]: pictures are not among it."""
        return self.embed(batch.ids)

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder, where the files hold it."""
        return {"image": Vision(files)}

    @property
    def n_ids(self) -> int:
        """Rows of the embedding: the picture's token lies behind the output head's."""
        return self._n_ids

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Cross() if i in self.across else Full() for i in range(self.config.n_layers)]

    def forward(self, batch: Batch, caches: list[Any]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embedded(batch)                                                   # [m, D]
        rope = self.rope.at(batch.n_ctx)
        angles = rope.table(batch.positions)                                       # [m, E]
        for block, cache in zip(self.blocks, caches):
            if not isinstance(block, CrossBlock):
                x = block(x, rope, angles, cache)
            elif cache is not None:
                x = block(x, batch.across, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x)
