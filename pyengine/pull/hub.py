"""Hugging Face: which files of a repository make a model, and where they lie in the cache of its own client.

    models--ORG--REPO/blobs/SHA256             contents, by their digests
    models--ORG--REPO/snapshots/COMMIT/FILE    links to them, by which `huggingface_hub` and `list` find them
    models--ORG--REPO/refs/main                the commit that "main" was

`huggingface_hub` gives the token, the addresses, and a file's digest, size and commit. It is not asked to list a repository, since it
reads answers of any size into memory, nor to fetch, since it forgets what it has of a file when it is interrupted.
Source: huggingface_hub, "Understand caching".
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

import pyengine
from pyengine.errors import DownloadError, PyEngineError
from pyengine.files.gguf import quoted, SPLIT_NAME
from pyengine.files.stores import hub_folder, is_projector, models_of, projector_of, quantization
from pyengine.pull import web
from pyengine.pull.download import RemoteFile
from pyengine.pull.names import HubName
from pyengine.pull.offer import Offer, said

ENDPOINT = "https://huggingface.co"
MAX_LISTING_BYTES = 32 << 20
MAX_FILES = 10_000
USUAL = "Q4_K_M"
# Where that is not there: bits a weight in the order in which they would do instead, and for each, what is nearest to K_M first.
BITS = (4, 5, 6, 8, 3, 16, 2, 32, 1)
VARIANTS = ("K_M", "K_L", "K_XL", "K_S", "K", "XS", "NL", "XXS", "1", "0", "")

_WORD = re.compile(r"[\w-][\w.-]{0,95}")
_ODD = re.compile(r"[\x00-\x1f\x7f\\:\ud800-\udfff]")                 # in names of files: control characters, Windows' separators
_HEX = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


class Model(NamedTuple):
    """A model among the files of a repository."""

    stem: str                          # "folder/name-Q4_K_M"
    parts: tuple[PurePosixPath, ...]
    nbytes: int

    @property
    def quantization(self) -> str:
        return quantization(PurePosixPath(self.stem).name).upper()


def find(source: HubName) -> Offer:
    """Choose among a repository's files. Raises: DownloadError where it has none that fit, or is not for everybody."""
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="pyengine", library_version=pyengine.__version__)
    listing = _listing(source, headers)
    files = _gguf_files(source, listing)
    models = models_among(files)
    model, notes = choose(source, models)
    projector = projector_beside(model, [PurePosixPath(path) for path in files])
    commit = listing.get("sha")
    names = [*map(str, model.parts), *([str(projector)] if projector else [])]
    fetched = []
    for name in names:
        file, commit = _remote_file(source, name, files[name], commit, headers)
        fetched.append(file)
    tag, same = model.quantization, [m for m in models if m.quantization == model.quantization]
    name = f"{source.repo}:{tag}" if tag and len(same) == 1 else f"{source.repo}/{PurePosixPath(model.stem).name}"
    n_parts = len(model.parts)

    def settle() -> None:
        for file in fetched:
            _link(_repo_folder(source) / "snapshots" / commit / file.name, file.path)
        if source.revision != commit:
            _write(_repo_folder(source) / "refs" / source.revision, commit)

    return Offer(name, f"the Hugging Face cache, {hub_folder()}", tuple(fetched[:n_parts]), fetched[n_parts] if projector else None, (),
                 settle, notes)


