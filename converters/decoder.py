"""What every decoder has: its sizes in the config, their keys in the file, and the tensors around its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGUFWriter

from .checkpoint import Config
from .contract import Blocks, Constant, Entry, linear, Stack
from .rope import rope_parameters

Tensors = Iterator[Entry | Stack | Constant | Blocks]


class Decoder:
    """A text model of equal layers; `config.json` names as in transformers' LlamaConfig.

    A subclass adds the keys of its own and lists what is in a layer.
    """

    arch: str
    renames: Sequence[tuple[str, str]] = ()
    defaults: Mapping[str, Any]             # where a config.json may be silent
    rope_base: float
    width = "intermediate_size"             # the name of the feed-forward's units
    norm_offset = 0.0                       # added to the weights of norms
    n_ahead = 0                             # layers behind the last one that predict further tokens

    def __init__(self, config: dict[str, Any], file: Path, more_defaults: Mapping[str, Any] = MappingProxyType({})):
        c = self.config = Config(config, {**self.defaults, **more_defaults}, file)
        self.vocab_size, self.d_model, self.d_ff = (c.count(n) for n in ("vocab_size", "hidden_size", self.width))
        self.n_layers, self.n_heads = c.count("num_hidden_layers"), c.count("num_attention_heads")
        self.n_kv_heads = c.count("num_key_value_heads") if c.get("num_key_value_heads") else self.n_heads
        self.head_dim = c.count("head_dim") if c.get("head_dim") else self.d_model // self.n_heads
        self.q_width, self.kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.tied = c.need("tie_word_embeddings")
        self.rope = self.read_rope()

    def read_rope(self) -> dict[str, Any]:
        """Return rope's parameters, of the layers that see everything."""
        return rope_parameters(self.config, self.rope_base)

    def write_keys(self, out: GGUFWriter) -> None:
        d_ff, n_kv_heads, head_dim = self.layer_sizes()
        self.write_sizes(out, d_ff)
        out.add_head_count_kv(n_kv_heads)
        out.add_key_length(head_dim)
        out.add_value_length(head_dim)
        out.add_layer_norm_rms_eps(self.config.need("rms_norm_eps"))
        out.add_rope_freq_base(self.rope["rope_theta"])

    def write_sizes(self, out: GGUFWriter, d_ff: int | list[int]) -> None:
        """Write what files of all decoders say."""
        out.add_block_count(self.n_layers + self.n_ahead)
        if self.n_ahead:
            out.add_nextn_predict_layers(self.n_ahead)
        out.add_context_length(self.config.count("max_position_embeddings"))
        out.add_embedding_length(self.d_model)
        out.add_feed_forward_length(d_ff)
        out.add_head_count(self.n_heads)

    def layer_sizes(self) -> tuple[int | list[int], int | list[int], int]:
        """Return units of the feed-forwards, key/value heads (for all layers, or a list) and elements of a head as the file says them."""
        return self.d_ff, self.n_kv_heads, self.head_dim

    def unused(self) -> set[str]:
        return {"lm_head.weight"} if self.tied else set()

    def tensors(self) -> Tensors:
        yield Entry("token_embd.weight", "model.embed_tokens.weight", (self.vocab_size, self.d_model))
        yield self.norm("output_norm", "model.norm", self.d_model)
        if not self.tied:
            yield Entry("output.weight", "lm_head.weight", (self.vocab_size, self.d_model))
        yield from self.constants()
        for i in range(self.n_layers):
            yield from self.layer(i, f"blk.{i}", f"model.layers.{i}")

    def constants(self) -> Iterator[Constant]:
        """List tensors of the file that follow from the config."""
        return iter(())

    def layer(self, i: int, b: str, m: str) -> Tensors:
        """List layer i, named b in the file and m in the checkpoint."""
        raise NotImplementedError

    def attention(self, b: str, m: str, bias: bool = False, out_bias: bool | None = None, head_norms: bool = False,
                  rows: tuple[np.ndarray | None, np.ndarray | None] = (None, None)) -> Iterator[Entry]:
        """List the matrices of a layer's attention, m in the checkpoint.

        bias        of queries, keys and values; of the output too, unless `out_bias` says otherwise
        head_norms  RMS norms over each head's queries and keys
        rows        the order of the rows of queries and of keys
        """
        d, q, kv = self.d_model, self.q_width, self.kv_width
        yield from linear(f"{b}.attn_q", f"{m}.q_proj", q, d, bias, rows[0])
        yield from linear(f"{b}.attn_k", f"{m}.k_proj", kv, d, bias, rows[1])
        yield from linear(f"{b}.attn_v", f"{m}.v_proj", kv, d, bias)
        if head_norms:
            yield self.norm(f"{b}.attn_q_norm", f"{m}.q_norm", self.head_dim)
            yield self.norm(f"{b}.attn_k_norm", f"{m}.k_norm", self.head_dim)
        yield from linear(f"{b}.attn_output", f"{m}.o_proj", d, q, bias if out_bias is None else out_bias)

    def gated(self, name: str, source: str, width: int, bias: bool = False, kind: str = "") -> Iterator[Entry]:
        """List the matrices of a gated feed-forward of `width` units; `kind` is added to the names of ours."""
        yield from linear(f"{name}.ffn_gate{kind}", f"{source}.gate_proj", width, self.d_model, bias)
        yield from linear(f"{name}.ffn_up{kind}", f"{source}.up_proj", width, self.d_model, bias)
        yield from linear(f"{name}.ffn_down{kind}", f"{source}.down_proj", self.d_model, width, bias)

    def norm(self, name: str, source: str, n: int) -> Entry:
        """Return the weight [n] of an RMS norm."""
        return Entry(f"{name}.weight", f"{source}.weight", (n,), add=self.norm_offset)


def write_window(out: GGUFWriter, window: int | None, sliding: list[bool]) -> None:
    """Write the window (a query sees that many keys, itself included) and which layers slide."""
    if window is not None and any(sliding):
        out.add_sliding_window(window)
        out.add_sliding_window_pattern(sliding)
