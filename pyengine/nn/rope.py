"""Rotary embeddings: tables of angles, and the scalings of files."""

from __future__ import annotations

import math

import numpy as np

from pyengine import ops
from pyengine.errors import InvalidModelError, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import WeightRef, Weights
from pyengine.graph.tensor import Tensor
from pyengine.records import NamedTuple

FACTORS = "rope_freqs", "rope_factors_long", "rope_factors_short"                # tensors that some architectures read


class Rope(NamedTuple):
    """Frequencies of a rotary embedding: `inv_freq` float32 [n_rot / 2]; `scale` multiplies cosines and sines."""

    inv_freq: np.ndarray
    scale: float
    interleaved: bool

    def table(self, positions: Tensor) -> Tensor:                                  # [1, m] -> [m, n_rot]
        return ops.rope_table(positions, self.inv_freq, scale=self.scale)

    def __call__(self, x: Tensor, table: Tensor) -> Tensor:                        # [m, h, e]
        return ops.rope(x, table, interleaved=self.interleaved)


def plain_rope(base: float, n_rot: int, interleaved: bool = False) -> Rope:
    """Return the rotary embedding of n_rot elements without scaling."""
    return Rope((1 / base ** (np.arange(0, n_rot, 2, dtype=np.float32) / n_rot)).astype(np.float32), 1.0, interleaved)


class Rotary(NamedTuple):
    """The rotary embedding that a file describes; `at` gives it for a context's size.

    factors       divisors of the frequencies, up to the context of `original` positions and beyond it; None: none
    """

    rope: Rope
    short: WeightRef | None = None
    long: WeightRef | None = None
    original: int = 0

    def at(self, n_ctx: int) -> Rope:
        """Return the frequencies for contexts of n_ctx positions."""
        ref = self.long if self.long and n_ctx > self.original else self.short
        divisor = ref.floats() if ref else np.float32(1)
        return self.rope._replace(inv_freq=(self.rope.inv_freq / divisor).astype(np.float32))


def rope(h: Hparams, w: Weights, head_dim: int, *, interleaved: bool, base: float = 10_000.0, whole_ramp: bool = True) -> Rotary:
    """Read the rotary embedding that a file describes, with its scaling; `base` is that of a file without the key.

    whole_ramp  yarn's ramp begins and ends at whole numbers of frequencies

    Kinds: none; linear (arXiv:2306.15595), which a factor without a kind means, as in llama.cpp (load_hparams); yarn
    (arXiv:2309.00071; transformers `_compute_yarn_parameters`); llama3, as the tensor `rope_freqs`; longrope (arXiv:2402.13753), as
    `rope_factors_long` and `rope_factors_short`, of which the long one is used for contexts beyond the original one.
    """
    n_rot = h.size("rope.dimension_count", head_dim)
    if n_rot > head_dim or n_rot % 2:
        raise InvalidModelError(f"{h.key('rope.dimension_count')} is {n_rot}, but a head has {head_dim} elements")
    kind = h.get("rope.scaling.type", "linear", str)
    base = h.number("rope.freq_base", base, above=1.0 if kind == "yarn" else 0.0)             # yarn divides by its logarithm
    inv_freq = 1.0 / base ** (np.arange(0, n_rot, 2, dtype=np.float32) / np.float32(n_rot))
    factor = h.number("rope.scaling.factor", 1.0, least=0.0) or 1.0             # 0: none, as in llama.cpp
    scale = 1.0
    if kind == "linear":
        inv_freq = inv_freq / np.float32(factor)
    elif kind == "yarn":
        inv_freq, scale = _yarn(h, inv_freq, base, n_rot, factor, whole_ramp)
    elif kind not in ("none", "llama3", "longrope"):
        raise UnsupportedModelError(f"{h.key('rope.scaling.type')} is {kind!r}; none, linear, yarn, llama3 and longrope are supported")
    if "rope_factors_long" in w:
        scale = h.number("rope.scaling.attn_factor", 1.0, above=0.0)
    return Rotary(Rope(inv_freq, float(scale), interleaved), *_factors(h, w, n_rot))


def _factors(h: Hparams, w: Weights, n_rot: int) -> tuple[WeightRef | None, WeightRef | None, int]:
    """Return the divisors of the frequencies that the file has as tensors, up to a context and beyond it, and that context."""
    llama3, long, short = (w[name].optional("weight", (n_rot // 2,)) for name in FACTORS)
    if long and short:
        return short, long, h.size("rope.scaling.original_context_length")
    return llama3, None, 0


def _yarn(h: Hparams, inv_freq: np.ndarray, base: float, n_rot: int, factor: float, whole_ramp: bool) -> tuple[np.ndarray, float]:
    original = h.size("rope.scaling.original_context_length", h.size("context_length"))
    fast, slow = (h.number(f"rope.scaling.yarn_beta_{end}", n, above=0.0) for end, n in (("fast", 32.0), ("slow", 1.0)))

    def turns(n: float) -> float:
        """Return the frequency number that makes n turns within the original context."""
        return n_rot * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base))

    low, high = turns(fast), turns(slow)
    if whole_ramp:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_rot - 1)
    ramp = np.clip((np.arange(n_rot // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    inv_freq = inv_freq / factor * ramp + inv_freq * (1 - ramp)
    scale, all_dim = h.number("rope.scaling.attn_factor", 1.0, above=0.0), h.number("rope.scaling.yarn_log_multiplier", 0.0)
    return inv_freq, scale * (_magnitude(factor, 1.0) / _magnitude(factor, all_dim) if all_dim else _magnitude(factor, 1.0))


def _magnitude(factor: float, m: float) -> float:
    """Compute yarn's factor on cosines and sines (equation 22), with m as `mscale` in DeepSeek's configs."""
    return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
