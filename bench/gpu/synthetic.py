"""Models of random weights, written as GGUF files on the spot: what a machine without a network checks and times.

Weights have the spread of trained ones (1 / sqrt of what they sum over), so that logits of two backends can be compared.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pyengine.dtype import DType, dtype
from pyengine.native.blocks import dequantize, QUANTIZABLE, quantize

from ..blocks import random_blocks, SCALES

ALIGN = 32
TILE = 4 << 20                                               # bytes of random weights that are repeated in large matrices
TYPES: dict[type, tuple[int, str]] = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}     # GGUF's number of a value's type, and its bytes


@dataclass(frozen=True)
class Decoder:
    """Sizes of a text model. mixture: experts, experts of a row, width of one.

    formats: of the matrices; "Q4_K_M" is llama.cpp's mixture of Q4_K and Q6_K
    """

    arch: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    formats: str = "Q4_K_M"
    mixture: tuple[int, int, int] | None = None
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    head_norms: bool = False                                 # on q and k
    biases: bool = False                                     # on q, k and v
    keys: dict[str, Any] = field(default_factory=dict)

    def format_of(self, name: str, layer: int = 0) -> str:
        """Return the format of a matrix."""
        if self.formats != "Q4_K_M":
            return self.formats
        eighth = self.n_layers // 8                          # llama-quant.cpp: use_more_bits
        more = layer < eighth or layer >= 7 * self.n_layers // 8 or (layer - eighth) % 3 == 2
        return "Q6_K" if name == "output" or name in ("attn_v", "ffn_down", "ffn_down_exps") and more else "Q4_K"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yield name, shape with the slowest axis first, and format, as llama.cpp names them."""
        q, kv, d = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.d_model
        yield "token_embd.weight", (self.vocab_size, d), self.format_of("token_embd")
        yield "output_norm.weight", (d,), "F32"
        yield "output.weight", (self.vocab_size, d), self.format_of("output")
        matrices: dict[str, tuple[int, ...]] = {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q)}
        if self.mixture:
            n, _, width = self.mixture
            matrices |= {"ffn_gate_exps": (n, width, d), "ffn_up_exps": (n, width, d), "ffn_down_exps": (n, d, width)}
        else:
            matrices |= {"ffn_gate": (self.d_ff, d), "ffn_up": (self.d_ff, d), "ffn_down": (d, self.d_ff)}
        for i in range(self.n_layers):
            for name, shape in matrices.items():
                yield f"blk.{i}.{name}.weight", shape, self.format_of(name, i)
            if self.mixture:
                yield f"blk.{i}.ffn_gate_inp.weight", (self.mixture[0], d), "F32"
            for name in self.norms:
                yield f"blk.{i}.{name}.weight", (d,), "F32"
            for name in ("attn_q_norm", "attn_k_norm") if self.head_norms else ():
                yield f"blk.{i}.{name}.weight", (self.head_dim,), "F32"
            for name in ("attn_q", "attn_k", "attn_v") if self.biases else ():
                yield f"blk.{i}.{name}.bias", matrices[name][:1], "F32"

    def metadata(self) -> dict[str, Any]:
        """Return its keys; tokens are numbers as text."""
        own = {"block_count": self.n_layers, "embedding_length": self.d_model, "feed_forward_length": self.d_ff,
               "attention.head_count": self.n_heads, "attention.head_count_kv": self.n_kv_heads,
               "attention.key_length": self.head_dim, "attention.value_length": self.head_dim, "rope.dimension_count": self.head_dim,
               "context_length": 131072, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6,
               **self._mixed(), **self.keys}
        tokens = [str(i) for i in range(self.vocab_size)]
        return {"general.architecture": self.arch, **{f"{self.arch}.{name}": value for name, value in own.items()},
                "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.merges": ["0 1"], "tokenizer.ggml.token_type": [1] * self.vocab_size}

    def _mixed(self) -> dict[str, int]:
        if not self.mixture:
            return {}
        return dict(zip(("expert_count", "expert_used_count", "expert_feed_forward_length"), self.mixture))


