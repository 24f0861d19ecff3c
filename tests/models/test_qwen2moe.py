"""Qwen2-MoE: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

import numpy as np

from cases import Case, Converted
from tiny import COMMON

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "rope.dimension_count": 16, "rope.freq_base": 10000.0, "expert_count": 12, "expert_used_count": 4,
        "expert_feed_forward_length": 64, "expert_shared_feed_forward_length": 96}

CASES = (Case(
    "qwen2moe", "qwen2moe", "Qwen2MoeConfig", "Qwen2MoeForCausalLM", "qwen2",
    {**COMMON, "num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    cached_as="qwen2", converted=Converted(KEYS, names="QWEN2MOE")),)
