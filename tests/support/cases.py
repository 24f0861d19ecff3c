"""Cases: the tiny checkpoints that whole-model tests convert and run, each declared by its architecture's own test file.

A file `tests/models/test_<arch>.py` has `CASES`, the checkpoints that every suite over models takes; they are found here, so nothing
lists them. Suites ask for properties (`cases.kinds(sees=True, mrope=False)`), never for names. A test that needs some model as an
example may name it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from foreign import Dialect, LlamaCpp
    from hollow import Full
    from sight import Sight

FOLDERS = [Path(__file__).resolve().parents[1] / "models"]
TOWERS = Path(__file__).resolve().parents[1] / "towers"
CHAT_TEMPLATE = "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>{% endfor %}"


@dataclass(frozen=True)
class Tokens:
    """Special tokens of a family of models: `ids` maps names of a config.json ("vision_config." before those in there) to them, `added` are not special."""

    special: tuple[str, ...] = ("<|start|>", "<|stop|>", "<|fill|>", "<|turn|>")
    bos: str | None = "<|start|>"
    eos: str = "<|stop|>"
    pad: str = "<|fill|>"
    template: str = CHAT_TEMPLATE
    ids: dict[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ("<tool>",)
    named: dict[str, str] | None = None         # the tokenizer's own attributes


@dataclass(frozen=True)
class Converted:
    """What the converted file of a checkpoint must say."""

    keys: dict[str, Any]                        # of a text model all keys of its architecture, without its name; else some, whole
    absent: tuple[str, ...] = ()                # keys that are not there
    clip: dict[str, Any] = field(default_factory=dict)          # all "clip." keys, without "clip." and "vision."
    clip_tokens: dict[str, str] = field(default_factory=dict)   # those of them that are ids of tokens
    renames: tuple[tuple[tuple[str, str], ...], ...] = ()       # what other versions of transformers call the beginnings of names
    # Text models: what gguf-py calls the architecture, and a tensor of the checkpoint as the file has it, with another name or not, or
    # the list of those that it becomes.
    names: str = ""
    tensor: Callable[[str, np.ndarray, dict[str, Any]], Any] = lambda name, value, config: (None, value)
    tensors: dict[str, dict[str, Any]] | None = None            # configs whose every tensor is compared; None: the case's own
    # llama.cpp runs the file: configs of which its logits are compared, the largest error, and a narrow type that is tried too
    runs: dict[str, dict[str, Any]] | None = None
    error: float = 2e-5
    narrow: str | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny checkpoint: its config and classes in transformers, what it has that suites ask for, and what must be made of it."""

    kind: str                                   # name of the checkpoint
    arch: str                                   # general.architecture of the converted file
    config_class: str                           # of transformers, as the next
    model_class: str
    tokenizer: str                              # a key of tiny.TOKENIZERS
    config: dict[str, Any]                      # what is not transformers' default
    text_config: dict[str, Any] | None = None   # of one that sees; empty: its values are the config's own
    vision_config: dict[str, Any] | None = None
    tokens: Tokens = Tokens()
    sight: Sight | None = None                  # how transformers sees
    # The random weights: the mean of a norm's, by name, and the axis of stacked experts' matrices that is summed over.
    norm_mean: Callable[[str], float] = lambda name: 1.0
    experts_axis: int = 2
    # Saved numbers that are no parameters: what theirs are around and how far from it, by name; None: as the class makes them.
    buffer: Callable[[str], tuple[float, float] | None] = lambda name: None
    shallow: dict[str, Any] = field(default_factory=lambda: {"num_hidden_layers": 2})      # what makes it a model of few layers

    ring: bool = False                          # caches of some layers forget: windows, chunks
    recurrent: bool = False                     # some layers keep a state, not tokens
    heads: bool = False                         # checkpoints may have a head that predicts further tokens, as `heads` adds it
    mrope: bool = False                         # positions have three axes
    across: bool = False                        # pictures are seen by cross-attention
    videos: bool = False
    also: tuple[str, ...] = ()                  # architectures and checkpoints of no class in transformers, which its file tests beside it
    cached_as: str = ""                         # the kind with the same caches and positions, which stands for this one there

    variants: dict[str, dict[str, Any]] | None = None           # of a text model: configs whose logits are compared; None: its own
    prompts: dict[str, list[Any]] | None = None                 # of one that sees: instead of those that all get
    several: bool = True                                        # of one that sees: a prompt may have several pictures
    messages: list[dict[str, Any]] | None = None                # of one that sees: a conversation instead of the one that all get
    converted: Converted | None = None          # None: no converter of ours, its files come from other programs
    dialect: Dialect | None = None              # writes it as other programs do
    llama_cpp: LlamaCpp | None = None           # how llama.cpp sees with it; None: it does not
    full: dict[str, Full] = field(default_factory=dict)         # published models in files without data

    @property
    def sees(self) -> bool:
        return self.vision_config is not None

    @property
    def compared(self) -> dict[str, dict[str, Any]]:
        """Configs by name of which a text model's logits are compared with transformers'."""
        return {self.kind: {}} if self.variants is None else self.variants

    @property
    def own_cache(self) -> bool:
        """Whether suites about caches, positions and conversations run it."""
        return not self.cached_as

    @property
    def llama_cpp_runs(self) -> dict[str, dict[str, Any]]:
        """Configs by name of which llama.cpp's logits are compared with transformers'."""
        return {self.kind: self.assumed} if self.converted.runs is None else self.converted.runs

    @property
    def assumed(self) -> dict[str, Any]:
        """Settings under which the constants of llama.cpp are those of the checkpoint."""
        return self.llama_cpp.assumed if self.llama_cpp else {}