# Llama 3.1 8B, and small models of the layouts that differ in what kernels see.
EIGHT = Decoder("llama", 32, 4096, 14336, 32, 8, 128, 128256)
GEMMA = {"norms": ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), "head_norms": True,
         "keys": {"attention.sliding_window": 32}}
SMALL = {
    "llama Q4_K_M": Decoder("llama", 3, 512, 1024, 8, 2, 64, 1024),
    "llama F32": Decoder("llama", 2, 96, 160, 6, 2, 16, 512, "F32"),
    "llama BF16": Decoder("llama", 2, 128, 256, 4, 2, 32, 512, "BF16"),
    "qwen2 Q5_0": Decoder("qwen2", 3, 128, 256, 4, 2, 32, 512, "Q5_0", biases=True),
    "gemma3 Q8_0": Decoder("gemma3", 7, 256, 512, 4, 1, 64, 512, "Q8_0", **GEMMA),
    "qwen3moe Q4_K_M": Decoder("qwen3moe", 2, 256, 512, 8, 2, 64, 512, mixture=(16, 4, 256), head_norms=True),
}


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """Return a value of a key: the number of its type, then its bytes."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        kind = 8 if isinstance(value[0], str) else TYPES[type(value[0])][0]
        body = b"".join(map(_text, value)) if kind == 8 else np.array(value, "<u4").tobytes()
        return struct.pack("<IIQ", 9, kind, len(value)) + body
    kind, form = TYPES[type(value)]
    return struct.pack("<I", kind) + struct.pack(form, value)


def blocks(d: DType, k: int, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Return random rows of k weights as bytes [rows, bytes], of mean about 0 and a spread of 1 / sqrt(k)."""
    if rows * k <= 1 << 20 and d.name in QUANTIZABLE:
        return quantize(rng.standard_normal((rows, k), np.float32) / np.float32(k**0.5), d)
    raw = random_blocks(d, (rows, k), rng).raw               # the search for scales takes too long here: any codes will do
    factor = 1 / (k**0.5 * float(np.std(dequantize(raw[:8], d))))
    for at in SCALES[d.name]:
        place = raw.reshape(-1, d.nbytes)[:, at : at + 2]
        place[:] = (place.copy().view(np.float16) * np.float16(factor)).view(np.uint8)
    return raw


def _weights(out: BinaryIO, shape: tuple[int, ...], d: DType, rng: np.random.Generator, exact: bool) -> None:
    """Write a matrix of random weights, or a vector of numbers around 1; exact: as float32, of the values that the format gives."""
    if len(shape) == 1:
        out.write((1 + 0.2 * rng.standard_normal(shape)).astype("<f4").tobytes())
        return
    rows, k = int(np.prod(shape[:-1])), shape[-1]
    tile = blocks(d, k, min(rows, max(16, TILE // d.size(k))), rng)
    for done in range(0, rows, len(tile)):
        part = tile[: rows - done]
        out.write((dequantize(part, d) if exact else part).tobytes())


def write(path: Path, model: Decoder, seed: int = 0, exact: bool = False) -> Path:
    """Write a model's file and return its path. exact: the same weights in float32. Layout: GGUF version 3 (ggml/docs/gguf.md)."""
    keys, tensors, rng = model.metadata(), list(model.tensors()), np.random.default_rng(seed)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(_text(name) + _value(value) for name, value in keys.items())
    offset, infos = 0, []
    for name, shape, kind in tensors:
        d = dtype("F32" if exact else kind)
        infos.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], d.id, offset))
        offset += -(-d.size(int(np.prod(shape))) // ALIGN) * ALIGN
    head += b"".join(infos)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        out.write(head)
        for _, shape, kind in tensors:
            out.write(bytes(-out.tell() % ALIGN))
            _weights(out, shape, dtype(kind), rng, exact)
        out.write(bytes(-out.tell() % ALIGN))
    return path
