"""GGUF files of full-size models with headers and no data: sparse files that `pe.plan` cannot tell from real ones.

Sizes are those of the published checkpoints' config.json. Vocabularies have the published number of tokens, which are
numbers as text; formats are Q4_0 or Q8_0 for matrices and F32 for the rest, F16 in encoders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
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
class Llama4(Decoder):
    """Experts in every layer; `d_ff` is the width of each and of the one that all tokens go through."""

    n_experts: int = 16

    def tensors(self, dtype: str) -> Iterator[Tensor]:
        """The decoder's tensors; the router stays in F32."""
        for name, shape, kind in super().tensors(dtype):
            block, _, part = name.removesuffix(".weight").rpartition(".")
            if part in ("ffn_gate", "ffn_up", "ffn_down"):
                yield f"{block}.{part}_shexp.weight", shape, kind
                yield f"{block}.{part}_exps.weight", (self.n_experts, *shape), kind
            else:
                yield name, shape, kind
            if part == "ffn_norm":
                yield f"{block}.ffn_gate_inp.weight", (self.n_experts, self.d_model), "F32"

    def metadata(self) -> dict[str, Any]:
        """Its keys."""
        return {**super().metadata(), "llama4.expert_count": self.n_experts, "llama4.expert_used_count": 1,
                "llama4.expert_feed_forward_length": self.d_ff, "llama4.interleave_moe_layer_step": 1}


_GEMMA = {"tied": True, "norms": ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), "head_norms": True,
          "keys": {"attention.sliding_window": 1024}}
LLAMA_70B = Decoder("llama", 80, 8192, 28672, 64, 8, 128, 128256, 131072)
LLAMA_405B = Decoder("llama", 126, 16384, 53248, 128, 8, 128, 128256, 131072, n_merges=280147)
GEMMA_12B = Decoder("gemma3", 48, 3840, 15360, 16, 8, 256, 262208, 131072, **_GEMMA)
GEMMA_27B = Decoder("gemma3", 62, 5376, 21504, 32, 16, 128, 262208, 131072, **_GEMMA)
MISTRAL_SMALL = Decoder("mistral3", 40, 5120, 32768, 32, 8, 128, 131072, 131072)         # 3.1 24B
LLAMA_VISION = Decoder("mllama", 40, 4096, 14336, 32, 8, 128, 128256, 131072)
LLAMA_VISION_ACROSS = (3, 8, 13, 18, 23, 28, 33, 38)         # layers that attend to the picture
QWEN_VL = {"biases": True, "keys": {"rope.dimension_sections": np.array([16, 24, 24, 0], np.int32)}}
QWEN_VL_7B = Decoder("qwen2vl", 28, 3584, 18944, 28, 4, 128, 152064, 128000, **QWEN_VL)
QWEN_VL_72B = Decoder("qwen2vl", 80, 8192, 29568, 64, 8, 128, 152064, 128000, **QWEN_VL)

LLAMA_4_SCOUT = Llama4("llama4", 48, 5120, 8192, 40, 8, 128, 202048, 10485760)


def siglip(d_model: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Gemma 3's encoder: keys and tensors of llama.cpp's projector file. 896 x 896 pixels, 4096 patches, 256 soft tokens."""
    width, d_ff, n_layers, patch, side = 1152, 4304, 27, 14, 64
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "gemma3", "clip.vision.image_size": 896,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width,
            "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16,
            "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.projection_dim": d_model, "clip.use_gelu": True}
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, patch, patch), "F16"), ("v.patch_embd.bias", (width,), "F32"),
                             ("v.position_embd.weight", (side * side, width), "F16"),
                             ("mm.input_projection.weight", (width, d_model), "F16"),
                             ("mm.soft_emb_norm.weight", (width,), "F32"), *_both("v.post_ln", width)]
    for i in range(n_layers):
        at = f"v.blk.{i}."
        tensors += [*_both(f"{at}ln1", width), *_both(f"{at}ln2", width)]
        for name, shape in {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (width, width)),
                            "ffn_up": (d_ff, width), "ffn_down": (width, d_ff)}.items():
            tensors += [(f"{at}{name}.weight", shape, "F16"), (f"{at}{name}.bias", shape[:1], "F32")]
    return keys, tensors


def qwen_encoder(d_model: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Qwen2.5-VL's encoder: keys and tensors of llama.cpp's projector file. At most 16,384 soft tokens a picture."""
    width, d_ff, n_layers, patch = 1280, 3420, 32, 14
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "qwen2.5vl_merger", "clip.use_silu": True,
            "clip.vision.image_size": 560,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width,
            "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16, "clip.vision.n_wa_pattern": 8,
            "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.projection_dim": d_model}
    group = 4 * width
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, patch, patch), "F16"),
                             ("v.patch_embd.weight.1", (width, 3, patch, patch), "F16"), ("v.post_ln.weight", (width,), "F32"),
                             ("mm.0.weight", (group, group), "F16"), ("mm.0.bias", (group,), "F32"),
                             ("mm.2.weight", (d_model, group), "F16"), ("mm.2.bias", (d_model,), "F32")]
    for i in range(n_layers):
        at = f"v.blk.{i}."
        tensors += [(f"{at}ln1.weight", (width,), "F32"), (f"{at}ln2.weight", (width,), "F32")]
        for name, shape in {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (width, width)), "ffn_gate": (d_ff, width),
                            "ffn_up": (d_ff, width), "ffn_down": (width, d_ff)}.items():
            tensors += [(f"{at}{name}.weight", shape, "F16"), (f"{at}{name}.bias", shape[:1], "F32")]
    return keys, tensors


