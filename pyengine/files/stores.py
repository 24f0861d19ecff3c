"""Find models by name where people already keep them. Nothing is copied, downloaded or written.

Places, in the order in which a name is looked up:

    $PYENGINE_MODELS   folders of GGUF files, separated as in $PATH; a name is the path below the folder, or the file's
    ./models           the same in the working folder, for those of a checkout
    pyengine           the same in $XDG_DATA_HOME/pyengine/models or ~/.local/share/pyengine/models (Windows: %LOCALAPPDATA%)
    Ollama             $OLLAMA_MODELS or ~/.ollama/models, and on Linux its service's /usr/share/ollama/.ollama/models;
                       "gemma3:270m", "gemma3" (= latest), "hf.co/org/repo:tag"
    Hugging Face       $HF_HUB_CACHE, $HF_HOME/hub or ~/.cache/huggingface/hub; "org/repo:Q4_K_M", "org/repo"
    LM Studio          ~/.lmstudio/models and ~/.cache/lm-studio/models; named as Hugging Face's

Names are compared without case, and without "https://", "hf.co/" and "ollama.com/library/"; the beginning of just one of them is enough.
Where a name fits several files ("org/repo" with many quantizations), Q4_K_M is taken if it is among them; otherwise the error lists
them. A projector ("mmproj-*.gguf", or a layer of Ollama's manifest) goes with the models of its folder, or, from the top of a
repository, with those of its folders; in $PYENGINE_MODELS and the two places after it, with those of the same name but for the
quantization.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, TypeVar

from pyengine.arguments import place
from pyengine.errors import InvalidModelError, ModelNotFoundError, nearest
from pyengine.files.gguf import quoted, SPLIT_NAME
from pyengine.records import NamedTuple

MAX_MANIFEST_BYTES = 1 << 20       # real ones have about 1 KB
MAX_LAYER_BYTES = 1 << 20          # of a text beside a model: a template has some KB
MAX_DEPTH = 4                      # folders below one of $PYENGINE_MODELS
PREFERRED_TAG = "Q4_K_M"
SET_FOLDER = "set PYENGINE_MODELS to a folder of GGUF files"                  # what a user without any model can do
HUB_HOSTS = ("hf.co", "huggingface.co", "www.huggingface.co")
REGISTRY_HOSTS = ("ollama.com", "www.ollama.com", "registry.ollama.ai")

_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_TAG = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q|TQ)\d\w*|BF16|F16|F32|MXFP4\w*)$", re.IGNORECASE)
_OLLAMA_LAYER = "application/vnd.ollama.image."
_OLLAMA_SERVICE = "/usr/share/ollama/.ollama/models"      # of the user that Ollama's installer makes (its FAQ, "where are models stored")
_OLLAMA_DEFAULTS = ("registry.ollama.ai", "library")      # left out of the names that Ollama shows


_Path = TypeVar("_Path", bound=PurePath)          # on this machine, or in a repository


class FoundModel(NamedTuple):
    """A model on this machine. Of a split one, `path` is the first part and `nbytes` counts all of them."""

    name: str
    path: Path
    nbytes: int                        # of the model and its projector
    source: str                        # "PYENGINE_MODELS", "./models", "pyengine", "Ollama" ...; "" for a path
    mmproj: Path | None = None
    aliases: tuple[str, ...] = ()      # other names that find it
    layers: Mapping[str, tuple[Path, ...]] = MappingProxyType({})            # other files by kind, for `read_modelfile`

    @property
    def title(self) -> str:
        """The name, where the file is called by its digest; "" where its own name says what it is."""
        return self.name if self.source == "Ollama" else ""


class Modelfile(NamedTuple):
    """What goes with a model in Ollama's store: the lines of its Modelfile, each empty where there is none."""

    adapters: tuple[Path, ...] = ()    # LoRA
    system: str = ""                   # the system text of conversations that have none
    template: str = ""                 # of prompts, in the syntax of Go's text/template
    parameters: Mapping[str, Any] = MappingProxyType({})                     # "temperature", "stop", "num_ctx" ...
    messages: tuple[Mapping[str, Any], ...] = ()                             # that each conversation begins with
    license: str = ""


