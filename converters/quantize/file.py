"""A GGUF file, written again with its matrices in other formats: tensors are streamed through, keys are copied.

The codes and scales of block formats are searched by the engine's C code (`pyengine.native.blocks`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gguf
import numpy as np

from pyengine.dtype import DType
from pyengine.errors import InvalidModelError, RequestError
from pyengine.files.gguf import DEFAULT_ALIGNMENT, GGUFFile, MAGIC, SPLIT_NAME, TensorInfo
from pyengine.files.writing import target_of, written
from pyengine.native.blocks import dequantize, QUANTIZABLE, quantize

from .mixtures import ALIASES, choose, Facts, MIXTURES, VISION

CHUNK = 1 << 20             # elements that a thread takes at once: 4 MiB of float32
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")        # meaningless in a file that is whole


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
    try:
        target = target_of(target)
    except OSError as error:
        raise RequestError(f"{target}: {error.strerror}") from None
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
        with written(target) as out, ThreadPoolExecutor(n_threads or os.cpu_count()) as pool:
            alignment = file.metadata.get("general.alignment", DEFAULT_ALIGNMENT, int)
            _write_header(out, file, mixture, plan, alignment)
            for w in plan:
                for data in _converted(file, w, pool):
                    out.write(data)
                file.drop(w.info.name)
                file.check()
                out.write(bytes(-out.tell() % alignment))
                if progress:
                    progress(w)
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
