"""Qwen3-Next: gated delta nets in three of four layers, gated attention in the others, experts in all: `qwen3next` in GGUF.

Follows transformers `configuration_qwen3_next.py`; keys and names as llama.cpp's `conversion/qwen.py` has them: norms with 1 added, -exp(A_log).
The layer that predicts further tokens ("mtp.") becomes the one behind the last, as llama.cpp has it for Qwen3.5;
its converter leaves Qwen3-Next's out, and its reader of those files does not expect it. Where there are several, they are left out, and it says so.
Axes: D hidden; of a delta net G heads of q and k of size S, V heads of size T.
"""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from pyengine.errors import InvalidModelError

from .checkpoint import tensors_beside
from .contract import FLOAT32, Entry, Stack, converts, linear
from .decoder import Decoder, Tensors
from .qwen2moe import write_expert_keys
from .qwen3 import DEFAULTS as QWEN3
from .qwen3 import Qwen3
from .rope import rope_parameters

# transformers' Qwen3NextConfig where a config.json may be silent; its rotary base is PreTrainedConfig's
DEFAULTS: dict[str, Any] = {**QWEN3, "head_dim": 256, "partial_rotary_factor": 0.25, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
                            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32}
EXPERTS: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": True, "moe_intermediate_size": 512,
                           "shared_expert_intermediate_size": 512, "num_experts_per_tok": 10, "num_experts": 512}


class DeltaNets(Decoder):
    """Layers of delta nets and of attention, for classes whose feed-forward is `feed_forward`."""

    norm_offset = 1.0
    leaves = ((r"^(model\.)?mtp\.", "the layers that predict further tokens are left out: it takes one, 'mtp.layers.0' with its 'mtp.fc', to draft"),)

    def read_rope(self) -> dict[str, Any]:
        return rope_parameters(self.config, self.rope_base, part=True)

    def read_delta_nets(self) -> None:
        """Read the sizes of delta nets, and which layers have one. Raises: InvalidModelError."""
        c = self.config
        self.taps, self.n_keys, self.d_key, self.n_values, self.d_value = (c.count(f"linear_{n}") for n in (
            "conv_kernel_dim", "num_key_heads", "key_head_dim", "num_value_heads", "value_head_dim"))
        self.every = c.count("full_attention_interval")
        kinds = c.get("layer_types") or ["linear_attention" if (i + 1) % self.every else "full_attention" for i in range(self.n_layers)]
        if len(kinds) != self.n_layers or not set(kinds) <= {"linear_attention", "full_attention"}:
            raise InvalidModelError(f"{c.file}: 'layer_types' must name linear_attention or full_attention for each of {self.n_layers} layers")
        if self.n_values % self.n_keys or self.taps < 2:
            raise InvalidModelError(f"{c.file}: {self.n_values} heads cannot share {self.n_keys} keys, or a convolution of {self.taps}")
        self.recurrent = [*(kind == "linear_attention" for kind in kinds), False]                # and the layer behind the last
        self.key_width, self.value_width = self.n_keys * self.d_key, self.n_values * self.d_value
        more = {n for n in tensors_beside(c.file) if n.startswith("mtp.")}
        layers = {n.split(".")[2] for n in more if n.startswith("mtp.layers.")}
        self.n_ahead = int(layers == {"0"} and "mtp.fc.weight" in more)

    def tensors(self) -> Tensors:
        yield from super().tensors()
        if self.n_ahead:
            b, d = f"blk.{self.n_layers}", self.d_model
            yield from linear(f"{b}.nextn.eh_proj", "mtp.fc", d, 2 * d)
            for name, source in (("enorm", "pre_fc_norm_embedding"), ("hnorm", "pre_fc_norm_hidden"), ("shared_head_norm", "norm")):
                yield self.norm(f"{b}.nextn.{name}", f"mtp.{source}", d)
            yield from self.layer(self.n_layers, b, "mtp.layers.0")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_ssm_conv_kernel(self.taps)
        out.add_ssm_state_size(self.d_key)
        out.add_ssm_group_count(self.n_keys)
        out.add_ssm_time_step_rank(self.n_values)
        out.add_ssm_inner_size(self.value_width)
        out.add_array(f"{self.arch}.attention.recurrent_layers", self.recurrent[: self.n_layers + self.n_ahead])
        out.add_uint32(f"{self.arch}.full_attention_interval", self.every)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d = self.d_model
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        if self.recurrent[i]:
            yield from self.delta_net(b, f"{m}.linear_attn")
        else:
            yield from linear(f"{b}.attn_q", f"{m}.self_attn.q_proj", 2 * self.q_width, d)
            yield from linear(f"{b}.attn_k", f"{m}.self_attn.k_proj", self.kv_width, d)
            yield from linear(f"{b}.attn_v", f"{m}.self_attn.v_proj", self.kv_width, d)
            yield self.norm(f"{b}.attn_q_norm", f"{m}.self_attn.q_norm", self.head_dim)
            yield self.norm(f"{b}.attn_k_norm", f"{m}.self_attn.k_norm", self.head_dim)
            yield from linear(f"{b}.attn_output", f"{m}.self_attn.o_proj", d, self.q_width)
        yield self.norm(f"{b}.post_attention_norm", f"{m}.post_attention_layernorm", d)
        yield from self.feed_forward(b, f"{m}.mlp")

    def delta_net(self, b: str, m: str) -> Tensors:
        """List a delta net but for its products from D."""
        heads, columns, channels = self.value_heads(1), self.value_heads(self.d_value), 2 * self.key_width + self.value_width
        rows = np.concatenate([np.arange(2 * self.key_width), 2 * self.key_width + columns])
        yield from self.products(b, m, rows, columns)
        yield Entry(f"{b}.ssm_conv1d.weight", f"{m}.conv1d.weight", (channels, self.taps), rows, stored=(channels, 1, self.taps), instead=FLOAT32,
                    make=lambda a: a.reshape(len(a), -1))
        yield Entry(f"{b}.ssm_dt.bias", f"{m}.dt_bias", (self.n_values,), heads)
        yield Entry(f"{b}.ssm_a", f"{m}.A_log", (self.n_values,), heads, make=lambda a: -np.exp(a))
        yield Entry(f"{b}.ssm_norm.weight", f"{m}.norm.weight", (self.d_value,))
        yield Entry(f"{b}.ssm_out.weight", f"{m}.out_proj.weight", (self.d_model, self.value_width), make=lambda a: a[:, columns])

    def value_heads(self, size: int) -> np.ndarray:
        """Return the order of the rows of the heads of v, of so many rows each: as in the checkpoint."""
        return np.arange(self.n_values * size)

    def products(self, b: str, m: str, qkv: np.ndarray, z: np.ndarray) -> Tensors:
        """List the matrices of q, k, v, the gate, beta and the decay. qkv, z: the rows of theirs, as if each was by itself."""
        raise NotImplementedError


