"""Mistral Small 3.1 and 3.2 whole: llama's decoder beside Pixtral's encoder, with a patch merger.

Follows transformers 5.23 `modeling_mistral3.py`; `encoders.pixtral` has the encoder.

Ministral 3, which has the same name in files, scales attention with the position and its rope by a second rule; it is refused.
"""

from __future__ import annotations

from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.models import llama

TEMPERATURE = "attention that is scaled with the position (Ministral 3)"
MAGNITUDE = "rope scaling with a magnitude of its own (Ministral 3)"


class Model(llama.Model):
    """llama's decoder."""

    def __init__(self, h: Hparams, w: Weights):
        h.refuse(attention__temperature_scale=TEMPERATURE, rope__scaling__yarn_log_multiplier=MAGNITUDE)
        super().__init__(h, w)