def pixtral(d_model: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Mistral Small 3.1's encoder: keys and tensors of llama.cpp's projector file. Up to 1540 x 1540 pixels, 3025 soft tokens."""
    width, d_ff, n_layers, patch, merge = 1024, 4096, 24, 14, 2
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "pixtral", "clip.use_silu": True,
            "clip.vision.image_size": 1540,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width,
            "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16,
            "clip.vision.spatial_merge_size": merge,
            "clip.vision.attention.layer_norm_epsilon": 1e-5, "clip.vision.projection_dim": d_model}
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, patch, patch), "F16"), ("v.pre_ln.weight", (width,), "F32"),
                             ("v.token_embd.img_break", (d_model,), "F32"), ("mm.input_norm.weight", (width,), "F32"),
                             ("mm.patch_merger.weight", (width, width * merge**2), "F16"), ("mm.1.weight", (d_model, width), "F16"),
                             ("mm.2.weight", (d_model, d_model), "F16")]
    for i in range(n_layers):
        at = f"v.blk.{i}."
        tensors += [(f"{at}ln1.weight", (width,), "F32"), (f"{at}ln2.weight", (width,), "F32")]
        for name, shape in {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (width, width)), "ffn_gate": (d_ff, width),
                            "ffn_up": (d_ff, width), "ffn_down": (width, d_ff)}.items():
            tensors.append((f"{at}{name}.weight", shape, "F16"))
    return keys, tensors


def tiled_encoder(d_model: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Llama 3.2 Vision's encoder: our keys, Ollama's names. Four tiles of 560 x 560 pixels, 1601 rows each."""
    width, d_ff, n_layers, n_global, patch, tiles, rows, ratios = 1280, 5120, 32, 8, 14, 4, 40 * 40 + 1, 9
    states = np.array([3, 7, 15, 23, 30], np.int32)
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "mllama", "clip.vision.image_size": 560,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.global.block_count": n_global,
            "clip.vision.embedding_length": width, "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16,
            "clip.vision.attention.layer_norm_epsilon": 1e-5, "clip.vision.max_num_tiles": tiles,
            "clip.vision.feature_layer": states, "clip.vision.image_token_id": 128256, "clip.vision.hidden_act": "gelu"}
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, patch, patch), "F32"), ("v.class_embd", (width,), "F32"),
                             ("v.position_embd.weight", (rows, width), "F32"), ("v.position_embd.gate", (1,), "F32"),
                             ("v.tile_position_embd.weight", (ratios, tiles * rows * width), "F16"),
                             ("v.tile_position_embd.gate", (1,), "F32"), *_both("v.pre_ln", width), *_both("v.post_ln", width)]
    for when in ("pre", "post"):
        name = f"v.{when}_tile_position_embd"
        tensors += [(f"{name}.weight", (ratios, tiles * width), "F32"), (f"{name}.gate", (1,), "F32")]
    for at in (*(f"v.blk.{i}." for i in range(n_layers)), *(f"v.global.blk.{i}." for i in range(n_global))):
        tensors += [*_both(f"{at}ln1", width), *_both(f"{at}ln2", width),
                    *((f"{at}{name}.weight", (width, width), "F16") for name in ("attn_q", "attn_k", "attn_v", "attn_out")),
                    (f"{at}ffn_up.weight", (d_ff, width), "F16"), (f"{at}ffn_up.bias", (d_ff,), "F32"),
                    (f"{at}ffn_down.weight", (width, d_ff), "F16"), (f"{at}ffn_down.bias", (width,), "F32")]
        tensors += [(f"{at}{name}", (1,), "F32") for name in (("attn_gate", "ffn_gate") if "global" in at else ())]
    return keys, [*tensors, ("mm.0.weight", (d_model, width * (1 + len(states))), "F16"), ("mm.0.bias", (d_model,), "F32")]