def choose(source: HubName, models: list[Model]) -> tuple[Model, tuple[str, ...]]:
    """Return the one that is wanted among a repository's models, and what there is to say of the choice.

    Raises: DownloadError naming what there is, where it has not what is wanted, or several of it.
    """
    if not models:
        raise DownloadError(f"hf.co/{source.repo} has no GGUF files. Repositories that have them mostly carry GGUF in their name; "
                            "`python -m converters` makes them of others")
    there = ", ".join(f"{m.quantization or PurePosixPath(m.stem).name + '.gguf'} ({said(m.nbytes)})" for m in models[:40])
    if source.file:
        found = [m for m in models if source.file in map(str, m.parts)]
    elif source.quantization:
        found = [m for m in models if m.quantization == source.quantization.upper()]
    else:
        tagged = [m for m in models if m.quantization]
        best = min(map(_distance, tagged or models))
        found = [m for m in tagged or models if _distance(m) == best]
    if not found:
        raise DownloadError(f"hf.co/{source.repo} has no {source.file or source.quantization} among its models: {there}")
    if len(found) > 1:
        names = ", ".join(f"{source.repo}/{m.parts[0]}" for m in found[:20])
        raise DownloadError(f"hf.co/{source.repo} has {len(found)} models that this may mean; choose one by its file: {names}")
    model, = found
    chosen = not source.file and not source.quantization and model.quantization not in (USUAL, "") and len(models) > 1
    return model, (f"{USUAL} is not there: {model.quantization} was chosen among {there}",) if chosen else ()


def projector_beside(model: Model, files: list[PurePosixPath]) -> PurePosixPath | None:
    """Return the file of the model's image encoder: of its folder or else of the repository's top, as `list` will pair them."""
    for folder in dict.fromkeys((model.parts[0].parent, PurePosixPath("."))):
        own = [path for path in files if path.parent == folder and is_projector(path)]
        if own:
            return projector_of(own, PurePosixPath(model.stem).name)
    return None


def _distance(model: Model) -> tuple[int, ...]:
    """Say how far a quantization is from the usual one."""
    tag = model.quantization.removeprefix("UD-")
    if not tag:
        return (len(BITS),)
    bits = int(re.search(r"\d+", tag)[0])
    variant = tag.partition("_")[2]
    return BITS.index(bits) if bits in BITS else len(BITS), tag.startswith("IQ"), VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)


def models_among(files: Mapping[str, Any]) -> list[Model]:
    """Group a repository's files into whole models, the smallest first."""
    folders: dict[PurePosixPath, list[PurePosixPath]] = {}
    for path in map(PurePosixPath, files):
        if "imatrix" not in path.name.lower():
            folders.setdefault(path.parent, []).append(path)
    found = []
    for folder, own in folders.items():
        for stem, parts in models_of(own):
            split = SPLIT_NAME.search(parts[0].name)
            if not split or len(parts) == int(split[2]):
                found.append(Model(str(folder / stem), tuple(parts), sum(files[str(part)].get("size") or 0 for part in parts)))
    return sorted(found, key=lambda m: (m.nbytes, m.stem))


def _listing(source: HubName, headers: Mapping[str, str]) -> dict[str, Any]:
    """Return what the hub says about a repository at a revision."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise DownloadError("$HF_HUB_OFFLINE is set: nothing is fetched from Hugging Face")
    at = "" if source.revision == "main" else f"/revision/{quote(source.revision, safe='')}"
    url = f"{_endpoint()}/api/models/{source.repo}{at}?blobs=true"
    try:
        text = web.read(url, headers, MAX_LISTING_BYTES)
    except web.Refused as error:
        raise _refused(source, error, error.status, error.headers, bool(headers.get("authorization"))) from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("siblings"), list):
        raise DownloadError(f"hf.co/{source.repo}: what {_endpoint()} answers is no list of its files")
    if not isinstance(found.get("sha") or "", str) or found.get("sha") and not _WORD.fullmatch(found["sha"]):
        raise DownloadError(f"hf.co/{source.repo}: {_endpoint()} names its commit {quoted(str(found['sha']))}, which is none")
    return found


def _gguf_files(source: HubName, listing: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what is listed of each GGUF file by its path. Raises: DownloadError for a path that leads out of the repository."""
    found = {}
    for item in listing["siblings"]:
        path = item.get("rfilename") if isinstance(item, dict) else None
        if not isinstance(path, str) or not path.lower().endswith(".gguf"):
            continue
        parts = path.split("/")
        if any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 255 or _ODD.search(part) for part in parts):
            raise DownloadError(f"hf.co/{source.repo}: has a file of the name {quoted(path)}, which no folder could hold")
        size = item.get("size")
        if len(found) == MAX_FILES:
            raise DownloadError(f"hf.co/{source.repo}: has more than {MAX_FILES} GGUF files")
        found[path] = {**item, "size": size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else None}
    return found


