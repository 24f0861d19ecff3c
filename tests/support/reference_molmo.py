"""Molmo in torch and NumPy, from its paper (arXiv:2409.17146) and the authors' description of its checkpoints: what transformers has no class for.

Names of parameters and settings are those of the authors' checkpoints. `register` makes transformers' automatic classes find it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tiny import OWN

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class MolmoConfig(transformers.PretrainedConfig):
    model_type = "molmo"

    def __init__(self, text_config: dict[str, Any] | None = None, vision_config: dict[str, Any] | None = None, **values: Any):
        values = {**values, **(text_config or {})}
        super().__init__(**{"vision_backbone": vision_config or {}, **values})


class MolmoEConfig(MolmoConfig):
    """The names of training."""

    model_type = "molmoe"
    attribute_map = {"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "num_hidden_layers": "n_layers",
                     "intermediate_size": "mlp_hidden_size"}

    def __init__(self, text_config: dict[str, Any] | None = None, vision_config: dict[str, Any] | None = None, **values: Any):
        super().__init__(text_config, vision_config, **values)


class Norm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


def rotated(x: torch.Tensor, base: float, neighbours: bool = False) -> torch.Tensor:
    """Rotate heads [h, n, e] by their positions: pairs (i, i + e / 2), or (2 i, 2 i + 1)."""
    _, n, e = x.shape
    if neighbours:
        angle = torch.arange(n).double()[:, None] / base ** (torch.arange(0, e, 2).double() / e)
        turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(turned).flatten(-2).float()
    angle = torch.arange(n).double()[:, None] / base ** (torch.arange(0, e, 2).double() / e)
    cos, sin = (torch.cat([f, f], -1).float() for f in (angle.cos(), angle.sin()))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Block(nn.Module):
    """A layer of the decoder; norms stand before or behind its halves."""

    def __init__(self, c: Any):
        super().__init__()
        d, self.c = c.hidden_size, c
        self.heads, self.kv = c.num_attention_heads, c.num_key_value_heads or c.num_attention_heads
        self.e = d // self.heads
        self.att_proj = nn.Linear(d, (self.heads + 2 * self.kv) * self.e, bias=c.qkv_bias)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_proj, self.ff_out = nn.Linear(d, c.intermediate_size, bias=False), nn.Linear(c.intermediate_size // 2, d, bias=False)
        self.attn_norm, self.ff_norm = Norm(d, c.layer_norm_eps), Norm(d, c.layer_norm_eps)
        if c.attention_layer_norm:
            self.q_norm, self.k_norm = Norm(d, c.layer_norm_eps), Norm(self.kv * self.e, c.layer_norm_eps)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.att_proj(x).split([self.heads * self.e, self.kv * self.e, self.kv * self.e], -1)
        if self.c.attention_layer_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, self.e)).transpose(0, 1) for y in (q, k, v))
        q, k = rotated(q, self.c.rope_theta), rotated(k, self.c.rope_theta)
        k, v = (y.repeat_interleave(self.heads // self.kv, 0) for y in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(self.e)
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        return self.attn_out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.ff_proj(x).chunk(2, -1)
        return self.ff_out(F.silu(gate) * up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.c.norm_after:
            x = x + self.attn_norm(self.attend(x))
            return x + self.ff_norm(self.feed(x))
        x = x + self.attend(self.attn_norm(x))
        return x + self.feed(self.ff_norm(x))


class Expert(nn.Module):
    def __init__(self, c: Any):
        super().__init__()
        f = c.intermediate_size // 2
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(*n, bias=False) for n in ((c.hidden_size, f), (c.hidden_size, f), (f, c.hidden_size)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ExpertBlock(Block):
    """A layer whose feed-forward is a mixture of experts, in modules of their own; the k with the largest probabilities count by these."""

    def __init__(self, c: Any):
        super().__init__(c)
        self.attn, self.mlp = nn.Module(), nn.Module()
        for name in ("att_proj", "attn_out", "attn_norm", "q_norm", "k_norm"):
            setattr(self.attn, name, getattr(self, name))
        self.mlp.gate, self.mlp.ff_norm = nn.Linear(c.hidden_size, c.moe_num_experts, bias=False), self.ff_norm
        self.mlp.experts = nn.ModuleList([Expert(c) for _ in range(c.moe_num_experts)])
        for name in ("att_proj", "attn_out", "attn_norm", "q_norm", "k_norm", "ff_norm", "ff_proj", "ff_out"):
            delattr(self, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, m, c = self.attn, self.mlp, self.c
        q, k, v = a.att_proj(a.attn_norm(x)).split([self.heads * self.e, self.kv * self.e, self.kv * self.e], -1)
        q, k, v = (y.unflatten(-1, (-1, self.e)).transpose(0, 1) for y in (a.q_norm(q), a.k_norm(k), v))
        q, k = (rotated(y, c.rope_theta, c.rope_impl == "cockatoo") for y in (q, k))
        k, v = (y.repeat_interleave(self.heads // self.kv, 0) for y in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(self.e)
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        x = x + a.attn_out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        h = m.ff_norm(x)
        weights, chosen = m.gate(h).softmax(-1).topk(c.moe_top_k, -1)
        return x + torch.stack([sum(w * m.experts[e](row) for w, e in zip(ws, es)) for row, ws, es in zip(h, weights, chosen)])


class Attention(nn.Module):
    """Attention of the encoder and of the pooling."""

    def __init__(self, width: int, heads: int, n_in: int):
        super().__init__()
        self.heads, self.e = heads, width // heads
        self.wq, self.wk, self.wv, self.wo = nn.Linear(n_in, width), nn.Linear(n_in, width), nn.Linear(n_in, width), nn.Linear(width, width)

    def forward(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, self.e)).transpose(-2, -3) for f, x in ((self.wq, q), (self.wk, kv), (self.wv, kv)))
        return self.wo(((q @ k.transpose(-1, -2) / math.sqrt(self.e)).softmax(-1) @ v).transpose(-2, -3).flatten(-2))


class EncoderBlock(nn.Module):
    def __init__(self, v: dict[str, Any]):
        super().__init__()
        d = v["image_emb_dim"]
        self.attention = Attention(d, v["image_num_heads"], d)
        self.feed_forward = nn.ModuleDict({"w1": nn.Linear(d, v["image_mlp_dim"]), "w2": nn.Linear(v["image_mlp_dim"], d)})
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d, v["image_norm_eps"]), nn.LayerNorm(d, v["image_norm_eps"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y)
        y = self.feed_forward["w1"](self.ffn_norm(x))
        return x + self.feed_forward["w2"](y * torch.sigmoid(1.702 * y))


class Backbone(nn.Module):
    def __init__(self, c: Any):
        super().__init__()
        v, self.layers = c.vision_backbone, c.vit_layers
        d, n, wide = v["image_emb_dim"], v["image_num_pos"], v["image_emb_dim"] * len(c.vit_layers)
        self.image_vit = nn.Module()
        self.image_vit.class_embedding, self.image_vit.positional_embedding = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(n, d))
        self.image_vit.patch_embedding = nn.Linear(3 * v["image_patch_size"] ** 2, d, bias=False)
        self.image_vit.pre_ln = nn.LayerNorm(d, v["image_norm_eps"])
        self.image_vit.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([EncoderBlock(v) for _ in range(v["image_num_layers"])])})
        self.image_pooling_2d = Attention(d, v["image_num_heads"], wide)
        f = c.intermediate_size // 2
        self.image_projector = nn.ModuleDict({"w1": nn.Linear(d, f, bias=False), "w2": nn.Linear(f, c.hidden_size, bias=False),
                                              "w3": nn.Linear(d, f, bias=False)})
        self.pad_embed = nn.Parameter(torch.zeros(2, wide))

    def forward(self, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Crops [c, n, 3 p p] and the part of each patch that is no padding [c, n] -> rows [c, n / 4, D]."""
        vit = self.image_vit
        x = torch.cat([vit.class_embedding.expand(len(images), 1, -1), vit.patch_embedding(images)], 1) + vit.positional_embedding
        x, states = vit.pre_ln(x), []
        for block in vit.transformer["resblocks"]:
            x = block(x)
            states.append(x)
        x = torch.cat([states[i] for i in self.layers], -1)[:, 1:]
        x = x + (masks == 0)[..., None] * self.pad_embed[0] + ((masks != 0) & (masks < 1))[..., None] * self.pad_embed[1]
        side = math.isqrt(x.shape[1])
        x = x.unflatten(1, (side // 2, 2, side // 2, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)        # [c, s / 2, s / 2, 4, 2 V]
        x = self.image_pooling_2d(x.mean(-2, keepdim=True), x).squeeze(-2).flatten(1, 2)
        p = self.image_projector
        return p["w2"](F.silu(p["w1"](x)) * p["w3"](x))


class MolmoForCausalLM(transformers.PreTrainedModel):
    config_class = MolmoConfig

    def __init__(self, config: MolmoConfig):
        super().__init__(config)
        self.model, t = nn.Module(), nn.Module()
        t.wte = nn.Module()
        t.wte.embedding = nn.Parameter(torch.zeros(config.embedding_size, config.hidden_size))
        t.wte.new_embedding = nn.Parameter(torch.zeros(128, config.hidden_size))
        t.blocks = nn.ModuleList([(ExpertBlock if getattr(config, "moe_num_experts", 0) else Block)(config) for _ in range(config.num_hidden_layers)])
        t.ln_f = Norm(config.hidden_size, config.layer_norm_eps)
        t.ff_out = nn.Linear(config.hidden_size, config.embedding_size, bias=False)
        self.model.transformer, self.model.vision_backbone = t, Backbone(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Random values are the test's."""

    def embedded(self, ids: torch.Tensor, images: list[torch.Tensor], masks: list[torch.Tensor], places: list[torch.Tensor]) -> torch.Tensor:
        """Look ids [n] up, and add each picture's rows at their places."""
        wte = self.model.transformer.wte
        x = torch.cat([wte.embedding, wte.new_embedding])[ids]
        for crops, mask, at in zip(images, masks, places):
            rows = self.model.vision_backbone(crops, mask).flatten(0, 1)
            x[at[at >= 0]] += rows[at >= 0]
        return x

    def forward(self, input_ids: torch.Tensor, images: Any = (), masks: Any = (), places: Any = ()) -> Any:
        t, x = self.model.transformer, self.embedded(input_ids[0], images, masks, places)
        for block in t.blocks:
            x = block(x)
        return SimpleNamespace(logits=t.ff_out(t.ln_f(x))[None])


class OLMoForCausalLM(MolmoForCausalLM):
    """MolmoE, by the name that its config.json gives."""

    config_class = MolmoEConfig


def register() -> None:
    """Let the classes be found by their names."""
    for config, model in ((MolmoConfig, MolmoForCausalLM), (MolmoEConfig, OLMoForCausalLM)):
        OWN.update({config.__name__: config, model.__name__: model})
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModelForImageTextToText.register(config, model, exist_ok=True)


# -- processor -----------------------------------------------------------------------------------------------------------------


class Images:
    """Settings of the image processor, by the authors' names, and what it does."""

    def __init__(self, **settings: Any):
        self.settings = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_padding_mask": True, **settings}

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(self.settings))

    @classmethod
    def from_pretrained(cls, folder: Path) -> Images:
        return cls(**json.loads((Path(folder) / "preprocessor_config.json").read_text()))

    def fit(self, picture: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a picture within a canvas, normalized, and where it is."""
        h, w = picture.shape[:2]
        scale = min(np.float32(width) / np.float32(w), np.float32(height) / np.float32(h))
        new_h, new_w = (max(1, int(np.float32(n) * scale)) for n in (h, w))
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].double() / 255          # whose weights are rounded less than float32's
        x = F.interpolate(x, (new_h, new_w), mode="bilinear", antialias=True).clip(0, 1)[0].permute(1, 2, 0).float().numpy()
        top, left = (height - new_h) // 2, (width - new_w) // 2
        around = (top, height - new_h - top), (left, width - new_w - left)
        x = np.pad(x, (*around, (0, 0)))
        mean, std = (np.array(self.settings[f"image_{name}"], np.float32) for name in ("mean", "std"))
        return (x - mean) / std, np.pad(np.ones((new_h, new_w), bool), around)

    def tiling(self, height: int, width: int, window: int, most: int) -> tuple[int, int]:
        best, found = None, (1, 1)
        for n, i, j in sorted((i * j, i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most):
            scale = min((np.float32(k * window) / np.float32(size) if size else np.float32(np.inf)) for k, size in ((i, height), (j, width)))
            better = best is None or (scale > best if best < 1 else 1 <= scale < best)     # up to 1 the largest, then the smallest
            if better:
                best, found = scale, (i, j)
        return found

    def crops(self, picture: np.ndarray, max_crops: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
        """Return patches [c, n, p p 3], the part of each that shows the picture, the number of each pooled row in the prompt or -1, and the
        lines and columns of the rows behind the whole."""
        s = self.settings
        size, p, (left, right) = s["base_image_input_size"][0], s["image_patch_size"], s["overlap_margins"]
        side, window = size // p, (size // p - left - right) * p
        lines, columns = self.tiling(*(n - (left + right) * p for n in picture.shape[:2]), window, max_crops or s["max_crops"])
        canvas, shown = self.fit(picture, lines * window + (left + right) * p, columns * window + (left + right) * p)
        whole, _ = self.fit(picture, size, size)
        down, across = (shown.shape[0] // p) // 2, (shown.shape[1] // p) // 2
        images, masks, numbers = [whole], [], [np.arange((side // 2) ** 2)]
        every = np.arange(down * across).reshape(down, across) + (side // 2) ** 2
        for i in range(lines):
            for j in range(columns):
                part = np.s_[i * window : i * window + size, j * window : j * window + size]
                images.append(canvas[part])
                masks.append(shown[part].reshape(side, p, side, p).transpose(0, 2, 1, 3).reshape(side * side, -1).astype(np.float32).mean(-1))
                own = np.full((side // 2, side // 2), -1)
                y, x = i * window // p // 2, j * window // p // 2
                y0, x0 = (0 if i == 0 else left // 2), (0 if j == 0 else left // 2)
                y1, x1 = (side // 2 - (0 if i == lines - 1 else right // 2)), (side // 2 - (0 if j == columns - 1 else right // 2))
                own[y0:y1, x0:x1] = every[y + y0 : y + y1, x + x0 : x + x1]
                numbers.append(own.reshape(-1))
        masks.append(np.full(side * side, -1, np.float32))               # behind the last one, though the whole came first: as released
        patches = [c.reshape(side, p, side, p, 3).transpose(0, 2, 1, 3, 4).reshape(side * side, -1) for c in images]
        return np.stack(patches).astype(np.float32), np.stack(masks), np.stack(numbers), (down, across)


class Processor:
    """Texts with places for pictures to ids."""

    def __init__(self, images: Images, tokenizer: Any):
        self.images, self.tokenizer = images, tokenizer

    def __call__(self, text: Any, images: Any, add_special_tokens: bool, return_tensors: str, **settings: Any) -> dict[str, Any]:
        whole = isinstance(text, list)                                   # a conversation, which the end token begins
        text, images = (text[0], images[0]) if whole else (text, images)
        ids = [self.tokenizer.eos_token_id] if whole else []
        start, end, patch, col = self.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>", "<im_patch>", "<im_col>"])
        texts, made = text.split("<|image|>"), []
        for i, piece in enumerate(texts):
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            if i + 1 < len(texts):
                made.append(self.images.crops(np.asarray(images[i]), **settings))
                side = math.isqrt(made[-1][2].shape[1])
                for lines, columns in ((side, side), made[-1][3]):
                    ids += [start, *([patch] * columns + [col]) * lines, end]
        return {"input_ids": torch.tensor([ids]), "made": made}
