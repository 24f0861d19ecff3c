"""Small building blocks that all models share. Each binds its weights by name and shape; calling it adds nodes to a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyengine import ops
from pyengine.dtype import DType, dtype as dtype_of
from pyengine.errors import InvalidModelError
from pyengine.files.weights import DerivedRef, WeightRef, Weights
from pyengine.graph.tensor import make_leaf, Tensor


def constant(ref: WeightRef | DerivedRef, dtype: DType | None = None) -> Tensor:
    """Return a weight as a constant of the graph; with `dtype`, converted when it is loaded."""
    return make_leaf("constant", ref.name, ref.shape, dtype or ref.dtype, ref)


def scalar(w: Weights, name: str) -> Tensor:
    """Return a number [1] of the file that whole tensors are multiplied with, as float32."""
    return constant(w.tensor(name, (1,)), dtype_of("F32"))


def mlp_width(w: Weights, width: int, names: Sequence[str] = ("ffn_up", "ffn_down")) -> int:
    """Return the number of units of a feed-forward of two matrices, for which no key can be relied on (llama.cpp's for Qwen2-VL
    holds the text's width or 0, Ollama's files have none, and units of zeros may have been added to fill blocks)."""
    shapes = [w[name].shape("weight") for name in names]
    units = {n for s in shapes if s is not None and len(s) == 2 and width in s for n in ((s[1] if s[0] == width else s[0]),)}
    if len(units) != 1 or None in shapes:
        raise InvalidModelError(f"{w.place}: {' and '.join(names)} have shapes {shapes}: a feed-forward of width {width} is needed")
    return units.pop()


class Linear:
    """y = x W^T + b. W [n_out, n_in] in any format; b [n_out] where the file has one."""

    def __init__(self, w: Weights, n_in: int, n_out: int):
        self._hold(w.tensor("weight", (n_out, n_in)), w.optional("bias", (n_out,)))

    @classmethod
    def of(cls, weight: WeightRef, bias: WeightRef | None) -> Linear:
        """Make one of tensors that do not stand together, as of an output head that shares the embedding's matrix."""
        made = cls.__new__(cls)
        made._hold(weight, bias)
        return made

    def _hold(self, weight: WeightRef, bias: WeightRef | None) -> None:
        self.weight = constant(weight)
        self.bias = constant(bias, dtype_of("F32")) if bias else None

    @classmethod
    def several(cls, w: Weights, n_in: int, sizes: Sequence[int]) -> list[Linear]:
        """Bind a matrix of the file that holds several, one below the other (q, k and v; gate and up)."""
        weight, bias = w.tensor("weight", (sum(sizes), n_in)), w.optional("bias", (sum(sizes),))
        made = []
        for i, n in enumerate(sizes):
            first = sum(sizes[:i])
            made.append(cls.of(weight.rows(first, n), bias and bias.rows(first, n)))
        return made

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, n_in] -> [m, n_out]
        return ops.linear(x, [self.weight], None if self.bias is None else [self.bias])[0]


class ClippedLinear(Linear):
    """The same with input and result kept within bounds [1], where the file has them: input_min, input_max, output_min, output_max."""

    def __init__(self, w: Weights, n_in: int, n_out: int):
        super().__init__(w, n_in, n_out)
        self.bounds = {name: scalar(w, name) if name in w else None for name in ("input_min", "input_max", "output_min", "output_max")}

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, n_in] -> [m, n_out]
        return self._clipped(super().__call__(self._clipped(x, "input")), "output")

    def _clipped(self, x: Tensor, what: str) -> Tensor:
        for end, kind in (("min", "max"), ("max", "min")):                         # at least the smallest, at most the largest
            bound = self.bounds[f"{what}_{end}"]
            x = x if bound is None else ops.binary(x, bound, kind=kind)
        return x


