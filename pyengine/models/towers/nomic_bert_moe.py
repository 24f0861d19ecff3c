"""nomic-embed-text v2: nomic-bert with biases, plain feed-forwards, and experts in the place of every second one.

Nussbaum and Duderstadt 2025, arXiv:2502.07972. Follows the authors' `modeling_hf_nomic_bert.py` (huggingface.co/nomic-ai/nomic-bert-2048), as transformers has no
such class; files are llama.cpp's `nomic-bert-moe`. Gates are a softmax over all experts, of which a row's largest are taken as they are.
differs from llama.cpp: what is added behind the experts ("ffn_exps.bias", ours) is kept; it leaves it out. Its GELU is the tanh one, the authors' is not.
Axes: m rows of all texts, D hidden.
"""

from __future__ import annotations

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import Towers
from pyengine.models.towers import nomic_bert
from pyengine.nn.decoder import used_experts
from pyengine.nn.layers import constant, Experts, Linear
from pyengine.nn.text_encoder import PostNormBlock


class Mixture:
    """Plain feed-forwards of which a router picks some for each row, and a row that is added to their sum."""

    def __init__(self, h: Hparams, w: Weights, width: int, d_ff: int, act: str):
        n, self.n_used = h.size("expert_count"), used_experts(h)
        self.router = Linear(w["ffn_gate_inp"], width, n)
        self.experts = Experts(w, n, width, d_ff, ("ffn_up_exps", "ffn_down_exps"), activation=act)
        bias = w["ffn_exps"].optional("bias", (width,))
        self.bias = None if bias is None else constant(bias, dtype("F32"))

    def __call__(self, x: Tensor) -> Tensor:                                               # [m, D] -> [m, D]
        y = self.experts(x, *ops.top_experts(self.router(x), n_used=self.n_used, gate="softmax", normed=False))
        return y if self.bias is None else y + self.bias


class Text(nomic_bert.Text):
    """The one tower."""

    act = "gelu"

    def block(self, h: Hparams, w: Weights, i: int, sizes: tuple[int, int, int], eps: float) -> PostNormBlock:
        """Bind layer i, which has experts where its number in a group is 1. sizes: (D, F, H)."""
        mixed = i % h.size("moe_every_n_layers") == 1
        return PostNormBlock(w, sizes, eps, self.act, mixture=Mixture(h, w, *sizes[:2], self.act) if mixed else None)


class Model(Towers):
    """A nomic-bert encoder with experts."""

    def __init__(self, h: Hparams, w: Weights):
        self.read_texts(Text(h, w))
