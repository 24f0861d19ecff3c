"""Which format each tensor of a file gets.

A mixture in llama.cpp's sense: most matrices get its first format, and those that suffer most, or fill few bytes, a finer one. The
rules are llama.cpp's (src/llama-quant.cpp: `llama_tensor_get_type_impl`, `tensor_allows_quantization`, `tensor_type_fallback`,
without importance matrix), written as data below. Matrices of an image encoder are the exception: see `VISION`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import LlamaFileType

from pyengine.dtype import DType, dtype
from pyengine.files.gguf import GGUFFile, TensorInfo

# Mixtures: the format of most matrices, and the number in general.file_type.
MIXTURES: dict[str, tuple[str, LlamaFileType]] = {
    "F32": ("F32", LlamaFileType.ALL_F32), "F16": ("F16", LlamaFileType.MOSTLY_F16), "BF16": ("BF16", LlamaFileType.MOSTLY_BF16),
    "Q8_0": ("Q8_0", LlamaFileType.MOSTLY_Q8_0), "Q4_0": ("Q4_0", LlamaFileType.MOSTLY_Q4_0),
    "Q4_1": ("Q4_1", LlamaFileType.MOSTLY_Q4_1), "Q5_0": ("Q5_0", LlamaFileType.MOSTLY_Q5_0),
    "Q5_1": ("Q5_1", LlamaFileType.MOSTLY_Q5_1), "IQ4_NL": ("IQ4_NL", LlamaFileType.MOSTLY_IQ4_NL),
    "Q2_K": ("Q2_K", LlamaFileType.MOSTLY_Q2_K), "Q3_K_S": ("Q3_K", LlamaFileType.MOSTLY_Q3_K_S),
    "Q3_K_M": ("Q3_K", LlamaFileType.MOSTLY_Q3_K_M), "Q3_K_L": ("Q3_K", LlamaFileType.MOSTLY_Q3_K_L),
    "Q4_K_S": ("Q4_K", LlamaFileType.MOSTLY_Q4_K_S), "Q4_K_M": ("Q4_K", LlamaFileType.MOSTLY_Q4_K_M),
    "Q5_K_S": ("Q5_K", LlamaFileType.MOSTLY_Q5_K_S), "Q5_K_M": ("Q5_K", LlamaFileType.MOSTLY_Q5_K_M),
    "Q6_K": ("Q6_K", LlamaFileType.MOSTLY_Q6_K),
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
PLAIN = ("F32", "F16", "BF16")
NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64")
# What rows get that are no whole blocks of 256, and F16 where 32 does not divide them either.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# An image encoder and its projector are a small share of a file and see every pixel through every layer, so with any block
# format their matrices get this one (the finest that people publish for llama.cpp's mmproj files), unless --vision says more.
VISION = "Q8_0"
VISION_PREFIXES = ("v.", "mm.")
# Matrices that are never quantized: norms, routers, positions, what pixels go through first, Gemma 3's projector (used
# transposed), and small matrices of recurrent and other architectures.
KEPT = re.compile(r"_norm\.weight$|ffn_gate_inp\.weight|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj"
                  r"|^position_embd\.|^token_types\."
                  r"|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|attn_rel_b\.weight"
                  r"|time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.weight"
                  r"|[._]position_embd|\.patch_embd|\.patch_merger|^mm\.input_projection\.|sam\.(pos_embd|neck\.|net_)|\.rel_pos"
                  r"|a\.rvq\.codebook|mm\.a\.code_embd")
LAYER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class Facts:
    """What the rules ask about a model."""

    n_layers: int
    n_gqa: int                 # query heads that share a key head, in the first layer
    n_experts: int
    tied: bool                 # the embedding is the output head too
    v_rank: dict[str, int]     # order of the value projections by layer: they are counted where some layers have none

    @staticmethod
    def of(file: GGUFFile) -> Facts:
        arch = file.metadata.get("general.architecture", "", str)
        heads, shared = (_first(file, f"{arch}.attention.head_count{end}") for end in ("", "_kv"))
        layers = {name: int(m[1]) for name in file.tensors if (m := LAYER.match(name))}
        values = sorted((n for n in layers if _is_value(n)), key=layers.__getitem__)
        return Facts(max(layers.values(), default=-1) + 1, heads // (shared or heads) if heads else 0,
                     _first(file, f"{arch}.expert_count"), "output.weight" not in file.tensors,
                     {name: i for i, name in enumerate(values)})


def _first(file: GGUFFile, key: str) -> int:
    value = file.metadata.get(key, 0, int, np.ndarray)
    return int(value if isinstance(value, int) else value.flat[0] if value.size else 0)


def _is_value(name: str) -> bool:
    return any(part in name for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))


def _more_bits(i: int, n: int) -> bool:
    """Whether layer i of n is of the outer eighths, or every third between: those that lose most by 4 and 5 bits."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