class Layer(NamedTuple):
    """One entry of a manifest of Ollama's."""

    kind: str                          # "model", "projector", "template" ...; "config" for what is none
    digest: str                        # 64 hex digits
    size: int | None                   # in bytes, where it is a number


class _Problem(NamedTuple):
    """What is there but cannot be used: a place, or a model with the names that it would have."""

    what: str
    names: tuple[str, ...] = ()


def find_model(name_or_path: str | os.PathLike[str]) -> Path | list[Path]:
    """Return the file of a model: a path as it is, or the model of that name; [model, projector] where it has one.

    Raises: ModelNotFoundError as `look_up`.
    """
    found = look_up(name_or_path)
    return found.path if found.mmproj is None else [found.path, found.mmproj]


def _several(what: str, models: Sequence[FoundModel]) -> ModelNotFoundError:
    """Make the error of a name that several models have."""
    return ModelNotFoundError(f"{what}; choose one of: " + ", ".join(_shown(model, models) for model in models[:20]))


def look_up(name_or_path: str | os.PathLike[str]) -> FoundModel:
    """Return a model by its path or its name.

    Raises: ModelNotFoundError saying where was searched, with close names, or the names among which to choose.
    """
    path = Path(place("model", name_or_path)) if name_or_path != "" else Path()
    name = name_or_path if isinstance(name_or_path, str) else str(path)
    if _is_file(path):
        return _found(name, [path], "", None, ())
    problems: list[_Problem] = []
    seen: list[FoundModel] = []
    for source, folder in _places():
        models = _in_place(source, folder, problems)
        matches = _matches(name, models)
        if len(matches) > 1:
            raise _several(f"{quoted(name)} fits {len(matches)} models of {source}", matches)
        if matches:
            return matches[0]
        seen += models
    damaged = [problem.what for problem in problems if name.casefold() in map(str.casefold, problem.names)]
    if damaged:
        raise ModelNotFoundError(f"{quoted(name)} is there, but cannot be used: {'; '.join(damaged[:3])}")
    begun = _beginning_with(name, seen)
    if len(begun) > 1:
        raise _several(f"{quoted(name)} begins the names of {len(begun)} models", begun)
    if begun:
        return begun[0]
    kind = "is a directory, and no model has that name" if _is_dir(path) else "no such file, and no model of that name"
    places = ", ".join(f"{source} ({folder})" for source, folder in _places())
    searched = f"searched {places}" if places else "no model folders found (looked for Ollama, Hugging Face, LM Studio, ./models and pyengine's own)"
    missing = missing_folders() or ([] if places else [SET_FOLDER])
    closed = [problem.what for problem in problems if not problem.names] + _closed_places()
    refused = f"; refused: {'; '.join(closed[:3])}" if closed else ""
    near = nearest(name, [alias for model in seen for alias in (model.name, *model.aliases) if not alias.endswith(".gguf")])
    raise ModelNotFoundError(f"{quoted(name)}: {'; '.join([kind, searched, *missing])}{near}{refused}", name)


def read_modelfile(found: FoundModel) -> Modelfile:
    """Read what goes with a model in Ollama's store. Raises: InvalidModelError for a file that is missing or malformed."""
    def text(kind: str) -> str:
        texts = []
        for path in found.layers.get(kind, ()):
            if not _is_file(path) and kind != "license":
                raise InvalidModelError(f"{found.name}: {path} is missing, which holds its {kind}")
            texts.append(_read_text(path, MAX_LAYER_BYTES + 1))
            if len(texts[-1]) > MAX_LAYER_BYTES:
                raise InvalidModelError(f"{found.name}: {path}, its {kind}, is larger than {MAX_LAYER_BYTES} bytes")
        return "\n".join(texts)

    def values(kind: str, want: type) -> Any:
        source = text(kind)
        if not source:
            return want()
        import json  # most models have none of these

        try:
            value = json.loads(source)
        except (ValueError, RecursionError):
            value = None
        if type(value) is not want:
            raise InvalidModelError(f"{found.name}: {found.layers[kind][0]}, its {kind}, is no JSON of a {want.__name__}")
        return value

    messages = values("messages", list)
    if any(not isinstance(m, dict) or not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str) for m in messages):
        raise InvalidModelError(f"{found.name}: {found.layers['messages'][0]}, its messages, are not of a role and a content each")
    return Modelfile(found.layers.get("adapter", ()), text("system"), text("template"), values("params", dict), tuple(messages), text("license"))


