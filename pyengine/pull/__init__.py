"""Models fetched from Hugging Face and from Ollama's registry into the stores of those programs: whole and checked, or not at all.

    names      "hf.co/org/repo:Q4_K_M", "gemma3:4b" -> whose model it is
    hub        Hugging Face: which files, and where they lie in its cache
    registry   Ollama: a manifest's layers, and where they lie in its store
    offer      what would be fetched: files with sizes and digests; fetched, checked, then shown to those programs
    download   one file: resumed, compared with its digest, never seen under its name before
    web        requests that are bounded
"""

from __future__ import annotations

from pyengine.pull.names import HubName, parse
from pyengine.pull.offer import Offer


def find(name: str) -> Offer:
    """Ask where a model is that `name` means, and what would be fetched.

    Raises: RequestError for what is no such name; DownloadError for a model that is not there or that nobody may have.
    """
    source = parse(name)
    if isinstance(source, HubName):
        from pyengine.pull import hub as place
    else:
        from pyengine.pull import registry as place
    return place.find(source)
