"""gpt-oss: what all models must do is in tests/contract; this file declares what it does it with, and reads checkpoints in MXFP4."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted
from converters import convert
from hollow import Decoder, Full, kv, Tensor
from tiny import COMMON, make_checkpoint

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 64,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "rope.dimension_count": 32, "rope.freq_base": 10000.0, "attention.sliding_window": 6, "attention.sliding_window_pattern": [True, False, True],
        "expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 64, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0,
        "truncate": False}
NAMES = {"self_attn.sinks": "attn_sinks.weight", "mlp.router.weight": "ffn_gate_inp.weight", "mlp.router.bias": "ffn_gate_inp.bias",
         "post_attention_layernorm": "post_attention_norm.weight", "experts.down_proj_bias": "ffn_down_exps.bias"}


def parted(name: str, value: np.ndarray, config: dict[str, Any]) -> Any:
    """Rows of gate and up lie in turns; matrices of experts are transposed."""
    layer = f"blk.{name.split('.')[2]}." if "layers" in name else ""
    if "gate_up_proj" in name:
        kind, value = ("bias", value) if name.endswith("bias") else ("weight", value.swapaxes(1, 2))
        return [(f"{layer}ffn_{part}_exps.{kind}", value[:, i::2]) for i, part in enumerate(("gate", "up"))]
    if name.endswith("experts.down_proj"):
        return f"{layer}ffn_down_exps.weight", value.swapaxes(1, 2)
    return next((layer + ours for theirs, ours in NAMES.items() if theirs in name), None), value


@dataclass(frozen=True)
class GptOss(Decoder):
    """Experts in MXFP4 in every layer, the rest as asked; `d_ff` is the width of each."""

    n_experts: int = 0

    def tensors(self, dtype: str) -> Iterator[Tensor]:
        """List the decoder's tensors; router, biases and sinks stay in F32."""
        for name, shape, kind in super().tensors(dtype):
            block, _, part = name.removesuffix(".weight").rpartition(".")
            if part in ("ffn_gate", "ffn_up", "ffn_down"):
                yield f"{block}.{part}_exps.weight", (self.n_experts, *shape), "MXFP4"
                yield f"{block}.{part}_exps.bias", (self.n_experts, shape[0]), "F32"
            else:
                yield name, shape, kind
            if part == "attn_norm":
                yield f"{block}.attn_output.bias", (self.d_model,), "F32"
                yield f"{block}.attn_sinks.weight", (self.n_heads,), "F32"
                yield f"{block}.ffn_gate_inp.weight", (self.n_experts, self.d_model), "F32"
                yield f"{block}.ffn_gate_inp.bias", (self.n_experts,), "F32"

    def metadata(self) -> dict[str, Any]:
        """Return its keys."""
        return {**super().metadata(), "gpt-oss.expert_count": self.n_experts, "gpt-oss.expert_used_count": 4,
                "gpt-oss.expert_feed_forward_length": self.d_ff, "gpt-oss.attention.sliding_window": 128}


def full(n_layers: int, n_experts: int) -> Full:
    return Full(GptOss("gpt-oss", n_layers, 2880, 2880, 64, 8, 64, 201_088, 131_072, biases=True, norms=("attn_norm", "post_attention_norm"),
                       n_experts=n_experts), dtype="Q8_0")


