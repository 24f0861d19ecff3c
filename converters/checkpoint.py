"""A Hugging Face checkpoint as it lies on disk: config.json read value by value, safetensors files read a piece at a time."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.errors import InvalidModelError, UnsupportedModelError

# what reading a JSON value of the wrong kind raises
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, ZeroDivisionError,
             struct.error)


@contextmanager
def malformed_is(message: str) -> Iterator[None]:
    """Turn what a JSON value of the wrong kind raises into an InvalidModelError; the cause stays attached."""
    try:
        yield
    except MALFORMED as e:
        raise InvalidModelError(f"{message} ({e!r})") from e


class Config:
    """Values of a config.json; what the file leaves out takes the default of transformers' config class."""

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
STORED_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "U8": np.dtype("u1"), "I64": np.dtype("<i8"),
                 "BOOL": np.dtype("?")}
NO_NUMBERS = "U8", "I64", "BOOL"     # bytes of blocks; buffers of positions, which follow from the config, and numbers of tokens


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
        except (*MALFORMED, RecursionError) as e:
            raise InvalidModelError(f"{file}: malformed safetensors header at byte 8: {e!r}"[:1000]) from None
    for name, t in found.items():
        if t.dtype not in STORED_DTYPES:
            raise UnsupportedModelError(f"{file}: tensor '{name}' is {t.dtype}; known are {', '.join(STORED_DTYPES)}")
        expected = t.offset + math.prod(t.shape) * STORED_DTYPES[t.dtype].itemsize
        if ends[name] != expected or expected > size or t.offset < 8 + n_header or min(t.shape, default=1) < 0:
            raise InvalidModelError(f"{file}: tensor '{name}' of shape {t.shape} must end at byte {expected}; "
                                    f"its header says {ends[name]} and the file has {size}")
    return found


def tensors_beside(file: Path) -> dict[str, Stored]:
    """Return the tensors of a config.json's checkpoint; none where no weights lie beside it, or `file` is another: the base of an adapter."""
    there = file.name == "config.json" and any((file.parent / f"model.safetensors{end}").exists() for end in ("", ".index.json"))
    return Checkpoint(file.parent).tensors if there else {}


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

    def add(self, file: Path, prefix: str = "") -> None:
        """Take a further file's tensors, with what is put before their names. Raises InvalidModelError where it is missing or has a name that is taken."""
        if not file.exists():
            raise InvalidModelError(f"{file}: missing")
        more = {prefix + name: tensor for name, tensor in read_safetensors_header(file).items()}
        if taken := sorted(more.keys() & self.tensors.keys()):
            raise InvalidModelError(f"{file}: tensor '{taken[0]}' is in {self.folder} too")
        self.tensors |= more

    def rename(self, patterns: Sequence[tuple[str, str]]) -> None:
        """Replace names of tensors by every pattern (regex, replacement) in turn. Raises InvalidModelError where two become one."""
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

    @property
    def name(self) -> str:
        """The model's name: what the config says, else the folder's."""
        return Path(self.config.get("_name_or_path") or "").name or self.folder.resolve().name

    @property
    def prevailing_dtype(self) -> str:
        """The dtype of most numbers, in lower case."""
        n_elements: dict[str, int] = {}
        for t in (t for t in self.tensors.values() if t.dtype not in NO_NUMBERS):
            n_elements[t.dtype] = n_elements.get(t.dtype, 0) + math.prod(t.shape)
        return max(n_elements, key=lambda dtype: n_elements[dtype]).lower()


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Convert stored values exactly to float32; a bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def read_json(file: Path, required: bool = False) -> dict[str, Any]:
    """Read a JSON object; a file that is not there is an empty one unless it is required."""
    if not file.exists():
        if required:
            raise InvalidModelError(f"{file}: missing")
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise InvalidModelError(f"{file}: not JSON: {e}") from None
    if not isinstance(value, dict):
        raise InvalidModelError(f"{file}: a JSON object is expected")
    return value
