"""What encoders of several architectures share: numbers and tokens of their metadata, the values of pixels, attention, feed-forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, Protocol, TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import pages, Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.layers import ACTIVATIONS, constant, LayerNorm, Linear, mlp_width
from pyengine.nn.texts import Texts
from pyengine.records import dataclass

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

# ---- metadata -----------------------------------------------------------------------------------------------------------------


def projector_type(v: Hparams) -> str:
    """Return the name of the encoder and its projector in a file's keys "clip.*"; "" where there is none."""
    return v.get("vision.projector_type", v.get("projector_type", "", str), str)


def n_layers(v: Hparams, w: Weights) -> int:
    """Return the number of the encoder's layers, the last of which must be in the file."""
    n = v.size("vision.block_count")
    if ("v", "blk", n - 1) not in w:
        raise InvalidModelError(f"{v.key('vision.block_count')} is {n}, but no tensor is named v.blk.{n - 1}")
    return n


def head_count(v: Hparams, width: int, name: str = "vision.attention.head_count", step: int = 4) -> int:
    """Read the number of heads, which are as wide as rotations need: a multiple of `step`, 1 without them. Raises: InvalidModelError."""
    n = v.size(name)
    if width % n or width // n % step:
        raise InvalidModelError(f"{v.key(name)} is {n} for a width of {width}: heads must have a multiple of {step} elements"
                                if step > 1 else f"{v.key(name)} is {n}, which does not divide a width of {width}")
    return n


def activation(v: Hparams, gelu: str, neither: str = "quick_gelu") -> str:
    """Read the kind of `ops.unary` from transformers' name, or from llama.cpp's switches: `gelu` is which GELU it is.

    Raises: UnsupportedModelError for an unknown one.
    """
    switched = "silu" if v.get("use_silu", False, bool) else gelu if v.get("use_gelu", False, bool) else neither
    return known_activation(v, "vision.hidden_act", switched)


def known_activation(v: Hparams, name: str, usual: str) -> str:
    """Read the kind of `ops.unary` from transformers' name; `usual` without the key. Raises: UnsupportedModelError."""
    act = v.get(name, usual, str)
    if act not in ACTIVATIONS:
        raise UnsupportedModelError(f"{v.key(name)}: the activation is {act!r}; {', '.join(ACTIVATIONS)} are supported")
    return ACTIVATIONS[act]


def per_channel(v: Hparams, name: str, usual: tuple[float, ...]) -> np.ndarray:
    """Read three finite numbers, float32; `usual` without the key. Raises: InvalidModelError."""
    value = np.asarray(v.get(name, np.array(usual), np.ndarray))
    if value.shape != (3,) or value.dtype.kind not in "fiu" or not np.all(np.isfinite(value)):
        raise InvalidModelError(f"{v.key(name)} is {value.tolist()}, but three numbers are needed")
    return value.astype(np.float32)


def whole_numbers(v: Hparams, name: str, usual: tuple[int, ...]) -> tuple[int, ...]:
    """Read whole numbers from 0 on; `usual` without the key. Raises: InvalidModelError."""
    found = v.get(name, None, np.ndarray)
    if found is None:
        return usual
    if found.dtype.kind not in "iu" or np.any(found < 0):
        raise InvalidModelError(f"{v.key(name)} is {found.tolist()}: whole numbers from 0 on are needed")
    return tuple(int(i) for i in found)