CASES = (Case(
    "gpt_oss", "gpt-oss", "GptOssConfig", "GptOssForCausalLM", "llama-bpe",
    {**COMMON, "intermediate_size": 64, "head_dim": 32, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 6,
     "rope_parameters": YARN},
    ring=True, cached_as="gemma3_text", experts_axis=1, converted=Converted(
        KEYS, names="GPT_OSS", tensor=parted,               # llama.cpp rounds the ends of yarn's ramp, which the checkpoint does not
        runs={"gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}}),
    full={"gpt-oss-20b": full(24, 32), "gpt-oss-120b": full(36, 128)}),)


def test_experts_in_mxfp4_are_the_checkpoints(tmp_path) -> None:
    """Published checkpoints hold experts in blocks of MXFP4; transformers' own code says what they are."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = make_checkpoint("gpt_oss", tmp_path / "c")
    tensors, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    blocks, dense = dict(tensors), dict(tensors)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        e, k, n = tensors[name].shape
        codes = torch.randint(0, 256, (e, n, k // 32, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(119, 124, (e, n, k // 32), generator=random, dtype=torch.uint8)
        del blocks[name]
        blocks[f"{name}_blocks"], blocks[f"{name}_scales"] = codes, scales
        dense[name] = convert_moe_packed_tensors(codes, scales, dtype=torch.float32).contiguous()
    assert dense[name].shape == tensors[name].shape
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    ids = np.random.default_rng(0).integers(0, 512, 40).tolist()
    want = tiny.hf_logits(folder, ids)
    save_file(blocks, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    path = convert(folder, tmp_path / "m.gguf", "f32")
    read = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, part in (("gate", np.s_[:, :, ::2]), ("up", np.s_[:, :, 1::2])):
        t, whole = read[f"blk.1.ffn_{name}_exps.weight"], dense["model.layers.1.mlp.experts.gate_up_proj"].numpy()
        assert t.tensor_type == gguf.GGMLQuantizationType.MXFP4
        assert np.array_equal(gguf.dequantize(t.data, t.tensor_type), whole[part].swapaxes(1, 2))
    got = pe.load(path, n_ctx=64, kv_dtype="f32").logits(ids)
    assert np.abs(got - want).max() / np.ptp(want) < 0.02        # products with blocks round activations to 8 bits
    assert np.corrcoef(got.reshape(-1), want.reshape(-1))[0, 1] > 0.9995


def test_ollamas_published_file(tiny_gguf, tmp_path) -> None:
    """Ollama's gpt-oss: another name of the architecture and of some tensors; llama-ollama-compat.cpp lists them."""
    path, _ = tiny_gguf("gpt_oss")
    reader = gguf.GGUFReader(path)
    out = gguf.GGUFWriter(tmp_path / "ollama.gguf", "gptoss")
    left_out = ("general.architecture", "rope.scaling.type", "expert_feed_forward_length", "sliding_window_pattern", "GGUF.", "tokenizer.ggml.pre")
    for key, field in reader.fields.items():
        if not key.endswith(left_out) and not key.startswith("GGUF."):
            kind = field.types[0]
            out.add_key_value(key.replace("gpt-oss.", "gptoss."), field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    out.add_string("tokenizer.ggml.pre", "default")
    names = {"attn_output": "attn_out", "attn_sinks.weight": "attn_sinks", "post_attention_norm": "ffn_norm"}
    for t in reader.tensors:
        name = next((t.name.replace(ours, theirs) for ours, theirs in names.items() if ours in t.name), t.name)
        out.add_tensor(name, t.data, raw_dtype=t.tensor_type)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    ids = list(range(40))
    theirs, ours = pe.load(tmp_path / "ollama.gguf", n_ctx=64), pe.load(path, n_ctx=64)
    assert np.array_equal(theirs.logits(ids), ours.logits(ids))
    assert theirs.file.metadata["tokenizer.ggml.pre"] == "gpt-4o"


@pytest.mark.parametrize("name, n_layers, n_experts, billions", [("gpt-oss-20b", 24, 32, 12.1), ("gpt-oss-120b", 36, 128, 63.4)])
def test_full_size_by_hand(full_size, machine, name: str, n_layers: int, n_experts: int, billions: float) -> None:
    """2 KiB a token and layer in f16; every second layer sees 128 tokens only. A row of an expert is 90 blocks of 17 bytes."""
    machine(96 * 2**30)
    path, _ = full_size(name)
    plan = pe.plan(path, n_ctx=131_072, device="cpu")
    token = 8 * 64 * 2 * 2
    assert kv(plan) == {"Full": n_layers // 2 * 131_072 * token, "Sliding": n_layers // 2 * (128 + plan.n_batch) * token}
    group = -(-16 * 2880 // 32 * 17 // 64) * 64                          # of 16 rows, which begins at a line of the cache
    expert = 3 * 2880 // 16 * group
    bias = 3 * 2880 * 4
    mixtures = [i.nbytes for i in plan.items if i.purpose == "weights" and any("_exps.weight" in part for part, _ in i.parts)]
    assert mixtures == [n_experts * expert] * n_layers                   # rows of biases are read from the mapped file
    q, k = 64 * 64, 8 * 64
    attention = (2 * 2880 * q + 2 * 2880 * k) // 32 * 34 + 4 * (q + 2 * k + 2880 + 64 + 2 * 2880 + n_experts * 2881)
    table = 201_088 * 2880 // 32 * 34
    whole = n_layers * (n_experts * (expert + bias) + attention) + 2 * table + 4 * 2880
    assert abs(plan.of("weights") + plan.of("mapped") - whole) < 40 * 2**20                  # the file's header, rows in groups of 16
    assert abs(whole / 1e9 - billions) < 0.1
