"""Bind the tensors of GGUF files to the places of a model, by name and shape, and account for every one of them.

`Weights` is a scope over dotted names: `w["blk", 3]["attn_q"].tensor("weight", shape=(n, k))` is "blk.3.attn_q.weight".
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from pyengine.dtype import DType, dtype as dtype_of
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError, nearest
from pyengine.files.gguf import GGUFFile, quoted
from pyengine.records import NamedTuple


def pages(shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of float32 zeros on pages of its own, which the system has back as soon as nothing refers to it.

    malloc would keep some of what large arrays held, and a plan counts what is allocated.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return np.frombuffer(mmap.mmap(-1, max(1, math.prod(shape)) * 4, **private), np.float32, math.prod(shape)).reshape(shape)


class WeightRef(NamedTuple):
    """One tensor of a file, or rows of one, with the shape that the model gives it. Nothing is read until bytes are asked for."""

    name: str
    shape: tuple[int, ...]     # slowest axis first
    dtype: DType
    source: GGUFFile
    first: int = 0             # elements of the tensor before these

    @property
    def nbytes(self) -> int:
        return self.dtype.size(math.prod(self.shape))

    def rows(self, first: int, n: int) -> WeightRef:
        """Return n rows from `first` on."""
        return self._replace(shape=(n, *self.shape[1:]), first=self.first + first * math.prod(self.shape[1:]))

    def view(self) -> np.ndarray:
        """Return the bytes, uint8 [nbytes], over the mapped file."""
        begin = self.dtype.size(self.first)
        return self.source.view(self.name)[begin : begin + self.nbytes]

    def floats(self) -> np.ndarray:
        """Return the numbers as float32 in `shape`, dequantized (F32: over the mapped file).

        Raises: UnsupportedModelError for a format that cannot be.
        """
        if self.dtype.name == "F32":
            return self.view().view(np.float32).reshape(self.shape)
        from pyengine.native.blocks import dequantize                          # reading a file's names needs no compiled part

        try:
            return dequantize(self.view(), self.dtype, out=pages(self.shape))
        except RequestError:
            raise UnsupportedModelError(f"{self.source.path}: tensor {self.name!r}: {self.dtype.name} cannot be read") from None

    def drop(self) -> bool:
        """Tell the kernel that the file's pages under this tensor are not needed now."""
        return self.source.drop(self.name)


class DerivedRef(NamedTuple):
    """A float32 weight that is computed from tensors of the file when it is loaded (a transposed matrix, joined slices).

    make(*arrays) gets `WeightRef.floats` of each part and returns an array of `shape`. With another `dtype`, that of all parts, it gets
    the bytes of each part, those of a row in a row, and returns those of the weight: parts that are joined in their format.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[WeightRef, ...]
    make: Callable[..., np.ndarray]
    dtype: DType = dtype_of("F32")

    def view(self) -> np.ndarray:
        """Compute the bytes, uint8 [nbytes]."""
        if self.dtype.name != "F32":
            return np.ascontiguousarray(self.make(*(p.view().reshape(p.shape[0], -1) for p in self.parts))).reshape(-1)
        made = self.make(*(p.floats() for p in self.parts))
        if made.shape != self.shape:
            raise InvalidModelError(f"tensor {self.name!r}: is made with shape {made.shape}, and the model needs {self.shape}")
        if made.dtype != np.float32 or not made.flags.c_contiguous:
            out = pages(self.shape)
            np.copyto(out, made)
            made = out
        return made.reshape(-1).view(np.uint8)

    def drop(self) -> bool:
        """Tell the kernel that the file's pages under the parts are not needed now."""
        return all([p.drop() for p in self.parts])


def files_of(sources: Iterable[Any]) -> list[GGUFFile]:
    """Return the files that constants are read from, each once. Arrays among `sources` have none."""
    refs = [ref for s in sources for ref in (s.parts if isinstance(s, DerivedRef) else [s] if isinstance(s, WeightRef) else [])]
    return list({id(ref.source): ref.source for ref in refs}.values())


