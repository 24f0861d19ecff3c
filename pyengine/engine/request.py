"""One prompt on its way to an answer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyengine.cache.cells import Conversation
from pyengine.engine.encoded import MediaInfo
from pyengine.errors import RequestError
from pyengine.programs.rows import Rows
from pyengine.text.sampling import Sampled, Sampler


class Stops:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]):
        if any(not isinstance(s, str) or not s for s in stops):
            raise RequestError("stop: must be texts that are not empty")
        self.stops, self.held, self.found = list(stops), "", False

    def push(self, text: str) -> str:
        """Add text; returns what can be shown. After a stop string nothing more comes."""
        if self.found:
            return ""
        self.held += text
        ends = [(i, s) for s in self.stops if (i := self.held.find(s)) >= 0]
        if ends:
            self.found = True
            shown, self.held = self.held[: min(ends)[0]], ""
            return shown
        keep = max((n for s in self.stops for n in range(1, min(len(s), len(self.held) + 1)) if self.held.endswith(s[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        shown, self.held = self.held, ""
        return shown


@dataclass
class Report:
    """How an answer came about.

    tokens: ids; sampled: their log-probabilities (and the n best, where `logprobs` asked for them); finish: "stop" or "length";
    n_prompt, n_cached: prompt tokens, and those of them found in the cache; seconds: of the generation.
    media: what became of each picture or video. conversation: that in the caches, as long as it is there.
    """

    tokens: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    finish: str = "length"
    n_prompt: int = 0
    n_cached: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    media: list[MediaInfo] = field(default_factory=list)
    conversation: Conversation | None = field(default=None, repr=False, compare=False)


class Request:
    """One prompt on its way to an answer: `pieces` are texts that nobody has taken yet."""

    def __init__(self, rows: Rows, sampler: Sampler, decoder: Any, stops: Stops, max_tokens: int | None, eog: Collection[int], report: Report):
        self.rows, self.sampler, self.decoder, self.stops = rows, sampler, decoder, stops
        self.max_tokens, self.eog, self.report = max_tokens, eog, report
        self.conversation: Conversation | None = None
        self.done = 0                                        # rows of the prompt in the cache
        self.pending: int | None = None                      # the token that the next step appends
        self.pieces: deque[str] = deque()
        self.finished = False
        self.error: BaseException | None = None
        self.started = self.prompted = time.perf_counter()

    @property
    def media(self) -> frozenset[bytes]:
        """Digests of its pictures."""
        return frozenset(s.source for _, s in (*self.rows.media, *self.rows.crossed))

    def take(self, logits: np.ndarray) -> None:
        """Sample from logits [vocab] after the last row, and decide whether to go on."""
        run, now = self.report, time.perf_counter()
        if self.pending is None:
            self.prompted = now
            run.prompt_seconds = now - self.started
        self.pending = None
        if self.max_tokens == 0:
            return self._end(run.finish)
        drawn = self.sampler.sample(logits)
        if drawn.token in self.eog:
            return self._end("stop")
        self.sampler.accept(drawn.token)
        run.tokens.append(drawn.token)
        run.sampled.append(drawn)
        self._show(self.stops.push(self.decoder.push(drawn.token)))
        run.seconds = time.perf_counter() - self.prompted
        if self.stops.found:
            run.finish, self.finished = "stop", True
        elif len(run.tokens) == self.max_tokens:
            self._end("length")
        else:
            self.pending = drawn.token

    def fill(self) -> None:
        """End because the context is full: what was generated so far is the answer, of finish "length"."""
        self.pending = None
        self._end("length")

    def _end(self, finish: str) -> None:
        tail = self.stops.push(self.decoder.flush()) + self.stops.flush()
        self.report.finish = "stop" if self.stops.found else finish
        self._show(tail)
        self.report.seconds = time.perf_counter() - self.prompted
        self.finished = True

    def _show(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
