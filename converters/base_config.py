"""A base model's config.json, as far as names and shapes of its text model's weights need it, from the keys and tensors of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pyengine.files.gguf import GGUFFile

from .contract import supported

# names in configs: the key that has the number, below the architecture's name
NUMBERS = {
    "embedding_length": ("hidden_size", "n_embd"), "feed_forward_length": ("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner"),
    "block_count": ("num_hidden_layers", "n_layer"), "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",), "attention.key_length": ("head_dim", "global_head_dim"), "context_length": ("max_position_embeddings", "n_positions"),
    "expert_count": ("num_experts", "num_local_experts"), "expert_used_count": ("num_experts_per_tok", "top_k_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",), "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "interleave_moe_layer_step": ("interleave_moe_layer_step",), "embedding_length_token": ("word_embed_proj_dim",),
    "attention.sliding_window": ("sliding_window",), "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",), "altup.num_inputs": ("altup_num_inputs",), "altup.active_idx": ("altup_active_idx",),
    "ssm.conv_kernel": ("linear_conv_kernel_dim",), "ssm.group_count": ("linear_num_key_heads",), "ssm.state_size": ("linear_key_head_dim",),
    "ssm.time_step_rank": ("linear_num_value_heads",), "full_attention_interval": ("full_attention_interval",),
}
ROWS = {"vocab_size": "token_embd.weight", "vocab_size_per_layer_input": "per_layer_token_embd.weight", "laurel_rank": "blk.0.laurel_l.weight"}
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
KINDS = {"attention.sliding_window_pattern": ("full_attention", "sliding_attention"), "attention.recurrent_layers": ("full_attention", "linear_attention")}
NORMED = "qwen3moe", "qwen3vlmoe"    # whose converters want to be told that gates add up to 1


def configs_of(model: GGUFFile) -> Iterator[dict[str, Any]]:
    """Yield a config for each class of checkpoints of a file's architecture, those of text models first."""
    meta, tensors = model.metadata, model.tensors
    arch = meta.need("general.architecture", str)
    values = {key: meta.get(f"{arch}.{key}") for key in (*NUMBERS, *KINDS)}
    config: dict[str, Any] = {name: values[key] for key, names in NUMBERS.items() if isinstance(values[key], int) for name in names}
    config |= {name: tensors[tensor].shape[0] for name, tensor in ROWS.items() if tensor in tensors}
    config |= {name: tensor in tensors for name, tensor in BIASES.items()}
    config |= {"tie_word_embeddings": "output.weight" not in tensors, "enable_moe_block": "expert_count" in _below(model, arch)}
    for key, kinds in KINDS.items():
        if isinstance(values[key], np.ndarray):
            config["layer_types"] = [kinds[bool(other)] for other in values[key]]
    config |= _differing(model, arch, values, config)
    if isinstance(inner := meta.get(f"{arch}.ssm.inner_size"), int) and values["ssm.time_step_rank"]:
        config["linear_value_head_dim"] = inner // values["ssm.time_step_rank"]
    if isinstance(sections := meta.get(f"{arch}.rope.dimension_sections"), np.ndarray):
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections[:3].tolist()}
    if isinstance(across := meta.get(f"{arch}.attention.cross_attention_layers"), np.ndarray):
        config["cross_attention_layers"] = across.tolist()
    if arch in NORMED:
        config["norm_topk_prob"] = True
    whole = {**config, "text_config": config, "vision_config": {"out_hidden_size": config.get("hidden_size")}}
    for name, kind in sorted(supported().items(), key=lambda known: not known[0].endswith("ForCausalLM")):
        if getattr(kind, "arch", None) == arch:                                 # others take that of their text model
            yield {**(config if name.endswith("ForCausalLM") else whole), "architectures": [name]}


def _below(model: GGUFFile, arch: str) -> set[str]:
    """Return the keys below the architecture's name."""
    return {key.removeprefix(f"{arch}.") for key in model.metadata}


def _differing(model: GGUFFile, arch: str, values: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return what configs say where layers differ: in widths, heads and their sizes."""
    found: dict[str, Any] = {}
    widths, heads, wide = values["feed_forward_length"], values["attention.head_count_kv"], values["attention.key_length"]
    kinds, narrow = config.get("layer_types") or [], model.metadata.get(f"{arch}.attention.key_length_swa")
    if isinstance(widths, np.ndarray) and len(widths):
        found |= {"intermediate_size": int(widths.min()), "use_double_wide_mlp": int(widths.max()) > int(widths.min())}
    if isinstance(narrow, int) and "full_attention" in kinds and "sliding_attention" in kinds:
        every = heads.tolist() if isinstance(heads, np.ndarray) else [heads] * len(kinds)
        slides, whole = kinds.index("sliding_attention"), kinds.index("full_attention")
        found |= {"num_key_value_heads": every[slides], "head_dim": narrow,
                  "per_layer_config": {str(i): {"num_key_value_heads": every[i], "head_dim": wide} for i, kind in enumerate(kinds) if kind == "full_attention"},
                  "attention_k_eq_v": f"blk.{whole}.attn_v.weight" not in model.tensors}
    if "interleave_moe_layer_step" in config and isinstance(values["expert_feed_forward_length"], int):
        found["intermediate_size"] = values["expert_feed_forward_length"]       # there the experts', and another name for the dense layers'
    return found
