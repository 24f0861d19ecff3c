"""Read GGUF files, versions 2 and 3, little-endian, one file or split into parts.

Layout (all numbers little-endian; string = length u64, then that many bytes):

    magic "GGUF"   version u32   number of tensors u64   number of keys u64
    key:           name string   type u32   value (array = element type u32, count u64, elements)
    tensor:        name string   number of axes u32   axes u64...   dtype u32   offset u64 from the start of the data
    padding to general.alignment (default 32), then the tensors' bytes, each at a multiple of the alignment

Keys and the list of tensors are copied, so that a file which changes later does not change them; tensors are mapped, never read
whole (`mapped`). Opening walks over keys and tensors once and checks each count, length, offset and type against the bytes that are
there before it is used; values are decoded when they are asked for. What a file claims is therefore never allocated: a hostile file
costs at most time linear in its own size.

GGUF lists axes fastest first; `TensorInfo.shape` is NumPy's order, slowest first, reversed here and nowhere else.
Source: ggml, gguf.md.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.arguments import place
from pyengine.dtype import DType, dtype
from pyengine.errors import InvalidModelError, ModelNotFoundError, nearest, RequestError, UnsupportedModelError
from pyengine.files.mapped import MappedFile
from pyengine.native import ffi, lib
from pyengine.records import NamedTuple

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_AXES = 4                 # GGML_MAX_DIMS
MAX_NAME_BYTES = 65535       # of keys, by the specification; held for tensors' names too
SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")     # llama.cpp's gguf-split: numbers from 1

CUT_LIMIT = 1 << 42          # bytes: a file that lacks more is rather damaged than cut off
_HEADER_BYTES = 4 + 4 + 8 + 8
_LEAST_KEY_BYTES = (8 + 1) + 4 + 1           # name of one byte, type, value of one byte
_LEAST_TENSOR_BYTES = (8 + 1) + 4 + 4 + 8    # name of one byte, no axes, dtype, offset

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32", _BOOL: "bool",
            10: "uint64", 11: "int64", 12: "float64"}
_NUMPY = {id: np.dtype(name).newbyteorder("<") for id, name in _NUMBERS.items()}
_TYPE_NAMES = {**_NUMBERS, _STRING: "string", _ARRAY: "array"}


def quoted(name: str) -> str:
    """Return `name` for a message: in quotes, with escapes, and cut where a file makes it long."""
    return repr(name if len(name) <= 100 else name[:100] + "...")


class TensorInfo(NamedTuple):
    """What a tensor is and where its bytes lie."""

    name: str
    shape: tuple[int, ...]     # slowest axis first; () is a single number
    dtype: DType
    nbytes: int
    offset: int                # from the start of the part's file
    part: int                  # index into GGUFFile.paths

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    def within(self, shape: tuple[int, ...], first: int = 0) -> TensorInfo:
        """Return what lies in a tensor from element `first` on, in this shape. Raises: InvalidModelError where it does not."""
        n = math.prod(shape)
        if not 0 <= first <= first + n <= self.n_elements or first % self.dtype.block or shape[-1] % self.dtype.block:
            raise InvalidModelError(f"tensor {quoted(self.name)}: {shape} from element {first} on is not in {self.shape} of {self.dtype}")
        return self._replace(shape=shape, nbytes=self.dtype.size(n), offset=self.offset + self.dtype.size(first))


class _Value(NamedTuple):
    """Where the value of a key lies. `start` is the first byte after all lengths and types that come before it."""

    type: int                  # for an array: the type of its elements
    is_array: bool
    count: int                 # elements of an array, bytes of a string, else 1
    start: int

    @property
    def type_name(self) -> str:
        name = _TYPE_NAMES[self.type]
        return f"array[{name}, {self.count}]" if self.is_array else name


class _Scanner:
    """A cursor over one file that checks before it moves. `buffer` is a copy of its first `n_read` bytes, those that it has come to."""

    def __init__(self, file: MappedFile):
        self.file, self.path, self.size, self.pos = file, file.path, file.size, 0
        self.buffer, self.n_read = file.start(), 0

    def fail(self, field: str, what: str, at: int | None = None) -> InvalidModelError:
        return InvalidModelError(f"{self.path}: {field}: {what}, at byte {self.pos if at is None else at}")

    def ends(self, field: str, what: str, at: int | None = None, missing: int = CUT_LIMIT) -> InvalidModelError:
        """Make the error for a file that ends too early, by `missing` bytes where that is known."""
        how = f"cut off: {missing:,} bytes are missing" if missing < CUT_LIMIT else "cut off in its header, or damaged"
        return self.fail(f"the file is {how}; download it again; {field}", what, at)

    def require(self, n_bytes: int, field: str) -> None:
        if n_bytes > self.size - self.pos:
            raise self.ends(field, f"needs {n_bytes} bytes, and {self.size - self.pos} are left in the file")
        if n_bytes > self.n_read - self.pos:
            self.n_read = self.file.read_on(self.buffer, self.n_read, self.pos + n_bytes)

    def u32(self, field: str) -> int:
        self.require(4, field)
        value = _U32.unpack_from(self.buffer, self.pos)[0]
        self.pos += 4
        return value

    def u64(self, field: str) -> int:
        self.require(8, field)
        value = _U64.unpack_from(self.buffer, self.pos)[0]
        self.pos += 8
        return value

    def name(self, field: str) -> str:
        """Read a key or a tensor's name: UTF-8, not empty, at most MAX_NAME_BYTES."""
        at = self.pos
        length = self.u64(f"length of {field}")
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.fail(f"length of {field}", f"is {length}, not 1 to {MAX_NAME_BYTES}", at)
        self.require(length, field)
        raw = self.buffer[self.pos:self.pos + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(field, f"is not UTF-8 ({error.reason})", self.pos + error.start) from None
        self.pos += length
        return text

    def value(self, key: str) -> _Value:
        """Pass over the type and the value of `key`, a name ready for messages."""
        at = self.pos
        type = self.u32(f"type of {key}")
        if type not in _TYPE_NAMES:
            raise self.fail(f"type of {key}", f"is {type}, which GGUF does not define", at)
        if type == _STRING:
            length = self.u64(f"length of {key}")
            self.require(length, f"value of {key}")
            found = _Value(type, False, length, self.pos)
            self.pos += length
        elif type == _ARRAY:
            found = self._array(key)
        else:
            found = self._numbers(key, type, False, 1)
        return found

    def _array(self, key: str) -> _Value:
        at = self.pos
        type = self.u32(f"element type of {key}")
        if type == _ARRAY:
            raise self.fail(f"element type of {key}", "is array: arrays of arrays are not read", at)
        if type not in _TYPE_NAMES:
            raise self.fail(f"element type of {key}", f"is {type}, which GGUF does not define", at)
        count = self.u64(f"count of {key}")
        if type != _STRING:
            return self._numbers(key, type, True, count)
        self.require(count * 8, f"the {count} strings of {key}")
        found = _Value(type, True, count, self.pos)
        # The only way to the end of an array of strings is from length to length: in C, for a vocabulary has 300,000.
        at, n_whole = ffi.new("int64_t *", self.pos), 0
        while True:
            with ffi.from_buffer("uint8_t[]", self.buffer) as data:
                n_whole += lib.pe_strings_pass(data, self.n_read, count - n_whole, at)
            if n_whole == count or self.n_read == self.size:
                break
            self.n_read = self.file.read_on(self.buffer, self.n_read, 0)
        self.pos = at[0]
        if n_whole < count:
            if self.pos > self.size - 8:
                raise self.ends(f"{key}[{n_whole}]", "begins past the end of the file")
            past = self.pos + 8 + _U64.unpack_from(self.buffer, self.pos)[0] - self.size
            raise self.ends(f"{key}[{n_whole}]", f"ends {past} bytes past the end of the file")
        return found

    def _numbers(self, key: str, type: int, is_array: bool, count: int) -> _Value:
        n_bytes = count * _NUMPY[type].itemsize
        self.require(n_bytes, f"value of {key}")
        if type == _BOOL and count:
            raw = np.frombuffer(self.buffer, np.uint8, count, self.pos)
            worst = int(raw.argmax())
            if raw[worst] > 1:
                raise self.fail(f"value of {key}", f"is a bool of {raw[worst]}, not 0 or 1", self.pos + worst)
        found = _Value(type, is_array, count, self.pos)
        self.pos += n_bytes
        return found


class Metadata(Mapping[str, Any]):
    """The keys of a GGUF file and their values, decoded when first asked for and then kept.

    Numbers are int, float or bool; strings are str; arrays of strings are list[str]; arrays of numbers are read-only
    and aligned NumPy arrays. Bytes of a string that are not UTF-8 become lone
    surrogates (PEP 383), which `text.encode("utf-8", "surrogateescape")` turns back; `raw` gives the bytes at once.
    """

    def __init__(self, path: Path, buffer: mmap.mmap, values: dict[str, _Value]):
        self._path, self._buffer, self._values = path, buffer, values
        self._decoded: dict[str, Any] = {}
        self._added: Mapping[str, Any] = {}              # keys that the file does not have: see `renamed`
        self._own: dict[str, str] = {}                   # names of keys in the file, where they are others

    def __getitem__(self, key: str) -> Any:
        if key in self._added:
            return self._added[key]
        if key not in self._decoded:
            self._decoded[key] = self._decode(self._values[key])
        return self._decoded[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values or key in self._added

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._values, *self._added)))

    def __len__(self) -> int:
        return len(self._values.keys() | self._added.keys())

    def renamed(self, names: Mapping[str, str], added: Mapping[str, Any]) -> Metadata:
        """Return these keys under other names, with `added` ones, whose values go before the file's. Nothing is decoded.

        names  the file's -> the new one, of keys that change
        """
        other = Metadata(self._path, self._buffer, {names.get(key, key): value for key, value in self._values.items()})
        other._added, other._own = dict(added), {new: old for old, new in names.items()}
        return other

    def below(self, prefix: str) -> Metadata:
        """Return the keys that begin with `prefix`, without it. Nothing is decoded."""
        return Metadata(self._path, self._buffer, {key[len(prefix):]: value for key, value in self._values.items() if key.startswith(prefix)})

    def own_name(self, key: str) -> str:
        """Return the name that `key` has in the file, for messages."""
        return self._own.get(key, key)

    def place(self, key: str) -> str:
        """Return where `key` stands, for messages: the file, and the name that it has there."""
        return f"{self._path}: {self.own_name(key)}"

    def need(self, key: str, *kinds: type) -> Any:
        """Return the value of `key`, which must be one of `kinds` where any are given.

        Kinds are bool, int, float (takes an int too), str, list (of strings) and np.ndarray (of numbers).
        Raises: InvalidModelError for a missing key, with the nearest ones that are there, and for another kind.
        """
        if key not in self:
            raise InvalidModelError(f"{self._path}: the key {key!r} is missing{nearest(key, self)}")
        value = self[key]
        if not kinds or type(value) in kinds:
            return value
        if float in kinds and type(value) is int:
            return float(value)
        raise InvalidModelError(f"{self._path}: {self.own_name(key)!r} must be {' or '.join(kind.__name__ for kind in kinds)}, "
                                f"not {self.type_name(key)}, at byte {self._values[key].start}")

    def get(self, key: str, default: Any = None, *kinds: type) -> Any:
        """Return `default` where `key` is missing, else what `need` returns. Raises as `need` for another kind."""
        return self.need(key, *kinds) if key in self else default

    def raw(self, key: str) -> bytes | list[bytes]:
        """Return a string's bytes, or the bytes of each string of an array. Raises RequestError for other types."""
        value = self._values[key]
        if value.type != _STRING:
            raise RequestError(f"{self._path}: {key!r} is {value.type_name}: raw bytes are kept of strings only")
        return self._strings(value) if value.is_array else self._held()[value.start:value.start + value.count]

    def encoded(self, key: str) -> bytes:
        """Return the type and the value of `key` as they lie in the file, which is how another file takes them."""
        value, buffer = self._values[key], self._held()
        end = value.start
        if value.type != _STRING:
            end += value.count * _NUMPY[value.type].itemsize
        elif not value.is_array:
            end += value.count
        else:
            for _ in range(value.count):                 # lengths were checked when the file was opened
                end += 8 + _U64.unpack_from(buffer, end)[0]
        before = 4 + 4 + 8 if value.is_array else 4 + 8 if value.type == _STRING else 4
        return buffer[value.start - before:end]

    def strings_region(self, key: str) -> tuple[memoryview, int]:
        """Return the bytes of an array of strings as they lie in the file (length u64, then that many bytes, for each;
        what follows the last is not theirs) and the number of strings. Raises RequestError for other types.
        """
        value = self._values[key]
        if value.type != _STRING or not value.is_array:
            raise RequestError(f"{self._path}: {key!r} is {value.type_name}, not an array of strings")
        return memoryview(self._held())[value.start:], value.count

    def type_name(self, key: str) -> str:
        """Return the type that the file gives `key`: "uint32", "string", "array[float32, 262144]"; Python's, of an added one."""
        if key in self._added:
            return type(self._added[key]).__name__
        return self._values[key].type_name

    def count(self, key: str) -> int:
        """Return the number of elements of an array without decoding it; 1 for any other value."""
        value = self._values[key]
        return value.count if value.is_array else 1

    def close(self) -> None:
        self._buffer = None

    def _held(self) -> mmap.mmap:
        if self._buffer is None:
            raise RequestError(f"{self._path}: is closed")
        return self._buffer

    def _decode(self, value: _Value) -> Any:
        if value.type == _STRING:
            if value.is_array:
                return [raw.decode("utf-8", "surrogateescape") for raw in self._strings(value)]
            return self._held()[value.start:value.start + value.count].decode("utf-8", "surrogateescape")
        array = np.frombuffer(self._held(), _NUMPY[value.type], value.count, value.start)
        if not value.is_array:
            return array[0].item()
        array = np.require(array, requirements="A")      # copied where it is not aligned, for C's sake
        array.flags.writeable = False
        return array

    def _strings(self, value: _Value) -> list[bytes]:
        unpack, buffer, pos, strings = _U64.unpack_from, self._held(), value.start, []
        for _ in range(value.count):                     # lengths were checked when the file was opened
            end = pos + 8 + unpack(buffer, pos)[0]
            strings.append(buffer[pos + 8:end])
            pos = end
        return strings


