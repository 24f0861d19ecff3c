"""Mistral Small 3.1 and 3.2, Ministral 3: llama's decoder beside Pixtral's encoder, with a patch merger.

Follows transformers 5.23 `modeling_mistral3.py`, `modeling_ministral3.py`; `encoders.pixtral` has the encoder. Ministral 3 multiplies its
rotated queries by 1 + beta log(1 + position // n), where n is the context that rope was trained with.

As in llama.cpp, the key of beta is attention.temperature_scale and n is rope.scaling.original_context_length.
"""

from __future__ import annotations

from pyengine import ops
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import llama
from pyengine.nn.batch import Batch


class Model(llama.Model):
    """llama's decoder, whose queries may grow with distance."""

    def __init__(self, h: Hparams, w: Weights):
        super().__init__(h, w)
        self.beta = h.number("attention.temperature_scale", 0.0)
        self.original = h.size("rope.scaling.original_context_length", h.size("context_length"))

    def factors(self, batch: Batch) -> Tensor | None:
        """Return how much sharper attention becomes with distance, [m, 1, 1]."""
        if not self.beta:
            return None
        return ops.temperature(batch.positions, floor=self.original, scale=self.beta, offset=0).reshape(-1, 1, 1)
