"""GGUF files of full-size models with headers and no data: sparse files that `pe.plan` cannot tell from real ones.

Which models there are, the cases say (`cases.py`). Sizes are those of the published checkpoints' config.json. Vocabularies have the published number of tokens, which are
numbers as text; formats are Q4_0 or Q8_0 for matrices and F32 for the rest, F16 in encoders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Tensor = tuple[str, tuple[int, ...], str]                    # name, shape with the slowest axis first, format


@dataclass(frozen=True)
class Decoder:
    """A text model's published sizes."""

    arch: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    n_ctx: int
    tied: bool = False
    biases: bool = False             # on q, k and v
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    head_norms: bool = False         # on q and k
    keys: dict[str, Any] = field(default_factory=dict)
    n_merges: int = 100              # of the tokenizer

    def tensors(self, dtype: str) -> Iterator[Tensor]:
        """The decoder's tensors, as llama.cpp names them."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        yield "token_embd.weight", (self.vocab_size, self.d_model), dtype
        yield "output_norm.weight", (self.d_model,), "F32"
        if not self.tied:
            yield "output.weight", (self.vocab_size, self.d_model), dtype
        for i in range(self.n_layers):
            matrices = {"attn_q": (q, self.d_model), "attn_k": (kv, self.d_model), "attn_v": (kv, self.d_model),
                        "attn_output": (self.d_model, q), "ffn_gate": (self.d_ff, self.d_model),
                        "ffn_up": (self.d_ff, self.d_model), "ffn_down": (self.d_model, self.d_ff)}
            for name, shape in matrices.items():
                yield f"blk.{i}.{name}.weight", shape, dtype
            for name in self.norms:
                yield f"blk.{i}.{name}.weight", (self.d_model,), "F32"
            for name in ("attn_q_norm", "attn_k_norm") if self.head_norms else ():
                yield f"blk.{i}.{name}.weight", (self.head_dim,), "F32"
            for name in ("attn_q", "attn_k", "attn_v") if self.biases else ():
                yield f"blk.{i}.{name}.bias", (matrices[name][0],), "F32"

    def metadata(self) -> dict[str, Any]:
        """Its keys."""
        own = {"block_count": self.n_layers, "embedding_length": self.d_model, "feed_forward_length": self.d_ff,
               "attention.head_count": self.n_heads, "attention.head_count_kv": self.n_kv_heads,
               "attention.key_length": self.head_dim, "attention.value_length": self.head_dim,
               "context_length": self.n_ctx, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6, **self.keys}
        return {f"{self.arch}.{name}": value for name, value in own.items()}


@dataclass(frozen=True)
class PlainDecoder(Decoder):
    """Norms and products with biases, one matrix up and one down."""

    positions: bool = False          # they are a table that is added to embeddings

    def tensors(self, dtype: str) -> Iterator[Tensor]:
        """The decoder's tensors."""
        d, f = self.d_model, self.d_ff
        for name in ("token_embd", *([] if self.tied else ["output"])):
            yield f"{name}.weight", (self.vocab_size, d), dtype
        if self.positions:
            yield "position_embd.weight", (self.n_ctx, d), "F16"
        yield from both("output_norm", d)
        for i in range(self.n_layers):
            b = f"blk.{i}."
            for name, shape in {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (d, d)), "ffn_up": (f, d), "ffn_down": (d, f)}.items():
                yield f"{b}{name}.weight", shape, dtype
                yield f"{b}{name}.bias", shape[:1], "F32"
            for name in self.norms:
                yield from both(b + name, d)
            for name in ("attn_q_norm", "attn_k_norm") if self.head_norms else ():
                yield from both(b + name, self.head_dim)


Encoder = tuple[dict[str, Any], list[Tensor]]                # keys and tensors of llama.cpp's projector file


