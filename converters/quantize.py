"""`python -m converters.quantize IN.gguf OUT.gguf TYPE`: write a GGUF file again with its matrices in block formats.

The formats' codes and scales are searched by `csrc/cpu/quantize.c`; this module decides which tensor gets which format,
streams the tensors through, and copies every key. TYPE names a mixture in llama.cpp's sense: most matrices get its first
format, and those that suffer most, or fill few bytes, a finer one. The rules are llama.cpp's (src/llama-quant.cpp:
`llama_tensor_get_type_impl`, `tensor_allows_quantization`, `tensor_type_fallback`, without importance matrix), written as
data below. Matrices of an image encoder are the exception: see `VISION`.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import LlamaFileType

from pyengine.dtype import DType, dtype
from pyengine.errors import InvalidModelError, PyEngineError, RequestError
from pyengine.files.gguf import DEFAULT_ALIGNMENT, GGUFFile, MAGIC, SPLIT_NAME, TensorInfo
from pyengine.native.blocks import dequantize, QUANTIZABLE, quantize

CHUNK = 1 << 20             # elements that a thread takes at once: 4 MiB of float32

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
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")        # meaningless in a file that is whole


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


# --- the file ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Written:
    """One tensor: what it was, what it became, and how many bytes."""

    info: TensorInfo
    dtype: DType
    nbytes: int


def quantize_file(source: str | os.PathLike[str], target: str | os.PathLike[str], mixture: str, vision: str = VISION,
                  n_threads: int | None = None, progress: Callable[[Written], None] | None = None) -> list[Written]:
    """Write the GGUF file (or all parts of a split one) at `source` to the single file `target` in the formats of `mixture`.

    Every key is copied as it is, but for general.file_type, general.quantization_version and the split.* keys. `target`
    appears when it is whole. Memory: some chunks for each thread and the bytes of one written tensor.
    Raises: RequestError for an unknown mixture and for a target that cannot be; InvalidModelError naming the tensor for
    NaN, infinities, and values beyond what its format holds; what GGUFFile raises.
    """
    mixture = ALIASES.get(mixture.upper(), mixture.upper())
    if mixture not in MIXTURES:
        raise RequestError(f"{mixture!r} is no file type; known are {', '.join(MIXTURES)}")
    vision = vision.upper()
    if vision not in QUANTIZABLE:
        raise RequestError(f"--vision {vision!r} is no format; known are {', '.join(QUANTIZABLE)}")
    target = Path(target)
    if SPLIT_NAME.search(target.name):
        raise RequestError(f"{target}: one file is written, and this name means a part of several")
    with GGUFFile(source) as file:
        if any(target.exists() and os.path.samefile(p, target) for p in file.paths):
            raise RequestError(f"{target}: is the file that is read; write to another name")
        facts = Facts.of(file)
        plan = []
        for info in file.tensors.values():
            kind = choose(info, mixture, facts, vision)
            plan.append(Written(info, kind, kind.size(info.n_elements)))
        partial = target.with_name(target.name + ".partial")
        try:
            with open(partial, "wb") as out, ThreadPoolExecutor(n_threads or os.cpu_count()) as pool:
                alignment = file.metadata.get("general.alignment", DEFAULT_ALIGNMENT, int)
                _write_header(out, file, mixture, plan, alignment)
                for w in plan:
                    for data in _converted(file, w, pool):
                        out.write(data)
                    file.drop(w.info.name)
                    out.write(bytes(-out.tell() % alignment))
                    if progress:
                        progress(w)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return plan


def _write_header(out, file: GGUFFile, mixture: str, plan: list[Written], alignment: int) -> None:
    def text(value: str) -> bytes:
        raw = value.encode("utf-8")
        return struct.pack("<Q", len(raw)) + raw

    uint32 = 4
    changed = {"general.file_type": struct.pack("<II", uint32, int(MIXTURES[mixture][1])),
               "general.quantization_version": struct.pack("<II", uint32, gguf.GGML_QUANT_VERSION)}
    keys = {key: file.metadata.encoded(key) for key in file.metadata if key not in SPLIT_KEYS} | changed
    out.write(MAGIC + struct.pack("<IQQ", 3, len(plan), len(keys)))
    for key, value in keys.items():
        out.write(text(key) + value)
    offset = 0
    for w in plan:
        axes = tuple(reversed(w.info.shape))           # GGUF lists them fastest first
        out.write(text(w.info.name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, w.dtype.id, offset))
        offset += -(-w.nbytes // alignment) * alignment
    out.write(bytes(-out.tell() % alignment))


def _converted(file: GGUFFile, w: Written, pool: ThreadPoolExecutor) -> Iterator[np.ndarray | bytes]:
    """Yield a tensor's bytes in order, some rows at a time; threads work on later rows meanwhile."""
    info = w.info
    raw = file.view(info.name)
    if w.dtype == info.dtype:
        for i in range(0, info.nbytes, 4 * CHUNK):
            yield raw[i:i + 4 * CHUNK]
            file.drop_range(info.offset + i, min(4 * CHUNK, info.nbytes - i), info.part)
        return
    width = info.shape[-1]
    n_rows, row_bytes = info.n_elements // width, info.dtype.size(width)
    rows = raw.reshape(n_rows, row_bytes)
    step = max(1, CHUNK // width)

    def convert(start: int) -> np.ndarray:
        part = rows[start:start + step]
        values = part.view(np.float32) if info.dtype.name == "F32" and part.ctypes.data % 4 == 0 else dequantize(part, info.dtype)
        try:
            data = quantize(values, w.dtype)
        except RequestError as error:
            raise InvalidModelError(f"{file.paths[info.part]}: tensor {info.name!r}, rows from {start}: {error}") from None
        file.drop_range(info.offset + start * row_bytes, part.nbytes, info.part)
        return data

    yield from pool.map(convert, range(0, n_rows, step))


# --- the command ------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m converters.quantize",
                                     description="Write a GGUF file again with smaller matrices.",
                                     epilog=f"TYPE is one of {', '.join(MIXTURES)} (Q3_K, Q4_K, Q5_K: their _M).")
    parser.add_argument("source", type=Path, metavar="IN.gguf", help="F32, F16 or BF16 best; any part of a split file will do")
    parser.add_argument("target", type=Path, metavar="OUT.gguf")
    parser.add_argument("mixture", metavar="TYPE")
    parser.add_argument("--vision", default=VISION, metavar="FORMAT",
                        help=f"format of an image encoder's matrices ({VISION}; they follow TYPE where it is F32, F16 or BF16)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="all processors without it")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every tensor")
    args = parser.parse_args(argv)
    try:
        if args.threads is not None and args.threads < 1:
            raise RequestError(f"--threads {args.threads}: at least 1 is needed")
        written = quantize_file(args.source, args.target, args.mixture, args.vision, args.threads,
                                _print_line if args.verbose else None)
    except (PyEngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_summary(written, args.target))
    again = sorted({w.info.dtype.name for w in written if w.dtype != w.info.dtype and w.info.dtype.name not in PLAIN})
    if again:
        print(f"warning: {args.source} was quantized before ({', '.join(again)}), and quantizing twice costs quality: "
              "start from an F32, F16 or BF16 file", file=sys.stderr)
    return 0


def _print_line(w: Written) -> None:
    print(f"{w.info.name:40} {str(list(w.info.shape)):20} {w.info.dtype} -> {w.dtype}", flush=True)


def _summary(written: list[Written], target: Path) -> str:
    """Say what became of the tensors: how many of each format, and which matrices are not in a block format and why."""
    counts = Counter(w.dtype.name for w in written)
    before, after = sum(w.info.nbytes for w in written), sum(w.nbytes for w in written)
    weights = sum(w.info.n_elements for w in written)
    lines = [f"{target}: {before / 1e6:.1f} -> {after / 1e6:.1f} MB, {8 * after / max(1, weights):.2f} bits a weight; "
             + ", ".join(f"{n} {name}" for name, n in counts.most_common())]
    plain = [w for w in written if len(w.info.shape) > 1 and w.dtype.name in PLAIN and math.prod(w.info.shape[:-1]) > 1]
    if plain and any(w.dtype.name not in PLAIN for w in written):
        lines.append("matrices without blocks: " + ", ".join(f"{w.info.name} {w.dtype} {list(w.info.shape)}" for w in plain))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
