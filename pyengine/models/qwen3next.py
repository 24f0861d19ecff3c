"""Qwen3-Next (80B-A3B): three layers with a gated delta net to one with attention, and experts in every layer.

Gated delta nets arXiv:2412.06464; gated attention arXiv:2505.06708. Follows transformers 5.23 `modeling_qwen3_next.py`. A recurrent layer
keeps the last inputs of a short convolution and a matrix for each head instead of keys and values. Attention has a gate for each
element of its output, whose rows stand in the matrix of q behind each head's, and rotates a part of each head.
Files of llama.cpp: norms have 1 added to their weights, `ssm_a` is -exp(A_log).
differs: rows are taken one after the other (transformers: in chunks of 64), so that results do not depend on how a prompt is cut.
The layer behind the last one (`nextn`), which predicts further tokens (MTP), is a block with attention. Where a file has several of them, the
first drafts every token, as one alone does, and the plan says so: published models have one, llama.cpp takes no more either (`src/models/qwen35.cpp`),
and chains of several are read in different ways by the programs that have them (transformers' MtpModel gives each the states of the one before,
llama.cpp's draft-mtp gives the layers of other architectures those of the decoder).
Axes: m rows of the batch, D hidden; attention: H/K query/KV heads, E head size; delta net: G heads of q and k of size S, V heads of T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pyengine import ops
from pyengine.cache.policy import Full, Policy, Recurrent
from pyengine.dtype import dtype
from pyengine.errors import InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import DerivedRef, Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import qwen2moe, qwen3
from pyengine.nn.ahead import Mtp
from pyengine.nn.cache import LayerCache, RecurrentCache
from pyengine.nn.decoder import common, DecoderConfig, per_layer, used_experts
from pyengine.nn.layers import constant, Linear, RMSNorm
from pyengine.nn.rope import Rope

INTERVAL = 4                     # every n-th layer has attention, in files without the key: full_attention_interval's default in llama.cpp
NORM_EPS = 1e-6                  # of q and k of a delta net; a constant of transformers' `l2norm`


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata; with experts `d_ff` is an expert's."""

    recurrent: tuple[bool, ...]      # layers with a delta net
    taps: int                        # of its convolution
    n_keys: int                      # heads of q and k
    d_key: int
    n_values: int                    # heads of v
    d_value: int
    n_experts: int = 0
    n_used: int = 0                  # experts of a row
    d_shared: int = 0                # width of the expert that all rows share
    n_ahead: int = 0                 # layers behind the last one that predict further tokens
    foreign: bool = False            # the file has some under names of its own, which are not read
    offset: float = 0.0              # of the norms around it

    @property
    def n_channels(self) -> int:
        """Channels of the convolution: q, k and v."""
        return 2 * self.n_keys * self.d_key + self.n_values * self.d_value


def delta_net(h: Hparams, w: Weights, **numbers: Any) -> dict[str, Any]:
    """Read the fields of `Config`, but for the experts'. numbers: for `common`."""
    read = common(h, w, **numbers)
    n_all, n_more = read["n_layers"], h.get("nextn_predict_layers", 0, int)
    if not 0 <= n_more < n_all:
        raise InvalidModelError(f"{h.key('nextn_predict_layers')} is {n_more} of {n_all} layers")
    n_layers, every = n_all - n_more, h.size("full_attention_interval", INTERVAL)
    recurrent = per_layer(h, "attention.recurrent_layers", tuple(i < n_layers and (i + 1) % every != 0 for i in range(n_all)))
    for i in range(n_layers + 1, n_all):
        w["blk", i].leave_out()
    inner, n_values, n_keys = h.size("ssm.inner_size"), h.size("ssm.time_step_rank"), h.size("ssm.group_count")
    if inner % n_values or n_values % n_keys:
        raise InvalidModelError(f"{h.key('ssm.inner_size')} is {inner} for {n_values} heads, which share {n_keys} keys")
    return {**read, "n_layers": n_layers, "recurrent": recurrent[:n_layers], "taps": h.size("ssm.conv_kernel"), "n_keys": n_keys,
            "d_key": h.size("ssm.state_size"), "n_values": n_values, "d_value": inner // n_values, "n_ahead": n_more,
            "foreign": h.get("foreign_nextn", False, bool), "offset": h.number("nextn_norm_offset", 0.0)}


