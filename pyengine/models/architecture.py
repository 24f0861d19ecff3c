"""The contract between an architecture's module and the engine."""

from __future__ import annotations

from typing import Any, ClassVar

from pyengine.cache.policy import Policy
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.batch import Batch
from pyengine.nn.rope import Rope


class Architecture:
    """What a module's class `Model` offers to the engine.

    config           has n_layers, d_model, n_kv_heads, head_dim, vocab_size
    n_ids            ids that a prompt may have; more than `vocab_size` where the embedding has more rows than the output head
    position_axes    rows of `batch.positions` (3 with M-RoPE)
    Vision           the media encoder's class (or a function that makes the one which the files hold), or None
    rope             the rotary embedding of queries and keys

    A `Vision` is made by `Vision(h, v, w, n_ctx, token)`: keys of the text model, keys "clip.*", weights "v.*" and "mm.*", the
    context's size, and a function that gives the id of a special token's text. It has

    image_marker     ids that a chat template writes for one picture, all of which `Processed.parts` replaces
    video_marker     the same for a video, or None
    atomic_rows      most rows of a span that must not be cut, 0 without such spans
    max_rows         most rows of one run of the encoder; a plan may make it smaller before `encode` is called
    rows(w, h)       rows of a picture of w x h pixels, at most
    process(media)   an Image or Video -> Processed, on the host
    encode(graph)    the graph of one run: declares the inputs that `View.inputs` names, returns F32 [rows, d_model]
    """

    config: Any
    position_axes: ClassVar[int] = 1
    Vision: ClassVar[Any] = None
    rope: Rope

    def __init__(self, h: Hparams, w: Weights, n_ctx: int | None = None):
        raise NotImplementedError

    @property
    def n_ids(self) -> int:
        """Rows of the embedding."""
        return self.config.vocab_size

    def cache_policies(self) -> list[Policy]:
        """What each layer's attention needs. The plan says how many encoder rows `Cross` holds."""
        raise NotImplementedError

    def ropes(self) -> list[Rope]:
        """The rotary embedding of each layer's keys: they can be turned on by further positions."""
        return [self.rope] * self.config.n_layers

    def forward(self, batch: Batch, caches: list[Any]) -> tuple[Tensor, Tensor]:
        """The graph of one step: logits [l, vocab] and hidden states of the wanted rows [w, d_model].

        caches: a `LayerCache` each; for layers that attend across a `CrossCache`, or None without an encoder.
        """
        raise NotImplementedError
