"""Numbers that every decoder has, read in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyengine.errors import InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.records import dataclass


@dataclass(frozen=True)
class DecoderConfig:
    """What decoders have in common; an architecture's own numbers follow."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    n_ctx_train: int
    eps: float


def common(h: Hparams, w: Weights, *, head_dim: int | None = None, d_ff: str = "feed_forward_length",
           eps: str = "attention.layer_norm_rms_epsilon") -> dict[str, Any]:
    """Read the fields of `DecoderConfig` below the architecture's name. The last of the layers must be in the file.

    head_dim  of files without the key; default d_model / n_heads
    d_ff      the key of the feed-forwards' width
    eps       the key of what norms add to the variance
    """
    n_layers, d_model, n_heads = h.size("block_count"), h.size("embedding_length"), h.size("attention.head_count")
    if ("blk", n_layers - 1) not in w:
        raise InvalidModelError(f"{h.key('block_count')} is {n_layers}, but no tensor is named blk.{n_layers - 1}")
    return {
        "n_layers": n_layers,
        "d_model": d_model,
        "d_ff": h.size(d_ff),
        "n_heads": n_heads,
        "n_kv_heads": h.size("attention.head_count_kv", n_heads),
        "head_dim": h.size("attention.key_length", head_dim or d_model // n_heads),
        "vocab_size": vocab_size(w),
        "n_ctx_train": h.size("context_length"),
        "eps": h.number(eps, above=0.0),
    }


def used_experts(h: Hparams) -> int:
    """Read how many experts a row goes to. Raises: InvalidModelError for more than there are."""
    n, n_used = h.size("expert_count"), h.size("expert_used_count")
    if n_used > n:
        raise InvalidModelError(f"{h.key('expert_used_count')} is {n_used} of {n} experts")
    return n_used


def first_tokens(h: Hparams, start: int | None = None) -> tuple[int, tuple[int, ...]]:
    """Read the id that the decoder of an encoder-decoder begins with, and those that its answers are forced to begin with.

    start  of files without the key; None: there must be one
    """
    forced = h.get("forced_bos_token_id", None, int)
    return h.need("decoder_start_token_id", int) if start is None else h.get("decoder_start_token_id", start, int), () if forced is None else (forced,)


def sizes(h: Hparams, name: str, n_layers: int) -> tuple[int, ...]:
    """Read a count or width of each layer, which a file gives as one number or as a list. Raises: InvalidModelError."""
    value = h.need(name, int, np.ndarray)
    found = [value] * n_layers if isinstance(value, int) else value.tolist()
    if len(found) != n_layers:
        raise InvalidModelError(f"{h.key(name)} has {len(found)} entries for {n_layers} layers")
    if not all(type(n) is int and 1 <= n < 2**31 for n in found):
        raise InvalidModelError(f"{h.key(name)} is {found}, which are no possible sizes")
    return tuple(found)


def last_of_kind(kinds: Sequence[object], n_own: int, where: str) -> tuple[int, ...]:
    """Return the owner of each layer's cache where layers from number n_own on read that of the last earlier one of their kind.

    Raises: InvalidModelError, beginning with `where`, for a kind that no earlier layer has.
    """
    last = {kind: i for i, kind in enumerate(kinds[:n_own])}
    if missing := set(kinds[n_own:]) - set(last):
        raise InvalidModelError(f"{where}: layers from {n_own} on read the caches of earlier ones, and none of those is like {missing}")
    return tuple(i if i < n_own else last[kind] for i, kind in enumerate(kinds))


def per_layer(h: Hparams, name: str, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """Read a switch for each layer. Raises: InvalidModelError for another number of them."""
    value = h.get(name, default, np.ndarray)
    if len(value) != len(default):
        raise InvalidModelError(f"{h.key(name)} has {len(value)} entries for {len(default)} layers")
    return tuple(bool(v) for v in value)


def vocab_size(w: Weights) -> int:
    """Return the number of rows of the output head (of the embedding, if tied); a vocabulary may have more tokens, or fewer."""
    for name in ("output", "token_embd"):
        shape = w[name].shape("weight")
        if shape is not None and len(shape) == 2:
            return shape[0]
    raise InvalidModelError(f"{w.place}: neither 'output.weight' nor 'token_embd.weight' is a matrix of the file")


def embedded(w: Weights, vocab_size: int) -> int:
    """Return the number of rows of the embedding: those of the output head, and of tokens that are read but never written, behind them."""
    shape = w["token_embd"].shape("weight")
    n = shape[0] if shape is not None and len(shape) == 2 else vocab_size
    if n < vocab_size:
        raise InvalidModelError(f"{w.place}: 'token_embd.weight' has {n} rows, but the output head gives {vocab_size} tokens")
    return n
