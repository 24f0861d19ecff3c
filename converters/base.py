"""What every architecture's converter shares: the checkpoint reader, the rope translation, the streaming GGUF writer.

An architecture is a class decorated with `@converts(...)` in a module of its own. It says which metadata it writes and
which tensor of the checkpoint becomes which tensor of the file; this module does the reading, checking and writing.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
import re
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QT
from gguf import LlamaFileType, RopeScalingType

from pyengine.dtype import Q8_0
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError
from pyengine.native.blocks import quantize

from .tokenizer import Vocabulary, read_vocabulary

OUTTYPES: dict[str, tuple[QT, LlamaFileType]] = {
    "f32": (QT.F32, LlamaFileType.ALL_F32),
    "f16": (QT.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (QT.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (QT.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
FLOAT32 = ("v.patch_embd.", "v.position_embd.", "v.pre_tile_position_embd.", "v.post_tile_position_embd.")
FEED_FORWARD = re.compile(r"v\.(global\.)?blk\.\d+\.ffn_((up|gate)\.(weight|bias)|down\.weight)$")
CHUNK = 1 << 20  # elements that are converted at once: 4 MiB in float32, so the peak is the tensor and not its copies
# what reading a JSON value of the wrong kind raises
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, ZeroDivisionError,
             struct.error)
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # buffers of old checkpoints that follow from the config
# What belongs to an image encoder: llama.cpp keeps it in a file of its own, whose name starts with "mmproj-"
VISION_TENSORS, VISION_KEYS = ("v.", "mm."), "clip."


# --- the checkpoint ---------------------------------------------------------------------------------------------------

class Config:
    """Read values of a config.json; what the file leaves out takes the default of transformers' config class."""

    def __init__(self, values: dict[str, Any], defaults: dict[str, Any], file: Path):
        self.values, self.defaults, self.file = values, defaults, file

    def get(self, name: str) -> Any:
        """Return a value, the class default, or None; a null in the file is a value."""
        return self.values.get(name, self.defaults.get(name))

    def need(self, name: str) -> Any:
        """Return a value. Raises InvalidModelError when neither the file nor the class has one."""
        value = self.get(name)
        if value is None:
            raise InvalidModelError(f"{self.file}: '{name}' is missing")
        return value

    def count(self, name: str) -> int:
        """Return a positive integer. Raises InvalidModelError for anything else."""
        value = self.need(name)
        if type(value) is not int or not 0 < value < 2 ** 31:
            raise InvalidModelError(f"{self.file}: '{name}' is {value!r}; a positive integer is expected")
        return value

    def token(self, *names: str) -> int:
        """Return a token id that has one of these names. Raises InvalidModelError."""
        value = next((self.values[n] for n in names if self.values.get(n) is not None), self.need(names[0]))
        if type(value) is not int or not 0 <= value < 2 ** 31:
            raise InvalidModelError(f"{self.file}: '{names[0]}' is {value!r}; a token id is expected")
        return value

    def refuse_unless(self, name: str, *allowed: Any) -> None:
        """Raise UnsupportedModelError when a switch has a value that the architecture's keys cannot express."""
        if self.get(name) not in allowed:
            raise UnsupportedModelError(
                f"{self.file}: '{name}' is {self.get(name)!r}; this converter knows {' or '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Stored:
    """Where one tensor of a checkpoint lies: `shape` slowest axis first, `offset` in bytes from the file's start."""
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


# bfloat16 has no NumPy dtype: its bits are read as uint16
STORED_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def read_safetensors_header(file: Path) -> dict[str, Stored]:
    """List the tensors of one safetensors file: 8 bytes of length, a JSON header, then the data.

    The data is read by offset and not mapped: pages of a mapped file would count as this process's memory.
    Raises InvalidModelError. Format: https://huggingface.co/docs/safetensors
    """
    size = file.stat().st_size
    with open(file, "rb") as f:
        n_header = int.from_bytes(f.read(8), "little")
        if size < 8 or n_header > size - 8:
            raise InvalidModelError(f"{file}: header length {n_header} at byte 0 exceeds the file ({size} bytes)")
        try:
            header = json.loads(f.read(n_header))
            header.pop("__metadata__", None)
            found = {name: Stored(file, str(h["dtype"]), tuple(int(n) for n in h["shape"]),
                                  8 + n_header + int(h["data_offsets"][0])) for name, h in header.items()}
            ends = {name: 8 + n_header + int(h["data_offsets"][1]) for name, h in header.items()}
        except MALFORMED as e:
            raise InvalidModelError(f"{file}: malformed safetensors header at byte 8: {e!r}") from None
    for name, t in found.items():
        if t.dtype not in STORED_DTYPES:
            raise UnsupportedModelError(f"{file}: tensor '{name}' is {t.dtype}; known are {', '.join(STORED_DTYPES)}")
        expected = t.offset + math.prod(t.shape) * STORED_DTYPES[t.dtype].itemsize
        if ends[name] != expected or expected > size or t.offset < 8 + n_header or min(t.shape, default=1) < 0:
            raise InvalidModelError(f"{file}: tensor '{name}' of shape {t.shape} must end at byte {expected}; "
                                    f"its header says {ends[name]} and the file has {size}")
    return found


class Checkpoint:
    """A Hugging Face model folder: config.json and one or several safetensors files, read a piece at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise InvalidModelError(f"{folder}: not a folder")
        self.config_file = folder / "config.json"
        self.config = read_json(self.config_file, required=True)
        self.tensors = self._find_tensors()

    def _find_tensors(self) -> dict[str, Stored]:
        index = self.folder / "model.safetensors.index.json"
        if not index.exists():
            single = self.folder / "model.safetensors"
            if not single.exists():
                raise InvalidModelError(f"{self.folder}: neither model.safetensors nor {index.name}; "
                                        "save the checkpoint with safetensors first")
            return read_safetensors_header(single)
        places = read_json(index, required=True).get("weight_map")
        if not isinstance(places, dict):
            raise InvalidModelError(f"{index}: 'weight_map' is missing")
        shards: dict[str, dict[str, Stored]] = {}
        for shard in sorted(set(places.values())):
            if Path(shard).name != shard or not (self.folder / shard).exists():
                raise InvalidModelError(f"{index}: shard '{shard}' is not in the folder")
            shards[shard] = read_safetensors_header(self.folder / shard)
        for name, shard in places.items():
            if name not in shards[shard]:
                raise InvalidModelError(f"{index}: tensor '{name}' is not in '{shard}'")
        # a tensor in a shard that the index does not list is an unknown tensor, not one to lose
        return {name: t for shard in shards.values() for name, t in shard.items()}

    def rename(self, patterns: Sequence[tuple[str, str]]) -> None:
        """Rename tensors: every pattern (regex, replacement) in turn. Raises InvalidModelError where two become one."""
        renamed: dict[str, Stored] = {}
        for name, stored in self.tensors.items():
            new = name
            for pattern, replacement in patterns:
                new = re.sub(pattern, replacement, new)
            if new in renamed:
                raise InvalidModelError(f"{self.folder}: two tensors are '{new}', one of them under the name '{name}'")
            renamed[new] = stored
        self.tensors = renamed

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) of a tensor's first axis, in the stored dtype (bfloat16 as uint16)."""
        t = self.tensors[name]
        dtype, row = STORED_DTYPES[t.dtype], math.prod(t.shape[1:])
        data = np.fromfile(t.file, dtype, (stop - start) * row, offset=t.offset + start * row * dtype.itemsize)
        return data.reshape(stop - start, *t.shape[1:])


def read_json(file: Path, required: bool = False) -> dict[str, Any]:
    """Read a JSON object; a file that is not there is an empty one unless it is required."""
    if not file.exists():
        if required:
            raise InvalidModelError(f"{file}: missing")
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InvalidModelError(f"{file}: not JSON: {e}") from None
    if not isinstance(value, dict):
        raise InvalidModelError(f"{file}: a JSON object is expected")
    return value


# --- what an architecture says ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint and the tensor of the file that it becomes; shapes slowest axis first.

    A part of a tensor has `stored`, the whole's shape; it is `shape[0]` rows from `first_row` on, one `frame`, with an axis less
    the one row `first_row`, or, of a stack of matrices that the checkpoint keeps transposed, `shape[1]` columns from
    `first_column` on. With `padded` the tensor of the file is larger than `shape`, by rows and columns of zeros behind it.
    """
    name: str
    source: str
    shape: tuple[int, ...]
    row_order: np.ndarray | None = None  # row i of the file is row row_order[i] of the checkpoint
    add: float = 0.0                     # added to every value
    stored: tuple[int, ...] | None = None
    first_row: int = 0
    frame: int | None = None             # index on the third axis of a convolution [out, in, frames, height, width]
    first_column: int | None = None      # of matrices [n, in, columns], which become [n, shape[1], in]
    padded: tuple[int, ...] | None = None
    make: Callable[[np.ndarray], np.ndarray] | None = None   # applied to the values, float32


@dataclass(frozen=True)
class Stack:
    """A tensor of the file that holds tensors of the checkpoint one after the other: an expert's matrix each, of one shape."""
    name: str
    parts: tuple[Entry, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.parts), *self.parts[0].shape


@dataclass(frozen=True)
class Constant:
    """A float32 tensor of the file that follows from the config."""
    name: str
    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


class Converter(Protocol):
    """One architecture; `arch` is `general.architecture` and the prefix of its keys.

    Names of a checkpoint's tensors change with the version that saved it: `renames` turns them into those of `tensors`.
    """
    arch: str
    renames: Sequence[tuple[str, str]]

    def __init__(self, config: dict[str, Any], file: Path): ...
    def write_keys(self, out: gguf.GGUFWriter) -> None: ...
    def tensors(self) -> Iterator[Entry | Stack | Constant]: ...
    def unused(self) -> set[str]: ...           # tensors of the checkpoint that the model itself does not read
    @property
    def vocab_size(self) -> int: ...            # rows of the embedding


_CONVERTERS: dict[str, type[Converter]] = {}


def converts(*classes: str) -> Callable[[type], type]:
    """Register the decorated class for these names in a config.json's `architectures`."""
    def register(cls: type) -> type:
        _CONVERTERS.update(dict.fromkeys(classes, cls))
        return cls
    return register


def supported() -> dict[str, type[Converter]]:
    """Return the converter of each supported architecture, by its Hugging Face class name."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__package__}.{module.name}")
    return dict(_CONVERTERS)


def warn(message: str) -> None:
    """Say on stderr what a conversion went on without."""
    print(f"warning: {message}", file=sys.stderr)


def linear(name: str, source: str, n_out: int, n_in: int, bias: bool = False,
           row_order: np.ndarray | None = None) -> Iterator[Entry]:
    """List the weight [n_out, n_in] of a linear layer and, if it has one, its bias [n_out]."""
    yield Entry(f"{name}.weight", f"{source}.weight", (n_out, n_in), row_order)
    if bias:
        yield Entry(f"{name}.bias", f"{source}.bias", (n_out,), row_order)


def interleaved_rows(n_heads: int, head_dim: int) -> np.ndarray:
    """Return the row order that turns half-split rope heads into llama.cpp's interleaved ones.

    Transformers rotates element i of a head with i + d/2; llama.cpp's "norm" rope rotates 2i with 2i + 1:
        rows of a head [a0 a1 .. b0 b1 ..]  ->  [a0 b0 a1 b1 ..]
    """
    head = np.arange(head_dim).reshape(2, head_dim // 2).T.ravel()        # 0 d/2 1 d/2+1 ..
    return (np.arange(n_heads)[:, None] * head_dim + head).ravel()


# --- rope -------------------------------------------------------------------------------------------------------------

def rope_parameters(config: Config, default_base: float, layer_type: str | None = None,
                    base_name: str = "rope_theta", scaled: bool = True) -> dict[str, Any]:
    """Return `rope_type`, `rope_theta` and the scaling's own values for one kind of layer.

    Two forms are on disk. Since transformers 5: `rope_parameters`, flat or one dict for each layer type. Before:
    `rope_theta` (named `base_name`) and `rope_scaling` with `type` or `rope_type`; `scaled` says whether that scaling
    is meant for this kind of layer. Source: modeling_rope_utils.py, `convert_rope_params_to_dict`.
    """
    new = config.get("rope_parameters") or {}
    if layer_type is not None:
        new = new.get(layer_type) or {}
    old = (config.get("rope_scaling") or {}) if scaled else {}
    p = {**new, **old}
    p["rope_type"] = p.get("rope_type", p.get("type", "default"))
    if p.get("rope_theta") is None:
        given = config.get(base_name)
        p["rope_theta"] = default_base if given is None else given
    partial = p.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"{config.file}: 'partial_rotary_factor' is {partial}; this converter knows 1")
    if p["rope_type"] in ("llama3", "yarn", "longrope"):
        length = config.get("original_max_position_embeddings") or p.get("original_max_position_embeddings")
        p["original_max_position_embeddings"] = length or config.need("max_position_embeddings")
    return p


def write_rope_scaling(out: gguf.GGUFWriter, rope: dict[str, Any], config: Config, allowed: tuple[str, ...]) -> None:
    """Write the rope.scaling.* keys of one of the `allowed` kinds ("default" is always one).

    The factor on cos and sin is (0.1 ln(factor) + 1) x rope.scaling.attn_factor for yarn and rope.scaling.attn_factor
    alone otherwise, as llama.cpp reads these keys; attn_factor is left out where it is 1.
    Source of the values: modeling_rope_utils.py, `_compute_*_parameters`. Raises UnsupportedModelError.
    """
    kind = rope["rope_type"]
    if kind != "default" and kind not in allowed:
        raise UnsupportedModelError(f"{config.file}: rope scaling '{kind}' is not one of {', '.join(allowed)} "
                                    f"that '{out.arch}' files can carry")
    attn_factor = 1.0
    if kind == "linear":
        out.add_rope_scaling_type(RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(_need(rope, "factor", config))
    elif kind == "yarn":
        original = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or config.need("max_position_embeddings") / original
        if factor < 1 or rope.get("truncate") is False:
            raise UnsupportedModelError(f"{config.file}: yarn with a factor below 1 or 'truncate': false has no key")
        out.add_rope_scaling_type(RopeScalingType.YARN)
        out.add_rope_scaling_factor(factor)
        out.add_rope_scaling_orig_ctx_len(original)
        out.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        out.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)

        def magnitude(m: float) -> float:      # YaRN, arXiv:2309.00071, equation 22
            return 0.1 * m * math.log(factor) + 1.0
        wanted = rope.get("attention_factor")
        if wanted is None:
            top, bottom = rope.get("mscale"), rope.get("mscale_all_dim")
            wanted = magnitude(top) / magnitude(bottom) if top and bottom else magnitude(1.0)
        attn_factor = wanted / magnitude(1.0)
    elif kind == "longrope":
        # no rope.scaling.factor here: llama.cpp would divide the positions by it too
        original = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or config.need("max_position_embeddings") / original
        wanted = rope.get("attention_factor")
        if wanted is None:
            wanted = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        out.add_rope_scaling_type(RopeScalingType.LONGROPE)
        out.add_rope_scaling_orig_ctx_len(original)
        attn_factor = wanted
    if attn_factor != 1.0:
        out.add_rope_scaling_attn_factors(attn_factor)


def rope_tensors(rope: dict[str, Any], config: Config, head_dim: int) -> Iterator[Constant]:
    """List the tensors [head_dim / 2] that divide each rope frequency: llama3's factors, longrope's two sets."""
    def factors(name: str, values: Any) -> Constant:
        array = np.asarray(values, np.float32)
        if array.shape != (head_dim // 2,):
            raise InvalidModelError(f"{config.file}: {name} has shape {array.shape}, expected ({head_dim // 2},)")
        return Constant(f"{name}.weight", array)

    if rope["rope_type"] == "llama3":
        original = rope["original_max_position_embeddings"]
        factor, low, high = (_need(rope, n, config) for n in ("factor", "low_freq_factor", "high_freq_factor"))
        frequency = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        turns = original * frequency / (2 * math.pi)       # rotations of each pair within the original context
        # below `low` turns: slowed by `factor`; above `high`: untouched; between: a linear blend of the frequencies.
        # Llama 4 has nothing between: `low` is `high`.
        blend = np.clip((turns - low) / (high - low), 0.0, 1.0) if high != low else (turns > high).astype(np.float64)
        yield factors("rope_freqs", 1.0 / ((1.0 - blend) / factor + blend))
    elif rope["rope_type"] == "longrope":
        yield factors("rope_factors_long", _need(rope, "long_factor", config))
        yield factors("rope_factors_short", _need(rope, "short_factor", config))


def _need(rope: dict[str, Any], name: str, config: Config) -> Any:
    if rope.get(name) is None:
        raise InvalidModelError(f"{config.file}: rope scaling '{rope['rope_type']}' needs '{name}'")
    return rope[name]


def write_window(out: gguf.GGUFWriter, window: int | None, sliding: list[bool]) -> None:
    """Write the window (a query sees that many keys, itself included) and which layers slide."""
    if window is not None and any(sliding):
        out.add_sliding_window(window)
        out.add_sliding_window_pattern(sliding)


# --- the file ---------------------------------------------------------------------------------------------------------

def convert(folder: str | os.PathLike[str], out_file: str | os.PathLike[str], outtype: str | None = None,
            with_tokenizer: bool = True, split_mmproj: bool = False) -> Path:
    """Convert a Hugging Face checkpoint folder to one GGUF file and return its path.

    `outtype` is a key of `OUTTYPES`; None keeps the dtype that most of the checkpoint has. With `split_mmproj` the image
    encoder goes to a second file, `mmproj_path(out_file)`. A file appears under its name only when it is whole. Memory
    beyond the interpreter: the vocabulary and at most one stored tensor. Raises InvalidModelError, UnsupportedModelError.
    """
    checkpoint = Checkpoint(Path(folder))
    converter = _find_converter(checkpoint)
    checkpoint.rename(converter.renames)
    entries = _check_entries(checkpoint, converter)
    vision = [e for e in entries if e.name.startswith(VISION_TENSORS)]
    if split_mmproj and not vision:
        raise UnsupportedModelError(f"{checkpoint.folder}: '{converter.arch}' has no image encoder to split off")

    out_file = Path(out_file)
    text = _Output(out_file, converter.arch, "model", checkpoint, outtype)
    text.writer.add_vocab_size(converter.vocab_size)
    with malformed_is(f"{checkpoint.config_file}: a value is of the wrong kind"):
        converter.write_keys(text.writer)
    with malformed_is(f"{checkpoint.folder}: a value of the tokenizer's files is of the wrong kind"):
        # a model with an image encoder has its text model's own values one level down
        values = {**(checkpoint.config.get("text_config") or {}), **checkpoint.config}
        vocabulary = read_vocabulary(checkpoint.folder, values) if with_tokenizer else Vocabulary.none()
    if with_tokenizer and vocabulary.model == "none":
        warn(f"{checkpoint.folder}: no tokenizer; the file takes and gives token ids only")
    vocabulary.write(text.writer, converter.vocab_size)
    outputs = [(text, entries)]
    if split_mmproj:
        outputs = [(text, [e for e in entries if not e.name.startswith(VISION_TENSORS)])]
        mmproj = _Output(mmproj_path(out_file), "clip", "mmproj", checkpoint, outtype)
        keys = text.writer.kv_data[0]
        mmproj.writer.kv_data[0] |= {k: keys.pop(k) for k in list(keys) if k.startswith(VISION_KEYS)}
        outputs.append((mmproj, vision))
    try:
        for output, its_entries in outputs:
            _write_tensors(output.writer, checkpoint, its_entries, output.wanted)
            output.writer.close()
        for output, _ in outputs:
            os.replace(output.partial, output.path)
    finally:
        for output, _ in outputs:
            output.writer.close()
            output.partial.unlink(missing_ok=True)
    return out_file


def mmproj_path(out_file: Path) -> Path:
    """Return the name of the image encoder's file beside a text model's, as llama.cpp's converter names it."""
    return out_file.with_name(f"mmproj-{out_file.name}")


class _Output:
    """A file that is being written, with the keys that every file has."""

    def __init__(self, path: Path, arch: str, kind: str, checkpoint: Checkpoint, outtype: str | None):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.wanted, file_type = OUTTYPES[outtype or _prevailing_dtype(checkpoint)]
        self.writer = gguf.GGUFWriter(self.partial, arch)
        self.writer.add_type(kind)
        self.writer.add_name(_model_name(checkpoint))
        self.writer.add_file_type(file_type)
        self.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


@contextmanager
def malformed_is(message: str) -> Iterator[None]:
    """Turn what a JSON value of the wrong kind raises into an InvalidModelError; the cause stays attached."""
    try:
        yield
    except MALFORMED as e:
        raise InvalidModelError(f"{message} ({e!r})") from e


def _find_converter(checkpoint: Checkpoint) -> Converter:
    known = supported()
    classes = checkpoint.config.get("architectures") or []
    with malformed_is(f"{checkpoint.config_file}: a value is of the wrong kind"):
        for name in classes:
            if name in known:
                return known[name](checkpoint.config, checkpoint.config_file)
    raise UnsupportedModelError(f"{checkpoint.config_file}: architecture "
                                f"{', '.join(map(str, classes)) or 'unknown'} is not supported; supported: {', '.join(sorted(known))}")


def _check_entries(checkpoint: Checkpoint, converter: Converter) -> list[Entry | Stack | Constant]:
    with malformed_is(f"{checkpoint.config_file}: a value is of the wrong kind"):
        entries = list(converter.tensors())
    parts = [p for e in entries for p in (e.parts if isinstance(e, Stack) else [e])]
    by_source = {e.source: e.stored or e.shape for e in parts if isinstance(e, Entry)}
    missing = sorted(by_source.keys() - checkpoint.tensors.keys())
    if missing:
        raise InvalidModelError(f"{checkpoint.folder}: {_listing(missing)} missing from the checkpoint")
    unknown = sorted(n for n in checkpoint.tensors.keys() - by_source.keys() - converter.unused()
                     if not COMPUTED.search(n))
    if unknown:
        raise UnsupportedModelError(f"{checkpoint.folder}: '{converter.arch}' has no place for {_listing(unknown)}")
    for source, shape in by_source.items():
        if checkpoint.tensors[source].shape != shape:
            raise InvalidModelError(f"{checkpoint.folder}: tensor '{source}' has shape "
                                    f"{checkpoint.tensors[source].shape}, config.json asks for {shape}")
    return entries


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(repr(n) for n in names[:3])}{more}"


