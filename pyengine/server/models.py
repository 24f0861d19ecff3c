"""The models that a server has, by the names that requests use: loaded, or on this machine and loaded when they are asked for."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from anyio import to_thread

from pyengine.chat.reply.style import find
from pyengine.engine.load import Candidate
from pyengine.engine.loop import Handle
from pyengine.engine.model import Model
from pyengine.engine.residents import KEEP_ALIVE, Lease, Residency, Residents
from pyengine.engine.towers import EncoderModel
from pyengine.engine.vectors import pooling_of, POOLINGS
from pyengine.errors import ModelNotFoundError, nearest, PyEngineError
from pyengine.files.gguf import GGUFFile, quoted
from pyengine.files.hparams import Hparams
from pyengine.files.stores import FoundModel, matching
from pyengine.models.architecture import Towers
from pyengine.server.allowed import allowed
from pyengine.server.fields import FieldError
from pyengine.text.tokenizer import Tokenizer


class Named:
    """A model with the names that it goes by: loaded (`Served`), or not (`Offer`)."""

    names: tuple[str, ...]
    nbytes: int                      # of its files

    @property
    def name(self) -> str:
        """The name that answers carry."""
        return self.names[0]


def kind_of(file: GGUFFile) -> dict[str, Any]:
    """Return what a model is, in Ollama's words: format, families, parameters, quantization."""
    arch = str(file.metadata.get("general.architecture", ""))
    n = sum(t.n_elements for t in file.tensors.values())
    return {"parent_model": "", "format": "gguf", "family": arch, "families": [arch], "quantization_level": _quantization(file),
            "parameter_size": f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"}


def _quantization(file: GGUFFile) -> str:
    """Return what the file says of its types, or else the one that most bytes have."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(file.metadata.get("general.file_type")).name.removeprefix("MOSTLY_")
    except ValueError:
        sizes: dict[str, int] = {}
        for t in file.tensors.values():
            sizes[t.dtype.name] = sizes.get(t.dtype.name, 0) + t.nbytes
        return max(sizes, key=sizes.__getitem__, default="")


@dataclass(frozen=True)
class Offer(Named):
    """A model that can be asked for. source: what `load` takes; options: its own ones, before those of all."""

    names: tuple[str, ...]
    source: str
    path: Path
    nbytes: int
    options: Mapping[str, Any] = field(default_factory=dict)
    written: float = 0.0             # when, in seconds since 1970

    @property
    def file(self) -> GGUFFile:
        """Its file, opened for its header. Raises: InvalidModelError."""
        return GGUFFile(self.path)

    @cached_property
    def kind(self) -> dict[str, Any]:
        """What it is, in Ollama's words; of a file that is damaged nothing is known, and asking for it says why."""
        try:
            with self.file as file:
                return kind_of(file)
        except PyEngineError as error:
            return {"parent_model": "", "format": "gguf", "family": "", "families": [], "quantization_level": "", "parameter_size": "",
                    "error": str(error)}

    @property
    def modified(self) -> float:
        """When its file was written, in seconds since 1970."""
        return self.written

    @cached_property
    def digest(self) -> str:
        """What tells its file from others."""
        return digest_of(self.path)

    @cached_property
    def capabilities(self) -> list[str]:
        """What can be asked of it. Raises as `load`, but for what does not fit."""
        bound = Candidate.open(self.source, **self.options).bound
        metadata = bound.files.model.metadata
        if bound.towers:
            return capabilities_of_towers(bound.model)
        return capabilities_of(metadata, Tokenizer(metadata), bound.image is not None)


@dataclass(frozen=True)
class Served(Named):
    """A loaded model with the names that it goes by. offer: how it is loaded again, where that can be."""

    names: tuple[str, ...]
    model: Any                       # Model or EncoderModel
    loaded: float                    # seconds since 1970
    nbytes: int                      # of its files
    offer: Offer | None = None

    def __post_init__(self) -> None:
        self._path, self.kind                                # read while the model is open: lists may name it when it is being unloaded

    @cached_property
    def _path(self) -> Path:
        return Path(self.model.file.path)

    @property
    def file(self) -> GGUFFile:
        """The model's file."""
        return self.model.file

    @cached_property
    def kind(self) -> dict[str, Any]:
        """What it is, in Ollama's words."""
        return kind_of(self.model.file)

    @property
    def modified(self) -> float:
        """When its file was written, in seconds since 1970; 0 for one that has gone."""
        return modified(self._path)

    @property
    def capabilities(self) -> list[str]:
        """What can be asked of it."""
        if isinstance(self.model, EncoderModel):
            return capabilities_of_towers(self.model.towers)
        return capabilities_of(self.file.metadata, self.model.tokenizer, self.model.media is not None)

    @cached_property
    def digest(self) -> str:
        """What tells its file from others."""
        return digest_of(self._path)

    def count(self, messages: Sequence[Any], tools: Sequence[Any] | None = None) -> int:
        """Count the tokens of a conversation, pictures' too. Raises as `Model.chat_ids`."""
        return len(self.model.chat_ids(messages, tools, media_policy=allowed().media))

    def submit(self, client: str, **request: Any) -> Handle:
        """Queue a request; its messages may show no file of this machine. Raises as `Model.submit`."""
        return self.model.submit(client=client, media_policy=allowed().media, **request)


def capabilities_of(metadata: Mapping[str, Any], tokenizer: Tokenizer, sees: bool) -> list[str]:
    """Return what can be asked of a model, in Ollama's words. Vectors can be had of any; "embedding" is one whose file says how they are made."""
    template = metadata.get("tokenizer.chat_template")
    thinks = isinstance(template, str) and find(template, lambda text: tokenizer.id_of(text) is not None).thinks
    told = {"vision": sees, "tools": isinstance(template, str), "thinking": thinks, "insert": tokenizer.fim is not None,
            "embedding": pooling_of(Hparams(metadata)) in POOLINGS}
    return ["completion", *(name for name, can in told.items() if can)]


def capabilities_of_towers(model: Towers) -> list[str]:
    """Return what can be asked of a model of encoders, which completes no text."""
    vectors = any(tower.pooling for tower in model.towers.values())            # rerankers and models of classes make none
    return [*(["embedding"] if vectors else []), *(["vision"] if model.image is not None else [])]


def digest_of(path: Path) -> str:
    """Return SHA-256, in hexadecimal, of a file's size and first MiB, which of a GGUF file are its facts and a part of its vocabulary.

    It tells models apart, as clients of Ollama use it; it is not the digest of a manifest, which only its registry has. "" for a file
    that has gone.
    """
    try:
        with path.open("rb") as file:
            return hashlib.sha256(b"%d " % path.stat().st_size + file.read(1 << 20)).hexdigest()
    except OSError:
        return ""


def modified(path: Path) -> float:
    """Return when a file was written, in seconds since 1970; 0 for one that has gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class Hold:
    """A model in memory for one request, until `release` or the end of a block. waited: seconds until it was there."""

    def __init__(self, served: Served, lease: Lease):
        self.served, self.waited, self.release = served, lease.waited, lease.release


class Models:
    """Models by name; a name is not case-sensitive, and ":latest" may be left out.

    served  are loaded, and stay. Of two with one name the first has it, and the other goes by what else it is called: its path
    found   what else can be asked for: those that `pyengine.files.stores.list_models` finds, looked for again when a name is not known
    options are those of `pyengine.load` for models that are loaded by name, which stay for keep_alive seconds after their last use
    """

    def __init__(self, served: Sequence[Served] = (), found: Callable[[], Sequence[FoundModel]] | None = None,
                 options: Mapping[str, Any] | None = None, keep_alive: float = KEEP_ALIVE):
        self._find, self._options = found, dict(options or {})
        self._named: list[Served] = []
        self._by_name: dict[str, Served] = {}
        self._offers: dict[str, Offer] = {}                  # by name, the first of each model's
        self._found: list[tuple[FoundModel, Offer]] = []
        self._served: dict[str, Served] = {}
        self.residents = Residents(self._open, keep_alive)
        for s in served:
            free = tuple(n for n in s.names if _key(n) not in self._by_name)
            if free:                                         # else it is there already
                own = replace(s, names=free)
                self._named.append(own)
                self._by_name.update({_key(n): own for n in free})
                self._served[own.name] = own
                if own.offer is not None:
                    self._offers[own.name] = replace(own.offer, names=free)
                self.residents.adopt(own.name, own.model)
        self.look()

    def look(self) -> None:
        """Look again for the models that can be asked for."""
        if self._find is None:
            return
        there = {(s.offer.path.resolve() if s.offer else None) for s in self._named}
        before = {offer.path: offer for _, offer in self._found}
        offers: list[tuple[FoundModel, Offer]] = []
        taken = set(self._by_name)
        for m in self._find():
            if _key(m.name) in taken or m.path.resolve() in there:             # the first place has the name, as at the command line
                continue
            taken.add(_key(m.name))
            old, new = before.get(m.path), Offer((m.name,), m.name, m.path, m.nbytes, self._options, modified(m.path))
            offers.append((m, old if old == new else new))
        loaded = {r.name for r in self.residents.ps()} - {offer.name for _, offer in offers}
        offers += [pair for pair in self._found if pair[1].name in loaded]     # its file has gone, the model is still there
        self._found = offers
        named = {s.name: self._offers[s.name] for s in self._named if s.name in self._offers}
        self._offers = {**named, **{offer.name: offer for _, offer in offers}}

    @property
    def all(self) -> list[Any]:
        """The models that can be asked for, those that are loaded as `Served`, the others as `Offer`."""
        loaded = {r.name: r for r in self.residents.ps()}
        known = [*(s.name for s in self._named if s.name in loaded or s.name in self._offers), *(offer.name for _, offer in self._found)]
        return [self._of(name, loaded[name].model, loaded[name].loaded) if name in loaded else self._offers[name] for name in known]

    @property
    def loads(self) -> bool:
        """Whether models that are not in memory can be asked for."""
        return self._find is not None

    def running(self) -> list[tuple[Served, Residency]]:
        """Return the models that are in memory, with when they go."""
        there = {r.name: r for r in self.residents.ps()}
        return [(s, there[s.name]) for s in self.all if isinstance(s, Served) and s.name in there]

    def find(self, name: str | None) -> Any:
        """Return a model by its name, or by the beginning of just one, as it is in `all`; without a name the only one.

        Raises: ModelNotFoundError naming those that there are, FieldError where a name is needed.
        """
        there = {s.name: s for s in self.all}
        if name is None:
            if len(there) == 1:
                return next(iter(there.values()))
            raise FieldError("model", "is missing")
        for again in (False, True):
            if again and self._find is not None:
                self.look()
                there = {s.name: s for s in self.all}
            found = self._meant(name, there)
            if len(found) == 1 and found[0] in there:
                return there[found[0]]
            if len(found) > 1:
                raise ModelNotFoundError(f"{quoted(name)} may mean {', '.join(found[:20])}: give the whole name")
        served = ", ".join(list(there)[:50]) or "none"
        raise ModelNotFoundError(f"there is no model {quoted(name)} here{nearest(name, there)}; served: {served}")

    def _meant(self, name: str, there: Mapping[str, Named]) -> list[str]:
        """Return the models that a name may mean, by their first names."""
        exact = self._by_name.get(_key(name))
        if exact is not None and exact.name in there:
            return [exact.name]
        found = [m for m, _ in self._found]
        matches = matching(name, found) or matching(_key(name), found)
        if matches or not name:
            return [m.name for m in matches]
        return [s.name for s in there.values() if any(_key(n).startswith(_key(name)) for n in s.names)]

    def there(self, name: str | None, keep: float | None = None) -> Hold | None:
        """Return a model that is loaded, as `lease` does; None where that has to be waited for, or the name is not the whole one."""
        if name is None:
            return None
        named = self._by_name.get(_key(name))
        known = named.name if named is not None else name if name in self._offers else None
        lease = None if known is None else self.residents.lease_now(known, keep)
        return None if lease is None or known is None else Hold(self._of(known, lease.model, time.time()), lease)

    async def lease(self, name: str | None, keep: float | None = None) -> Hold:
        """Return a model by its name, loaded if it is not, that cannot go before it is released. keep: seconds that it stays afterwards.

        Raises as `find`; PlanError for one that does not fit; what loading it raises.
        """
        known = name is None or self._find is None or _key(name) in self._by_name or name in self._offers
        found = self.find(name) if known else await to_thread.run_sync(self.find, name)
        lease = await asyncio.wrap_future(self.residents.lease(found.name, keep))
        return Hold(self._of(found.name, lease.model, time.time()), lease)

    @asynccontextmanager
    async def using(self, name: str | None, keep: float | None = None) -> AsyncIterator[Served]:
        """Use a model within a block. Raises as `lease`."""
        hold = await self.lease(name, keep)
        try:
            yield hold.served
        finally:
            hold.release()

    def stop(self, name: str | None) -> Any:
        """Let a model go when its requests have ended, and return it. Raises as `find`."""
        found = self.find(name)
        self.residents.stop(found.name)
        return found

    def close(self) -> None:
        """Close all models."""
        self.residents.close()

    def _of(self, name: str, model: Model, loaded: float) -> Served:
        """Return a loaded model with its names: the same object as long as it stays."""
        known = self._served.get(name)
        if known is None or known.model is not model:
            offer = self._offers[name]
            known = self._served[name] = Served(offer.names, model, loaded, offer.nbytes, offer)
        return known

    def _open(self, name: str) -> Candidate:
        """Open a model that is to be loaded. Raises: ModelNotFoundError for one that is no longer there, and as `load`."""
        offer = self._offers.get(name)
        if offer is None:
            raise ModelNotFoundError(f"{quoted(name)} was stopped, and it is not known where it came from: it cannot be loaded again")
        return _opened(offer.source, offer.options)


def _key(name: str) -> str:
    return name.casefold().removesuffix(":latest")


def _opened(source: str, options: Mapping[str, Any]) -> Candidate:
    """Open a model with the options of all that a server has: encoders keep no conversations, and those of pictures have no context."""
    found = Candidate.open(source, **options)
    if not found.bound.towers:
        return found
    return replace(found, want=replace(found.want, n_seq=1, compress=None, n_ctx=found.want.n_ctx if found.bound.model.text is not None else None))


def load(name: str, **options: Any) -> Served:
    """Load a model to be served: `options` are those of `pyengine.load`. Raises as that does."""
    from pyengine.files.stores import look_up

    found = look_up(name)
    model = _opened(name, options).load()
    stem = Path(found.path).stem if not found.source else found.name
    names = tuple(dict.fromkeys([stem, found.name, name, Path(found.path).name, *found.aliases]))
    return Served(names, model, time.time(), found.nbytes, Offer(names, name, Path(found.path), found.nbytes, options, modified(Path(found.path))))
