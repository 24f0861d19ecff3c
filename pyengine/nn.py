"""Small building blocks that all models share. Each binds its weights by name and shape; calling it adds nodes to a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyengine import ops
from pyengine.dtype import DType, dtype as dtype_of
from pyengine.errors import InvalidModelError, UnsupportedModelError
from pyengine.hparams import Hparams
from pyengine.tensor import Tensor, make_leaf
from pyengine.weights import DerivedRef, WeightRef, Weights


def constant(ref: WeightRef | DerivedRef, dtype: DType | None = None) -> Tensor:
    """A weight as a constant of the graph; with `dtype`, converted when it is loaded."""
    return make_leaf("constant", ref.name, ref.shape, dtype or ref.dtype, ref)


def vocab_size(w: Weights) -> int:
    """Rows of the output head (of the embedding, where they are tied); a vocabulary may have more tokens, or fewer."""
    for name in ("output", "token_embd"):
        shape = w[name].shape("weight")
        if shape is not None and len(shape) == 2:
            return shape[0]
    raise InvalidModelError(f"{w!r}: neither 'output.weight' nor 'token_embd.weight' is a matrix of the file")


def mlp_width(w: Weights, width: int, names: Sequence[str] = ("ffn_up", "ffn_down")) -> int:
    """Units of a feed-forward of two matrices, which is in no key that can be relied on (llama.cpp's for Qwen2-VL holds the text's
    width or 0, Ollama's files have none, and units of zeros may have been added to fill blocks)."""
    shapes = [w[name].shape("weight") for name in names]
    units = {n for s in shapes if s is not None and len(s) == 2 and width in s for n in ((s[1] if s[0] == width else s[0]),)}
    if len(units) != 1 or None in shapes:
        raise InvalidModelError(f"{w!r}: {' and '.join(names)} have shapes {shapes}: a feed-forward of width {width} is needed")
    return units.pop()


class Linear:
    """y = x W^T + b. W [n_out, n_in] in any format; b [n_out] where the file has one."""

    def __init__(self, w: Weights, n_in: int, n_out: int):
        self.weight = constant(w.tensor("weight", (n_out, n_in)))
        bias = w.optional("bias", (n_out,))
        self.bias = constant(bias, dtype_of("F32")) if bias else None

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, n_in] -> [m, n_out]
        return ops.linear(x, [self.weight], None if self.bias is None else [self.bias])[0]


class Experts:
    """Gated feed-forwards of which each row uses some: y[i] = sum over j of gate[i, j] down(act(gate x) * up x) of expert chosen[i, j].

    names  tensors [n_experts, d_ff, d_model], the same again, and [n_experts, d_model, d_ff], in any format; "...weight" is added
    """

    def __init__(self, w: Weights, n_experts: int, d_model: int, d_ff: int,
                 names: tuple[str, str, str] = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), activation: str = "silu"):
        self.gate, self.up, self.down = (constant(w[name].tensor("weight", (n_experts, *shape)))
                                         for name, shape in zip(names, ((d_ff, d_model), (d_ff, d_model), (d_model, d_ff))))
        self.activation = activation

    def __call__(self, x: Tensor, chosen: Tensor, gates: Tensor, *, scale_input: bool = False) -> Tensor:
        """x [m, D]; chosen I32 [m, u] and gates [m, u] as of `ops.top_experts` -> [m, D].

        scale_input  gates multiply what goes into an expert (Llama 4), not what comes out of it
        """
        used, width = chosen.shape[1], x.shape[1]
        if scale_input:
            x = (x.reshape(-1, 1, width) * gates.reshape(-1, used, 1)).reshape(-1, width)      # [m u, D]
        h = ops.expert_linear(x, [self.gate, self.up], chosen, glu=self.activation)            # [m u, F]
        y = ops.expert_linear(h, [self.down], chosen)                                          # [m u, D]
        return ops.sum_experts(y, None if scale_input else gates, n_used=used)                 # [m, D]


def attention_products(*projections: Linear) -> str:
    """How an encoder's attention multiplies, for `ops.attention`: bytes where the weights around it are in blocks, whose products
    round activations to 8 bits too; floats elsewhere, so that F32, F16 and BF16 files give the authors' numbers."""
    return "int8" if all(p.weight.dtype.block > 1 for p in projections) else "float"


class Embedding:
    """Rows of a table [n, d] by token id, times `scale`; negative ids take rows of `media` [e, d] unscaled."""

    def __init__(self, w: Weights, n: int, d: int, scale: float = 1.0):
        self.weight, self.scale = constant(w.tensor("weight", (n, d))), scale

    def __call__(self, ids: Tensor, media: Tensor | None = None) -> Tensor:        # [m] -> [m, d]
        return ops.rows(self.weight, ids, media, scale=self.scale)


class RMSNorm:
    """x / rms(x) * weight over the last axis."""

    def __init__(self, w: Weights, d: int, eps: float):
        self.weight, self.eps = constant(w.tensor("weight", (d,)), dtype_of("F32")), eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)


