"""Qwen3.5: qwen3next's layers with dense feed-forwards or experts, M-RoPE, Qwen3-VL's encoder: `qwen35` and `qwen35moe` in GGUF.

Follows transformers `configuration_qwen3_5.py`, `configuration_qwen3_5_moe.py`; keys and names as llama.cpp's `conversion/qwen.py` has them.
Heads of v that share a key stand side by side in checkpoints, and as many apart as there are keys in files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from .contract import converts, linear
from .decoder import Tensors
from .qwen3 import Qwen3
from .qwen3next import DEFAULTS as QWEN3NEXT
from .qwen3next import DeltaNets, EXPERTS, SharedExperts
from .qwen3vl import DEFAULTS as QWEN3VL
from .qwen3vl import Qwen3Vl, VISION

# transformers' Qwen3_5Config, Qwen3_5TextConfig and Qwen3_5MoeTextConfig where a config.json may be silent
ROOT: dict[str, Any] = {**QWEN3VL, "image_token_id": 248_056, "vision_start_token_id": 248_053, "vision_end_token_id": 248_054}
DEFAULTS: dict[str, Any] = {**QWEN3NEXT, "vocab_size": 248_320}
MOE: dict[str, Any] = {**DEFAULTS, **EXPERTS, "num_experts_per_tok": 8, "num_experts": 256}
SECTIONS = (11, 11, 10)
ROPE_BASE = 10_000.0            # PreTrainedConfig.default_theta


class Heads(DeltaNets):
    """Matrices of their own for q, k and v together, the gate, beta and the decay; heads of v in llama.cpp's order."""

    def value_heads(self, size: int) -> np.ndarray:
        """Return the order of the rows of the heads of v, of so many rows each: the first of each key, then the second ..."""
        rows = np.arange(self.n_values * size).reshape(self.n_keys, self.n_values // self.n_keys, size)
        return rows.swapaxes(0, 1).ravel()

    def products(self, b: str, m: str, qkv: np.ndarray, z: np.ndarray) -> Tensors:
        yield from linear(f"{b}.attn_qkv", f"{m}.in_proj_qkv", len(qkv), self.d_model, row_order=qkv)
        yield from linear(f"{b}.attn_gate", f"{m}.in_proj_z", len(z), self.d_model, row_order=z)
        for name, source in (("ssm_beta", "in_proj_b"), ("ssm_alpha", "in_proj_a")):
            yield from linear(f"{b}.{name}", f"{m}.{source}", self.n_values, self.d_model, row_order=self.value_heads(1))


@converts("Qwen3_5ForCausalLM")
class Qwen35Text(Heads, Qwen3):
    """Without an encoder."""

    arch = "qwen35"
    renames = ((r"^model\.language_model\.", "model."),)
    defaults, rope_base = DEFAULTS, ROPE_BASE

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.read_delta_nets()

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_rope_dimension_sections([*(self.rope.get("mrope_section") or SECTIONS), 0])


@converts("Qwen3_5ForConditionalGeneration")
class Qwen35(Heads, Qwen3Vl):
    arch = "qwen35"
    root_defaults, defaults, rope_base = ROOT, DEFAULTS, ROPE_BASE
    vision_defaults, default_sections = {**VISION, "deepstack_visual_indexes": []}, SECTIONS

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.vision.refuse_unless("deepstack_visual_indexes", [])
        self.read_delta_nets()


@converts("Qwen3_5MoeForCausalLM")
class Qwen35MoeText(SharedExperts, Qwen35Text):
    arch, defaults, width = "qwen35moe", MOE, "moe_intermediate_size"

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.read_experts()


@converts("Qwen3_5MoeForConditionalGeneration")
class Qwen35Moe(SharedExperts, Qwen35):
    arch, defaults, width = "qwen35moe", MOE, "moe_intermediate_size"

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.read_experts()
