"""Qwen3-VL with experts: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

from test_qwen3vl import case

CASES = (case("qwen3_vl_moe", "qwen3vlmoe", "Qwen3VLMoe",
              {"num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1}),)
