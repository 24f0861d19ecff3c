"""NVLM-D, -X and -H in torch, from their paper (arXiv:2409.11402) and the description of NVLM-D's checkpoint: transformers has none of them.

Names of parameters are those of nvidia/NVLM-D-72B, and of ours for the gated layers that were never published. `register` makes transformers'
automatic classes find them. The decoder's layers, and the tiles' pixels, are those of transformers.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tiny import OWN


class NvlmConfig(transformers.PretrainedConfig):
    model_type = "NVLM_D"

    def __init__(self, text_config: dict[str, Any] | None = None, vision_config: dict[str, Any] | None = None, **values: Any):
        text = {**(text_config or values.pop("llm_config", {})), "model_type": "llama", "architectures": ["Qwen2ForCausalLM"]}
        super().__init__(**values, llm_config=text, vision_config=vision_config or {})


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class EncoderLayer(nn.Module):
    def __init__(self, v: dict[str, Any]):
        super().__init__()
        d, self.heads = v["hidden_size"], v["num_attention_heads"]
        self.norm1, self.norm2 = RmsNorm(d, v["layer_norm_eps"]), RmsNorm(d, v["layer_norm_eps"])
        self.ls1, self.ls2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.attn.q_norm, self.attn.k_norm = RmsNorm(d), RmsNorm(d)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(d, v["intermediate_size"]), nn.Linear(v["intermediate_size"], d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.attn.q_norm(q), self.attn.k_norm(k), v))
        y = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + self.attn.proj(y.transpose(1, 2).flatten(2)) * self.ls1
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))) * self.ls2


class CrossLayer(nn.Module):
    """Gated cross-attention and a gated feed-forward (arXiv:2204.14198, figure 4), for rows that see something."""

    def __init__(self, c: Any):
        super().__init__()
        d, self.heads, self.kv = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
        e = d // self.heads
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(d, c.rms_norm_eps), RmsNorm(d, c.rms_norm_eps)
        self.cross_attn = nn.ModuleDict({"q_proj": nn.Linear(d, d, bias=False), "k_proj": nn.Linear(d, self.kv * e, bias=False),
                                         "v_proj": nn.Linear(d, self.kv * e, bias=False), "o_proj": nn.Linear(d, d, bias=False)})
        f = c.intermediate_size
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(d, f, bias=False), "up_proj": nn.Linear(d, f, bias=False), "down_proj": nn.Linear(f, d, bias=False)})
        self.attn_gate, self.mlp_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, seen: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        """x [n, D], encoder rows [r, D], bool [n, r]."""
        a, group, some = self.cross_attn, self.heads // self.kv, sees.any(-1, keepdim=True)
        if not len(seen):
            return x
        q, k, v = (f(y).unflatten(-1, (h, -1)).transpose(0, 1) for f, y, h in (
            (a["q_proj"], self.input_layernorm(x), self.heads), (a["k_proj"], seen, self.kv), (a["v_proj"], seen, self.kv)))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~(sees | ~some), -math.inf)
        y = x + a["o_proj"]((scores.softmax(-1) @ v).transpose(0, 1).flatten(1)) * self.attn_gate.tanh()
        h = self.post_attention_layernorm(y)
        y = y + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h)) * self.mlp_gate.tanh()
        return torch.where(some, y, x)


class NVLM_D(transformers.PreTrainedModel):      # noqa: N801  the authors' name
    config_class = NvlmConfig
    gated = False

    def __init__(self, config: NvlmConfig):
        super().__init__(config)
        v, text = config.vision_config, transformers.Qwen2Config(**{k: x for k, x in config.llm_config.items() if k not in ("model_type", "architectures")})
        text._attn_implementation = "eager"
        d, side = v["hidden_size"], v["image_size"] // v["patch_size"]
        self.vision_model, at = nn.Module(), nn.Module()
        at.class_embedding, at.position_embedding = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(torch.zeros(1, side**2 + 1, d))
        at.patch_embedding = nn.Conv2d(3, d, v["patch_size"], v["patch_size"])
        self.vision_model.embeddings, self.vision_model.encoder = at, nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList([EncoderLayer(v) for _ in range(v["num_hidden_layers"])])
        units = text.intermediate_size
        self.mlp1 = nn.Sequential(nn.LayerNorm(4 * d), nn.Linear(4 * d, units, bias=False), nn.GELU(), nn.Linear(units, text.hidden_size, bias=False))
        self.language_model = transformers.Qwen2ForCausalLM(text)
        if self.gated:
            self.language_model.model.cross_layers = nn.ModuleList([CrossLayer(text) for _ in config.cross_attention_layers])
        self.post_init()

    def get_output_embeddings(self) -> Any:
        return self.language_model.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        """Random values are the test's."""

    def rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tiles [t, 3, s, s] -> rows [t, n / 4, D]."""
        at = self.vision_model.embeddings
        x = at.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([at.class_embedding.expand(len(x), -1, -1), x], 1) + at.position_embedding
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        side = math.isqrt(x.shape[1])
        x = x[:, 1:].unflatten(1, (side // 2, 2, side // 2, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)     # groups of 2 x 2, row by row
        return self.mlp1(x)

    def forward(self, input_ids: torch.Tensor, soft: torch.Tensor, seen: torch.Tensor, sees: torch.Tensor, pad: int) -> Any:
        """soft [k, D]: rows for the ids `pad`; seen [r, D], sees bool [n, r]: what gated layers see."""
        inner = self.language_model.model
        x = inner.embed_tokens(input_ids)
        if len(soft):
            x[input_ids == pad] = soft
        n = x.shape[1]
        at, mask = torch.arange(n)[None], torch.full((n, n), -math.inf).triu(1)[None, None]
        angles, gated = inner.rotary_emb(x, at), iter(getattr(inner, "cross_layers", ()))
        for i, layer in enumerate(inner.layers):
            if self.gated and i in self.config.cross_attention_layers:
                x = next(gated)(x[0], seen, sees)[None]
            x = layer(x, attention_mask=mask, position_ids=at, position_embeddings=angles)
            x = x[0] if isinstance(x, tuple) else x
        return SimpleNamespace(logits=self.language_model.lm_head(inner.norm(x)))


class NVLM_X(NVLM_D):      # noqa: N801
    gated = True


class NVLM_H(NVLM_D):      # noqa: N801
    gated = True


class NvlmXConfig(NvlmConfig):
    model_type = "NVLM_X"

    def __init__(self, **values: Any):             # transformers would write one of its own
        super().__init__(**values)


class NvlmHConfig(NvlmConfig):
    model_type = "NVLM_H"

    def __init__(self, **values: Any):
        super().__init__(**values)


def register() -> None:
    """Let the classes be found by their names."""
    for config, model in ((NvlmConfig, NVLM_D), (NvlmXConfig, NVLM_X), (NvlmHConfig, NVLM_H)):
        model.config_class = config
        OWN.update({config.__name__: config, model.__name__: model})
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModelForImageTextToText.register(config, model, exist_ok=True)