def _remote_file(source: HubName, name: str, listed: Mapping[str, Any], commit: str | None,
                 headers: Mapping[str, str]) -> tuple[RemoteFile, str]:
    """Ask for a file's size and digest, which must be those that were listed, if any were. Returns its commit too."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url, what = hf_hub_url(source.repo, name, revision=commit or source.revision, endpoint=_endpoint()), f"hf.co/{source.repo}/{name}"
    try:
        told = get_hf_file_metadata(url, endpoint=_endpoint(), timeout=web.TIMEOUT_SECONDS)
    except PyEngineError:
        raise
    except HfHubHTTPError as error:
        raise _refused(source, error, error.response.status_code, error.response.headers, bool(headers.get("authorization"))) from None
    except Exception as error:                                # of the client's own connection, whose library changes with its version
        raise DownloadError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    lfs = listed.get("lfs")
    digests = [d for d in (lfs.get("sha256") if isinstance(lfs, dict) else None, told.etag) if isinstance(d, str) and _HEX.fullmatch(d)]
    sizes = {size for size in (listed["size"], told.size) if size is not None}
    commits = {c for c in (commit, told.commit_hash) if c}
    if not digests:
        raise DownloadError(f"{what}: {_endpoint()} names no digest by which it could be checked")
    if len(sizes) != 1 or min(sizes) < 0 or len(commits) != 1 or len(set(digests)) != 1 or not _WORD.fullmatch(next(iter(commits))):
        raise DownloadError(f"{what}: {_endpoint()} contradicts itself: sizes {sorted(sizes)}, commits {sorted(commits)}, digests {digests}")
    size, commit, digest = sizes.pop(), commits.pop(), digests[0]
    link = _repo_folder(source) / "snapshots" / commit / name
    copied = link.is_file() and not link.is_symlink()         # where the system has no links, the client keeps files there
    place = link if copied else _repo_folder(source) / "blobs" / digest
    return RemoteFile(name, url, size, f"{'sha256' if len(digest) == 64 else 'git'}:{digest}", place, headers), commit


def _refused(source: HubName, error: Exception, status: int, headers: Mapping[str, str], has_token: bool) -> DownloadError:
    """Say what a status means for who asked, and what to do."""
    code, page = headers.get("X-Error-Code"), f"{_endpoint()}/{source.repo}"
    log_in = "`hf auth login` keeps a token of yours, or $HF_TOKEN gives one"
    if code == "GatedRepo":
        return DownloadError(f"hf.co/{source.repo} is gated: accept its terms at {page}"
                             f"{' with the account of your token' if has_token else f', and say who you are: {log_in}'}")
    if status == 401 and "credentials" in (headers.get("X-Error-Message") or ""):
        return DownloadError(f"hf.co/{source.repo}: the token is not valid any more, or never was: {log_in}")
    if status in (401, 403, 404) and code != "EntryNotFound":
        at = "" if source.revision == "main" else f" with a revision {source.revision}"
        return DownloadError(f"hf.co/{source.repo}: there is no such repository{at}, or it is private"
                             f"{' and your token does not open it' if has_token else f' ({log_in})'}. "
                             f"A model of Ollama's registry is ollama.com/{source.repo}")
    return DownloadError(f"hf.co/{source.repo}: {' '.join(str(error).split())[:300]}")


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")


def _repo_folder(source: HubName) -> Path:
    return hub_folder() / ("models--" + source.repo.replace("/", "--"))


def _link(link: Path, target: Path) -> None:
    """Make a snapshot's file: a link to the content, or where the system has none, the content itself."""
    if link == target or link.is_symlink() and link.exists() and link.resolve() == target.resolve():
        return
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        try:
            os.symlink(os.path.relpath(target, link.parent), link)
        except (OSError, NotImplementedError):
            os.replace(target, link)
    except OSError as error:
        raise DownloadError(f"{link}: {error.strerror}") from None


def _write(path: Path, text: str) -> None:
    """Replace a small file, whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text)
        os.replace(beside, path)
    except OSError as error:
        raise DownloadError(f"{path}: {error.strerror}") from None
