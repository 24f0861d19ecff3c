"""Ministral 3 without its encoder: `mistral3` in GGUF, with yarn and attention that is scaled with the position.

Follows transformers `configuration_ministral3.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import UnsupportedModelError

from .contract import converts
from .llama import DEFAULTS, Llama

BETA = "llama_4_scaling_beta"
# transformers' Ministral3Config where a config.json may be silent
ROPE: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
                        "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, BETA: 0.1}


@converts("Ministral3ForCausalLM")
class Ministral3(Llama):
    arch = "mistral3"
    defaults = {**DEFAULTS, "rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 8, "rope_parameters": ROPE}

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.config.refuse_unless("attention_bias", False)
        self.config.refuse_unless("mlp_bias", False)
        self.window, self.beta = self.config.get("sliding_window"), self.rope.get(BETA)
        if self.rope["rope_type"] != "yarn" or type(self.beta) not in (int, float):
            raise UnsupportedModelError(f"{file}: rope '{self.rope['rope_type']}' with {BETA!r} {self.beta!r}; this converter knows 'yarn' and a number")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_attn_temperature_scale(float(self.beta))
