"""Whether and how the answer to a request is searched for: what the request says, and the model's files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TYPE_CHECKING

from pyengine.errors import RequestError
from pyengine.text.sampling import SamplingParams
from pyengine.text.search import Rules, SEARCH, Search, search_defaults

if TYPE_CHECKING:
    from pyengine.engine.sources import Sources


OFF = ("top_p", "typical_p", "repeat_penalty")               # settings that 1 leaves out; the others are left out by 0, or by nothing


def rules_of(sources: Sources | None, meta: Mapping[str, Any], ends: Collection[int], asked: Mapping[str, Any]) -> Rules | None:
    """Return which tokens may come in an answer, None for a model that does not search. ends: ids that end one.

    Raises: RequestError, also for a search that is asked of such a model.
    """
    given = {name: value for name, value in asked.items() if name in SEARCH}
    if sources is not None:
        return Rules(replace(search_defaults(meta), **given), sources.encoder.forced, ends)
    if given:
        raise RequestError(f"{next(iter(given))}: answers are searched for in models whose prompts an encoder reads, and this is none of them")
    return None


def searches(search: Search, asked: Mapping[str, Any], guided: bool, n_seq: int) -> bool:
    """Say whether an answer is searched for with beams: those that the request or the model's files ask for.

    temperature=0 is greedy whatever they say, and what samples goes before what the files say. guided: the content has a form.
    Raises: RequestError for a request that asks for both, and for more beams than there are conversations.
    """
    n = search.n_beams
    if n == 1 or asked.get("temperature") == 0:
        return False
    samples = (name for name in SamplingParams.__dataclass_fields__ if asked.get(name) and not (name in OFF and asked[name] == 1))
    other = next(samples, "a form of the content" if guided else "")
    if other and "n_beams" not in asked:
        return False
    if other:
        raise RequestError(f"n_beams={n}: {other} does not go with beams, which look for the most probable answer; leave one of them out")
    if n > n_seq:
        raise RequestError(f"n_beams={n}: the model holds {n_seq} conversations side by side; load with n_seq={n}")
    return True