def matching(name: str, models: Sequence[FoundModel]) -> list[FoundModel]:
    """Return those of `list_models` that a name means, of the first place that has any; several are not told apart by it.

    Nothing but these is looked at: a path is no name.
    """
    for source in dict.fromkeys(model.source for model in models):
        if found := _matches(name, [model for model in models if model.source == source]):
            return found
    return []


def list_models() -> list[FoundModel]:
    """Return every model in the places above, in their order, sorted by name within each."""
    return [model for source, folder in _places() for model in _in_place(source, folder, [])]


def missing_folders() -> list[str]:
    """Say which folders of $PYENGINE_MODELS are not there."""
    given = [folder for folder in os.environ.get("PYENGINE_MODELS", "").split(os.pathsep) if folder]
    return [f"PYENGINE_MODELS={folder}: no such folder" for folder in given if not _is_dir(Path(os.path.expanduser(folder)))]


def hub_folder() -> Path:
    """Return the folder in which Hugging Face's client keeps repositories."""
    env = os.environ.get
    cache = env("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(env("HF_HUB_CACHE") or os.path.join(env("HF_HOME") or os.path.join(cache, "huggingface"), "hub")))


def ollama_folder() -> Path:
    """Return the folder in which Ollama keeps models where this user starts it."""
    return Path(os.path.expanduser(os.environ.get("OLLAMA_MODELS") or "~/.ollama/models"))


def own_folder() -> Path:
    """Return this program's folder for models that have no other place: $XDG_DATA_HOME, %LOCALAPPDATA% or ~/.local/share."""
    base = os.environ.get("XDG_DATA_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return Path(os.path.expanduser(base or "~/.local/share")) / "pyengine" / "models"


def ollama_name(host: str, namespace: str, model: str, tag: str) -> str:
    """Return the name that Ollama shows: without the default registry, and without its namespace."""
    parts = [host, namespace, model]
    for default in _OLLAMA_DEFAULTS:
        parts = parts[1:] if parts[0] == default else parts
    return f"{'/'.join(parts)}:{tag}"


def _plain(name: str) -> str:
    """Return a name as stores have it, from one that begins with the address of where it came from."""
    host, slash, rest = re.sub(r"^https?://", "", name).partition("/")
    if slash and host.casefold() in HUB_HOSTS:
        return rest
    return (rest if slash and host.casefold() in REGISTRY_HOSTS else name).removeprefix("library/")


def _matches(name: str, models: list[FoundModel]) -> list[FoundModel]:
    """Return the models that `name` may mean: by name before by alias, and the preferred quantization among several."""
    wanted = {name.casefold(), _plain(name).casefold()}
    matches = ([model for model in models if model.name.casefold() in wanted]
               or [model for model in models if wanted & set(map(str.casefold, model.aliases))])
    preferred = [model for model in matches if quantization(model.name).upper() == PREFERRED_TAG]
    return preferred if len(preferred) == 1 else matches


def _beginning_with(name: str, models: list[FoundModel]) -> list[FoundModel]:
    """Return the models of which `name` begins a name, once each, and the preferred quantization among those of one model."""
    wanted = name.casefold()
    begun = {model.name.casefold(): model for model in reversed(models)
             if wanted.strip() and any(alias.casefold().startswith(wanted) for alias in (model.name, *model.aliases))}
    matches = [model for model in models if begun.get(model.name.casefold()) is model]
    whole = {name.removesuffix(quantization(name)) for name in begun}
    preferred = [model for model in matches if quantization(model.name).upper() == PREFERRED_TAG]
    return preferred if len(preferred) == 1 and len(whole) == 1 else matches


def _in_place(source: str, folder: Path, problems: list[_Problem]) -> list[FoundModel]:
    """Return the models of one place by name. What is there but cannot be used is told to `problems`."""
    readers = {"Ollama": _in_ollama, "Hugging Face": _in_hub, "LM Studio": _in_lm_studio}
    found = readers[source](folder, problems) if source in readers else _in_folder(folder, problems, source)
    return sorted(found, key=lambda model: (model.name.casefold(), model.path))


def _places() -> list[tuple[str, Path]]:
    """Return (source, folder) for each folder that exists, in the order of the search."""
    places = [("PYENGINE_MODELS", folder) for folder in os.environ.get("PYENGINE_MODELS", "").split(os.pathsep) if folder]
    places += [("./models", "models"), ("pyengine", own_folder()), ("Ollama", ollama_folder()),
               *([("Ollama", _OLLAMA_SERVICE)] if sys.platform == "linux" else []),
               ("Hugging Face", hub_folder()), ("LM Studio", "~/.lmstudio/models"), ("LM Studio", "~/.cache/lm-studio/models")]
    found: dict[Path, tuple[str, Path]] = {}             # a place that has two names is searched once
    for source, folder in places:
        path = Path(os.path.expanduser(folder))
        if _is_dir(path):
            found.setdefault(path.resolve(), (source, path))
    return list(found.values())


def _closed_places() -> list[str]:
    """Say which place there is that this user may not look into: the installer keeps the service's folder for its own group."""
    try:
        Path(_OLLAMA_SERVICE).stat()
    except PermissionError:
        return [f"{_OLLAMA_SERVICE}: models of Ollama's service, which only its user and group may read (sudo usermod -a -G ollama $USER)"]
    except OSError:
        pass
    return []


def _in_folder(root: Path, problems: list[_Problem], source: str) -> Iterator[FoundModel]:
    for folder, files in _folders(root, MAX_DEPTH, problems):
        below = folder.relative_to(root)
        for stem, paths in models_of(files):
            own = [path for path in files if _base(path.stem) == _base(stem)]     # a folder may mix several models
            aliases = (stem, paths[0].name, (below / paths[0].name).as_posix())
            yield _found((below / stem).as_posix(), paths, source, projector_of(own), aliases)


def _in_hub(root: Path, problems: list[_Problem]) -> Iterator[FoundModel]:
    """Find models--ORG--REPO/snapshots/REVISION/**/*.gguf; of a file in several revisions, main's or else the newest's."""
    for repo in _children(root, problems):
        if not repo.name.startswith("models--"):
            continue
        name = repo.name.removeprefix("models--").replace("--", "/")
        main = _read_text(repo / "refs" / "main", 200).strip()
        snapshots = sorted(filter(_is_dir, _children(repo / "snapshots", problems)),
                           key=lambda path: (path.name != main, -path.stat().st_mtime, path.name))
        seen: set[str] = set()
        for snapshot in snapshots:
            top: list[Path] | None = None                   # a projector beside folders of quantizations goes with all of them
            for _, files in _folders(snapshot, 2, problems):
                top = files if top is None else top
                for model in _in_repo(name, files, "Hugging Face", top):
                    if model.name not in seen:
                        seen.add(model.name)
                        yield model


def _in_lm_studio(root: Path, problems: list[_Problem]) -> Iterator[FoundModel]:
    """Find PUBLISHER/REPO/*.gguf."""
    for publisher in _children(root, problems):
        for repo in _children(publisher, problems):
            for _, files in _folders(repo, 1, problems):
                yield from _in_repo(f"{publisher.name}/{repo.name}", files, "LM Studio")


def _in_repo(repo: str, files: list[Path], source: str, top: Sequence[Path] = ()) -> Iterator[FoundModel]:
    """Name the models of one folder of a repository: by tag, "org/repo:Q4_K_M", or by file where that is not unique."""
    models = models_of(files)
    tags = [quantization(stem).upper() for stem, _ in models]
    for (stem, paths), tag in zip(models, tags):
        tagged = (f"{repo}:{tag}",) if tag else ()
        name = tagged[0] if tags.count(tag) == 1 and tagged else f"{repo}/{stem}"
        aliases = (repo, *tagged, f"{repo}/{stem}", f"{repo}/{paths[0].name}", stem, paths[0].name)
        yield _found(name, paths, source, projector_of(files, stem) or projector_of(top, stem), aliases)


def _in_ollama(root: Path, problems: list[_Problem]) -> Iterator[FoundModel]:
    """Find manifests/HOST/NAMESPACE/NAME/TAG, JSON that lists blobs by digest."""
    for host in _children(root / "manifests", problems):
        for namespace in _children(host, problems):
            for name in _children(namespace, problems):
                for tag in _children(name, problems):
                    if not _is_file(tag):
                        continue
                    parts = (host.name, namespace.name, name.name)
                    aliases = (ollama_name(*parts, tag.name), f"{'/'.join(parts)}:{tag.name}")
                    aliases += tuple(alias.removesuffix(":latest") for alias in aliases) if tag.name == "latest" else ()
                    try:
                        layers = _read_manifest(tag, root / "blobs")
                    except ModelNotFoundError as error:
                        problems.append(_Problem(str(error), aliases))
                        continue
                    model, projectors = layers.pop("model")[0], layers.pop("projector", (None,))
                    yield _found(aliases[0], [model], "Ollama", projectors[0], aliases, layers)


def _read_manifest(path: Path, blobs: Path) -> dict[str, tuple[Path, ...]]:
    """Return the blobs by kind; the one of the model is there. Raises: ModelNotFoundError for what is malformed."""
    text = _read_text(path, MAX_MANIFEST_BYTES + 1)
    if len(text) > MAX_MANIFEST_BYTES:
        raise ModelNotFoundError(f"{path}: manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    found: dict[str, tuple[Path, ...]] = {}
    for kind, digest, _ in manifest_layers(text, str(path)):
        blob = blobs / f"sha256-{digest}"
        if kind in ("model", "projector") and not _is_file(blob):
            raise ModelNotFoundError(f"{path}: blob {blob.name} is missing")
        found[kind] = (*found.get(kind, ()), blob)
    return found


def manifest_layers(text: str, what: str, whole: bool = False) -> list[Layer]:
    """Return the layers of a manifest that have to do with a model, one of them the model.

    what:   whose manifest it is, for messages
    whole:  all layers, each of them well formed, and the configuration, as they are fetched
    Raises: ModelNotFoundError for what is malformed.
    """
    import json  # most models are given by their path

    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise ModelNotFoundError(f"{what}: manifest is not JSON") from None
    listed = manifest.get("layers") if isinstance(manifest, dict) else None
    layers = [_layer(item, what) for item in (listed if isinstance(listed, list) else ()) if whole or _is_ours(item)]
    if whole and layers and manifest.get("config") is not None:
        layers.append(_layer(manifest["config"], what, "config"))
    kinds = [layer.kind for layer in layers]
    for kind in ("model", "projector"):
        if kinds.count(kind) > 1:
            raise ModelNotFoundError(f"{what}: manifest has two layers of a {kind}")
    if "model" not in kinds:
        raise ModelNotFoundError(f"{what}: manifest has no layer of a model")
    return layers


def _is_ours(item: object) -> bool:
    """Say whether an entry of a manifest is of a kind that Ollama gives to parts of a model."""
    return isinstance(item, dict) and isinstance(item.get("mediaType"), str) and item["mediaType"].startswith(_OLLAMA_LAYER)


def _layer(item: Any, what: str, kind: str = "") -> Layer:
    """Read an entry of a manifest. Raises: ModelNotFoundError for a digest by which it could leave the folder of blobs."""
    values = item if isinstance(item, dict) else {}
    kind, digest, size = kind or str(values.get("mediaType")).removeprefix(_OLLAMA_LAYER), values.get("digest"), values.get("size")
    match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    if match is None:
        raise ModelNotFoundError(f"{what}: digest of {quoted(kind)} is not sha256:<64 hex digits>")
    return Layer(kind, match[1], size if type(size) is int and size >= 0 else None)


def models_of(files: Sequence[_Path]) -> list[tuple[str, list[_Path]]]:
    """Group the GGUF files of a folder into models: (stem, parts in order). Projectors are left out.

    A split model whose first part is missing is left out too: it could not be opened.
    """
    models: dict[tuple[str, str], list[_Path]] = {}      # by stem and number of parts
    for path in sorted(files):
        if not is_projector(path):
            match = SPLIT_NAME.search(path.name)
            key = (path.name[:match.start()], match[2]) if match else (path.stem, "")
            models.setdefault(key, []).append(path)
    return [(stem, paths) for (stem, n_parts), paths in models.items()
            if not n_parts or paths[0].name.endswith(f"-00001-of-{n_parts}.gguf")]


def projector_of(files: Sequence[_Path], stem: str = "") -> _Path | None:
    """Return a folder's projector: of several, one of the model's own name, then the f16 one, else the first by name."""
    return min((path for path in files if is_projector(path)), default=None,
               key=lambda path: (_base(path.stem) != _base(stem), quantization(path.stem).upper() != "F16", path.name))


def _base(stem: str) -> str:
    """Return a stem without its quantization and without "mmproj": what a model and its projector have in common."""
    return re.sub(r"mmproj[-._]|[-._]mmproj", "", _TAG.sub("", stem.casefold()))


def is_projector(path: PurePath) -> bool:
    """Say whether a file is an image encoder that goes with a text model, by its name."""
    return "mmproj" in path.name.casefold()


def _found(name: str, paths: list[Path], source: str, projector: Path | None, aliases: tuple[str, ...],
           layers: Mapping[str, tuple[Path, ...]] | None = None) -> FoundModel:
    nbytes = sum(path.stat().st_size for path in [*paths, *([projector] if projector else [])])
    return FoundModel(name, paths[0], nbytes, source, projector, tuple(dict.fromkeys(aliases)), layers or {})


def _shown(model: FoundModel, among: list[FoundModel]) -> str:
    """Return the name, or the path where the name would not tell it from the others."""
    names = [other.name for other in among]
    return model.name if names.count(model.name) == 1 else str(model.path)


def quantization(stem: str) -> str:
    """Return the quantization that ends a file's stem or a model's name, "" where none does."""
    match = _TAG.search(stem.rpartition(":")[2])
    return match[1] if match else ""


def _folders(root: Path, depth: int, problems: list[_Problem]) -> Iterator[tuple[Path, list[Path]]]:
    """Yield `root` and the folders below it with the GGUF files of each. Hidden folders and linked ones are passed."""
    children = _children(root, problems)
    yield root, [path for path in children if path.suffix == ".gguf" and _is_file(path)]
    if depth:
        for path in children:
            if _is_dir(path) and not path.is_symlink():
                yield from _folders(path, depth - 1, problems)


def _children(folder: Path, problems: list[_Problem]) -> list[Path]:
    """Return what is in a folder, sorted, without hidden names; empty where it is no folder."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        problems.append(_Problem(f"{folder}: {error.strerror}"))
        return []


def _read_text(path: Path, limit: int) -> str:
    """Return at most `limit` bytes of a file as text; "" where there is no such regular file or it cannot be read."""
    if not _is_file(path):
        return ""
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode("utf-8", "replace")
    except OSError:
        return ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):      # a name too long for the system; a NUL (Python before 3.12 raises for both)
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
