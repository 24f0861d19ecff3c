"""The demo model's forward pass in training: transformers' modules, all pictures of a size at once, and the decoder's insides to learn from.

`check_forward` holds it to transformers' own. Axes: n patches, r merged rows, b conversations, t tokens, s those of pictures,
k tokens of answers, m the most of them that a conversation has, h heads, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from . import pictures
from .model import FRAMES, MEAN, MERGE, PATCH, STD, VISION, Batch, grid_of, make_batch, make_tokenizer, patches
from .pictures import Example, Picture

MATCHES, FINDS = 1, 2                   # the layers whose attention `Inside` has: the last before the middle, and the first behind it


# ---- encoder -------------------------------------------------------------------------------------------------------------------


@cache
def _plan(grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the order of picture groups by window [r], its inverse, positions [n, 2] and which patches share a window [n, n]."""
    h, w = grid
    row, column = np.divmod(np.arange(h * w), w)
    side = VISION["window_size"] // PATCH // MERGE                          # type: ignore[operator]
    window = row // side * w + column // side
    order = np.argsort(window, kind="stable")
    dy, dx = np.divmod(np.arange(MERGE * MERGE), MERGE)
    places = np.stack([(MERGE * a[order, None] + d).reshape(-1) for a, d in ((row, dy), (column, dx))], axis=-1)
    member = np.repeat(window[order], MERGE * MERGE)
    return (torch.from_numpy(order), torch.from_numpy(np.argsort(order)), torch.from_numpy(places),
            torch.from_numpy(member[:, None] == member[None, :]))