class _Part:
    """One file: its keys and its tensors, checked."""

    def __init__(self, path: Path, index: int):
        self.path, self.index = path, index
        self.file = MappedFile(path, _HEADER_BYTES)
        scan = _Scanner(self.file)
        scan.require(_HEADER_BYTES, "header")
        if scan.buffer[:4] != MAGIC:
            raise InvalidModelError(f"{path}: this is not a GGUF file: {_other(scan.buffer[:_HEADER_BYTES])}")
        scan.pos = 4
        self.version = _check_version(scan)
        at = scan.pos
        n_tensors, n_keys = scan.u64("number of tensors"), scan.u64("number of keys")
        for count, least, what, where in ((n_tensors, _LEAST_TENSOR_BYTES, "tensors", at),
                                          (n_keys, _LEAST_KEY_BYTES, "keys", at + 8)):
            if count > (scan.size - scan.pos) // least:
                raise scan.fail(f"number of {what}", f"is {count}, more than {scan.size} bytes can hold", where)
        self.values = self._scan_keys(scan, n_keys)
        self.metadata = Metadata(path, scan.buffer, self.values)
        self.alignment = self._read_alignment(scan)
        self.tensors = self._scan_tensors(scan, n_tensors)
        if sys.platform == "linux":                      # elsewhere memory cannot be made smaller; it was never used
            scan.buffer.resize(max(1, scan.pos))

    def _scan_keys(self, scan: _Scanner, n_keys: int) -> dict[str, _Value]:
        values: dict[str, _Value] = {}
        for i in range(n_keys):
            at = scan.pos
            key = scan.name(f"key {i}")
            if key in values:
                raise scan.fail(f"key {i}", f"{quoted(key)} is there twice", at)
            values[key] = scan.value(quoted(key))
        return values

    def _read_alignment(self, scan: _Scanner) -> int:
        key = "general.alignment"
        if key not in self.values:
            return DEFAULT_ALIGNMENT
        value = self.values[key]
        if value.is_array or _TYPE_NAMES[value.type] != "uint32":
            raise scan.fail(key, f"must be uint32, not {value.type_name}", value.start)
        alignment = self.metadata[key]
        if alignment < 8 or alignment & (alignment - 1):
            raise scan.fail(key, f"is {alignment}, not a power of two of at least 8", value.start)
        return alignment

    def _scan_tensors(self, scan: _Scanner, n_tensors: int) -> dict[str, TensorInfo]:
        # Offsets here count from the start of the data, known only after the last tensor; `where` is the field's byte.
        found: dict[str, tuple[TensorInfo, int]] = {}
        for i in range(n_tensors):
            at = scan.pos
            info, where = self._scan_tensor(scan, i)
            if info.name in found:
                raise scan.fail(f"tensor {i}", f"{quoted(info.name)} is there twice", at)
            found[info.name] = info, where
        start = -(-scan.pos // self.alignment) * self.alignment          # of the data
        tensors = {}
        missing = max((start + info.offset + info.nbytes for info, _ in found.values()), default=0) - scan.size
        for info, where in found.values():
            name, end = quoted(info.name), start + info.offset + info.nbytes
            if info.offset % self.alignment:
                raise scan.fail(f"offset of {name}", f"is {info.offset}, no multiple of {self.alignment}", where)
            if end > scan.size:
                raise scan.ends(f"offset of {name}", f"is {info.offset}: with {info.nbytes} bytes, and the data from "
                                f"byte {start} on, it ends {end - scan.size} bytes past the end of the file", where, missing)
            tensors[info.name] = info._replace(offset=start + info.offset)
        end, before = 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise scan.fail(f"tensor {quoted(info.name)}", f"overlaps {quoted(before)}, which ends at byte {end}",
                                info.offset)
            end, before = info.offset + info.nbytes, info.name
        return tensors

    def _scan_tensor(self, scan: _Scanner, i: int) -> tuple[TensorInfo, int]:
        name = scan.name(f"name of tensor {i}")
        field = quoted(name)
        at = scan.pos
        n_axes = scan.u32(f"number of axes of {field}")
        if n_axes > MAX_AXES:
            raise scan.fail(f"number of axes of {field}", f"is {n_axes}, more than {MAX_AXES}", at)
        axes: list[int] = []                             # fastest first, as in the file
        for axis in range(n_axes):
            at = scan.pos
            length = scan.u64(f"axis {axis} of {field}")
            if not length:
                raise scan.fail(f"axis {axis} of {field}", "is 0: a tensor must have elements", at)
            if math.prod(axes) * length >= 2**63:
                raise scan.fail(f"axis {axis} of {field}", f"is {length}: the elements are 2**63 or more", at)
            axes.append(length)
        at = scan.pos
        type = self._dtype(scan, field)
        row = axes[0] if axes else 1
        if row % type.block:
            raise scan.fail(f"dtype of {field}", f"is {type}: rows of {row} are not whole blocks of {type.block}", at)
        at = scan.pos
        offset = scan.u64(f"offset of {field}")
        shape = tuple(reversed(axes))
        return TensorInfo(name, shape, type, type.size(math.prod(shape)), offset, self.index), at

    def _dtype(self, scan: _Scanner, field: str) -> DType:
        at = scan.pos
        number = scan.u32(f"dtype of {field}")
        try:
            found = dtype(number)
            if not found.in_files:                       # a form of ours in memory, which no file may claim
                raise UnsupportedModelError(f"no dtype has the number {number} in a file")
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.path}: dtype of {field}: {error}, at byte {at}") from None
        return found


