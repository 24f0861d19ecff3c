"""How well a model predicts a text, by llama-perplexity's definition.

The text is tokenized once, with BOS where the model adds it, and cut into chunks of n_ctx tokens; a rest that does not
fill a chunk is left out. Each chunk is evaluated from an empty cache, its first token replaced by BOS where the model
adds it. Only tokens with more than n_ctx/2 tokens before them count:

    perplexity = exp(mean of -log p(token j+1 | tokens 0..j of its chunk)),   j = n_ctx/2 .. n_ctx-2

Source: llama.cpp, tools/perplexity/perplexity.cpp, function perplexity. It wants two chunks at least; here one will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyengine.errors import RequestError


@dataclass(frozen=True)
class Perplexity:
    """`value` +- `stderr` over `n_tokens` predicted tokens; `chunk_values` is the perplexity of each chunk alone."""

    value: float
    stderr: float
    n_tokens: int
    chunk_values: tuple[float, ...]


def perplexity(model: Any, text: str | bytes, n_ctx: int = 512, chunks: int | None = None,
               progress: Callable[[int, int, float], None] | None = None) -> Perplexity:
    """Measure a model on a text. At most two blocks of logits are in memory at once.

    chunks: evaluate that many at most. progress(done, all, perplexity so far) is called after each chunk.
    Raises: RequestError if the text is too short or n_ctx is below 4; ContextOverflowError if the model's context is
    below n_ctx.
    """
    if n_ctx < 4:
        raise RequestError(f"n_ctx={n_ctx}: must be at least 4")
    if chunks is not None and chunks < 1:
        raise RequestError(f"chunks={chunks}: must be at least 1")
    ids = model.tokenize(text)
    n_chunks = min(len(ids) // n_ctx, chunks or len(ids))
    if not n_chunks:
        raise RequestError(f"the text has {len(ids)} tokens: a chunk of {n_ctx} is the least; give a longer text or a "
                           "smaller context")
    first = n_ctx // 2
    losses = np.empty((n_chunks, n_ctx - 1 - first))                          # nats
    for c in range(n_chunks):
        chunk = ids[c * n_ctx : (c + 1) * n_ctx]
        targets = chunk[1:]                                                   # targets[j] comes after position j
        if model.tokenizer.add_bos:
            chunk[0] = model.tokenizer.bos_id
        for start, rows in model.logit_blocks(chunk, first):
            for j in range(start, min(start + len(rows), n_ctx - 1)):
                losses[c, j - first] = nll(rows[j - start], targets[j])
        if progress:
            progress(c + 1, n_chunks, float(np.exp(losses[: c + 1].mean())))
    value = math.exp(losses.mean())
    return Perplexity(value, value * float(losses.std()) / math.sqrt(max(1, losses.size - 1)), losses.size,
                      tuple(np.exp(losses.mean(axis=1)).tolist()))


def nll(row: np.ndarray, target: int) -> float:
    """Return -log softmax(row)[target] in nats: exp in float32 as llama.cpp's, the sum in float64.

    Row by row, because a row of 262,144 floats (1 MiB) stays in the second-level cache and a block of them does not.
    """
    top = row.max()
    shifted = np.subtract(row, top)
    loss = -float(shifted[target])
    np.exp(shifted, out=shifted)
    return loss + math.log(float(shifted.sum(dtype=np.float64)))