def mean_and_std(v: Hparams, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Read what is subtracted from each colour, and what it is then divided by. Raises: InvalidModelError for divisors up to 0."""
    found = per_channel(v, "vision.image_mean", mean), per_channel(v, "vision.image_std", std)
    if not np.all(found[1] > 0):
        raise InvalidModelError(f"{v.key('vision.image_std')} is {found[1].tolist()}: must be above 0")
    return found


def resample_filter(v: Hparams, usual: int) -> int:
    """Read Pillow's number of the filter that resizes pictures. Raises: InvalidModelError."""
    found = v.get("vision.resample", usual, int)
    if found not in range(6):
        raise InvalidModelError(f"{v.key('vision.resample')} is {found}, but Pillow's filters are 0 to 5")
    return found


PIXELS = 1 << 14                 # most along a side of what an encoder reads at once
TILES = 1024                     # most squares that a picture is cut into


class BlockSizes(Protocol):
    """What a layer of an encoder needs to know."""

    @property
    def width(self) -> int: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def eps(self) -> float: ...
    @property
    def act(self) -> str: ...


@dataclass(frozen=True)
class EncoderConfig:
    """Numbers that encoders of pictures and their processors have in common; an architecture's own numbers follow."""

    n_layers: int
    width: int
    d_ff: int
    n_heads: int
    d_out: int                       # of the decoder
    eps: float
    act: str                         # of ops.unary
    patch: int                       # side in pixels
    mean: np.ndarray                 # of each colour, as the next
    std: np.ndarray
    resample: int                    # Pillow's number of a filter


def common(h: Hparams, v: Hparams, w: Weights, *, gelu: str, eps: float, colours: tuple[tuple[float, ...], tuple[float, ...]],
           resample: int) -> dict[str, Any]:
    """Read the fields of `EncoderConfig` from the decoder's keys `h` and the keys "clip.*" `v`. Raises: InvalidModelError, UnsupportedModelError.

    Of files without the key: gelu, which one a switch means; eps; colours, (mean, deviation); resample.
    """
    width = v.size("vision.embedding_length")
    mean, std = mean_and_std(v, *colours)
    return {
        "n_layers": n_layers(v, w),
        "width": width,
        "d_ff": mlp_width(w["v", "blk", 0], width),
        "n_heads": head_count(v, width),
        "d_out": h.size("embedding_length"),
        "eps": v.number("vision.attention.layer_norm_epsilon", eps, above=0.0),
        "act": activation(v, gelu),
        "patch": v.size("vision.patch_size"),
        "mean": mean,
        "std": std,
        "resample": resample_filter(v, resample),
    }


def special_token(v: Hparams, name: str, token: Callable[[str], int], text: str) -> int:
    """Return a special token's id: from its key, or from its text where there is no key."""
    number = v.get(f"vision.{name}_token_id", None, int)
    return token(text) if number is None else number


def image_marker(v: Hparams, token: Callable[[str], int]) -> tuple[int, ...]:
    """Return the token that stands for a picture; none where the vocabulary, as those of first checkpoints, has no such token."""
    try:
        return (special_token(v, "image", token, "<image>"),)
    except InvalidModelError:
        return ()


def token_or_text(token: Callable[[str], int], text: str) -> int | str:
    """Return a token by its text, or the text where the vocabulary has none."""
    try:
        return token(text)
    except InvalidModelError:
        return text


# ---- pictures -----------------------------------------------------------------------------------------------------------------


def only_pictures(media: Image | Video, *options: str) -> None:
    """Refuse a video, and options that are not among `options`. Raises: RequestError."""
    from pyengine.media.image import known_options                                 # Pillow takes 20 ms to import
    from pyengine.media.video import Video

    if isinstance(media, Video):
        raise RequestError("this model takes pictures, not videos; give a video's frames as pictures")
    known_options(media.options, *options)


def whole_option(media: Image | Video, name: str, most: int) -> int:
    """Return an option's number; `most` where it is not given. Raises: RequestError for what is no whole number from 1 to `most`."""
    value = media.options.get(name, most)
    if type(value) is not int or not 1 <= value <= most:
        raise RequestError(f"{name}={value!r}: must be a whole number from 1 to {most}")
    return value


def squeezed(video: Video, numbers: Sequence[int], sizes: Sequence[tuple[int, int]], resample: int) -> Callable[[], list[np.ndarray]]:
    """Return what reads frames of these numbers, once, resized to (height, width) after (height, width): uint8 [h, w, 3] each."""
    from pyengine.media.image import resize                                        # Pillow takes 20 ms to import

    def resized(pixels: np.ndarray) -> np.ndarray:
        for height, width in sizes:
            pixels = resize(pixels, height, width, resample)
        return pixels

    return cache(lambda: [resized(frame.pixels) for frame in video.read(numbers)])


Rounding = Literal["float64, float32", "float32", "bfloat16"]


def levels(mean: np.ndarray, std: np.ndarray, rounding: Rounding = "float64, float32") -> np.ndarray:
    """Compute (level / 255 - mean) / std of the 256 levels of each colour, float32 [3, 256].

    rounding  "float64, float32": rescaled in float64, rounded, normalized in float32, which are the bits of transformers'
              processors (`image_transforms.py`: rescale, normalize); "float32": throughout, an ulp beside them here and there;
              "bfloat16": each operation, as Meta's code of Llama 4 and transformers' processor for it
    """
    m, s = (np.asarray(a, np.float32)[:, None] for a in (mean, std))
    if rounding == "float64, float32":
        return ((np.arange(256) * (1 / 255)).astype(np.float32) - m) / s
    scaled = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    if rounding == "float32":
        return (scaled - m) / s
    return bfloat16(bfloat16(bfloat16(scaled) - bfloat16(m)) / bfloat16(s))


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 values to bfloat16, half to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def by_table(table: np.ndarray, pixels: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Look up pixels uint8 [.., 3, n] in a table [3, 256]: float32 [.., 3, n], into `out` where it is given."""
    out = pages(pixels.shape) if out is None else out
    for channel in range(3):                                                       # one by one: no copies as large as `out`
        out[..., channel, :] = table[channel][pixels[..., channel, :]]
    return out


def cut_patches(pixels: np.ndarray, side: int | tuple[int, int], patch: int) -> np.ndarray:
    """Cut side x side patches, or (lines, columns) of them, in reading order: pixels uint8 [lines * patch, columns * patch, 3] ->
    uint8 [lines * columns, 3, patch * patch]."""
    lines, columns = (side, side) if isinstance(side, int) else side
    return pixels.reshape(lines, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3).reshape(lines * columns, 3, patch * patch)


def buckets(n: int, side: int) -> np.ndarray:
    """Return the position embedding's line, of `side`, of each of n lines of patches (or columns), int [n]: that of its fraction of the
    picture in float32, which is not always its own where n is `side` (transformers' `SmolVLMVisionEmbeddings.forward`)."""
    step = 1 / side
    bounds = (step + step * np.arange(max(0, math.ceil((1 - step) / step)))).astype(np.float32)
    fractions = np.minimum(np.arange(n, dtype=np.float32) * (np.float32(1) / np.float32(n)), np.float32(1 - 1e-6))
    return np.searchsorted(bounds, fractions, side="right")


def grouped(side: int, group: int) -> np.ndarray:
    """Return the numbers of side x side patches, one group of group x group after the other."""
    grid = np.arange(side * side).reshape(side // group, group, side // group, group)
    return grid.transpose(0, 2, 1, 3).reshape(-1)


def bilinear(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Resize a grid of rows (height, width): which 4 of its rows, in reading order, each row of the `wanted` one is made of, and their weights.

    Pixels are squares whose middles are compared; sizes that shrink are not smoothed. As `torch.nn.functional.interpolate`, mode "bilinear",
    without aligned corners. Returns indices int64 and weights float32 [height, width, 4].
    """
    taps, shares = [], []
    for have, want in zip(size, wanted):
        at = np.maximum(float(np.float32(have / want)) * (np.arange(want) + 0.5) - 0.5, 0).astype(np.float32)
        low = at.astype(np.int64)
        taps.append(np.stack([low, np.minimum(low + 1, have - 1)], axis=1))                # [want, 2]
        shares.append(np.stack([1 - (at - low), at - low], axis=1).astype(np.float32))
    indices = taps[0][:, None, :, None] * size[1] + taps[1][None, :, None, :]
    weights = shares[0][:, None, :, None] * shares[1][None, :, None, :]
    return indices.reshape(*wanted, 4), weights.reshape(*wanted, 4)


# ---- layers -------------------------------------------------------------------------------------------------------------------


def products_of(*around: Linear) -> str:
    """Return how attention multiplies: bytes where the weights around it are in blocks, whose products round activations to 8 bits too;
    floats elsewhere, so that F32, F16 and BF16 files give the authors' numbers."""
    return "int8" if all(p.weight.dtype.block > 1 for p in around) else "float"


class EncoderAttention:
    """Attention of rows [n, V] to those of the interval that each sees, in heads that together are as wide as the rows. In a file q, k and v
    may be one matrix, as llama.cpp has them.

    q_norm, k_norm  norms of all heads' queries and keys at once; None: there are none
    """

    def __init__(self, w: Weights, width: int, n_heads: int, q_norm: Callable[[Tensor], Tensor] | None = None,
                 k_norm: Callable[[Tensor], Tensor] | None = None):
        parts = (Linear.several(w["attn_qkv"], width, (width,) * 3) if "attn_qkv" in w
                 else [Linear(w[n], width, width) for n in ("attn_q", "attn_k", "attn_v")])
        self.hold(*parts, Linear(w["attn_out"], width, width), n_heads=n_heads, norms=(q_norm, k_norm))

    def hold(self, *products: Linear, n_heads: int, norms: tuple[Callable[[Tensor], Tensor] | None, ...] = (None, None)) -> None:
        """Keep the products of queries, keys, values and output."""
        self.q, self.k, self.v, self.out = products
        width = int(self.out.weight.shape[0])
        self.n_heads, self.head_dim, self.norms = n_heads, width // n_heads, (*norms, None)
        self.products = products_of(*products)

    def __call__(self, x: Tensor, lo: Tensor | np.ndarray, hi: Tensor | np.ndarray, rotate: Callable[[Tensor], Tensor] | None = None,
                 across: tuple[Tensor, Tensor] | None = None) -> Tensor:                   # [n, V] -> [n, V]
        """Attend within the intervals. rotate: what is done to queries and keys [n, H, E]; across: rows [k, V] that keys and values are
        made of, where they are not those of x."""
        return self.read(*self.heads(x, rotate, across), lo, hi)

    def among(self, x: Tensor, texts: Texts) -> Tensor:                                    # [m, V] -> [m, V]
        """Attend within texts that stand side by side."""
        q, k, v = (part(x).reshape(-1, self.n_heads, self.head_dim) for part in (self.q, self.k, self.v))      # [m, H, E] each
        return self.out(texts.attend(q, k, v, scale=self.head_dim**-0.5, products=self.products))

    def heads(self, x: Tensor, rotate: Callable[[Tensor], Tensor] | None = None, across: tuple[Tensor, Tensor] | None = None
              ) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries [n, H, E], keys and values [H, k, E] of rows; arguments are those of a call."""
        products = ((f(rows), norm) for f, rows, norm in zip((self.q, self.k, self.v), (x, *(across or (x, x))), self.norms))
        q, k, v = ((norm(y) if norm else y).reshape(-1, self.n_heads, self.head_dim) for y, norm in products)    # [n, H, E]
        if rotate:
            q, k = rotate(q), rotate(k)
        return q, *(ops.transpose(t, axes=(1, 0, 2)) for t in (k, v))                      # [H, n, E], views

    def read(self, q: Tensor, k: Tensor, v: Tensor, lo: Tensor | np.ndarray, hi: Tensor | np.ndarray) -> Tensor:
        """Attend with heads within the intervals: [n, V]."""
        return self.out(ops.attention(q, k, v, lo, hi, scale=self.head_dim**-0.5, products=self.products))

    def shares(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute what `read` does not keep: how much of each query's attention goes to each key, after softmax, [H, n, k]."""
        return ops.softmax(ops.matmul(ops.transpose(q, axes=(1, 0, 2)), k), scale=self.head_dim**-0.5)


class EncoderFeedForward:
    """down(act(up x)), or gated: down(act(gate x) * up x)."""

    def __init__(self, w: Weights, width: int, d_ff: int, act: str, gated: bool = False):
        """Bind the weights. act: of `ops.unary`."""
        self.gate = Linear(w["ffn_gate"], width, d_ff) if gated else None
        self.up, self.down, self.act = Linear(w["ffn_up"], width, d_ff), Linear(w["ffn_down"], d_ff, width), act

    def __call__(self, x: Tensor) -> Tensor:                                               # [n, V] -> [n, V]
        if self.gate is None:
            return self.down(ops.unary(self.up(x), kind=self.act))
        return self.down(ops.unary(self.gate(x), kind=self.act) * self.up(x))


class EncoderBlock:
    """A layer of CLIP, SigLIP, ViT and their kin: attention and a feed-forward, each behind a layer norm and added to its input; where the file
    has such, the feed-forward is gated, and what is added is multiplied by a scale for each element (arXiv:2103.17239)."""

    def __init__(self, w: Weights, c: BlockSizes):
        self.norm1, self.norm2 = LayerNorm(w["ln1"], c.width, c.eps), LayerNorm(w["ln2"], c.width, c.eps)
        self.attention = EncoderAttention(w, c.width, c.n_heads)
        self.feed_forward = EncoderFeedForward(w, c.width, c.d_ff, c.act, gated="ffn_gate" in w)
        self.scales = [constant(ref, dtype("F32")) if ref else None for ref in (w[name].optional("weight", (c.width,)) for name in ("ls1", "ls2"))]

    def __call__(self, x: Tensor, lo: np.ndarray | Tensor, hi: np.ndarray | Tensor) -> Tensor:      # [n, V]
        x = x + self._scaled(self.attention(self.norm1(x), lo, hi), 0)
        return x + self._scaled(self.feed_forward(self.norm2(x)), 1)

    def among(self, x: Tensor, texts: Texts) -> Tensor:                                    # [m, V] -> [m, V]
        """Apply it to texts that stand side by side."""
        x = x + self._scaled(self.attention.among(self.norm1(x), texts), 0)
        return x + self._scaled(self.feed_forward(self.norm2(x)), 1)

    def _scaled(self, x: Tensor, which: int) -> Tensor:
        return x if self.scales[which] is None else x * self.scales[which]