class GGUFFile:
    """A GGUF file, or all parts of a split one, opened from any of them for reading.

    `path` the file that was asked for; `paths` all parts in order; `version`; `metadata` (of the first part);
    `tensors` by name, in the order of the file.

    Raises: ModelNotFoundError where there is no such file; UnsupportedModelError for big-endian files, versions other
    than 2 and 3, and unknown dtypes; InvalidModelError, naming field and byte, for everything malformed.
    Metadata stay as they were when the file was opened. Tensors are read from the file: `check` says whether they still can be.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(place("path", path))
        asked = _Part(self.path, 0)
        parts = [asked] if _n_parts(asked) == 1 else _open_parts(asked)
        self.paths = [part.path for part in parts]
        self.version, self.metadata = parts[0].version, parts[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self.tensors:
                    other = self.paths[self.tensors[name].part]
                    raise InvalidModelError(f"{part.path}: tensor {quoted(name)}: is in {other.name} too, "
                                            f"at byte {info.offset}")
                self.tensors[name] = info
        self._files: list[MappedFile] | None = [part.file for part in parts]

    def renamed(self, tensors: Mapping[str, str | None], metadata: Metadata, placed: Mapping[str, TensorInfo] = {}) -> GGUFFile:
        """Return the same open file with tensors under other names and with other metadata; `TensorInfo.name` stays the file's.

        tensors  the file's -> the new one, of names that change; None: of a tensor that is left out
        placed   by its new name, what lies elsewhere in a tensor of the file or has another shape there (`TensorInfo.within`)
        Raises: InvalidModelError where two tensors would have one name.
        """
        other = copy(self)
        other.metadata, other.tensors = metadata, {}
        for new, info in (*((tensors.get(name, name), info) for name, info in self.tensors.items()), *placed.items()):
            if new is None:
                continue
            if new in other.tensors:
                raise InvalidModelError(f"{self.paths[info.part]}: tensor {quoted(info.name)}: {quoted(other.tensors[new].name)} is there "
                                        f"too, which is another name of the same one, at byte {info.offset}")
            other.tensors[new] = info
        return other

    def view(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor, uint8 [nbytes], read-only, without copying them."""
        info = self._info(name)
        return np.frombuffer(self._file(info.part).buffer, np.uint8, info.nbytes, info.offset)

    def array(self, name: str) -> np.ndarray:
        """Return a tensor of plain numbers in its shape, read-only, without copying; BF16 as its bits in uint16.

        Raises: RequestError for block formats, which have no element type.
        """
        info = self._info(name)
        if info.dtype.numpy is None:
            raise RequestError(f"{name!r} has the block format {info.dtype}: read its bytes with view()")
        flat = np.frombuffer(self._file(info.part).buffer, info.dtype.numpy, info.n_elements, info.offset)
        return flat.reshape(info.shape)

    def drop(self, name: str) -> bool:
        """Tell the kernel that a tensor's pages are not needed now; they come back from the file when read again.

        Returns whether the platform can be told (madvise); nothing changes where it cannot.
        """
        info = self._info(name)
        return self.drop_range(info.offset, info.nbytes, info.part)

    def drop_range(self, offset: int, nbytes: int, part: int = 0) -> bool:
        """Do what `drop` does for bytes of a part's file, widened to whole pages."""
        buffer = self._file(part).buffer
        if not 0 <= offset <= offset + nbytes <= len(buffer):
            raise RequestError(f"{self.paths[part]}: bytes {offset} to {offset + nbytes} are not all in the file")
        if not nbytes or not hasattr(mmap, "MADV_DONTNEED"):
            return False
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        buffer.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)     # clean pages of a file: nothing is lost
        return True

    def check(self) -> None:
        """Make sure that what was read of tensors up to now is what the file held when it was opened; asked after reading.

        Raises: InvalidModelError if it was cut or written to since (one that was replaced by another of its name was not).
        """
        for file in self._files or ():
            file.check()

    def close(self) -> None:
        """End reading. Arrays and values that were handed out stay valid: the mapping goes with the last of them."""
        files, self._files = self._files, None
        self.metadata.close()
        for file in files or ():
            file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (f"GGUFFile({str(self.path)!r}, version={self.version}, {len(self.metadata)} keys, "
                f"{len(self.tensors)} tensors)")

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InvalidModelError(f"{self.path}: no tensor {name!r}{nearest(name, self.tensors)}")
        return self.tensors[name]

    def _file(self, part: int) -> MappedFile:
        if self._files is None:
            raise RequestError(f"{self.path}: is closed")
        return self._files[part]


