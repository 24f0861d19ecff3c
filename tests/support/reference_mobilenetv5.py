"""MobileNet-V5 in torch, under the names of timm's parameters: what Gemma 3n sees with, where timm is not there.

From arXiv:2404.10518 (MobileNetV4: universal inverted blocks, attention of many queries to one head of keys) and the description of
timm's encoder for Gemma 3n; between transformers' Gemma 3n and its projector. `register` makes transformers' automatic classes find it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.gemma3n import configuration_gemma3n, modeling_gemma3n

from tiny import OWN

# what a layer is, by stage: ("er", k, expansion, out), ("uir", k before, k between, expansion, out), ("mqa", heads, elements, stride of keys)
STAGES = (
    (("er", 3, 4, 24), ("er", 3, 2, 24)),
    (("uir", 3, 5, 6, 32), ("uir", 5, 0, 4, 32), ("uir", 3, 3, 2, 32)),
    (("uir", 5, 5, 2, 48), ("uir", 0, 0, 1, 48), ("mqa", 6, 16, 2), ("uir", 0, 0, 2, 48)),
    (("uir", 5, 0, 3, 64), ("mqa", 4, 20, 1), ("uir", 0, 0, 2, 64)),
)


class Conv(nn.Conv2d):
    """A convolution padded as TensorFlow does: as many places as the stride makes of the side, less before than behind."""

    def __init__(self, n_in: int, n_out: int, k: int, stride: int = 1, by_channel: bool = False, bias: bool = False):
        super().__init__(n_in, n_out, k, stride, groups=n_in if by_channel else 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, s, ends = self.kernel_size[0], self.stride[0], []
        for n in (x.shape[-1], x.shape[-2]):
            missing = max(0, ((n + s - 1) // s - 1) * s + k - n)
            ends += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, ends))


class Norm(nn.Module):
    """Of each pixel's channels, by their root mean square."""

    def __init__(self, n: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * self.weight[:, None, None]


class ConvNorm(nn.Module):
    """A convolution, a norm, and GELU where there is one."""

    def __init__(self, *sizes: Any, act: bool = False, **more: Any):
        super().__init__()
        self.conv, self.bn, self.act = Conv(*sizes, **more), Norm(sizes[1]), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        return F.gelu(y, approximate="tanh") if self.act else y


class Scale(nn.Module):
    """A number for each channel."""

    def __init__(self, n: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma[:, None, None]


class Edge(nn.Module):
    """Fused: the convolution that widens is a full one."""

    def __init__(self, n_in: int, k: int, expansion: int, n_out: int, stride: int):
        super().__init__()
        self.conv_exp, self.bn1 = Conv(n_in, n_in * expansion, k, stride), Norm(n_in * expansion)
        self.conv_pwl, self.bn2 = Conv(n_in * expansion, n_out, 1), Norm(n_out)
        self.skips, self.width = stride == 1 and n_in == n_out, n_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv_pwl(F.gelu(self.bn1(self.conv_exp(x)), approximate="tanh")))
        return x + y if self.skips else y


class Inverted(nn.Module):
    """Universal inverted bottleneck."""

    def __init__(self, n_in: int, before: int, between: int, expansion: int, n_out: int, stride: int, alone: bool = False):
        super().__init__()
        wide = n_in * expansion
        self.dw_start = ConvNorm(n_in, n_in, before, 1 if between else stride, True) if before else nn.Identity()
        self.pw_exp = ConvNorm(n_in, wide, 1, act=True)
        self.dw_mid = ConvNorm(wide, wide, between, stride, True, act=True) if between else nn.Identity()
        self.pw_proj = ConvNorm(wide, n_out, 1)
        self.layer_scale = nn.Identity() if alone else Scale(n_out)
        self.skips, self.width = stride == 1 and n_in == n_out and not alone, n_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer_scale(self.pw_proj(self.dw_mid(self.pw_exp(self.dw_start(x)))))
        return x + y if self.skips else y


class Attention(nn.Module):
    """Heads of queries at all pixels, one of keys and values."""

    def __init__(self, n: int, heads: int, head_dim: int, stride: int):
        super().__init__()
        self.heads, self.width, self.norm, self.layer_scale = heads, n, Norm(n), Scale(n)

        def seen() -> nn.Module:
            thin = {"down_conv": Conv(n, n, 3, stride, True), "norm": Norm(n)} if stride > 1 else {}
            return nn.ModuleDict({**thin, "proj": Conv(n, head_dim, 1)})

        self.attn = nn.ModuleDict({"query": nn.ModuleDict({"proj": Conv(n, heads * head_dim, 1)}), "key": seen(), "value": seen(),
                                   "output": nn.ModuleDict({"proj": Conv(heads * head_dim, n, 1)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        b, _, h, w = x.shape
        q = self.attn["query"]["proj"](y).reshape(b, self.heads, -1, h * w).transpose(2, 3)
        k, v = (nn.Sequential(*self.attn[name].values())(y).flatten(2).transpose(1, 2)[:, None] for name in ("key", "value"))
        shares = (q * q.shape[-1]**-0.5 @ k.transpose(2, 3)).softmax(-1)
        o = (shares @ v).transpose(2, 3).reshape(b, -1, h, w)
        return x + self.layer_scale(self.attn["output"]["proj"](o))


class Fusion(nn.Module):
    """The last two stages' pixels side by side, as many as the decoder reads."""

    def __init__(self, n_in: int, n_out: int, tokens: int):
        super().__init__()
        self.ffn, self.norm, self.tokens = Inverted(n_in, 0, 0, 2, n_out, 1, alone=True), Norm(n_out), tokens

    def forward(self, fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        size = fine.shape[-2:]
        x = self.ffn(torch.cat([fine, F.interpolate(coarse, size=size, mode="nearest")], 1))
        if size[0] % self.tokens:
            x = F.interpolate(x, size=(self.tokens, self.tokens), mode="bilinear")
        elif size[0] != self.tokens:
            x = F.avg_pool2d(x, size[0] // self.tokens)
        return self.norm(x)


class Encoder(nn.Module):
    """Stem, stages and their fusion."""

    def __init__(self, c: Any):
        super().__init__()
        self.conv_stem = ConvNorm(3, 16, 3, 2, act=True, bias=True)
        width, ends, stages = 16, [], []
        for stage in STAGES:
            layers = []
            for i, (kind, *sizes) in enumerate(stage):
                layers.append(Attention(width, *sizes) if kind == "mqa" else (Edge if kind == "er" else Inverted)(width, *sizes, 1 if i else 2))
                width = layers[-1].width
            stages.append(nn.Sequential(*layers))
            ends.append(width)
        self.blocks = nn.Sequential(*stages)
        self.msfa = Fusion(ends[-2] + ends[-1], c.hidden_size, c.tokens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, ends = self.conv_stem(x), []
        for stage in self.blocks:
            x = stage(x)
            ends.append(x)
        return self.msfa(*ends[-2:])


class VisionConfig(configuration_gemma3n.Gemma3nVisionConfig):
    """Without the names of timm's classes; and the side of what becomes soft tokens."""

    model_type = "gemma3n_vision_here"
    tokens: int = 2

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **more: Any) -> Any:
        return transformers.PreTrainedConfig.from_dict.__func__(cls, config_dict, **more)

    def to_dict(self) -> dict[str, Any]:
        return transformers.PreTrainedConfig.to_dict(self)


class Tower(transformers.PreTrainedModel):
    """Where transformers wraps timm."""

    config_class = VisionConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.timm_model = Encoder(config)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Leave what torch has made."""

    def forward(self, pixel_values: torch.Tensor, **more: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.timm_model(pixel_values), pooler_output=None)


class SeeingConfig(configuration_gemma3n.Gemma3nConfig):
    """Gemma3nConfig with that encoder."""

    model_type = "gemma3n_here"
    sub_configs_defaults = {"text_config": configuration_gemma3n.Gemma3nTextConfig, "vision_config": VisionConfig,
                            "audio_config": configuration_gemma3n.Gemma3nAudioConfig}


class Gemma3nForConditionalGeneration(modeling_gemma3n.Gemma3nForConditionalGeneration):
    """transformers' class, by the name that checkpoints give."""

    config_class = SeeingConfig


def register() -> None:
    """Let the classes be found by their names."""
    OWN.update({"SeeingConfig": SeeingConfig, "Gemma3nForConditionalGeneration": Gemma3nForConditionalGeneration})
    for config in (SeeingConfig, VisionConfig):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    transformers.AutoModel.register(VisionConfig, Tower, exist_ok=True)
    transformers.AutoModelForImageTextToText.register(SeeingConfig, Gemma3nForConditionalGeneration, exist_ok=True)