def experts(h: Hparams) -> dict[str, int]:
    """Read the numbers of experts."""
    return {"n_experts": h.size("expert_count"), "n_used": used_experts(h), "d_shared": h.size("expert_shared_feed_forward_length")}


class Mixture(qwen2moe.Mixture):
    """Gates add up to 1."""

    normed = True


class DeltaNet:
    """A short convolution over q, k and v, the gated delta rule, a norm of each head, and a gate."""

    tiled: ClassVar[bool] = False    # head i of v takes head i mod G of q and k, not i // (V / G)

    def __init__(self, w: Weights, c: Config):
        f32, taps = dtype("F32"), w["ssm_conv1d"].tensor("weight", (c.n_channels, c.taps))
        self.c = c
        self.qkv = Linear(w["attn_qkv"], c.d_model, c.n_channels)
        self.z = Linear(w["attn_gate"], c.d_model, c.n_values * c.d_value)
        self.taps = constant(DerivedRef(taps.name, (c.taps, c.n_channels), (taps,), np.transpose))
        self.bias, self.rate = constant(w["ssm_dt"].tensor("bias", (c.n_values,)), f32), constant(w.tensor("ssm_a", (c.n_values,)), f32)
        self.norm = RMSNorm(w["ssm_norm"], c.d_value, c.eps)
        self.out = Linear(w["ssm_out"], c.n_values * c.d_value, c.d_model)
        self.bind_gates(w)

    def bind_gates(self, w: Weights) -> None:
        """Bind what `gates` reads."""
        self.beta_alpha = Linear(w["ssm_ba"], self.c.d_model, 2 * self.c.n_values)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what beta and the decay are made of, [m, V] each: behind each other for the heads of v that share a key."""
        c = self.c
        both = self.beta_alpha(x).reshape(-1, c.n_keys, 2, c.n_values // c.n_keys)             # [m, G, 2, V / G]
        beta, alpha = (ops.contiguous(ops.slice(both, axis=2, start=i, stop=i + 1)).reshape(-1, c.n_values) for i in (0, 1))
        return beta, alpha

    def __call__(self, x: Tensor, cache: RecurrentCache) -> Tensor:                            # [m, D]
        c, (last, matrices), width = self.c, cache.states, self.c.n_keys * self.c.d_key
        mixed, _ = ops.causal_conv(self.qkv(x), self.taps, last, cache.before, cache.after)
        mixed = ops.silu(mixed)                                                                # [m, 2 G S + V T]
        q, k, v = (ops.contiguous(ops.slice(mixed, axis=1, start=a, stop=b)) for a, b in ((0, width), (width, 2 * width), (2 * width, c.n_channels)))
        # x / |x| is x / rms(x) / sqrt(S); queries are divided by sqrt(S) once more
        q, k = (ops.rms_norm(t.reshape(-1, c.n_keys, c.d_key), np.full(c.d_key, c.d_key**power, np.float32), eps=NORM_EPS / c.d_key)
                for t, power in ((q, -1.0), (k, -0.5)))                                        # [m, G, S]
        beta, alpha = self.gates(x)
        y, _ = ops.gated_delta_rule(q, k, v.reshape(-1, c.n_values, c.d_value), ops.softplus(alpha + self.bias) * self.rate, ops.sigmoid(beta),
                                    matrices, cache.before, cache.after, tiled=self.tiled)     # [m, V, T]
        y = self.norm(y) * ops.silu(self.z(x).reshape(-1, c.n_values, c.d_value))
        return self.out(y.reshape(-1, c.n_values * c.d_value))                                 # [m, D]


class Attention:
    """Grouped-query attention with norms of queries and keys, whose output has a gate for each element."""

    def __init__(self, w: Weights, c: Config):
        self.c = c
        self.q = Linear(w["attn_q"], c.d_model, 2 * c.n_heads * c.head_dim)                    # of each head q, then the gate
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.q_norm, self.k_norm = (RMSNorm(w[name], c.head_dim, c.eps) for name in ("attn_q_norm", "attn_k_norm"))
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:    # [m, D]
        c = self.c
        both = self.q(x).reshape(-1, c.n_heads, 2 * c.head_dim)                                # [m, H, 2 E]
        q, gate = (ops.contiguous(ops.slice(both, axis=2, start=a, stop=a + c.head_dim)) for a in (0, c.head_dim))
        k = self.k_norm(self.k(x).reshape(-1, c.n_kv_heads, c.head_dim))                       # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                                    # [m, K, E]
        y = cache.attend(rope(self.q_norm(q), angles), rope(k, angles), v, scale=c.head_dim**-0.5)
        return self.out(y * ops.sigmoid(gate.reshape(-1, c.n_heads * c.head_dim)))             # [m, D]


class Block:
    """Attention or a delta net, and a feed-forward, each behind a norm and added to its input."""

    def __init__(self, w: Weights, c: Config, delta_net: type[DeltaNet] | None, feed_forward: Any):
        self.attn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps)
        self.delta_net = delta_net(w, c) if delta_net else None
        self.attention = None if delta_net else Attention(w, c)
        self.ffn_norm = RMSNorm(w["post_attention_norm"], c.d_model, c.eps)
        self.feed_forward = feed_forward(w, c)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: Any) -> Tensor:           # [m, D]
        y = self.attn_norm(x)
        x = x + (self.attention(y, rope, angles, cache) if self.attention else self.delta_net(y, cache))
        return x + self.feed_forward(self.ffn_norm(x))                                         # [m, D]


def bind_ahead(model: Any, w: Weights) -> Mtp | None:
    """Bind the layer that predicts further tokens, the first where the file has several."""
    c = model.config
    if not c.n_ahead:
        return None
    own = w["blk", c.n_layers]
    return Mtp(own, Block(own, c, None, model.feed_forward), model, c.offset)


def without_ahead(c: Config) -> str:
    """Say what of a file predicts further tokens and is left out."""
    if c.n_ahead > 1:
        return (f"of the file's {c.n_ahead} layers that predict further tokens the first drafts, and the others are left out: programs that run several of them "
                "do not agree on what each reads")
    return ("the file's layers that predict further tokens are left out: they have names of Ollama's (mtp.*), and experts apart; llama.cpp's files, which have "
            "one as nextn, draft with it") if c.foreign else ""


class Model(qwen3.Model):
    """A qwen3next decoder."""

    feed_forward = Mixture
    delta_net: ClassVar[type[DeltaNet]] = DeltaNet

    def __init__(self, h: Hparams, w: Weights):
        super().__init__(h, w)
        self.ahead, self.without = bind_ahead(self, w), without_ahead(self.config)

    @staticmethod
    def read(h: Hparams, w: Weights) -> Config:
        """Read the keys "qwen3next.*"."""
        h.refuse(attention__sliding_window="a sliding window")
        return Config(**delta_net(h, w, d_ff="expert_feed_forward_length"), **experts(h))

    def block(self, w: Weights, i: int) -> Block:
        """Bind layer i."""
        return Block(w, self.config, self.delta_net if self.config.recurrent[i] else None, self.feed_forward)

    def policies(self) -> list[Policy]:
        """Return what each layer keeps: keys and values, or the convolution's inputs and the matrices of a delta net."""
        c = self.config
        states = Recurrent(((c.taps - 1, c.n_channels), (c.n_values, c.d_key * c.d_value)))
        return [states if recurrent else Full() for recurrent in c.recurrent]
