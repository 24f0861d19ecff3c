"""Qwen3.5 against transformers; what all models must do is in tests/contract."""

from __future__ import annotations

import re
from typing import Any

import gguf
import numpy as np
import pytest

from cases import Case, Converted
from foreign import head_sizes, Saved, Tensors, text_sizes
from test_qwen2vl import TOKENS
from test_qwen3next import KEYS, norm_mean, plain, TEXT
from test_qwen3vl import CLIP, CLIP_TOKENS, PIXELS, Qwen3Dialect, Qwen3LlamaCpp, Qwen3Sight, VISION

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")


class Qwen35Sight(Qwen3Sight):
    """Qwen3-VL's processor."""

    model_types = ("qwen3_5", "qwen3_5_moe")


QWEN35 = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}}
SEEING = {**QWEN35, "vocab_size": 520, "max_position_embeddings": 512}
SEES = {k: v for k, v in VISION.items() if k != "deepstack_visual_indexes"}
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen35": {},
    "qwen35-equal-heads": {"linear_num_key_heads": 2, "linear_num_value_heads": 2},
    "qwen35-wide-values": {"linear_value_head_dim": 64, "linear_num_value_heads": 3, "linear_conv_kernel_dim": 3},
    "qwen35-layers": {"num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "full_attention"]},
    "qwen35-recurrent-alone-at-the-end": {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"], "tie_word_embeddings": True},
}


def reordered(value: np.ndarray, n_keys: int, n_values: int) -> np.ndarray:
    """Heads of v along the first axis, in llama.cpp's order."""
    return value.reshape(n_keys, n_values // n_keys, -1).swapaxes(0, 1).reshape(value.shape)


def tensor(name: str, value: np.ndarray, config: dict[str, Any]) -> Any:
    """A tensor of the checkpoint as the file has it: heads of v that share a key are as many apart as there are keys."""
    new, value = plain(name, value)
    heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if any(part in name for part in ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias")):
        value = reordered(value, *heads)
    elif "in_proj_qkv" in name or "conv1d" in name:
        n = 2 * heads[0] * config["linear_key_head_dim"]
        value = np.concatenate([value[:n], reordered(value[n:], *heads)])
    elif "linear_attn.out_proj" in name:
        value = reordered(np.ascontiguousarray(value.T), *heads).T
    return new, value


class Qwen35Dialect(Qwen3Dialect):
    """llama.cpp's `conversion/qwen.py` beside Qwen3-VL's encoder; without layers for the prediction of further tokens, which Ollama's
    `convert/convert_qwen3next.go` keeps.
    """

    model_types, arch, names, ollama_arch = ("qwen3_5",), "qwen35", gguf.MODEL_ARCH.QWEN35, "qwen35"

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        text, rope = saved.text, saved.text["rope_parameters"]
        head_sizes(w, text)
        w.add_rope_freq_base(rope["rope_theta"])
        w.add_rope_dimension_sections([*rope["mrope_section"], 0])
        w.add_array(f"{self.arch}.attention.recurrent_layers", [kind == "linear_attention" for kind in text["layer_types"]])
        self.state_keys(w, saved)

    def state_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        text, rope = saved.text, saved.text["rope_parameters"]
        w.add_rope_dimension_count(int(text["head_dim"] * rope["partial_rotary_factor"]))
        w.add_ssm_conv_kernel(text["linear_conv_kernel_dim"])
        w.add_ssm_state_size(text["linear_key_head_dim"])
        w.add_ssm_group_count(text["linear_num_key_heads"])
        w.add_ssm_time_step_rank(text["linear_num_value_heads"])
        w.add_ssm_inner_size(text["linear_value_head_dim"] * text["linear_num_value_heads"])
        w.add_full_attention_interval(4)

    def text_tensor(self, saved: Saved, source: str, value: np.ndarray) -> Tensors:
        name, value = tensor(source, value, saved.text)
        yield name or self.text_name(source), value

    def ollama_sizes(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        heads = [saved.text["num_key_value_heads"] * (kind == "full_attention") for kind in saved.text["layer_types"]]
        text_sizes(w, {**saved.text, "num_key_value_heads": heads, "intermediate_size": saved.text.get("intermediate_size", 0)})

    def ollama_keys(self, w: gguf.GGUFWriter, saved: Saved) -> tuple[dict[str, int], float | None]:
        self.state_keys(w, saved)
        w.add_array(f"{self.arch}.rope.dimension_sections", saved.text["rope_parameters"]["mrope_section"])
        w.add_bool(f"{self.arch}.ssm.v_head_reordered", True)
        return super().ollama_keys(w, saved)

    def ollama_text(self, saved: Saved) -> Tensors:
        yield from ((name.replace("ssm_dt.bias", "ssm_dt"), value) for name, value in self.text_tensors(saved))
        yield "mtp.fc.weight", np.ones((saved.text["hidden_size"], 2 * saved.text["hidden_size"]), np.float32)


class Qwen35MoeDialect(Qwen35Dialect):
    """The same with experts, and no length of a feed-forward without them."""

    model_types, arch, names, feed_forward, ollama_arch = ("qwen3_5_moe",), "qwen35moe", gguf.MODEL_ARCH.QWEN35MOE, "", "qwen35moe"

    def state_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        super().state_keys(w, saved)
        w.add_expert_count(saved.text["num_experts"])
        w.add_expert_used_count(saved.text["num_experts_per_tok"])
        w.add_expert_feed_forward_length(saved.text["moe_intermediate_size"])
        w.add_expert_shared_feed_forward_length(saved.text["shared_expert_intermediate_size"])

    def text_tensor(self, saved: Saved, source: str, value: np.ndarray) -> Tensors:
        one = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)", source.removesuffix(".weight"))
        if one is None:
            yield from super().text_tensor(saved, source, value)
        elif one[2] == "0":
            experts = [saved.tensors[f"{one[1]}.{i}.{one[3]}.weight"] for i in range(saved.text["num_experts"])]
            yield self.text_name(f"{one[1]}.{one[3]}.weight"), np.stack(experts)


def seeing(kind: str, arch: str, name: str, text: dict[str, Any]) -> Case:
    return Case(kind, arch, f"{name}Config", f"{name}ForConditionalGeneration", "qwen35", {"tie_word_embeddings": False}, {**SEEING, **text}, SEES, TOKENS,
                Qwen35Sight(), norm_mean=lambda name: 1.0 if "visual" in name else norm_mean(name), recurrent=True, mrope=True, cached_as="qwen3_5_text",
                converted=Converted({"general.architecture": arch, f"{arch}.rope.dimension_sections": [2, 1, 1, 0], f"{arch}.n_deepstack_layers": 0},
                                    clip={**CLIP, "is_deepstack_layers": [False] * 4}, clip_tokens=CLIP_TOKENS),
                dialect=Qwen35MoeDialect() if arch == "qwen35moe" else Qwen35Dialect(), llama_cpp=Qwen3LlamaCpp((280, 252), PIXELS))


CASES = (
    Case("qwen3_5_text", "qwen35", "Qwen3_5TextConfig", "Qwen3_5ForCausalLM", "qwen35", QWEN35, norm_mean=norm_mean, variants=VARIANTS, recurrent=True, heads=True,
         converted=Converted({**KEYS, "rope.dimension_sections": [2, 1, 1, 0]}, names="QWEN35", tensor=tensor)),
    seeing("qwen3_5", "qwen35", "Qwen3_5", {}),
)