def _other(start: bytes) -> str:
    """Say what a file is that begins so."""
    begun = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begun.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "it is a web page (HTML); download the file itself"
    if begun.startswith(b"version https://git-lfs"):
        return "it is the pointer of Git LFS to one; `git lfs pull` fetches the file itself"
    if all(byte in b"\t\r\n" or byte >= 32 for byte in start):
        return "it is text"
    return f"it begins with the bytes {start[:4].hex(' ')}"


def _check_version(scan: _Scanner) -> int:
    version = scan.u32("version")
    if version in VERSIONS:
        return version
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped < 1 << 16 and version >= 1 << 16:
        raise UnsupportedModelError(f"{scan.path}: version: is {swapped} in big-endian order, at byte 4: only "
                                    "little-endian files are read; gguf-py's gguf_convert_endian.py converts it")
    raise UnsupportedModelError(f"{scan.path}: version: is {version}, at byte 4: only 2 and 3 are read")


def _n_parts(part: _Part) -> int:
    """Return the number of files that a model is split into, by its keys and by its file's name, which must agree."""
    by_name = SPLIT_NAME.search(part.path.name)
    n_named = int(by_name[2]) if by_name else 1
    n_parts = part.metadata.need("split.count", int) if n_named > 1 else part.metadata.get("split.count", 1, int)
    if n_named <= 1 and n_parts in (0, 1):
        return 1
    if n_parts != n_named:
        says = f"says {n_named}" if by_name else "does not end in -00001-of-0000N.gguf, by which they are found"
        raise InvalidModelError(f"{part.path}: split.count: is {n_parts}, but the name of the file {says}")
    return n_parts


def _open_parts(asked: _Part) -> list[_Part]:
    """Open all parts of the model that `asked` belongs to, in order."""
    n_parts = _n_parts(asked)
    stem = SPLIT_NAME.sub("", asked.path.name)
    paths = [asked.path.with_name(f"{stem}-{i + 1:05}-of-{n_parts:05}.gguf") for i in range(n_parts)]
    parts = []
    for i, path in enumerate(paths):
        if not path.is_file():
            raise ModelNotFoundError(f"{path}: part {i + 1} of {n_parts} is missing beside {asked.path.name}")
        part = _Part(path, i)
        number = part.metadata.need("split.no", int)
        if number != i or _n_parts(part) != n_parts:
            raise InvalidModelError(f"{path}: split.no: is {number}, but by its name the file is {i}, counted from 0")
        parts.append(part)
    n_tensors = sum(len(part.tensors) for part in parts)
    wanted = parts[0].metadata.get("split.tensors.count", n_tensors, int)
    if wanted != n_tensors:
        raise InvalidModelError(f"{paths[0]}: split.tensors.count: is {wanted}, but the parts hold {n_tensors}")
    return parts
