"""What can be done with a model here: by what its decoder, its encoder, its vocabulary and its template declare."""

from __future__ import annotations

import re
from typing import Any, TYPE_CHECKING

from pyengine.errors import PyEngineError
from pyengine.files.gguf import Metadata

if TYPE_CHECKING:
    from pyengine.memory.plan import MemoryPlan
    from pyengine.models.architecture import Towers

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
        bound = bind(open_files(name, mmproj))
        fitted = fit.fit(bound, Settings(recommended(name).get("num_ctx")))
        if bound.towers:
            return _of_towers(bound.model, fitted)
        found = {**_seen(fitted), **_spoken(meta), "adapters": [a.name for a in fitted.layout.bound.adapters]}
    except PyEngineError as error:
        return {"can": [], "abilities": {}, "runs": False, "why_not": str(error), "template_takes": told}
    plan = fitted.plan
    several = found.get("pictures", {}).get("at_once", 0) > 1
    can = ["text", *(word for key in found for word in ([key, "several pictures"] if key == "pictures" and several else [key]))]
    return {"can": can, "abilities": found, **_fits(plan), "template_takes": told}


def _fits(plan: MemoryPlan) -> dict[str, Any]:
    """Return whether it runs here, and in what memory."""
    about = {"n_ctx": plan.n_ctx, "bytes": plan.total, "available": plan.available["cpu"]}
    return {"runs": plan.fits, "why_not": None if plan.fits else plan.verdict(), "plan": about}


def _of_towers(model: Towers, fitted: Any) -> dict[str, Any]:
    """Say the same of a model that makes vectors, labels and scores."""
    found: dict[str, Any] = {"vectors of text" if kind == "text" else "vectors of pictures": {"size": tower.d_out, "pooling": tower.pooling}
                             for kind, tower in model.towers.items() if tower.pooling}
    if len(found) == 2:
        found["pictures compared with text"] = {"independent": model.independent}
    if model.text is not None and model.text.n_classes == 1:
        found["texts ranked by a query"] = {}
    elif any(tower.n_classes for tower in model.towers.values()):
        found["classes"] = {"labels": list(model.labels)}
    if model.text is not None and model.text.n_logits:
        found["masked tokens"] = {}
    return {"can": list(found), "abilities": found, **_fits(fitted.plan), "template_takes": []}


def _seen(fitted: Any) -> dict[str, Any]:
    """Return what the encoder takes: rows of a picture, how many of them a conversation holds; videos; and whether boxes are printed."""
    bound, sizes = fitted.layout.bound, fitted.layout.sizes
    if bound.image is None:
        return {}
    from pyengine.chat.boxes import MARKS
    from pyengine.text.tokenizer import Tokenizer

    rows = bound.image.n_rows(SIDE, SIDE)
    found: dict[str, Any] = {"pictures": {"side": SIDE, "rows": rows, "at_once": (sizes.across or sizes.n_ctx) // rows if bound.image.several else 1}}
    if "video" in bound.image.markers:
        found["videos"] = {}
    tokenizer = Tokenizer.from_metadata(bound.files.model.metadata)
    return {**found, **({"boxes": {}} if bound.image.tasks or all(tokenizer.id_of(mark) is not None for mark in MARKS) else {}), **({"points": {}} if bound.image.points else {})}


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
