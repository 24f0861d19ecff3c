"""What a name means: a model on Hugging Face, or one in a registry of Ollama's.

    hf.co/org/repo, https://huggingface.co/org/repo, each with :QUANT    Hugging Face
    .../org/repo/FILE.gguf, .../org/repo/blob/REVISION/FILE.gguf         one file of it
    ollama.com/library/model:tag, ollama.com/user/model:tag              Ollama's registry
    host/namespace/model:tag, https://host:port/namespace/model:tag      another registry that speaks as Ollama's
    model, model:tag, library/model:tag                                  Ollama's registry
    org/repo, org/repo:QUANT                                             Hugging Face
    user/model:tag                                                       Ollama's registry, where the tag names no quantization
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from pyengine.errors import RequestError
from pyengine.files.gguf import quoted
from pyengine.files.stores import HUB_HOSTS, quantization, REGISTRY_HOSTS

REGISTRY = "registry.ollama.ai"

_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"                # so that no part can leave a folder, or hide in it
_REPO = re.compile(_WORD)
_HOST = re.compile(r"(?:[A-Za-z0-9-]+\.)+[A-Za-z0-9-]+(?::\d{1,5})?|localhost(?::\d{1,5})?")
_FORMS = "give hf.co/org/repo[:QUANT] for Hugging Face, or model[:tag] and ollama.com/user/model[:tag] for Ollama's registry"


class HubName(NamedTuple):
    """A repository on Hugging Face, and what of it is wanted."""

    repo: str                          # "org/repo"
    quantization: str = ""             # "Q4_K_M"; "": the usual one
    file: str = ""                     # a path in the repository, where one file is named
    revision: str = "main"


class RegistryName(NamedTuple):
    """A model in a registry that speaks as Ollama's does."""

    host: str
    namespace: str
    model: str
    tag: str = "latest"
    scheme: str = "https"


def parse(name: str) -> HubName | RegistryName:
    """Say whose model a name means; asks nobody. Raises: RequestError for what is no name of either."""
    scheme, rest = re.fullmatch(r"(?:(https?)://)?(.*)", name.strip(), re.DOTALL).groups()
    rest = rest.partition("?")[0].partition("#")[0].rstrip("/") if scheme else rest
    host, _, path = rest.partition("/")
    if host.lower() in (*HUB_HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc):
        return _of_hub(path, name)
    if host.lower() in REGISTRY_HOSTS:
        return _of_registry(REGISTRY, path, name)
    if path.count("/") == 1 and _HOST.fullmatch(host):
        return _of_registry(host, path, name, scheme or "https")
    if scheme or not rest:
        raise _no_name(name)
    if not path or host == "library":
        return _of_registry(REGISTRY, rest, name)
    tag = rest.rpartition(":")[2] if ":" in path else ""
    if tag and not quantization(tag) and not path.endswith(".gguf"):
        return _of_registry(REGISTRY, rest, name)
    return _of_hub(rest, name)


def _of_hub(path: str, name: str) -> HubName:
    """Read "org/repo", and what may follow it."""
    parts = unquote(path).split("/")
    org, repo, inside = parts[0], "".join(parts[1:2]), parts[2:]
    revision = "main"
    if inside[:1] in (["blob"], ["resolve"], ["raw"], ["tree"]) and len(inside) > 1:
        revision, inside = inside[1], inside[2:]
    repo, colon, tag = repo.partition(":") if not inside else (repo, "", "")
    if tag.endswith(".gguf"):
        inside, tag = [tag], ""
    file = "/".join(inside)
    whole = [org, repo, revision, *([tag] if colon and tag else []), *inside]
    if not all(_REPO.fullmatch(part) for part in whole) or repo.endswith(".gguf") or file and not file.endswith(".gguf"):
        raise _no_name(name)
    return HubName(f"{org}/{repo}", "" if tag.lower() == "latest" else tag, file, revision)


def _of_registry(host: str, path: str, name: str, scheme: str = "https") -> RegistryName:
    """Read "model:tag" or "namespace/model:tag"."""
    path, _, tag = path.partition(":")
    namespace, _, model = path.rpartition("/")
    found = RegistryName(host, namespace or "library", model, tag or "latest", scheme)
    if not all(_REPO.fullmatch(part) for part in found[1:4]) or model.endswith(".gguf"):
        raise _no_name(name)
    return found


def _no_name(name: str) -> RequestError:
    return RequestError(f"{quoted(name)} names no model that could be fetched: {_FORMS}")
