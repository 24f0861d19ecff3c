"""A model bound to its files: its weights by name and shape, its encoders by kind. Made once; plans of any size come from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pyengine.arguments import place
from pyengine.errors import InvalidModelError, RequestError, shown, UnsupportedModelError
from pyengine.files.adapters import Adapter, check_base
from pyengine.files.dialects import ENCODER, ENCODER_TENSORS
from pyengine.files.hparams import Hparams
from pyengine.files.model_files import Files, open_files
from pyengine.files.weights import WeightRef, Weights
from pyengine.models import architectures, head_class, HEAD_LAYERS, head_models, head_names, LAYERS, model_class, tower_models
from pyengine.models.architecture import Architecture, Encoder, EncoderFiles, SourceEncoder, Towers
from pyengine.nn.ahead import Ahead
from pyengine.nn.rope import FACTORS
from pyengine.records import dataclass
from pyengine.text.search import BEAMS, search_defaults
from pyengine.text.tokenizer import Tokenizer
from pyengine.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class Bound:
    """A decoder, the encoders that the files hold, and the adapters beside them; or towers, which are all that there is."""

    files: Files
    model: Any
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    left_out: bool = False           # whether there are encoders, and the model runs without them
    draft: Bound | None = None       # a small model of the same tokens, whose answers are drafts of this one's
    drafts: bool = False             # it is that of another model
    head: Ahead | None = None        # what predicts further tokens beside the model, from a file of its own, in place of a head of the model's own
    ranks: WeightRef | None = None   # of a decoder that ranks texts: one row for its score, or two for the answers "yes" and "no"

    @property
    def image(self) -> Encoder | None:
        """The encoder of pictures."""
        return self.encoders.get("image")

    @property
    def towers(self) -> bool:
        """Whether the model makes vectors, labels and scores, and no text."""
        return isinstance(self.model, Towers)

    @property
    def source(self) -> SourceEncoder | None:
        """The encoder that prompts go to, of an encoder-decoder."""
        return None if self.towers else self.model.source

    @property
    def atomic_rows(self) -> int:
        """Most rows of a span that no step may cut; none of prompts that an encoder reads."""
        return max((e.atomic_rows for e in self.encoders.values()), default=0) if self.source is None else 0

    @property
    def n_seq_least(self) -> int:
        """Conversations that there must be places for: the beams of one answer, where answers are searched for so."""
        return 1 if self.source is None else max(BEAMS, search_defaults(self.files.model.metadata).n_beams)

    @property
    def n_ctx_train(self) -> int:
        """Positions of the contexts that the model was trained with, of texts where it has no context; 0 without texts."""
        if self.towers:
            return self.model.text.n_ctx if self.model.text else 0
        return Hparams(self.files.model.metadata).size("context_length")

    @property
    def ahead(self) -> Ahead | None:
        """The head that predicts further tokens."""
        return self.head or (None if self.towers else self.model.ahead)

    def without_draft(self) -> Bound:
        """Return the model as if nothing had been given to draft for it."""
        return replace(self, draft=None, head=None, files=self.files._replace(head=None))

    def without_encoders(self) -> Bound:
        """Return the model as if its files held no encoder."""
        return replace(self, encoders={}, left_out=self.left_out or bool(self.encoders))

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Adapters of the decoder."""
        return self.files.adapters


def runs(architecture: object) -> bool:
    """Return whether there is a module for the architecture that a file names."""
    return isinstance(architecture, str) and architecture.replace("-", "_") in (*architectures(), *tower_models())


def bind(files: Files, with_encoders: bool = True) -> Bound:
    """Bind every tensor of a model's files; without encoders, theirs are left alone.

    Raises: InvalidModelError for tensors that are missing or have other shapes, and for adapters of other models; UnsupportedModelError
    for those that nothing reads.
    """
    h, weights = Hparams(files.model.metadata), Weights(files.model)
    kind = model_class(h.arch)
    model = kind(h, weights)
    if isinstance(model, Towers):
        if files.mmproj is not None:
            raise RequestError(f"{files.model.path}: architecture {h.arch!r} has its encoders in one file; give no mmproj")
        weights.finish()
        return Bound(files, model)
    encoders = _encoders(kind, h, files, weights) if with_encoders else {}
    shape = weights["cls.output"].shape("weight")
    ranks = weights["cls.output"].tensor("weight", shape) if shape in ((1, model.config.d_model), (2, model.config.d_model)) else None
    weights.finish(ignore=(*FACTORS, *(() if encoders and not files.mmproj else ENCODER_TENSORS)))
    for adapter in files.adapters:
        check_base(adapter, files.model)
    return Bound(files, model, encoders, not with_encoders and _with_encoder(files, weights), ranks=ranks)