def see(model: Any, stacks: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Tensor:
    """Run the encoder over pictures by size, as `Batch.patches` and `Batch.grids` have them: rows [r, D], picture by picture."""
    visual = model.model.visual
    kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)               # a still picture fills both frames of a patch
    plans, x, turns, shapes = [_plan(g) for g in grids], [], [], []
    for stack, (order, _, places, _) in zip(stacks, plans):
        b, n, k = stack.shape
        x.append(F.linear(stack.view(b, n // 4, 4, k)[:, order].reshape(b * n, k), kernel))
        cos, sin = visual.rotary_pos_emb(stack, places)
        turns.append((cos.repeat(b, 1)[:, None], sin.repeat(b, 1)[:, None]))
        shapes.append((b, n))
    h = torch.cat(x)
    cos, sin = (torch.cat([t[i] for t in turns]) for i in range(2))
    counts = [b * n for b, n in shapes]
    for i, block in enumerate(visual.blocks):
        qkv = block.attn.qkv(block.norm1(h)).view(h.shape[0], 3, block.attn.num_heads, -1)
        q, k = (_turn(qkv[:, j], cos, sin).to(qkv.dtype) for j in range(2))
        out = []
        for (b, n), (_, _, _, same), *parts in zip(shapes, plans, *(a.split(counts) for a in (q, k, qkv[:, 2]))):
            heads = [a.view(b, n, a.shape[1], -1).transpose(1, 2) for a in parts]
            scores = heads[0] @ heads[1].transpose(2, 3) * block.attn.scaling       # short rows: torch's fused one is slower
            if i not in visual.fullatt_block_indexes:
                scores = scores.masked_fill(~same, -torch.inf)
            out.append((scores.softmax(-1).to(qkv.dtype) @ heads[2]).transpose(1, 2).reshape(b * n, -1))
        h = h + block.attn.proj(torch.cat(out))
        h = h + block.mlp(block.norm2(h))
    soft = visual.merger(h)
    parts = soft.split([c // 4 for c in counts])
    return torch.cat([p.view(b, n // 4, -1)[:, back].flatten(0, 1) for p, (b, n), (_, back, _, _) in zip(parts, shapes, plans)])


def rows_of(model: Any, shown: Sequence[Picture]) -> dict[int, Tensor]:
    """Encode pictures: float16 rows [r, D] by id() of the picture."""
    grids = sorted({grid_of(p) for p in shown})
    by_size = [[p for p in shown if grid_of(p) == grid] for grid in grids]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        soft = see(model, [torch.from_numpy(np.stack([patches(p) for p in own])) for own in by_size], grids)
    parts = soft.half().split([h * w for (h, w), own in zip(grids, by_size) for _ in own])
    return {id(p): rows.clone() for p, rows in zip((p for own in by_size for p in own), parts)}


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


# ---- decoder -------------------------------------------------------------------------------------------------------------------


class Inside(NamedTuple):
    """What answers are made from, as far as training has aims for it."""

    early: Tensor                       # [s, D]: image tokens before layer MATCHES
    rows: Tensor                        # [s, D]: image tokens halfway
    tokens: Tensor                      # [b, t, D]: all tokens halfway
    scores: dict[int, Tensor]           # [b, h, t, t] by layer: of its attention, before the softmax; what is not seen is very low
    last: Tensor                        # [k, D]: what the answers' tokens are read from, as batch.targets has them


def _scores(layer: Any, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Compute scores [b, h, t, t] of queries [b, h, t, d] and keys [b, groups, t, d]: keys are not repeated for their heads."""
    b, heads, t, d = q.shape
    q = (q * layer.scaling).reshape(b, k.shape[1], -1, d)
    return (q @ k.transpose(2, 3)).view(b, heads, t, -1) + mask


def _mixed(scores: Tensor, v: Tensor) -> Tensor:
    b, heads, t, n = scores.shape
    p = scores.softmax(-1).to(v.dtype).view(b, v.shape[1], -1, n)
    return (p @ v).view(b, heads, t, -1).transpose(1, 2).reshape(b, t, -1)


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _mask(batch: Batch, dtype: torch.dtype) -> Tensor:
    t = batch.ids.shape[1]
    seen = torch.ones(t, t, dtype=torch.bool).tril()[None, None] if batch.seen is None else batch.seen
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -3e4).expand(len(batch.ids), -1, -1, -1)


def _decode(model: Any, batch: Batch, soft: Tensor, picked: Tensor) -> tuple[Tensor, Inside]:
    """Run the decoder; the last layer for the picked tokens [b, m] only: [b, m, D]."""
    text = model.model.language_model
    x = text.embed_tokens(batch.ids)
    shown = batch.ids == model.config.image_token_id
    x = x.masked_scatter(shown[..., None], soft[batch.rows].to(x.dtype))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    cos, sin = (a[:, None].to(dtype) for a in text.rotary_emb(x, batch.positions))
    mask, scores, before = _mask(batch, dtype), {}, []
    for i, layer in enumerate(text.layers):
        before.append(x)
        attention, h = layer.self_attn, _norm(x, layer.input_layernorm)
        k, v = (p(h).view(*h.shape[:2], -1, attention.head_dim).transpose(1, 2) for p in (attention.k_proj, attention.v_proj))
        k = _turn(k, cos, sin)
        if i == len(text.layers) - 1:
            x, h = (a.gather(1, picked[..., None].expand(-1, -1, a.shape[-1])) for a in (x, h))
            cos, sin, mask = (a.gather(2, picked[:, None, :, None].expand(-1, -1, -1, a.shape[-1])) for a in (cos, sin, mask))
        q = _turn(attention.q_proj(h).view(*h.shape[:2], -1, attention.head_dim).transpose(1, 2), cos, sin)
        found = _scores(attention, q, k, mask)
        if i in (MATCHES, FINDS):
            scores[i] = found
        x = x + attention.o_proj(_mixed(found, v))
        h = _norm(x, layer.post_attention_layernorm)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    out = _norm(x, text.norm)
    middle = before[len(text.layers) // 2]
    return out, Inside(before[MATCHES][shown], middle[shown], middle, scores, out)


def hidden(model: Any, batch: Batch, soft: Tensor) -> Tensor:
    """Run the decoder over the conversations with the pictures' rows [r, D] in place: [b, t, D]."""
    return _decode(model, batch, soft, torch.arange(batch.ids.shape[1]).expand(len(batch.ids), -1))[0]


def answers(model: Any, batch: Batch, soft: Tensor) -> Inside:
    """Run the decoder for what training asks of it, which is less: the last layer for tokens of answers only."""
    known = batch.targets >= 0
    picked = known.int().argsort(dim=1, descending=True, stable=True)[:, :int(known.sum(1).max())]
    out, inside = _decode(model, batch, soft, picked)
    return inside._replace(last=out[known.gather(1, picked)])


def alone(example: Example) -> list[Example]:
    """List the conversations that an example of turns apart holds at once."""
    return [replace(example, turns=(turn,), apart=False) for turn in example.turns] if example.apart else [example]


def check_forward(model: Any, examples: Sequence[Example]) -> float:
    """Compare with transformers' own forward, one conversation at a time; return the largest difference of a logit.

    The ids are those of the chat template and the patches those of the processor, so that these are compared as well.
    """
    tokenizer, examples = make_tokenizer(), [one for example in examples for one in alone(example)[:3]]
    batch, worst = make_batch(examples), 0.0
    processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH, temporal_patch_size=FRAMES, merge_size=MERGE, min_pixels=pictures.MIN_PIXELS,
        max_pixels=pictures.MAX_PIXELS, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    with torch.no_grad():
        ours = model.lm_head(hidden(model, batch, see(model, batch.patches, batch.grids)))
        for i, example in enumerate(examples):
            made = processor(images=[PIL.Image.fromarray(p.pixels) for p in example.pictures], return_tensors="pt")
            messages: list[dict[str, Any]] = []
            for turn, n in zip(example.turns, example.shown()):
                shown = pictures.shown_parts(example, [{"type": "image"} for _ in range(n)])
                messages += [{"role": turn.role, "content": [*shown, {"type": "text", "text": turn.question}]},
                             {"role": "assistant", "content": turn.mistaken or turn.answer}]
            text = tokenizer.apply_chat_template(messages, tools=example.functions() or None, tokenize=False)
            for _, h, w in made["image_grid_thw"].tolist():
                text = text.replace("<|vision_start|><|image_pad|><|vision_end|>",
                                    "<|vision_start|>" + "<|image_pad|>" * (h * w // 4) + "<|vision_end|> ", 1)
            ids = torch.tensor([tokenizer(text.replace("<|vision_end|> ", "<|vision_end|>"))["input_ids"]])
            if ids[0].tolist() != batch.ids[i, :ids.shape[1]].tolist():
                raise AssertionError(f"the template makes other ids of {example.turns}")
            kinds = (ids == model.config.image_token_id).int()
            theirs = model(input_ids=ids, mm_token_type_ids=kinds, **made).logits[0]
            worst = max(worst, float((theirs - ours[i, :ids.shape[1]]).abs().max()))
    return worst
