"""Tensors, steps and transfers of a program as the structs of csrc/cuda/runtime.h."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.graph.tensor import Axis
from pyengine.native import ffi


class Described:
    """Lists that grow into C arrays. dims: number of each run-time axis by its name."""

    def __init__(self, dims: Mapping[str, int]):
        self.dims = dims
        self._tensors: list[Any] = []
        self._nodes: list[Any] = []
        self._keep: list[Any] = []                           # what the structs point to

    def _axes(self, axes: Sequence[Axis]) -> list[tuple[int, int]]:
        return [(a, -1) if isinstance(a, int) else (a.scale, self.dims[a.name]) for a in axes]

    def tensor(self, address: int, dtype: int, shape: Sequence[Axis], strides: Sequence[Axis]) -> int:
        """Add a tensor and return its number."""
        self._tensors.append((address, dtype, len(shape), self._axes(shape), self._axes(strides)))
        return len(self._tensors) - 1

    def node(self, op: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], params: bytes, scratch: int,
             scratch_bytes: int) -> None:
        """Add a step whose arguments are these tensors."""
        args = [*inputs, *outputs]
        name, bits = ffi.new("char[]", op.encode()), ffi.new("char[]", params)
        count, numbers = ffi.new("int32_t[]", [len(a) for a in args]), ffi.new("int32_t[]", [i for a in args for i in a] or [0])
        self._keep += [name, bits, count, numbers]
        self._nodes.append((name, bits, len(params), len(inputs), len(outputs), count, numbers, scratch, scratch_bytes))

    def arrays(self) -> tuple[Any, Any]:
        """Return the tensors and the steps; this object must live while they are used."""
        return ffi.new("pe_card_tensor[]", self._tensors), ffi.new("pe_card_node[]", self._nodes)

    def transfers(self, rows: Sequence[tuple[int, int, int, Sequence[Axis], int]]) -> Any:
        """Return transfers of (host, device, bytes of an element, shape, first step that does not need it any more)."""
        out = []
        for host, device, nbytes, shape, last in rows:
            free = [self.dims[a.name] for a in shape if not isinstance(a, int)]
            for a in shape:
                nbytes *= a if isinstance(a, int) else a.scale
            out.append((host, device, nbytes, len(free), free, last))
        return ffi.new("pe_card_transfer[]", out)