@dataclass(frozen=True, eq=False)
class SourceCase:
    """A tiny checkpoint of an encoder-decoder, and configs of it whose encoder and decoder are compared, by name."""

    kind: str
    arch: str
    config_class: str                           # of transformers, as the next
    model_class: str
    tokenizer: str                              # a key of tiny_sources.SAVE
    config: dict[str, Any]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    unscaled: Callable[[Any], float] = lambda config: 1.0       # what makes random queries as large as trained ones, where scores are not scaled
    also: tuple[str, ...] = ()                  # other classes that are converted as it is


def _modules(folder: Path) -> list[Any]:
    """Import the tests of a folder."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return [importlib.import_module(file.stem) for file in sorted(folder.glob("test_*.py"))]


def _declared(name: str) -> dict[str, Any]:
    """Find what the tests of all architectures declare under a name, by its kind."""
    found: dict[str, Any] = {}
    for folder in FOLDERS:
        for module in _modules(folder):
            for case in getattr(module, name, ()):
                assert case.kind not in found, f"{module.__file__}: {case.kind} is declared twice"
                found[case.kind] = case
    return found


@cache
def every() -> dict[str, Case]:
    """Find the cases of all decoders by name."""
    return _declared("CASES")


@cache
def sources() -> dict[str, SourceCase]:
    """Find the cases of all encoder-decoders by name."""
    return _declared("SOURCES")


@cache
def towers() -> dict[str, Callable[[Path], Path]]:
    """Find what writes a tiny checkpoint of each model of encoders, by the name of its module."""
    found: dict[str, Callable[[Path], Path]] = {}
    for module in _modules(TOWERS):
        found |= getattr(module, "TINY", {})
    return found


def find(kind: str) -> Case:
    """Return the case of this name."""
    return every()[kind]


def select(**properties: Any) -> Iterator[Case]:
    """Return the cases with these properties, e.g. `sees=True`."""
    return (c for c in every().values() if all(getattr(c, name) == value for name, value in properties.items()))


def kinds(**properties: Any) -> list[str]:
    """Return the names of the cases with these properties."""
    return [c.kind for c in select(**properties)]


def first(**properties: Any) -> str:
    """Return the name of one case with these properties, which stands for itself in suites about caches unless that is asked for."""
    return next(select(**{"own_cache": True, **properties})).kind


def quick(kinds: Iterable[str]) -> list[Any]:
    """Return kinds as parameters; those that another kind stands for elsewhere (`cached_as`) are for the slow tests: what files of other
    programs say of them differs from their like by names."""
    return [pytest.param(kind, marks=pytest.mark.slow) if find(kind).cached_as else kind for kind in kinds]
