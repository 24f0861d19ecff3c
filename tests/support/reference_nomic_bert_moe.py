"""nomic-embed-text v2 in torch, by its paper (arXiv:2502.07972) and the names and shapes of the authors' checkpoint: transformers does not have it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def rotated(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotate [n, heads, size]: element i together with element i + size / 2."""
    n, _, size = x.shape
    angles = torch.outer(torch.arange(n), base ** (-torch.arange(0, size, 2) / size))[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


class Attention(nn.Module):
    """Every token sees all of them."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.heads, self.base = c["n_head"], c["rotary_emb_base"]
        self.Wqkv, self.out_proj = nn.Linear(c["n_embd"], 3 * c["n_embd"]), nn.Linear(c["n_embd"], c["n_embd"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.Wqkv(x).reshape(len(x), 3, self.heads, -1).unbind(1)
        q, k = rotated(q, self.base), rotated(k, self.base)
        shares = (torch.einsum("qhe,khe->hqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out_proj(torch.einsum("hqk,khe->qhe", shares, v).reshape(len(x), -1))


class Plain(nn.Module):
    """A feed-forward."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c["n_embd"], c["n_inner"]), nn.Linear(c["n_inner"], c["n_embd"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Mixture(nn.Module):
    """The sum of a token's experts, weighed by their shares of a softmax over all of them, and one bias."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        n, d, f = c["num_experts"], c["n_embd"], c["n_inner"]
        self.n, self.used = n, c["moe_top_k"]
        self.router, self.experts = nn.Module(), nn.Module()
        self.router.layer, self.experts.mlp = nn.Linear(d, n, bias=False), nn.Module()
        self.experts.mlp.w1, self.experts.mlp.w2 = nn.Parameter(torch.empty(n * f, d)), nn.Parameter(torch.empty(n * f, d))
        self.experts.bias = nn.Parameter(torch.empty(d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        into, back = (w.chunk(self.n) for w in (self.experts.mlp.w1, self.experts.mlp.w2))
        rows = []
        for token, shares in zip(x, self.router.layer(x).softmax(-1)):
            best = shares.argsort(descending=True)[: self.used]
            rows.append(self.experts.bias + sum(shares[e] * (nn.functional.gelu(into[e] @ token) @ back[e]) for e in best.tolist()))
        return torch.stack(rows)


class Layer(nn.Module):
    """Attention and what is behind it, each added to its input and normalized."""

    def __init__(self, c: dict[str, Any], mixed: bool):
        super().__init__()
        self.attn, self.mlp = Attention(c), Mixture(c) if mixed else Plain(c)
        self.norm1, self.norm2 = (nn.LayerNorm(c["n_embd"], eps=c["layer_norm_epsilon"]) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Model(nn.Module):
    """The encoder, of one text."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(c["vocab_size"], c["n_embd"])
        self.embeddings.token_type_embeddings = nn.Embedding(c["type_vocab_size"], c["n_embd"])
        self.emb_ln = nn.LayerNorm(c["n_embd"], eps=c["layer_norm_epsilon"])
        self.encoder.layers = nn.ModuleList(Layer(c, i % c["moe_every_n_layers"] == 1) for i in range(c["n_layer"]))

    def forward(self, ids: torch.Tensor) -> Any:
        """Return last hidden states of ids [1, n]."""
        x = self.emb_ln(self.embeddings.word_embeddings(ids[0]) + self.embeddings.token_type_embeddings.weight[0])
        for layer in self.encoder.layers:
            x = layer(x)
        return SimpleNamespace(last_hidden_state=x[None])
