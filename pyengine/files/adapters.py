"""LoRA adapters in llama.cpp's files: two low matrices for each weight that an adapter changes.

    general.type = "adapter", general.architecture, adapter.type = "lora", adapter.lora.alpha
    blk.0.attn_q.weight.lora_a [r, n_in], blk.0.attn_q.weight.lora_b [n_out, r]            (slowest axis first)
    blk.0.ffn_up_exps.weight.lora_a [e, r, n_in], blk.0.ffn_up_exps.weight.lora_b [e, n_out, r]        of e experts
    token_embd.weight.lora_a [vocabulary, r], token_embd.weight.lora_b [n_out, r]          rows by id, times B^T

Hu et al. 2021, arXiv:2106.09685: y = x W^T + scale alpha / r (x A^T) B^T; alpha 0: y = x W^T + scale (x A^T) B^T, as in llama.cpp
(src/llama-adapter.h). `python -m converters` makes such files of peft's folders.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyengine.arguments import number, place
from pyengine.errors import InvalidModelError, RequestError, shown, UnsupportedModelError
from pyengine.files.dialects import ENCODER_TENSORS
from pyengine.files.gguf import GGUFFile, quoted
from pyengine.files.weights import WeightRef
from pyengine.records import dataclass, NamedTuple

A, B = ".lora_a", ".lora_b"
KIND = "adapter"                     # general.type of such a file
EMBEDDING = "token_embd.weight"


class Pair(NamedTuple):
    """The matrices of one weight: a [r, n_in], b [n_out, r], those of experts one above the other, of embeddings a [vocabulary, r]; `factor` is
    alpha / r.
    """

    a: WeightRef
    b: WeightRef
    factor: float

    @property
    def rank(self) -> int:
        return self.b.shape[-1]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter's file. scale: what requests that say nothing get; pairs: by the name of the weight that each changes."""

    name: str
    scale: float
    file: GGUFFile
    alpha: float
    pairs: Mapping[str, Pair]

    @property
    def n_parameters(self) -> int:
        return sum(t.n_elements for t in self.file.tensors.values())

    @property
    def ranks(self) -> list[int]:
        """The ranks that there are, ascending."""
        return sorted({p.rank for p in self.pairs.values()})


class Asked(NamedTuple):
    """An adapter that is asked for: its name in requests, its file, its scale where a request says nothing."""

    name: str
    path: Path
    scale: float


def asked_for(given: Any) -> list[Asked]:
    """Return the adapters that `load` is given: a path, a list of paths and (path, scale), or a mapping of names to these.

    A name is otherwise that of the file. Raises: RequestError.
    """
    if given is None:
        return []
    if isinstance(given, (str, os.PathLike)):
        given = [given]
    if not isinstance(given, (list, tuple, Mapping)):
        raise RequestError(f"adapters: must be paths, (path, scale), or a mapping of names to these, got {shown(given)}")
    found: list[Asked] = []
    for name, one in given.items() if isinstance(given, Mapping) else ((None, one) for one in given):
        path, scale = one if isinstance(one, (tuple, list)) and len(one) == 2 else (one, 1.0)
        path = Path(place("adapters", path))
        name = path.stem if name is None else name
        if not isinstance(name, str) or not name:
            raise RequestError(f"adapters: a name is a text, got {shown(name)}")
        if name in (a.name for a in found):
            raise RequestError(f"adapters: two are called {shown(name)}; give them names: adapters={{name: path, ..}}")
        found.append(Asked(name, path, number(f"adapters: the scale of {shown(name)}", scale)))
    return found


def is_adapter(file: GGUFFile) -> bool:
    """Say whether a file is an adapter, not a model."""
    return file.metadata.get("general.type") == KIND


