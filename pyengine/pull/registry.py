"""Ollama's registry: a manifest lists layers by digest; both go where Ollama keeps them, the manifest last.

    GET /v2/NAMESPACE/MODEL/manifests/TAG      JSON: config and layers, each with mediaType, digest, size
    GET /v2/NAMESPACE/MODEL/blobs/DIGEST       often a redirect to where the bytes lie

The manifest is stored as it came, byte by byte. $OLLAMA_REGISTRY is the URL of a mirror of the default registry, whose models keep
their names. Sources: the OCI distribution specification; ollama, server/images.go and types/model/name.go.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pyengine.errors import DownloadError, ModelNotFoundError
from pyengine.files.stores import manifest_layers, MAX_LAYER_BYTES, MAX_MANIFEST_BYTES, ollama_folder, ollama_name
from pyengine.pull import web
from pyengine.pull.download import RemoteFile
from pyengine.pull.names import REGISTRY, RegistryName
from pyengine.pull.offer import Offer

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MAX_LAYERS = 64
MAX_BYTES = 1 << 44                  # of one layer: 16 TiB


def find(source: RegistryName) -> Offer:
    """Read a model's manifest. Raises: DownloadError where there is none, or none that says what a model is."""
    url, name = _url(source), ollama_name(*source[:4])
    what = f"{name}, the manifest of {url}"
    try:
        manifest = web.read(f"{url}/manifests/{source.tag}", {"Accept": MANIFEST}, MAX_MANIFEST_BYTES)
    except web.Refused as error:
        raise _refused(source, name, error) from None
    try:
        layers = manifest_layers(manifest.decode("utf-8", "replace"), what, whole=True)
    except ModelNotFoundError as error:
        raise DownloadError(f"{error}; models that run elsewhere have none either" if "no layer of a model" in str(error) else str(error)) from None
    if len(layers) > MAX_LAYERS:
        raise DownloadError(f"{what}: has {len(layers)} layers, more than {MAX_LAYERS}")
    root, files = ollama_folder(), {}
    for kind, digest, size in layers:
        most = MAX_BYTES if kind in ("model", "projector", "adapter") else MAX_LAYER_BYTES
        if size is None or size > most:
            raise DownloadError(f"{what}: {'no size' if size is None else f'size {size}'} of a layer, {kind}, which may have {most} bytes")
        files.setdefault(kind, []).append(RemoteFile(f"{name}, {kind}", f"{url}/blobs/sha256:{digest}", size, f"sha256:{digest}",
                                                     root / "blobs" / f"sha256-{digest}"))
    model, projectors = files.pop("model"), files.pop("projector", [])
    place = root / "manifests" / source.host / source.namespace / source.model / source.tag
    return Offer(name, f"Ollama's store, {root}", tuple(model), projectors[0] if projectors else None,
                 tuple(file for several in files.values() for file in several), lambda: _write(place, manifest))


def _url(source: RegistryName) -> str:
    """Return the URL below which a model's manifests and blobs are."""
    mirror = os.environ.get("OLLAMA_REGISTRY", "").rstrip("/") if source.host == REGISTRY else ""
    if mirror and not mirror.startswith(("http://", "https://")):
        raise DownloadError(f"$OLLAMA_REGISTRY is {mirror!r}, no URL that begins with https:// or http://")
    return f"{mirror or f'{source.scheme}://{source.host}'}/v2/{source.namespace}/{source.model}"


def _refused(source: RegistryName, name: str, error: web.Refused) -> DownloadError:
    """Say what a status means for who asked."""
    if error.status == 404:
        page = f"library/{source.model}" if source.namespace == "library" else f"{source.namespace}/{source.model}"
        tags = f"; https://ollama.com/{page}/tags lists what there is" if source.host == REGISTRY else ""
        return DownloadError(f"{name}: {source.host} has no such model or tag{tags}")
    if error.status in (401, 403):
        return DownloadError(f"{name}: {source.host} gives it to its owner only, whose key Ollama keeps: `ollama pull {name}` asks with it")
    return error


def _write(place: Path, manifest: bytes) -> None:
    """Put a manifest into its place, whole or not at all."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".", delete=False) as f:
            f.write(manifest)
        os.chmod(f.name, 0o644)
        os.replace(f.name, place)
    except OSError as error:
        raise DownloadError(f"{place}: {error.strerror}") from None
