"""OLMoE: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

from cases import Case, Converted
from test_olmo2 import KEYS
from tiny import COMMON

OLMOE = Case(
    "olmoe", "olmoe", "OlmoeConfig", "OlmoeForCausalLM", "dbrx", {**COMMON, "rms_norm_eps": 1e-5, "num_experts": 12, "num_experts_per_tok": 4},
    cached_as="qwen2", converted=Converted(
        {**KEYS, "expert_count": 12, "expert_used_count": 4}, names="OLMOE",
        runs={"olmoe": {"num_key_value_heads": 6}}))         # llama.cpp takes no grouped heads here

CASES = (OLMOE,)