@dataclass(frozen=True)
class Full:
    """A published model: its sizes, its special tokens, which come first, and its encoder for a decoder of some width."""

    decoder: Decoder
    tokens: tuple[str, ...] = ()
    encoder: Callable[[int], Encoder] | None = None
    dtype: str = "Q4_0"
    part_bytes: int = 0              # largest size of a file, if the decoder is in several

    def write(self, folder: Path, name: str) -> tuple[Path, Path | None]:
        """Write its files and return them: (decoder, encoder)."""
        path = write_decoder(folder / f"{name}.gguf", self.decoder, self.dtype, self.part_bytes, self.tokens)
        return path, self.encoder and write_encoder(folder / f"mmproj-{name}.gguf", self.encoder(self.decoder.d_model))


KINDS = {"all ": "Full", "window of": "Sliding", "chunks of": "Chunked", "pictures: ": "Cross"}     # the words of `Policy.about`


def kv(plan: Any) -> dict[str, int]:
    """Bytes of a plan's caches by kind of layer."""
    found: dict[str, int] = {}
    for i in plan.items:
        if i.purpose == "kv" and i.layer is not None:
            kind = next(name for word, name in KINDS.items() if word in i.detail)
            found[kind] = found.get(kind, 0) + i.nbytes
    return found


def both(name: str, width: int) -> list[Tensor]:
    """Weight and bias of a vector's length."""
    return [(f"{name}.weight", (width,), "F32"), (f"{name}.bias", (width,), "F32")]


def vit_layers(n_layers: int, width: int, d_ff: int) -> list[Tensor]:
    """An encoder's layers as llama.cpp names them: two norms, attention and a feed-forward, all with biases."""
    tensors: list[Tensor] = []
    for i in range(n_layers):
        at = f"v.blk.{i}."
        tensors += [*both(f"{at}ln1", width), *both(f"{at}ln2", width)]
        for name, shape in {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (width, width)),
                            "ffn_up": (d_ff, width), "ffn_down": (width, d_ff)}.items():
            tensors += [(f"{at}{name}.weight", shape, "F16"), (f"{at}{name}.bias", shape[:1], "F32")]
    return tensors


def write_decoder(path: Path, model: Decoder, dtype: str = "Q4_0", part_bytes: int = 0, special: tuple[str, ...] = ()) -> Path:
    """Write a decoder's file, in parts of at most `part_bytes` if given; `special` are the first tokens. Returns the first part."""
    tokens = [*special, *(str(i) for i in range(model.vocab_size - len(special)))]
    keys = {**model.metadata(), "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [f"{i // 1000} {i % 1000}" for i in range(model.n_merges)],
            "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special))}
    return write_headers(path, model.arch, keys, list(model.tensors(dtype)), part_bytes)


def write_encoder(path: Path, encoder: Encoder) -> Path:
    """Write an encoder's file."""
    return write_headers(path, "clip", *encoder, 0)


def add_keys(writer: Any, keys: Mapping[str, Any]) -> None:
    """Write keys with gguf-py, in the formats of their types: uint32 for ints, float32 for floats."""
    for name, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value.tolist() if isinstance(value, np.ndarray) else value)


def write_headers(path: Path, arch: str, keys: dict[str, Any], tensors: list[Tensor], part_bytes: int) -> Path:
    """Write headers with gguf-py; the data that they speak of are holes in the files."""
    import gguf

    writer = gguf.GGUFWriter(path, arch, split_max_size=part_bytes)
    add_keys(writer, keys)
    for name, shape, dtype in tensors:
        type_ = gguf.GGMLQuantizationType[dtype]
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        n = int(np.prod(shape))
        plain = np.dtype(np.float16 if dtype == "F16" else np.float32)
        writer.add_tensor_info(name, shape, plain, n // block * block_bytes, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for file, table in zip(writer.fout, writer.tensors):
        data = sum(-(-t.nbytes // 32) * 32 for t in table.values())
        file.flush()
        os.truncate(file.fileno(), -(-file.tell() // 32) * 32 + data)
    writer.close()
    return next(p for p in sorted(path.parent.glob(f"{path.stem}*.gguf")) if p == path or "-00001-of-" in p.name)
