"""One prompt on its way: `Job`, what the scheduler works on, and `Request`, whose end is an answer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, replace
from typing import Any, ClassVar, TYPE_CHECKING

import numpy as np

from pyengine.cache.cells import Conversation
from pyengine.arguments import iterates
from pyengine.errors import RequestError, shown as in_short
from pyengine.programs.rows import Rows
from pyengine.programs.step import Row
from pyengine.records import dataclass, NamedTuple
from pyengine.text.sampling import Sampled, Sampler

if TYPE_CHECKING:
    from pyengine.chat.regions import Naming
    from pyengine.chat.reply.deltas import Delta, ToolCall
    from pyengine.engine.drafts import Drafts
    from pyengine.engine.encoded import MediaInfo
    from pyengine.engine.guide import Guide
    from pyengine.engine.runner import Runner
    from pyengine.text.search import Rules
    from pyengine.text.tokenizer import StreamDecoder


class Stops:
    """Text that is held back while it may be the beginning of a stop string.

    Each character moves each stop on to the longest beginning of it that the text ends with (Knuth, Morris and Pratt 1977,
    doi:10.1137/0206024), so a long stop costs no more than a short one, and answers do not depend on how they are cut into pieces.
    """

    def __init__(self, stops: str | Sequence[str]):
        stops = [stops] if isinstance(stops, str) else stops
        if isinstance(stops, (bytes, bytearray, memoryview, Mapping)) or not iterates(stops):
            raise RequestError(f"stop: must be a text or a list of texts, not {in_short(stops)}")
        self.stops = list(stops)
        self.found: str | None = None                        # the stop that ended the text
        self.held, self._n_held = deque[str](), 0            # pieces that are not shown yet, and their characters
        if any(not isinstance(s, str) or not s for s in self.stops):
            raise RequestError("stop: must be texts that are not empty")
        self._back = [_borders(s) for s in self.stops]
        self._at = [0] * len(self.stops)                     # characters of each stop that the text ends with

    def push(self, text: str) -> str:
        """Add text; returns what can be shown. After a stop string nothing more comes."""
        if self.found:
            return ""
        before = self._n_held
        if text:
            self.held.append(text)
            self._n_held += len(text)
        for i, char in enumerate(text, before + 1):
            for k, stop in enumerate(self.stops):
                self._at[k] = _longer(stop, self._back[k], self._at[k], char)
            ended = [stop for at, stop in zip(self._at, self.stops) if at == len(stop)]
            if ended:
                self.found = max(ended, key=len)
                shown = self._taken(i - len(self.found))
                self.held.clear()
                self._n_held = 0
                return shown
        return self._taken(self._n_held - max(self._at, default=0))

    def _taken(self, n: int) -> str:
        """Take the first n characters of what is held. What stays is not copied: a stop may be as long as the answer."""
        shown = []
        self._n_held -= n
        while n > 0:
            piece = self.held.popleft()
            if len(piece) > n:
                self.held.appendleft(piece[n:])
            shown.append(piece[:n])
            n -= len(piece)
        return "".join(shown)

    def flush(self) -> str:
        """Return what was held back, at the end of the answer."""
        return self._taken(self._n_held)


def _borders(stop: str) -> list[int]:
    """Return, for each beginning of a stop, the longest shorter one that it ends with."""
    back = [0]
    for char in stop[1:]:
        back.append(_longer(stop, back, back[-1], char))
    return back


def _longer(stop: str, back: list[int], at: int, char: str) -> int:
    """Return the longest beginning of `stop` that a text ends with after `char`, if it was `at` long before."""
    while at and stop[at] != char:
        at = back[at - 1]
    return at + (stop[at] == char)


class Drafted(NamedTuple):
    """Tokens that were drafted, and those of them that came."""

    n_drafted: int = 0
    n_accepted: int = 0


@dataclass
class Report:
    """How an answer came about.

    tokens: ids; sampled: their log-probabilities (and the n best, where `logprobs` asked for them);
    finish: "stop", "tool_calls", "length" or "cancelled"; stopped_by: the stop text that ended it, if one did; ended_by: the token with which
    the model ended it, if it did;
    prompted: the same of the prompt's tokens, where `prompt_logprobs` asked for it: None for the first one and for those of pictures;
    times: of the tokens, by the clock of `time.perf_counter`;
    thinking: the text of it; n_thinking: its tokens; calls: of tools, the last one may be cut off;
    n_prompt, n_cached: prompt tokens, and those of them found in the cache; seconds: of the generation.
    drafts: by where they came from ("lookup", "grammar", "model"), tokens that were computed before they were known, and those of them that
    came; n_drafted, n_accepted: of all.
    media: what became of each picture or video. naming: how the answer names regions of the last one, if it does: by tokens that its text may
    leave out, and that stand in `marked`. conversation: that in the caches, as long as it is there.
    earlier: where tools were run, the messages before this answer: calls and their results.
    """

    tokens: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    ended_by: Sampled | None = None
    prompted: list[Sampled | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list, repr=False, compare=False)
    finish: str = "length"
    stopped_by: str | None = None
    thinking: str = ""
    n_thinking: int = 0
    calls: list[ToolCall] = field(default_factory=list)
    n_prompt: int = 0
    n_cached: int = 0
    drafts: dict[str, Drafted] = field(default_factory=dict)
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    media: list[MediaInfo] = field(default_factory=list)
    naming: Naming | None = None
    marked: str = field(default="", repr=False)
    conversation: Conversation | None = field(default=None, repr=False, compare=False)
    earlier: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def n_drafted(self) -> int:
        """Tokens that were computed before they were known."""
        return sum(d.n_drafted for d in self.drafts.values())

    @property
    def n_accepted(self) -> int:
        """Of those, how many came."""
        return sum(d.n_accepted for d in self.drafts.values())


class Marking:
    """A decoder beside which another one keeps the texts of all tokens, in a report's `marked`."""

    def __init__(self, decoder: StreamDecoder, whole: StreamDecoder, report: Report):
        self.decoder, self.whole, self.report = decoder, whole, report

    def push(self, token: int) -> str:
        """Give the text that this token completes."""
        self.report.marked += self.whole.push(token)
        return self.decoder.push(token)

    def flush(self) -> str:
        """Give what is held back."""
        self.report.marked += self.whole.flush()
        return self.decoder.flush()