PADDED = 128                         # tokens by which vocabularies may differ: they end in padding, to a number that suits the makers' hardware


def with_draft(bound: Bound, name: str | Path | None) -> Bound:
    """Bind a draft model, or a head, by its path or its name, beside a model; without one, return the model as it is. Encoders of a draft model
    are left alone.

    Its tokens must be the model's, id by id: it reads and writes ids. Names of tokens that stand for no text may differ, as they do between
    generations of a family; llama.cpp does not compare the first five for it. So may sizes, by PADDED tokens at most, its limit too
    (common/speculative.cpp): ids that only one of them has are padding, and are not drafted.
    Raises: as `bind`; RequestError for two that do not go together.
    """
    if name is None:
        return bound
    files = open_files(place("draft", name))
    beside = files.model.metadata.get("general.architecture")
    if isinstance(beside, str) and beside.replace("-", "_") in head_models():
        return _with_head(bound, files, beside)
    own = bind(files, with_encoders=False)
    for one, what in ((bound, "a model with"), (own, "a model as")):
        _check_decoder(one, what)
    _check_tokens(bound.files, own.files)
    return replace(bound, draft=replace(own, drafts=True))


def _check_decoder(one: Bound, what: str) -> None:
    why = ("makes vectors and scores, no text" if one.towers else "has an encoder for its prompts" if one.source is not None else "")
    if why:
        raise RequestError(f"draft: {one.files.name} {why}: {what} a draft is a decoder")


def _check_tokens(files: Files, own: Files) -> None:
    """Make sure that a draft's tokens are the model's."""
    mine, its = (Vocabulary(f.model.metadata) for f in (files, own))
    first = mine.first_other(its)
    if first is not None:
        raise RequestError(f"draft: {own.name} has other tokens than {files.name}: {first} is {shown(its.tokens.text(first))} there, and "
                           f"{shown(mine.tokens.text(first))} here; a draft is a small model of the same family")
    if abs(len(mine) - len(its)) > PADDED:
        raise RequestError(f"draft: {own.name} has {len(its):,} tokens, and {files.name} {len(mine):,}; padding makes a difference of {PADDED} at most")


def _with_head(bound: Bound, own: Files, arch: str) -> Bound:
    """Bind a head beside a model. Files need not have tokens."""
    _check_decoder(bound, "a model with")
    if all("tokenizer.ggml.tokens" in files.model.metadata for files in (bound.files, own)):
        _check_tokens(bound.files, own)
    file = own.model.renamed(head_names(own.model.tensors), own.model.metadata)
    weights = Weights(file, own={f"{HEAD_LAYERS}.": f"{LAYERS}."})
    head = head_class(arch)(Hparams(file.metadata), weights, bound.model)
    weights.finish(ignore=FACTORS)
    return replace(bound, head=head, files=bound.files._replace(head=file))


def _with_encoder(files: Files, weights: Weights) -> bool:
    """Say whether the files hold tensors of an encoder."""
    return files.mmproj is not None or any(scope in weights for scope in ENCODER_TENSORS[:2])


def _encoders(kind: type[Architecture], h: Hparams, files: Files, weights: Weights) -> dict[str, Encoder]:
    """Bind the encoders, none where the files hold none or the architecture cannot run them."""
    source = files.mmproj or files.model
    if not _with_encoder(files, weights):
        return {}

    @cache
    def tokenizer() -> Tokenizer:                            # for files without keys for the tokens; once for all of them
        return Tokenizer.from_metadata(files.model.metadata)

    def token(text: str) -> int:
        found = tokenizer().id_of(text)
        if found is None:
            raise InvalidModelError(f"{files.model.path}: no token {text!r} in the vocabulary, and no key that names it")
        return found

    own = weights if files.mmproj is None else Weights(files.mmproj)
    encoders = kind.encoders(EncoderFiles(h, Hparams(source.metadata, ENCODER), own, token))
    if files.mmproj is not None:
        if not encoders:
            raise UnsupportedModelError(f"{source.path}: architecture {h.arch!r} has no media encoder here")
        own.finish()
    return encoders