class _Names:
    """What all scopes of one model share: where each tensor is, which scopes exist, and what has been bound."""

    def __init__(self, files: tuple[GGUFFile, ...], own: Mapping[str, str]):
        self.own = own
        self.sources: dict[str, GGUFFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self.sources:
                    raise InvalidModelError(f"{file.path}: tensor {quoted(name)}: is in {self.sources[name].path} too")
                self.sources[name] = file
        self.scopes = {name[:i] for name in self.sources for i, char in enumerate(name[:200]) if char == "."}
        self.bound: set[str] = set()
        self.paths = ", ".join(str(file.path) for file in files)

    def told(self, name: str) -> str:
        """Return a tensor's or a scope's name as messages have it."""
        return next((file + name.removeprefix(ours) for ours, file in self.own.items() if name.startswith(ours)), name)


class Weights:
    """The tensors of one or more GGUF files (text and projector, say) below a prefix of their names."""

    def __init__(self, *files: GGUFFile, own: Mapping[str, str] = MappingProxyType({})):
        """Keep the files. own: what names begin with that are others in the files, and what they begin with there, for messages."""
        self._names, self.prefix = _Names(files, own), ""

    def __getitem__(self, path: str | int | tuple[str | int, ...]) -> Weights:
        """Return the scope below: `w["blk", 3]` is everything named "blk.3...". It may be empty."""
        scope = Weights.__new__(Weights)
        scope._names, scope.prefix = self._names, self.prefix + _dotted(path) + "."
        return scope

    def __contains__(self, path: str | int | tuple[str | int, ...]) -> bool:
        """Say whether a tensor has this name here, or lies in the scope of this name."""
        name = self.prefix + _dotted(path)
        return name in self._names.sources or name in self._names.scopes

    @property
    def place(self) -> str:
        """Where this scope is, for messages: its files, and what its names begin with there."""
        return f"{self._names.paths}: {self._names.told(self.prefix)}".rstrip(". :")

    def first(self, *paths: str | int | tuple[str | int, ...]) -> Weights:
        """Return the first of these scopes that has tensors: `w.first("output", "token_embd")` for tied embeddings.

        Raises: InvalidModelError naming all of them.
        """
        for path in paths:
            if path in self:
                return self[path]
        raise InvalidModelError(f"{self._names.paths}: no tensor below any of "
                                f"{', '.join(repr(self._names.told(self.prefix + _dotted(path))) for path in paths)}")

    def tensor(self, name: str, shape: tuple[int, ...]) -> WeightRef:
        """Bind the tensor `name` of this scope, which must have this shape (slowest axis first).

        Axes of length 1 in front do not count: GGUF does not tell (n,) from (1, n).
        Raises: InvalidModelError for a missing tensor, with the nearest names, and for another shape, with both.
        """
        full = self.prefix + name
        file = self._names.sources.get(full)
        if file is None:
            told = self._names.told(full)
            raise InvalidModelError(f"{self._names.paths}: tensor {told!r}: is missing{nearest(told, map(self._names.told, self._names.sources))}")
        info = file.tensors[full]
        if _significant(info.shape) != _significant(shape):
            raise InvalidModelError(f"{file.paths[info.part]}: tensor {info.name!r}: has shape {info.shape}, and the model "
                                    f"needs {tuple(shape)}, at byte {info.offset}")
        self._names.bound.add(full)
        return WeightRef(full, tuple(shape), info.dtype, file)

    def optional(self, name: str, shape: tuple[int, ...]) -> WeightRef | None:
        """Bind a tensor that files may leave out; None without it. Raises as `tensor` for another shape."""
        return self.tensor(name, shape) if self.prefix + name in self._names.sources else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape that the file gives a tensor of this scope, for widths that no key states; None without it."""
        file = self._names.sources.get(self.prefix + name)
        return None if file is None else file.tensors[self.prefix + name].shape

    def leave_out(self) -> None:
        """Count all tensors of this scope as used: the model does without them, on purpose."""
        self._names.bound.update(name for name in self._names.sources if name.startswith(self.prefix))

    def finish(self, ignore: Iterable[str] = ()) -> None:
        """Check, once the model is built, that every tensor of the files is bound, so that nothing is left unused.

        ignore  scopes or tensors that may stay unbound: "rope_freqs" covers "rope_freqs.weight"
        Raises: UnsupportedModelError naming up to five that are not.
        """
        ignored = tuple(ignore)
        left = [file.tensors[name].name for name, file in self._names.sources.items() if name not in self._names.bound
                and not any(name == scope or name.startswith(scope + ".") for scope in ignored)]
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise UnsupportedModelError(f"{self._names.paths}: tensors that the model does not use: "
                                        f"{', '.join(quoted(name) for name in left[:5])}{more}")


def _dotted(path: str | int | tuple[str | int, ...]) -> str:
    return ".".join(map(str, path)) if isinstance(path, tuple) else str(path)


def _significant(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` without its leading axes of length 1."""
    shape = tuple(shape)
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor's name speaks of: 3 for "blk.3.attn_q.weight" and for "v.blk.3.ln1.bias"; else None."""
    parts = name.split(".")
    number = parts[parts.index("blk") + 1] if "blk" in parts[:-1] else ""
    return int(number) if number.isdigit() else None


def behind_layers(name: str) -> bool:
    """Say whether a tensor stands behind the last layer: the output head and its norm."""
    return name.startswith("output")