class Experts:
    """Gated feed-forwards of which each row uses some: y[i] = sum over j of gate[i, j] down(act(gate x) * up x) of expert chosen[i, j].

    names  tensors [n_experts, d_ff, d_model], the same again, and [n_experts, d_model, d_ff], in any format; "...weight" is added. Without the gate's
           feed-forwards are plain: down(act(up x))
    both   the name of a tensor [n_experts, 2 d_ff, d_model] that a file may have instead of the first two: the gate's rows come first
    """

    def __init__(self, w: Weights, n_experts: int, d_model: int, d_ff: int, names: tuple[str, ...] = (
            "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), activation: str = "silu", both: str = "ffn_gate_up_exps"):
        self.gated = len(names) > 2
        shapes = {**{name: (d_ff, d_model) for name in names[:-1]}, names[-1]: (d_model, d_ff)}
        if self.gated and both in w:
            shapes = {both: (2 * d_ff, d_model), names[2]: (d_model, d_ff)}
        *self.into, self.down = (constant(w[name].tensor("weight", (n_experts, *shape))) for name, shape in shapes.items())
        self.activation, self.d_ff = activation, d_ff

    def __call__(self, x: Tensor, chosen: Tensor, gates: Tensor, *, scale_input: bool = False) -> Tensor:
        """Apply the chosen experts to x [m, D]; chosen I32 [m, u] and gates [m, u] as of `ops.top_experts` -> [m, D].

        scale_input  gates multiply an expert's input (Llama 4), not its output
        """
        used, width = chosen.shape[1], x.shape[1]
        if scale_input:
            x = (x.reshape(-1, 1, width) * gates.reshape(-1, used, 1)).reshape(-1, width)      # [m u, D]
        if not self.gated:
            h = ops.unary(ops.expert_linear(x, self.into, chosen), kind=self.activation)       # [m u, F]
        elif len(self.into) == 2:
            h = ops.expert_linear(x, self.into, chosen, glu=self.activation)                   # [m u, F]
        else:
            h = ops.expert_linear(x, self.into, chosen)                                        # [m u, 2 F]
            gate, up = (ops.slice(h, axis=1, start=i * self.d_ff, stop=(i + 1) * self.d_ff) for i in range(2))
            h = ops.unary(ops.contiguous(gate), kind=self.activation) * up                     # [m u, F]
        y = ops.expert_linear(h, [self.down], chosen)                                          # [m u, D]
        return ops.sum_experts(y, None if scale_input else gates, n_used=used)                 # [m, D]


class Embedding:
    """Rows of a table [n, d] by token id, times `scale`; negative ids take rows of `media` [e, d] unscaled."""

    def __init__(self, w: Weights, n: int, d: int, scale: float = 1.0):
        self.weight, self.scale = constant(w.tensor("weight", (n, d))), scale

    def __call__(self, ids: Tensor, media: Tensor | None = None) -> Tensor:        # [m] -> [m, d]
        return ops.rows(self.weight, ids, media, scale=self.scale)


class RMSNorm:
    """x / rms(x) * (weight + offset) over the last axis."""

    def __init__(self, w: Weights, d: int, eps: float, offset: float = 0.0):
        ref = w.tensor("weight", (d,))
        self.weight, self.eps = constant(DerivedRef(ref.name, ref.shape, (ref,), lambda a: a + np.float32(offset)) if offset else ref, dtype_of("F32")), eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)


# names of transformers' `hidden_act` -> kinds of `ops.unary`
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu",
               "relu": "relu"}


class PatchEmbedding(Linear):
    """A convolution whose windows do not overlap, as a product over patches flattened in the order channel, (time,) y, x.

    Tensors `slices` are [width, channels, p, p] each: one for pictures, one a frame where patches span several frames, which the first may
    hold together, [width, channels, frames, p * p].
    """

    def __init__(self, w: Weights, width: int, channels: int, p: int, slices: Sequence[str] = ("weight",)):
        shape, together = (width, len(slices) * channels * p * p), (width, channels, len(slices), p * p)
        if len(slices) > 1 and slices[1] not in w and w.shape(slices[0]) == together:
            whole = w.tensor(slices[0], together)
            self.weight = constant(DerivedRef(whole.name, shape, (whole,), lambda a: a.reshape(shape)))
        elif len(parts := [w.tensor(name, (width, channels, p, p)) for name in slices]) == 1:
            self.weight = constant(parts[0]._replace(shape=shape))
        else:
            self.weight = constant(DerivedRef(parts[0].name, shape, tuple(parts), lambda *a: np.stack(a, axis=2).reshape(shape)))
        bias = w.optional("bias", (width,))
        self.bias = constant(bias, dtype_of("F32")) if bias else None


class LayerNorm:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. biased: whether there is a bias; None: where the file has one."""

    def __init__(self, w: Weights, d: int, eps: float, biased: bool | None = True):
        f32, self.eps = dtype_of("F32"), eps
        self.weight = constant(w.tensor("weight", (d,)), f32)
        bias = w.tensor("bias", (d,)) if biased else w.optional("bias", (d,)) if biased is None else None
        self.bias = constant(bias, f32) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)