class Job(ABC):
    """A prompt that the scheduler works on, whatever is made of it.

    hidden   its wanted rows give last hidden states, not logits
    seats    conversations that it may have side by side; n_held: those that it has
    pieces   what nobody has taken yet: content as it is, the rest as a Delta
    drafts   of tokens that may follow, where steps compute some before they are known
    """

    hidden: ClassVar[bool] = False
    drafts: Drafts | None = None
    seats: int = 1
    n_held: int = 1

    def __init__(self, rows: Rows, report: Report):
        self.rows, self.report = rows, report
        self.conversation: Conversation | None = None
        self.done = 0                                        # rows of the prompt in the cache
        self.pending: int | None = None                      # the token that the next step appends
        self.pieces: deque[str | Delta] = deque()            # content as it is, the rest as a Delta
        self.finished = False
        self.error: BaseException | None = None
        self.started = self.prompted = time.perf_counter()

    @property
    def media(self) -> frozenset[bytes]:
        """Digests of its pictures."""
        return frozenset(s.source for _, s in (*self.rows.media, *self.rows.crossed))

    @abstractmethod
    def join(self, runner: Runner) -> None:
        """Take a conversation, and note how much of the prompt it has. Raises: PlanError when all are in use."""

    @abstractmethod
    def wanted(self, start: int, stop: int) -> np.ndarray:
        """Return which of its rows [start, stop) `take` gets, counted from `start`."""

    @abstractmethod
    def take(self, given: Any) -> None:
        """Take what the step gave for the wanted rows: hidden states [n, d_model], or the logits after the last one, a `Row`."""

    def branches(self) -> list[tuple[Conversation, int]]:
        """Return the conversations that go on, with the tokens that the next step appends: `take` gets the logits after each."""
        return [(self.conversation, self.pending)]

    def leave(self, runner: Runner) -> None:
        """Let go of the conversation."""
        self.conversation.active = False