def _prevailing_dtype(checkpoint: Checkpoint) -> str:
    n_elements: dict[str, int] = {}
    for t in checkpoint.tensors.values():
        n_elements[t.dtype] = n_elements.get(t.dtype, 0) + math.prod(t.shape)
    return max(n_elements, key=lambda dtype: n_elements[dtype]).lower()


def _model_name(checkpoint: Checkpoint) -> str:
    path = checkpoint.config.get("_name_or_path") or ""
    return Path(path).name or checkpoint.folder.resolve().name


def stored_type(name: str, shape: tuple[int, ...], wanted: QT) -> QT:
    """Return the type a tensor is written in, as llama.cpp's converter chooses.

    Vectors, norms, routers and what an image encoder adds to or makes from pixels stay float32, but for positions in tiles, of
    which there are many (in blocks they never are); Gemma 3's projector is multiplied transposed and so never in blocks.
    """
    if len(shape) < 2 or name.endswith(("_norm.weight", "ffn_gate_inp.weight")) or name.startswith(FLOAT32):
        return QT.F32
    if name == "v.tile_position_embd.weight":
        return QT.F16 if wanted == QT.Q8_0 else wanted
    if name == "mm.input_projection.weight":
        return QT.F32 if wanted == QT.BF16 else QT.F16 if wanted == QT.Q8_0 else wanted
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else QT.F16


