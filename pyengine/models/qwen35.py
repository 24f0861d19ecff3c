"""Qwen3.5 (0.8B to 27B): qwen3next's layers with dense feed-forwards, positions on three axes, and Qwen3-VL's encoder.

Follows transformers 5.23 `modeling_qwen3_5.py`. The encoder and its processor are those of `qwen3vl`, without features for the decoder's
first layers. Files of llama.cpp have the heads of v in another order than checkpoints: those that share a key are G apart. q, k and v of
a delta net, its gates and its decay have a matrix or a vector each.
differs: as in `qwen3next` and `qwen3vl`.
"""

from __future__ import annotations

from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import qwen3next, qwen3vl
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.llama import FeedForward
from pyengine.nn.layers import Linear


class DeltaNet(qwen3next.DeltaNet):
    """Beta and the decay have a matrix each."""

    tiled = True

    def bind_gates(self, w: Weights) -> None:
        """Bind what `gates` reads."""
        self.beta, self.alpha = (Linear(w[name], self.c.d_model, self.c.n_values) for name in ("ssm_beta", "ssm_alpha"))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what beta and the decay are made of, [m, V] each."""
        return self.beta(x), self.alpha(x)


class Model(qwen3vl.Model):
    """A qwen35 decoder."""

    feed_forward = FeedForward
    delta_net = DeltaNet
    block = qwen3next.Model.block
    policies = qwen3next.Model.policies

    def __init__(self, h: Hparams, w: Weights):
        super().__init__(h, w)
        self.ahead, self.without = qwen3next.bind_ahead(self, w), qwen3next.without_ahead(self.config)

    @staticmethod
    def read(h: Hparams, w: Weights) -> qwen3next.Config:
        """Read the keys "qwen35.*"."""
        h.refuse(attention__sliding_window="a sliding window", expert_count="a mixture of experts", n_deepstack_layers="features for first layers")
        return qwen3next.Config(**qwen3next.delta_net(h, w))

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder, where the files hold it."""
        return {"image": qwen3vl.Vision(files)}
