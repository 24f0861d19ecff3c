"""All that decides the largest shapes of a model's programs: one frozen value, from which they are declared, counted and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any

from pyengine.cache.policy import Compressed
from pyengine.dtype import DType, dtype as dtype_of
from pyengine.errors import RequestError, shown, UnsupportedModelError
from pyengine.records import NamedTuple

KV_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1"}
GROUPED = {"kivi4": ("Q4_1_CHANNELS", "Q4_1"), "kivi2": ("Q2_1_CHANNELS", "Q2_1")}       # keys by channel, values (arXiv:2402.02750)
HEAD_BYTES = 32 << 20                # logits of at most this size are computed at once
N_BATCH = 512                        # rows of one step, unless told otherwise


class Sizes(NamedTuple):
    """The largest shapes that a model's programs are made for.

    n_ctx    positions of one conversation's context
    n_batch  rows of one step; n_head: of those, rows whose logits are computed at once
    n_seq    conversations side by side
    k, v     formats of cached keys and values
    runs     rows of one run of each encoder, by its kind
    across   encoder rows of one conversation in layers that attend across; 0 without such layers or an encoder
    n_tokens tokens of the vocabulary, where the device finds the largest logits of each row; 0 where the host has them all
    source   rows of one source of an encoder-decoder; 0 for a decoder
    compressed  the policy in place of `Full` where conversations are compressed; None: they are not
    atomic_rows rows of the largest picture that must be one step
    drafted  tokens of a step that may be taken back, where layers keep states
    ahead    whether the step has the model's head that predicts further tokens
    """

    n_ctx: int
    n_batch: int
    n_seq: int
    n_head: int
    k: DType
    v: DType
    runs: Mapping[str, int] = MappingProxyType({})
    across: int = 0
    n_tokens: int = 0
    source: int = 0
    compressed: Compressed | None = None
    atomic_rows: int = 0
    drafted: int = 0
    ahead: bool = False

    def with_(self, **changes: Any) -> Sizes:
        """Return the same with other numbers."""
        return self._replace(**changes)


def cells_of_budget(budget: int, atomic_rows: int) -> int:
    """Return the cells of a conversation of which a compression leaves `budget`: a fifth more, or a picture that must be one step."""
    return budget + max(1, budget // 5, atomic_rows)


def step_rows(n_ctx: int, n_batch: int, n_seq: int, atomic_rows: int, vocab_size: int) -> tuple[int, int]:
    """Return (rows of one step, rows whose logits are computed at once)."""
    n_batch = min(max(n_batch, n_seq, atomic_rows), n_ctx * n_seq)
    return n_batch, max(n_seq, min(n_batch, HEAD_BYTES // (4 * vocab_size)))


def kv_dtypes(name: str) -> tuple[DType, DType]:
    """Return the formats of keys and values: "q8_0" for both, "q8_0/q4_0" for each. Raises: RequestError naming those that there are."""
    k, _, v = name.partition("/") if isinstance(name, str) else ("", "", "")
    for part in (k, v or k):
        if part not in (KV_DTYPES | GROUPED):
            raise RequestError(f"kv_dtype={shown(name)}: use one of {', '.join(KV_DTYPES | GROUPED)}, or two of them as keys/values")
    if v in GROUPED and k not in GROUPED:
        raise RequestError(f"kv_dtype={shown(name)}: values of {v} go with keys of {' or '.join(GROUPED)}, whose last tokens are in full")
    own = {name: (n, n) for name, n in KV_DTYPES.items()} | GROUPED
    return dtype_of(own[k][0]), dtype_of(own[v or k][1])


def check_heads(name: str, sizes: Sequence[int]) -> tuple[DType, DType]:
    """Return `kv_dtypes` if their blocks divide heads of these sizes. Raises: UnsupportedModelError if they do not."""
    for dtype, head_dim in product(kv_dtypes(name), sizes):
        if head_dim % dtype.block:
            raise UnsupportedModelError(f"kv_dtype={name}: blocks of {dtype.block} do not divide a head of {head_dim}; use f16")
    return kv_dtypes(name)