def with_whole_blocks(entry: Entry | Stack | Constant, block: int) -> Entry | Stack | Constant:
    """Widen an image encoder's feed-forward to whole blocks (So400m has 4304 units, Qwen2.5-VL 3420).

    Units of zeros add nothing: all activations are 0 at 0, and their columns of the second matrix are 0 too.
    """
    if block == 1 or not (isinstance(entry, Entry) and FEED_FORWARD.match(entry.name)):
        return entry
    rows, *columns = entry.shape
    units = -(-(columns[0] if ".ffn_down." in entry.name else rows) // block) * block
    if ".ffn_down." in entry.name:
        return replace(entry, padded=(rows, units)) if columns[0] != units else entry
    return replace(entry, padded=(units, *columns)) if rows != units else entry


def _write_tensors(out: gguf.GGUFWriter, checkpoint: Checkpoint, entries: list[Entry | Stack | Constant], wanted: QT) -> None:
    entries = [with_whole_blocks(e, gguf.GGML_QUANT_SIZES[wanted][0]) for e in entries]
    shapes = [e.padded or e.shape if isinstance(e, Entry) else e.shape for e in entries]
    types = [stored_type(e.name, shape, wanted) for e, shape in zip(entries, shapes)]
    for entry, shape, qtype in zip(entries, shapes, types):
        block, n_bytes = gguf.GGML_QUANT_SIZES[qtype]
        out.add_tensor_info(entry.name, shape, np.dtype(np.float32),
                            math.prod(shape) // block * n_bytes, raw_dtype=qtype)
    out.write_header_to_file()
    with malformed_is(f"{checkpoint.folder}: a value of the config or the tokenizer is of the wrong kind"):
        out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    # GGUFWriter takes whole tensors only; offsets are already written, so chunks and padding follow in the same order
    file = out.fout[0]
    out.write_padding(file, file.tell())
    for entry, qtype in zip(entries, types):
        for chunk in _chunks(checkpoint, entry):
            if qtype == QT.Q8_0:
                data = _quantize_blocks(entry.name, chunk)
            else:
                with np.errstate(over="ignore"):
                    data = gguf.quants.quantize(chunk, qtype)
            if qtype == QT.F16 and np.isinf(data).any() and np.isfinite(chunk).all():
                raise UnsupportedModelError(f"tensor '{entry.name}' has values that float16 cannot hold; "
                                            "use --outtype bf16 or f32")
            data.tofile(file)
        out.write_padding(file, file.tell())


def _quantize_blocks(name: str, chunk: np.ndarray) -> np.ndarray:
    """Return rows in Q8_0: gguf-py's bytes, many times faster."""
    try:
        return quantize(chunk, Q8_0)
    except RequestError as error:
        raise InvalidModelError(f"tensor '{name}': {error}") from None


def _chunks(checkpoint: Checkpoint, entry: Entry | Stack | Constant) -> Iterator[np.ndarray]:
    """Yield a tensor in float32, some rows at a time."""
    match entry:
        case Constant(values=values):
            yield values
        case Stack(parts=parts):
            for part in parts:
                yield from _chunks(checkpoint, part)
        case Entry(source=source, shape=(_,) as shape, stored=(_, _), first_row=row):
            yield to_float32(checkpoint.read(source, row, row + 1).reshape(shape), checkpoint.tensors[source].dtype)
        case Entry(source=source, shape=shape, row_order=order, add=add):
            n_rows = max(1, CHUNK // max(1, math.prod((entry.stored or shape)[1:])))
            # rows that are moved need the whole tensor, in its stored dtype
            whole = checkpoint.read(source, 0, shape[0]) if order is not None else None
            for i in range(0, shape[0], n_rows):
                stop = min(i + n_rows, shape[0])
                raw = (checkpoint.read(source, entry.first_row + i, entry.first_row + stop) if whole is None
                       else whole[order[i:stop]])
                if entry.frame is not None:
                    raw = raw[:, :, entry.frame]
                if entry.first_column is not None:
                    raw = raw[:, :, entry.first_column : entry.first_column + shape[1]].swapaxes(1, 2)
                values = np.ascontiguousarray(to_float32(raw, checkpoint.tensors[source].dtype))
                values = values + np.float32(add) if add else values
                values = entry.make(values) if entry.make else values
                if entry.padded and len(shape) == 2:
                    values = np.pad(values, ((0, 0), (0, entry.padded[1] - shape[1])))
                yield values
            if entry.padded and entry.padded[0] > shape[0]:
                yield np.zeros((entry.padded[0] - shape[0], *entry.padded[1:]), np.float32)


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Widen stored values exactly; a bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)
