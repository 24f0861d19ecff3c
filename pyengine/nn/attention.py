"""Attention of encoder-decoders: among the rows of a source, to the rows before in a cache, and across to a source's rows."""

from __future__ import annotations

from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.batch import Source
from pyengine.nn.cache import CrossCache, LayerCache
from pyengine.nn.layers import Linear
from pyengine.nn.texts import Texts


class Attention:
    """Queries, keys, values and output in H heads of E elements, which together need not be as wide as the rows.

    bias [H, 2 r + 1], where it is given, is added to scores by how far a key is from its query: `ops.attention`.
    """

    def __init__(self, w: Weights, d_model: int, n_heads: int, head_dim: int, scale: float, name: str = "attn"):
        """Bind the weights "<name>_q", "<name>_k", "<name>_v" and "<name>_o"."""
        width = n_heads * head_dim
        self.q, self.k, self.v = (Linear(w[f"{name}_{part}"], d_model, width) for part in "qkv")
        self.out = Linear(w[f"{name}_o"], width, d_model)
        self.n_heads, self.head_dim, self.scale = n_heads, head_dim, scale

    def _heads(self, x: Tensor) -> Tensor:                                         # [m, H E] -> [m, H, E]
        return x.reshape(-1, self.n_heads, self.head_dim)

    def among(self, x: Tensor, source: Source | Texts, bias: Tensor | None = None) -> Tensor:  # [m, D] -> [m, D]
        """Attend in both directions, to the rows of each row's own text."""
        q, k, v = (self._heads(f(x)) for f in (self.q, self.k, self.v))                        # [m, H, E]
        own = {} if bias is None else {"bias": bias, "at": source.positions}
        return self.out(source.attend(q, k, v, scale=self.scale, **own))

    def before(self, x: Tensor, cache: LayerCache, bias: Tensor | None = None) -> Tensor:      # [m, D] -> [m, D]
        """Attend to the rows before, which the cache holds, and to itself."""
        q, k, v = (self._heads(f(x)) for f in (self.q, self.k, self.v))                        # [m, H, E]
        return self.out(cache.attend(q, k, v, scale=self.scale, bias=bias))

    def across(self, x: Tensor, states: Tensor, cache: CrossCache) -> Tensor:                  # [m, D], [c, D] -> [m, D]
        """Attend to the source's rows, to whose cache `states` are added."""
        q, k, v = self._heads(self.q(x)), self._heads(self.k(states)), self._heads(self.v(states))
        return self.out(cache.attend(q, k, v, scale=self.scale))
