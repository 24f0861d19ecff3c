"""Qwen3.5 with experts: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

from cases import Case, Converted
from test_qwen35 import QWEN35, seeing, tensor
from test_qwen3next import KEYS, MIXTURE, MIXTURE_KEYS, norm_mean

CASES = (
    Case("qwen3_5_moe_text", "qwen35moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", "qwen35", {**QWEN35, **MIXTURE}, norm_mean=norm_mean, recurrent=True, heads=True,
         cached_as="qwen3_5_text",
         converted=Converted({**KEYS, **MIXTURE_KEYS, "feed_forward_length": 64, "rope.dimension_sections": [2, 1, 1, 0]}, names="QWEN35MOE",
                             tensor=tensor)),
    seeing("qwen3_5_moe", "qwen35moe", "Qwen3_5Moe", MIXTURE),
)
