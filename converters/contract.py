"""What a converter says: the keys that it writes, and which tensor of the checkpoint becomes which tensor of the file.

An architecture is a class decorated with `@converts(...)` in a module of this package that has no other task. Reading, checking and
writing are done for it (`checkpoint`, `writer`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from gguf import GGMLQuantizationType as QT
from gguf import GGUFWriter

if TYPE_CHECKING:
    from gguf import PoolingType

    from .tokenizer import Vocabulary

# for `Entry.instead`: tensors that are few and count much, and tensors that are no factors of a product with blocks
FLOAT32 = {QT.F16: QT.F32, QT.BF16: QT.F32, QT.Q8_0: QT.F32}
NO_BLOCKS = {QT.Q8_0: QT.F16}


@dataclass(frozen=True)
class LowRank:
    """A change of a matrix [n_out, n_in]: scale * high [n_out, rank] low [rank, n_in], of which both are tensors of the checkpoint
    (LoRA, arXiv:2106.09685)."""
    low: str
    high: str
    rank: int
    scale: float


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint and the tensor of the file that it becomes; shapes slowest axis first.

    A part of a tensor has `stored`, the whole's shape; it is `shape[0]` rows from `first_row` on, one `frame`, with an axis less
    the one row `first_row`, a number without axes as (1,), of a stack of matrices `shape[1]` rows of each from `middle` on, or, of one that the checkpoint keeps
    transposed, `shape[1]` columns from `first_column` on. A matrix that is `turned` lies transposed in the checkpoint, from its `first_row` on. With `padded` the tensor of the file is larger than `shape`, by rows and columns of zeros behind it.
    Vectors are float32 and matrices of the type that is asked for, or of the one that stands for it in `instead`.
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
    middle: int | None = None            # of matrices [n, rows, in], which become [n, shape[1], in]
    turned: bool = False
    units: int | None = None             # the axis that may be padded with zeros to whole blocks
    padded: tuple[int, ...] | None = None
    instead: Mapping[QT, QT] = field(default_factory=dict)
    make: Callable[[np.ndarray], np.ndarray] | None = None   # applied to the values, float32
    change: LowRank | None = None        # added to the values


@dataclass(frozen=True)
class Stack:
    """A tensor of the file that holds tensors of the checkpoint one after the other: an expert's matrix each, of one shape; or, where they
    are `joined`, rows of one matrix.
    """
    name: str
    parts: tuple[Entry, ...]
    joined: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        if self.joined:
            return sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:]
        return len(self.parts), *self.parts[0].shape


@dataclass(frozen=True)
class Blocks:
    """A tensor of the file in blocks of a type that the checkpoint has already, in another order of bytes: never computed with.

    `sources` are tensors of bytes and their shapes, of which `make` gets the same rows each, and returns the bytes of those rows.
    """
    name: str
    shape: tuple[int, ...]
    qtype: QT
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    make: Callable[..., np.ndarray]


@dataclass(frozen=True)
class Constant:
    """A tensor of the file that follows from the config, float32 or int64."""
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
    def write_keys(self, out: GGUFWriter) -> None: ...
    def tensors(self) -> Iterator[Entry | Stack | Constant | Blocks]: ...
    def unused(self) -> set[str]: ...           # tensors of the checkpoint that the model itself does not read
    @property
    def vocab_size(self) -> int: ...            # rows of the embedding


@runtime_checkable
class ChangesVocabulary(Protocol):
    """A converter of a model whose own code does more to a text than its tokenizer's files say, or whose tokenizer has a name of its own."""

    def change_vocabulary(self, vocabulary: Vocabulary) -> None: ...


@runtime_checkable
class ReadsMore(Protocol):
    """A converter of checkpoints with tensors in further files."""

    @property
    def more_files(self) -> Sequence[Path]: ...


@runtime_checkable
class LooksFirst(Protocol):
    """A converter that has to know which tensors a checkpoint has, under the names that `renames` gives, before it lists them."""

    def look(self, names: Collection[str]) -> None: ...


@runtime_checkable
class MakesVectors(Protocol):
    """A converter of a model that makes vectors of texts, with layers behind its pooling where sentence-transformers' files have them."""

    @property
    def usual_pooling(self) -> PoolingType: ...


@runtime_checkable
class LeavesOut(Protocol):
    """A converter that leaves a part of a model out and says so: patterns of its tensors' names, and words for each."""

    @property
    def leaves(self) -> Sequence[tuple[str, str]]: ...


@runtime_checkable
class Tells(Protocol):
    """A converter that says what it did with a checkpoint, where more than one thing can be done."""

    @property
    def notes(self) -> Sequence[str]: ...


@runtime_checkable
class DraftsFor(Protocol):
    """A converter of a head that drafts for another model, of which it may have to know the config."""

    def read_base(self, config: dict[str, Any]) -> None: ...


@runtime_checkable
class IsEncoders(Protocol):
    """A converter of a model that is encoders and nothing else: none of them can be split off."""
    whole: bool


_CONVERTERS: dict[str, type[Converter]] = {}


def converts(*classes: str) -> Callable[[type], type]:
    """Register the decorated class for these names in a config.json's `architectures`. Raises TypeError for a taken name."""
    def register(cls: type) -> type:
        for name in classes:
            other = _CONVERTERS.setdefault(name, cls).__module__
            if other != cls.__module__:
                raise TypeError(f"{name} is converted by both {other} and {cls.__module__}")
        return cls
    return register


def supported() -> dict[str, type[Converter]]:
    """Return the converter of each supported architecture, by its Hugging Face class name.

    Modules beside this one are imported, and those that are architectures register themselves; packages are tools and stay out.
    """
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg and not module.name.startswith("_"):
            importlib.import_module(f"{__package__}.{module.name}")
    return dict(_CONVERTERS)


def linear(name: str, source: str, n_out: int, n_in: int, bias: bool = False,
           row_order: np.ndarray | None = None) -> Iterator[Entry]:
    """List the weight [n_out, n_in] of a linear layer and, if it has one, its bias [n_out]."""
    yield Entry(f"{name}.weight", f"{source}.weight", (n_out, n_in), row_order)
    if bias:
        yield Entry(f"{name}.bias", f"{source}.bias", (n_out,), row_order)


def layer_norm(name: str, source: str, width: int) -> Iterator[Entry]:
    """List the weight and the bias of a layer norm."""
    for part in ("weight", "bias"):
        yield Entry(f"{name}.{part}", f"{source}.{part}", (width,))