class Request(Job):
    """One prompt on its way to an answer.

    guide: splits the text into content, thinking and calls, and says which tokens may come; None: all of it is content, and free.
    rules: which tokens the model's authors leave out.
    Stop texts are looked for in the content.
    """

    def __init__(self, rows: Rows, sampler: Sampler, decoder: Any, stops: Stops, limits: tuple[int | None, Collection[int]], report: Report,
                 guide: Guide | None = None, rules: Rules | None = None):
        super().__init__(rows, report)
        self.sampler, self.decoder, self.stops, self.guide, self.rules = sampler, decoder, stops, guide, rules
        self.max_tokens, self.eog = limits
        self.scorer: Sampler | None = None                   # where log-probabilities of the prompt are wanted

    def join(self, runner: Runner) -> None:
        """Go on from the conversation that has most of the prompt. Raises: PlanError when all are in use."""
        for token in self.rows.ids.tolist():
            if 0 <= token < self.sampler.n_vocab:            # the others are never sampled
                self.sampler.accept(token)
        if self.scorer is None:
            self.conversation, self.done = runner.resume(self.rows)
        else:                                                # each row's logits are wanted: none may come from the cache
            self.conversation, self.done = runner.cells.new(self.rows.adapters, self.rows.compression), 0
            self.report.prompted.append(None)

    def wanted(self, start: int, stop: int) -> np.ndarray:
        """Return the last row of the prompt, if it is among these; all where the prompt is scored."""
        if self.scorer is not None:
            return np.arange(stop - start, dtype=np.int32)
        return np.array([stop - start - 1], np.int32) if stop == len(self.rows) else np.empty(0, np.int32)

    def score(self, row: int, given: Row) -> None:
        """Note how probable the prompt's token `row` is by the logits after the row before it; the first row has none."""
        token = int(self.rows.ids[row])
        if token < 0 or self.scorer is None:                 # of a picture
            self.report.prompted.append(None)
            return
        logits = given.whole()
        best = self.scorer.sample(logits[: self.scorer.n_vocab])
        known = dict(best.top)
        total = float(logits[best.token]) - best.logprob     # logarithm of the sum of all exponentials
        self.report.prompted.append(Sampled(token, known.get(token, float(logits[token]) - total), best.top))

    def take(self, given: Row) -> None:
        """Sample from the logits after the last row, and decide whether to go on."""
        run, now, guide = self.report, time.perf_counter(), self.guide
        if self.pending is None:
            self.prompted = now
            run.prompt_seconds = now - self.started
        self.pending = None
        if self.max_tokens == 0:
            return self._end(run.finish)
        drawn = self._draw(given)
        if drawn.token in self.eog:
            run.ended_by = drawn
            return self._end("stop")
        self.sampler.accept(drawn.token)
        run.tokens.append(drawn.token)
        run.sampled.append(drawn)
        run.times.append(now)
        text = self.decoder.push(drawn.token)
        if guide is None:
            self._show(self.stops.push(text))
        else:
            self._tell(guide.push(drawn.token, text))
        run.seconds = time.perf_counter() - self.prompted
        if self.stops.found:
            run.finish, run.stopped_by, self.finished = "stop", self.stops.found, True
        elif guide is not None and guide.ended:
            self._end("stop")
        elif len(run.tokens) == self.max_tokens:
            self._end("length")
        else:
            self.pending = drawn.token

    def _draw(self, given: Row) -> Sampled:
        """Choose a token by the largest logits where those decide, else by all. Rows of the head beyond the tokens are padding."""
        allowed, n_vocab = None if self.guide is None else self.guide.allowed(), self.sampler.n_vocab
        ruled = None if self.rules is None else self.rules.allowed(self.rows.ids.tolist(), self.report.tokens, n_vocab)
        if allowed is None and ruled is None and given.largest is not None:
            drawn = self.sampler.sample_few(*given.largest)
            if drawn is not None:
                return drawn
        if allowed is not None:                              # a vocabulary may be longer than the head: nobody draws its last ones
            allowed = allowed[: (n_vocab + 31) // 32]
        if ruled is not None:
            allowed = ruled if allowed is None else allowed & ruled
        return self.sampler.sample(given.whole()[:n_vocab], allowed)

    def fill(self) -> None:
        """End because the context is full: what was generated so far is the answer, of finish "length"."""
        self.pending = None
        self._end("length")

    def _end(self, finish: str) -> None:
        tail = self.decoder.flush()
        if self.guide is None:
            self._show(self.stops.push(tail))
        else:
            self._tell(self.guide.flush(tail))
        self._show(self.stops.flush())
        run = self.report
        run.finish, run.stopped_by = "stop" if self.stops.found else finish, self.stops.found
        if run.calls and run.finish == "stop" and not self.stops.found:
            run.finish = "tool_calls"
        run.seconds = time.perf_counter() - self.prompted
        self.finished = True

    def _tell(self, deltas: Sequence[Delta]) -> None:
        """Hand out what a guide made of the text."""
        from pyengine.chat.reply.deltas import new_call_id, ToolCall

        run = self.report
        for delta in deltas:
            if self.stops.found:
                return
            if delta.kind == "text":
                self._show(self.stops.push(delta.text))
                continue
            self._show(self.stops.flush())                   # a stop text does not reach over a call
            if delta.kind == "thinking":
                run.thinking += delta.text
            elif delta.kind == "call":
                run.calls.append(ToolCall(new_call_id(), delta.text, ""))
            else:
                so_far = run.calls[delta.index]
                run.calls[delta.index] = replace(so_far, arguments=so_far.arguments + delta.text)
            self.pieces.append(delta)
        run.n_thinking = self.guide.n_thinking if self.guide else 0

    def _show(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
