"""What can be done with a model here: by what its decoder, its encoder, its vocabulary and its template declare."""

from __future__ import annotations

import re
from typing import Any

from pyengine.errors import PyEngineError
from pyengine.files.gguf import Metadata

TEMPLATE = "tokenizer.chat_template"
SIDE = 448                           # pixels of the pictures that are counted
_TOOLS, _THINKING = re.compile(r"\btools\b"), re.compile(r"\benable_thinking\b|<think>|\breasoning_content\b")


def abilities(name: str, mmproj: str | None, meta: Metadata) -> dict[str, Any]:
    """Say whether a model runs here, in what memory, and what it takes and gives: by binding and planning it, and by its template.

    can         words, in the order of `abilities`, which has what is known of each
    """
    from pyengine.cli.answer import recommended
    from pyengine.files.model_files import open_files
    from pyengine.memory import fit
    from pyengine.memory.settings import Settings
    from pyengine.programs.bound import bind

    template = meta.get(TEMPLATE)
    told = [word for word, pattern in (("tools", _TOOLS), ("thinking", _THINKING)) if isinstance(template, str) and pattern.search(template)]
    try:
        fitted = fit.fit(bind(open_files(name, mmproj)), Settings(recommended(name).get("num_ctx")))
        found = {**_seen(fitted), **_spoken(meta), "adapters": [a.name for a in fitted.layout.bound.adapters]}
    except PyEngineError as error:
        return {"can": [], "abilities": {}, "runs": False, "why_not": str(error), "template_takes": told}
    plan = fitted.plan
    several = found.get("pictures", {}).get("at_once", 0) > 1
    can = ["text", *(word for key in found for word in ([key, "several pictures"] if key == "pictures" and several else [key]))]
    about = {"n_ctx": plan.n_ctx, "bytes": plan.total, "available": plan.available["cpu"]}
    return {"can": can, "abilities": found, "runs": plan.fits, "why_not": None if plan.fits else plan.verdict(), "template_takes": told, "plan": about}


def _seen(fitted: Any) -> dict[str, Any]:
    """Return what the encoder takes: rows of a picture, how many of them a conversation holds; videos; and whether boxes are printed."""
    bound, sizes = fitted.layout.bound, fitted.layout.sizes
    if bound.image is None:
        return {}
    from pyengine.chat.boxes import MARKS
    from pyengine.text.tokenizer import Tokenizer

    rows = bound.image.n_rows(SIDE, SIDE)
    found: dict[str, Any] = {"pictures": {"side": SIDE, "rows": rows, "at_once": (sizes.across or sizes.n_ctx) // rows}}
    if "video" in bound.image.markers:
        found["videos"] = {}
    tokenizer = Tokenizer.from_metadata(bound.files.model.metadata)
    return {**found, **({"boxes": {}} if all(tokenizer.id_of(mark) is not None for mark in MARKS) else {})}


def _spoken(meta: Metadata) -> dict[str, Any]:
    """Return how tools are told and thinking is asked for, by the file's template; without one a model only continues texts."""
    from pyengine.engine.language import Language

    if TEMPLATE not in meta:
        return {}
    style = Language(meta).style
    return {"tools": {"format": style.name.partition("+")[0] if style.shows_tools else "in words"},
            **({"thinking": {"takes": sorted(style.switches)}} if style.thinks else {})}


def in_words(described: dict[str, Any]) -> str:
    """Return what a model can do, for people."""
    found, words = described["abilities"], list(described["can"])
    if "several pictures" in words:
        p = found["pictures"]
        words.remove("pictures")
        words[words.index("several pictures")] = f"several pictures ({p['at_once']:,} of {p['side']} x {p['side']} pixels)"
    if found.get("tools", {}).get("format") == "in words":
        words[words.index("tools")] = "tools (told in words)"
    return ", ".join(words)
