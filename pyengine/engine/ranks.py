"""Ranking by a decoder that was asked whether a document answers a query: how much rather it says yes than no.

Such a file has two rows of an output head, for the two words, or a row that gives the score itself, and a template of its own (llama.cpp's pooling
"rank" of Qwen3-Reranker).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyengine.arguments import iterates
from pyengine.engine.vectors import Vectors
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError
from pyengine.files.weights import WeightRef

TEMPLATE = "tokenizer.chat_template.rerank"
_BLANK = re.compile(r"\{(query|document)\}")


class Ranked(NamedTuple):
    """Scores of documents, float32 [n], and the tokens that were read for them."""

    scores: np.ndarray
    n_tokens: int


def check_asked(query: Any, documents: Any) -> list[str]:
    """Return the documents. Raises: RequestError for what is no text and no list of texts."""
    if not isinstance(query, str) or isinstance(documents, str) or not iterates(documents) or not all(isinstance(d, str) for d in documents):
        raise RequestError("rerank: query is a text, and documents are a list of texts")
    return list(documents)


def ranked(vectors: Vectors, rows: WeightRef | None, name: str, query: str, documents: Sequence[str]) -> Ranked:
    """Return the logit of the first row, less that of the second where there is one, for each document. rows: [1 or 2, d_model]; name: of the model.

    Raises: UnsupportedModelError for a model that does not rank; ContextOverflowError, RequestError.
    """
    language = vectors.prompts.language
    template = language.metadata.get(TEMPLATE)
    if rows is None or template is None:
        raise UnsupportedModelError(f"{name} was not made to rank texts: its file has no row for a score, or no template {TEMPLATE!r}")
    if not isinstance(template, str):
        raise InvalidModelError(f"{TEMPLATE} is {type(template).__name__}, and a text is needed")
    weight, guarded, out = rows.floats().astype(np.float64), language.tokenizer.guarded, []
    for document in documents:
        words = {"query": guarded(query), "document": guarded(document)}
        ids = language.tokenizer.tokenize(_BLANK.sub(lambda found: words[found[1]], template), add_special=False, mend=True)
        out.append(ids)
    hidden = vectors.embed(out, normalize=False, pooling="last").astype(np.float64)                # [n, d_model]
    scores = ((hidden @ weight.T) @ np.array([1.0, -1.0][: len(weight)])).astype(np.float32) if out else np.empty(0, np.float32)
    return Ranked(scores, sum(map(len, out)))
