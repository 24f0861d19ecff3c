"""Granite: llama's layout with four multipliers: `granite` in GGUF. Follows transformers `configuration_granite.py`."""

from __future__ import annotations

from gguf import GGUFWriter

from .contract import converts
from .llama import DEFAULTS, Llama

# transformers' GraniteConfig where a config.json may be silent
MULTIPLIERS = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0}


@converts("GraniteForCausalLM")
class Granite(Llama):
    arch = "granite"
    defaults = {**DEFAULTS, **MULTIPLIERS}

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        c = self.config
        out.add_embedding_scale(float(c.need("embedding_multiplier")))
        out.add_logit_scale(float(c.need("logits_scaling")))
        out.add_residual_scale(float(c.need("residual_multiplier")))
        out.add_attention_scale(float(c.need("attention_multiplier")))