# Rules of the mixtures: (layer or rank, of how many, facts) -> a finer format, or None for the mixture's own.
Rule = Callable[[int, int, Facts], "str | None"]
VALUE_RULES: dict[str, Rule] = {
    "Q2_K": lambda i, n, f: "Q4_K" if f.n_gqa >= 4 else "Q3_K",
    "Q3_K_M": lambda i, n, f: "Q5_K" if i < 2 else "Q4_K",
    "Q3_K_L": lambda i, n, f: "Q5_K",
    "Q4_K_S": lambda i, n, f: "Q5_K" if i < 4 else None,
    "Q4_K_M": lambda i, n, f: "Q6_K" if _more_bits(i, n) else None,
    "Q5_K_M": lambda i, n, f: "Q6_K" if _more_bits(i, n) else None,
    "IQ4_NL": lambda i, n, f: "Q5_K" if f.n_gqa >= 4 else None,
}
DOWN_RULES: dict[str, Rule] = {
    "Q2_K": lambda i, n, f: "Q3_K",
    "Q3_K_M": lambda i, n, f: "Q5_K" if i < n // 16 else "Q4_K",
    "Q3_K_L": lambda i, n, f: "Q5_K",
    "Q4_K_S": lambda i, n, f: "Q5_K" if i < n // 8 else None,
    "Q4_K_M": lambda i, n, f: "Q6_K" if _more_bits(i, n) else None,
    "Q5_K_M": lambda i, n, f: "Q6_K" if _more_bits(i, n) else None,
    "IQ4_NL": lambda i, n, f: "Q5_K" if i < n // 8 else None,
}
OUTPUT_RULES: dict[str, Rule] = {       # the projection after attention
    "Q2_K": lambda i, n, f: "Q5_K" if f.n_experts == 8 else "Q3_K",
    "Q3_K_S": lambda i, n, f: "Q5_K" if f.n_experts == 8 else None,
    "Q3_K_M": lambda i, n, f: "Q5_K" if f.n_experts == 8 else "Q4_K",
    "Q3_K_L": lambda i, n, f: None if f.n_experts == 8 else "Q5_K",
    "Q4_K_S": lambda i, n, f: "Q5_K" if f.n_experts == 8 else None,
    "Q4_K_M": lambda i, n, f: "Q5_K" if f.n_experts == 8 else None,
    "IQ4_NL": lambda i, n, f: "Q5_K" if f.n_experts == 8 else None,
}


def choose(info: TensorInfo, mixture: str, facts: Facts, vision: str = VISION) -> DType:
    """Return the format that a tensor is written in."""
    base, name = MIXTURES[mixture][0], info.name
    is_image = name.startswith(VISION_PREFIXES)
    if len(info.shape) < 2 or not name.endswith("weight") or KEPT.search(name) or info.dtype.name in NO_WEIGHTS:
        return info.dtype
    if base in PLAIN:
        return dtype(base)
    wanted = vision if is_image else _text_format(name, info.shape[-1], base, mixture, facts)
    if info.shape[-1] % dtype(wanted).block:
        wanted = FALLBACK.get(wanted, wanted)
    if info.shape[-1] % dtype(wanted).block:
        # llama.cpp takes F16; what has 16 bits already is not rounded into another kind of them
        return info.dtype if info.dtype.name in ("F16", "BF16") else dtype("F16")
    return dtype(wanted)


def _text_format(name: str, width: int, base: str, mixture: str, f: Facts) -> str:
    if name == "output.weight" or f.tied and name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "Q8_0" if base == "Q8_0" or width % dtype(base).block else "Q6_K"
    layer = int(m[1]) if (m := LAYER.match(name)) else 0
    if _is_value(name):
        if f.n_experts == 8:
            return "Q8_0"
        found = _rule(VALUE_RULES, mixture, f.v_rank.get(name, 0), len(f.v_rank), f) or base
        # 80 layers whose value projection is an eighth of the query's, as Llama 2 and 3 70B have them: few bytes, more bits
        return "Q5_K" if f.n_layers == 80 and f.n_gqa == 8 and found in ("Q3_K", "Q4_K") else found
    if "attn_k.weight" in name and f.n_experts == 8:
        return "Q8_0"
    if "ffn_down" in name:
        return _rule(DOWN_RULES, mixture, layer, f.n_layers, f) or base
    if "attn_output.weight" in name:
        return _rule(OUTPUT_RULES, mixture, layer, f.n_layers, f) or base
    return base


def _rule(rules: dict[str, Rule], mixture: str, i: int, n: int, facts: Facts) -> str | None:
    return rules[mixture](i, n, facts) if mixture in rules else None