def open_adapter(asked: Asked) -> Adapter:
    """Open an adapter's file and check it.

    Raises: InvalidModelError for a file that is none, or has half of a pair; UnsupportedModelError for another kind of adapter.
    """
    if asked.path.is_dir():
        raise InvalidModelError(f"{asked.path}: is a folder; `python -m converters {asked.path} --base HF_DIR -o x.gguf` makes a file of one of "
                                "Hugging Face's adapters")
    file = GGUFFile(asked.path)
    meta = file.metadata
    if not is_adapter(file):
        raise InvalidModelError(f"{file.path}: is no adapter: general.type is {shown(meta.get('general.type'))}, not {KIND!r}")
    kind = meta.need("adapter.type", str)
    if kind != "lora":
        raise UnsupportedModelError(f"{file.path}: adapter.type is {shown(kind)}; 'lora' is supported")
    if "adapter.alora.invocation_tokens" in meta:
        raise UnsupportedModelError(f"{file.path}: an activated LoRA, which works from some tokens of a prompt on, is not supported")
    alpha = meta.need("adapter.lora.alpha", float)
    return Adapter(asked.name, asked.scale, file, number(f"{file.path}: adapter.lora.alpha", alpha), _pairs(file, alpha))


def _pairs(file: GGUFFile, alpha: float) -> dict[str, Pair]:
    """Find the two matrices of each weight."""
    pairs: dict[str, Pair] = {}
    for name, a in file.tensors.items():
        base, end = name[: -len(A)], name[-len(A):]
        other = base + (B if end == A else A)
        if end not in (A, B):
            raise UnsupportedModelError(f"{file.path}: tensor {quoted(name)}: is neither {A[1:]} nor {B[1:]}: only pairs of matrices are supported")
        if other not in file.tensors:
            raise InvalidModelError(f"{file.path}: tensor {quoted(name)}: has no {quoted(other)} beside it")
        b = file.tensors[other]
        if end == B:
            continue
        if len(a.shape) not in (2, 3) or len(b.shape) != len(a.shape) or a.shape[:-2] != b.shape[:-2]:
            raise InvalidModelError(f"{file.path}: tensor {quoted(name)}: has shape {a.shape}, and {quoted(other)} {b.shape}: two matrices are needed, or "
                                    "two of each expert")
        rank = a.shape[-1 if base == EMBEDDING else -2]
        if rank != b.shape[-1]:
            raise InvalidModelError(f"{file.path}: tensor {quoted(name)}: has shape {a.shape}, and {quoted(other)} {b.shape}: the "
                                    f"{'columns' if base == EMBEDDING else 'rows'} of the one must be the columns of the other")
        pairs[base] = Pair(WeightRef(name, a.shape, a.dtype, file), WeightRef(other, b.shape, b.dtype, file), alpha / rank if alpha else 1.0)
    if not pairs:
        raise InvalidModelError(f"{file.path}: has no tensors")
    return pairs


def check_base(adapter: Adapter, model: GGUFFile) -> None:
    """Check that an adapter was made for a model of this shape.

    Raises: InvalidModelError for another architecture, for weights that the model lacks, and for those of other shapes;
    UnsupportedModelError for weights that are no factors of a product.
    """
    path, theirs = adapter.file.path, model.metadata.get("general.architecture")
    arch = adapter.file.metadata.get("general.architecture")
    if arch != theirs:
        raise InvalidModelError(f"{path}: is an adapter of architecture {shown(arch)}, and {model.path} is {shown(theirs)}")
    for name, (a, b, _) in adapter.pairs.items():
        if name.partition(".")[0] in ENCODER_TENSORS:
            raise UnsupportedModelError(f"{path}: tensor {quoted(a.name)}: adapters of the media encoder are not supported")
        if name not in model.tensors:
            raise InvalidModelError(f"{path}: tensor {quoted(a.name)}: {model.path} has no tensor {quoted(name)}: the adapter is of another base model")
        shape = model.tensors[name].shape
        wanted = (a.shape[0], b.shape[0]) if name == EMBEDDING else (*a.shape[:-2], b.shape[-2], a.shape[-1])
        if shape != wanted:
            raise InvalidModelError(f"{path}: tensors {quoted(a.name)} {a.shape} and {quoted(b.name)} {b.shape} are for a weight {wanted}, but "
                                    f"{quoted(name)} of {model.path} is {shape}: the adapter is of another base model")