# names of transformers' `hidden_act` -> kinds of `ops.unary`
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu",
               "relu": "relu"}


class PatchEmbedding(Linear):
    """A convolution whose windows do not overlap, as a product over patches flattened in the order channel, (time,) y, x.

    Tensors `slices` are [width, channels, p, p] each: one for pictures, one a frame where patches span several frames.
    """

    def __init__(self, w: Weights, width: int, channels: int, p: int, slices: Sequence[str] = ("weight",)):
        parts = [w.tensor(name, (width, channels, p, p)) for name in slices]
        shape = (width, len(parts) * channels * p * p)
        if len(parts) == 1:
            self.weight = constant(parts[0]._replace(shape=shape))
        else:
            self.weight = constant(DerivedRef(parts[0].name, shape, tuple(parts), lambda *a: np.stack(a, axis=2).reshape(shape)))
        bias = w.optional("bias", (width,))
        self.bias = constant(bias, dtype_of("F32")) if bias else None


class LayerNorm:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis."""

    def __init__(self, w: Weights, d: int, eps: float):
        f32 = dtype_of("F32")
        self.weight, self.bias = constant(w.tensor("weight", (d,)), f32), constant(w.tensor("bias", (d,)), f32)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class Rope(NamedTuple):
    """Frequencies of a rotary embedding: `inv_freq` float32 [n_rot / 2]; `scale` multiplies cosines and sines."""

    inv_freq: np.ndarray
    scale: float
    interleaved: bool

    def table(self, positions: Tensor) -> Tensor:                                  # [1, m] -> [m, n_rot]
        return ops.rope_table(positions, self.inv_freq, scale=self.scale)

    def __call__(self, x: Tensor, table: Tensor) -> Tensor:                        # [m, h, e]
        return ops.rope(x, table, interleaved=self.interleaved)


def rope(h: Hparams, w: Weights, head_dim: int, *, interleaved: bool, n_ctx: int, base: float = 10_000.0) -> Rope:
    """The rotary embedding that a file describes, with its scaling; `base` is that of a file without the key.

    Kinds: none; linear (arXiv:2306.15595); yarn (arXiv:2309.00071; transformers `_compute_yarn_parameters`); llama3, as the
    tensor `rope_freqs`; longrope (arXiv:2402.13753), as `rope_factors_long` and `rope_factors_short`, of which the long one
    is used when `n_ctx` exceeds the original context.
    """
    n_rot = h.size("rope.dimension_count", head_dim)
    if n_rot > head_dim or n_rot % 2:
        raise InvalidModelError(f"{h.arch}.rope.dimension_count is {n_rot}, but a head has {head_dim} elements")
    base = h.number("rope.freq_base", base)
    inv_freq = 1.0 / base ** (np.arange(0, n_rot, 2, dtype=np.float32) / np.float32(n_rot))
    kind = h.get("rope.scaling.type", "linear" if "rope.scale_linear" in h.meta else "none", str)
    factor = h.number("rope.scaling.factor", h.number("rope.scale_linear", 1.0))
    scale = 1.0
    if kind == "linear":
        inv_freq = inv_freq / np.float32(factor if factor else 1.0)
    elif kind == "yarn":
        inv_freq, scale = _yarn(h, inv_freq, base, n_rot, factor)
    elif kind not in ("none", "", "default", "llama3", "longrope"):              # "", "default": Ollama's words for none
        raise UnsupportedModelError(f"{h.arch}.rope.scaling.type is {kind!r}; none, linear, yarn, llama3 and longrope are supported")
    if "rope_factors_long" in w:
        scale = h.number("rope.scaling.attn_factor", 1.0)
    return Rope((inv_freq / _factors(h, w, n_rot, n_ctx)).astype(np.float32), float(scale), interleaved)


def _factors(h: Hparams, w: Weights, n_rot: int, n_ctx: int) -> Any:
    """Divisors of the frequencies that stand in the file as a tensor, or 1."""
    llama3 = w["rope_freqs"].optional("weight", (n_rot // 2,))
    long = w["rope_factors_long"].optional("weight", (n_rot // 2,))
    short = w["rope_factors_short"].optional("weight", (n_rot // 2,))
    if long and short:
        return (long if n_ctx > h.size("rope.scaling.original_context_length") else short).array().astype(np.float32)
    return llama3.array().astype(np.float32) if llama3 else np.float32(1)


def _yarn(h: Hparams, inv_freq: np.ndarray, base: float, n_rot: int, factor: float) -> tuple[np.ndarray, float]:
    original = h.size("rope.scaling.original_context_length", h.size("context_length"))
    fast, slow = h.number("rope.scaling.yarn_beta_fast", 32.0), h.number("rope.scaling.yarn_beta_slow", 1.0)

    def turns(n: float) -> float:
        """The frequency number that makes n turns within the original context."""
        return n_rot * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(turns(fast)), 0), min(math.ceil(turns(slow)), n_rot - 1)
    ramp = np.clip((np.arange(n_rot // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    inv_freq = inv_freq / factor * ramp + inv_freq * (1 - ramp)
    return inv_freq, h.number("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