def write_llama_vision(path: Path, dtype: str = "Q4_0") -> Path:
    """Write Llama 3.2 Vision 11B, decoder and encoder in one file."""
    model = LLAMA_VISION
    d, kv, e = model.d_model, model.n_kv_heads * model.head_dim, model.head_dim
    other = {f"blk.{i}.attn_{name}.weight" for i in LLAMA_VISION_ACROSS for name in ("q", "k", "v", "output")}
    own = [t for t in model.tensors(dtype) if t[0] not in other]
    own[0] = ("token_embd.weight", (model.vocab_size + 8, d), dtype)
    for i in LLAMA_VISION_ACROSS:
        at = f"blk.{i}.cross_attn_"
        shapes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
        own += [(f"{at}{name}_proj.weight", shape, dtype) for name, shape in shapes.items()]
        own += [(f"{at}{name}_norm.weight", (e,), "F32") for name in ("q", "k")]
        own += [(f"{at}{name}_gate", (1,), "F32") for name in ("attn", "mlp")]
    keys, tensors = tiled_encoder(d)
    tokens = [str(i) for i in range(model.vocab_size + 8)]
    keys = {**model.metadata(), "mllama.attention.cross_attention_layers": np.array(LLAMA_VISION_ACROSS, np.int32), **keys,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["1 1"], "tokenizer.ggml.token_type": [1] * len(tokens)}
    return _write(path, model.arch, keys, own + tensors, 0)


def llama4_encoder(d_model: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Llama 4's encoder: keys and tensors of llama.cpp's projector file. 336 x 336 pixels a tile, 144 soft tokens."""
    width, d_ff, n_layers, patch, side, adapter = 1408, 5632, 34, 14, 24, 4096
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "llama4", "clip.use_gelu": True, "clip.vision.image_size": 336,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width,
            "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16, "clip.vision.projector.scale_factor": 2,
            "clip.vision.attention.layer_norm_epsilon": 1e-5, "clip.vision.projection_dim": d_model}
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3 * patch * patch), "F16"), ("v.class_embd", (width,), "F32"),
                             ("v.position_embd.weight", (side * side + 1, width), "F16"), *_both("v.pre_ln", width),
                             *_both("v.post_ln", width), ("mm.model.mlp.1.weight", (adapter, 4 * width), "F16"),
                             ("mm.model.mlp.2.weight", (adapter, adapter), "F16"), ("mm.model.fc.weight", (d_model, adapter), "F16")]
    for i in range(n_layers):
        at = f"v.blk.{i}."
        tensors += [*_both(f"{at}ln1", width), *_both(f"{at}ln2", width)]
        for name, shape in {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (width, width)),
                            "ffn_up": (d_ff, width), "ffn_down": (width, d_ff)}.items():
            tensors += [(f"{at}{name}.weight", shape, "F16"), (f"{at}{name}.bias", shape[:1], "F32")]
    return keys, tensors


def _both(name: str, width: int) -> list[Tensor]:
    return [(f"{name}.weight", (width,), "F32"), (f"{name}.bias", (width,), "F32")]


def write_decoder(path: Path, model: Decoder, dtype: str = "Q4_0", part_bytes: int = 0, special: tuple[str, ...] = ()) -> Path:
    """Write a decoder's file, in parts of at most `part_bytes` if given; `special` are the first tokens. Returns the first part."""
    tokens = [*special, *(str(i) for i in range(model.vocab_size - len(special)))]
    keys = {**model.metadata(), "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [f"{i // 1000} {i % 1000}" for i in range(model.n_merges)],
            "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special))}
    return _write(path, model.arch, keys, list(model.tensors(dtype)), part_bytes)


def write_encoder(path: Path, encoder: tuple[dict[str, Any], list[Tensor]]) -> Path:
    """Write an encoder's file."""
    return _write(path, "clip", *encoder, 0)


def _write(path: Path, arch: str, keys: dict[str, Any], tensors: list[Tensor], part_bytes: int) -> Path:
    """Write headers with gguf-py; the data that they speak of are holes in the files."""
    import gguf

    writer = gguf.GGUFWriter(path, arch, split_max_size=part_bytes)
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
