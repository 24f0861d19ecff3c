"""Per-layer embeddings: beside the residual stream, each layer gets a small vector of its own for each row (Gemma 3n and 4)."""

from __future__ import annotations

from pyengine import ops
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.batch import Batch
from pyengine.nn.layers import Embedding, Linear, RMSNorm


class PerLayerEmbedding:
    """(norm(projection of x / sqrt(D)) + sqrt(P) row of a table by token) / sqrt(2), a vector of P numbers for each of L layers.

    Rows of media take the table's row of `Architecture.media_id`; their projection is that of their own embedding.
    """

    def __init__(self, w: Weights, n_ids: int, d_model: int, n_layers: int, width: int, eps: float):
        self.n_layers, self.width, self.scale = n_layers, width, d_model**-0.5
        self.table = Embedding(w["per_layer_token_embd"], n_ids, n_layers * width, scale=width**0.5)
        self.projection = Linear(w["per_layer_model_proj"], d_model, n_layers * width)
        self.norm = RMSNorm(w["per_layer_proj_norm"], width, eps)

    def __call__(self, x: Tensor, batch: Batch) -> list[Tensor]:                   # [m, D]
        """Return each layer's vectors [m, P] for the embeddings x."""
        projected = ops.scale(self.projection(x), factor=self.scale)               # [m, L P]
        projected = self.norm(projected.reshape(-1, self.n_layers, self.width)).reshape(-1, self.n_layers * self.width)
        both = ops.scale(projected + self.table(batch.ids if batch.texts is None else batch.texts), factor=2**-0.5)
        return [ops.slice(both, axis=1, start=i * self.width, stop=(i + 1) * self.width) for i in range(self.n_layers)]


class PerLayerGate:
    """norm(projection of act(gate x) * vectors of the layer): what a layer adds at its end."""

    def __init__(self, w: Weights, d_model: int, width: int, eps: float):
        self.gate, self.projection = Linear(w["inp_gate"], d_model, width), Linear(w["proj"], width, d_model)
        self.norm = RMSNorm(w["post_norm"], d_model, eps)

    def __call__(self, x: Tensor, vectors: Tensor) -> Tensor:                      # [m, D], [m, P] -> [m, D]
        return self.norm(self.projection(ops.gelu_tanh(self.gate(x)) * vectors))