class SharedExperts(DeltaNets):
    """Experts, and one that all rows share; in checkpoints a tensor each, or all in one, the gate before up."""

    experts: dict[str, Any] = EXPERTS

    def read_experts(self) -> None:
        """Read the sizes of experts. Raises: UnsupportedModelError."""
        c = self.config
        for name, *allowed in (("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", None, [])):
            c.refuse_unless(name, *allowed)
        self.n_experts, self.d_expert, self.d_shared = (c.count(n) for n in ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size"))
        renames = [(re.compile(old), new) for old, new in self.renames]
        self.joined = {reduce(lambda name, rename: rename[0].sub(rename[1], name), renames, n) for n in tensors_beside(c.file) if n.endswith(".gate_up_proj")}

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        write_expert_keys(out, self.config)

    def feed_forward(self, b: str, m: str) -> Tensors:
        """List the router, the experts and the one that all rows share."""
        d, f, n = self.d_model, self.d_expert, self.n_experts
        yield Entry(f"{b}.ffn_gate_inp.weight", f"{m}.gate.weight", (n, d), instead=FLOAT32)
        for name, shape, first in (("gate", (f, d), 0), ("up", (f, d), f), ("down", (d, f), None)):
            if f"{m}.experts.gate_up_proj" not in self.joined:
                yield Stack(f"{b}.ffn_{name}_exps.weight", tuple(Entry(name, f"{m}.experts.{e}.{name}_proj.weight", shape) for e in range(n)))
            elif first is None:
                yield Entry(f"{b}.ffn_{name}_exps.weight", f"{m}.experts.down_proj", (n, *shape))
            else:
                yield Entry(f"{b}.ffn_{name}_exps.weight", f"{m}.experts.gate_up_proj", (n, *shape), stored=(n, 2 * f, d), middle=first)
        yield from self.gated(b, f"{m}.shared_expert", self.d_shared, kind="_shexp")
        yield Entry(f"{b}.ffn_gate_inp_shexp.weight", f"{m}.shared_expert_gate.weight", (1, d), instead=FLOAT32)


@converts("Qwen3NextForCausalLM")
class Qwen3Next(SharedExperts, Qwen3):
    arch = "qwen3next"
    defaults = {**DEFAULTS, **EXPERTS}

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.read_delta_nets()
        self.read_experts()

    def products(self, b: str, m: str, qkv: np.ndarray, z: np.ndarray) -> Tensors:
        """List the parts of one matrix that has q, k, v and the gate of each key's heads behind each other."""
        d, s, t = self.d_model, self.d_key, self.value_width // self.n_keys
        whole = (2 * self.key_width + 2 * self.value_width, d)
        places = np.arange(whole[0]).reshape(self.n_keys, 2 * s + 2 * t)
        q, k, v, gate = (p.ravel() for p in np.split(places, (s, 2 * s, 2 * s + t), axis=1))
        yield Entry(f"{b}.attn_qkv.weight", f"{m}.in_proj_qkvz.weight", (len(qkv), d), np.concatenate([q, k, v]), stored=whole)
        yield Entry(f"{b}.attn_gate.weight", f"{m}.in_proj_qkvz.weight", (len(z), d), gate, stored=whole)
        yield from linear(f"{b}.ssm_ba", f"{m}.in_proj_ba", 2 * self.n_values, d)
