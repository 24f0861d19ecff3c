"""Answers and streams of pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TYPE_CHECKING

from pyengine.arguments import INT32_MAX, takes, whole
from pyengine.engine.request import Report, Request
from pyengine.engine.scheduler import Scheduler
from pyengine.errors import RequestError

if TYPE_CHECKING:
    from pyengine.chat.reply.deltas import Delta, ToolCall
    from pyengine.engine.encoded import MediaInfo
    from pyengine.text.sampling import Sampled


class Reported:
    """What is known of an answer beside its text. Of a stream it grows with the pieces."""

    report: Report

    @property
    def tokens(self) -> list[int]:
        """Ids of the tokens that were generated, without the one that ended the answer."""
        return self.report.tokens

    @property
    def finish(self) -> str:
        """Why it ended: "stop" (the model ended it, or a stop text came), "tool_calls", "length" (`max_tokens`, or the context is full) or
        "cancelled"."""
        return self.report.finish

    @property
    def thinking(self) -> str:
        """What the model wrote for itself before its answer, if its format has that; not part of the text."""
        return self.report.thinking

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Calls of tools that the answer asks for, in order; of an answer of finish "length" the last one may be cut off."""
        return self.report.calls

    @property
    def sampled(self) -> list[Sampled]:
        """One (token, logprob, top) for each token: see `logprobs` and `top_logprobs`."""
        return self.report.sampled

    @property
    def logprobs(self) -> list[float]:
        """Natural logarithm of each token's probability, by the model's logits: without bias, penalties and temperature."""
        return [s.logprob for s in self.report.sampled]

    @property
    def top_logprobs(self) -> list[tuple[tuple[int, float], ...]]:
        """For each token the most probable ones in its place, (id, logprob), best first: as many as `logprobs=` asked for."""
        return [s.top for s in self.report.sampled]

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt, soft tokens of pictures among them."""
        return self.report.n_prompt

    @property
    def n_cached(self) -> int:
        """Of those, how many were still in the caches, and were not computed again."""
        return self.report.n_cached

    @property
    def n_drafted(self) -> int:
        """Tokens that were computed before they were known: see `engine.speculation`."""
        return self.report.n_drafted

    @property
    def n_accepted(self) -> int:
        """Of those, how many came."""
        return self.report.n_accepted

    @property
    def prompt_seconds(self) -> float:
        """Seconds from the start of the work to the first token."""
        return self.report.prompt_seconds

    @property
    def seconds(self) -> float:
        """Seconds from the first token to the last one."""
        return self.report.seconds

    @property
    def media(self) -> list[MediaInfo]:
        """What became of each picture or video of the prompt: its size, the size that the encoder saw, soft tokens."""
        return self.report.media


class Answer(Reported, str):
    """Generated text: a str, with what is known of how it came about."""

    def __new__(cls, text: str, report: Report) -> Answer:
        answer = super().__new__(cls, text)
        answer.report = report
        return answer

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of a conversation, in OpenAI's form: content, and where there are any reasoning_content and tool_calls."""
        message: dict[str, Any] = {"role": "assistant", "content": str(self)}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [c.as_dict() for c in self.tool_calls]
        return message

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What a conversation goes on with: where tools were run, the calls and results before the answer, and its message."""
        return [*self.report.earlier, self.message]

    @property
    def boxes(self) -> list[Any]:
        """Boxes and points that the text names, in pixels of the last picture's original; see `boxes_in`."""
        return self.boxes_in(-1) if self.report.media else []

    @property
    def points(self) -> list[Any]:
        """The points among them."""
        from pyengine.chat.boxes import Point                                   # as below

        return [box for box in self.boxes if isinstance(box, Point)]

    @property
    def polygons(self) -> list[Any]:
        """Polygons that the answer names (`boxes.Polygon`), in pixels of the last picture's original."""
        from pyengine.chat.boxes import Polygon                                 # as below

        return [mark for mark in self.marks_in(-1) if isinstance(mark, Polygon)] if self.report.media else []

    @property
    def labels(self) -> list[str]:
        """Labels of all boxes, points and polygons, in the answer's order."""
        return [mark.label for mark in self.marks_in(-1)] if self.report.media else []

    @takes()
    def boxes_in(self, number: int) -> list[Any]:
        """Find boxes and points (`boxes.Box`, `boxes.Point`) that the text names, in pixels of the original of one picture.

        A text does not say which of several pictures it speaks of, so the caller does. Raises: RequestError where there is no such picture.
        """
        from pyengine.chat.boxes import Polygon                                 # Pillow takes 20 ms to import

        return [mark for mark in self.marks_in(number, "boxes_in") if not isinstance(mark, Polygon)]

    def marks_in(self, number: int, name: str = "marks_in") -> list[Any]:
        """Find the same and polygons. Raises: RequestError, naming what was called."""
        from pyengine.chat.boxes import find_boxes                              # Pillow takes 20 ms to import

        n, seen = whole("number", number, -INT32_MAX), len(self.report.media)
        if not -seen <= n < seen:
            raise RequestError(f"{name}({n}): the prompt of this answer has {seen} pictures, numbered from 0")
        n %= seen
        medium = self.report.media[n]
        if self.report.naming is not None:
            from pyengine.chat.regions import find_regions

            return find_regions(self.report.marked, self.report.naming, medium.size, n)
        return find_boxes(self, medium.size, medium.processed, image=n)

    def __repr__(self) -> str:
        return f"Answer({str.__repr__(self)}, {len(self.tokens)} tokens, finish={self.finish!r})"

    def __reduce__(self) -> tuple[Any, ...]:                 # without its conversation, which lies in a model's caches
        return Answer, (str(self), replace(self.report, conversation=None))

    def __copy__(self) -> Answer:                            # as any str: nobody changes it
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Answer:
        return self


class Stream(Reported, Iterator[str]):
    """Pieces of an answer as they come; what is known of it grows with them.

    Work on the request begins with the first piece that is asked for. Streams of one model may be read side by side: whichever
    is read moves all of them on. One that is closed, or forgotten, is no longer worked on.
    progress(done, total) is called before each step that reads the prompt, with the tokens that are in the cache by then.
    """

    progress: Callable[[int, int], None] | None = None

    def __init__(self, request: Request, scheduler: Scheduler):
        self._request, self._scheduler, self._begun = request, scheduler, False
        self.report = request.report

    def __next__(self) -> str:
        while not isinstance(piece := self._piece(), str):
            pass
        return piece

    def deltas(self) -> Iterator[Delta]:
        """Yield what comes with its kind: content, thinking, calls of tools and their arguments. Each piece is given once, here or as text."""
        from pyengine.chat.reply.deltas import Delta

        while True:
            try:
                piece = self._piece()
            except StopIteration:
                return
            yield Delta("text", piece) if isinstance(piece, str) else piece

    def _piece(self) -> str | Delta:
        r = self._request
        self.begin()
        while not self.ready:
            self.advance()
        if r.pieces:
            return r.pieces.popleft()
        if r.error is not None:
            error, r.error = r.error, None
            raise error
        raise StopIteration

    @property
    def ready(self) -> bool:
        """Whether the next piece, or the end, is there already: nothing has to be computed for it."""
        return bool(self._request.pieces) or self._request.finished

    def advance(self) -> None:
        """Run one step for all that are worked on, if the next piece is not there yet."""
        r = self._request
        if self.progress is not None and r.pending is None:
            self.progress(r.done, len(r.rows))
        with self._scheduler.lock:
            if not self.ready:                               # another thread may have moved it on
                self._scheduler.advance()

    def begin(self) -> None:
        """Put the request in the queue, if it is not there yet."""
        with self._scheduler.lock:
            if not self._begun and not self._request.finished:
                self._begun = True
                self._scheduler.submit(self._request)

    def answer(self) -> Answer:
        """Take all that is left as one text."""
        return Answer("".join(self), self.report)

    def close(self) -> None:
        """Stop working on the request; its conversation stays in the cache."""
        self._scheduler.cancel(self._request)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "not begun" if not self._begun else "ended" if self._request.finished else "running"
        return f"Stream({state}, {len(self.tokens)} tokens)"

    def __del__(self) -> None:
        self.close()


class Streams(Iterator[tuple[int, str]]):
    """Pieces of several answers, worked on side by side: (number of the prompt, piece), in the order in which they come."""

    def __init__(self, streams: list[Stream]):
        self.streams = streams
        self._left = list(range(len(streams)))
        self._texts: list[list[str]] = [[] for _ in streams]
        self._begun = False

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            for s in self.streams:
                s.begin()

    def __next__(self) -> tuple[int, str]:
        self._begin()
        while self._left:
            at = next((i for i in self._left if self.streams[i].ready), None)
            if at is None:
                self.streams[self._left[0]].advance()
                continue
            self._left.remove(at)
            piece = next(self.streams[at], None)
            if piece is not None:
                self._left.append(at)                        # behind the others, so that none waits for one that is fast
                self._texts[at].append(piece)
                return at, piece
        raise StopIteration

    def answers(self) -> list[Answer]:
        """Take all that is left, and return each whole answer."""
        self._begin()
        return [Answer("".join([*texts, *s]), s.report) for texts, s in zip(self._texts, self.streams)]

    def __repr__(self) -> str:
        return f"Streams({len(self.streams) - len(self._left)} of {len(self.streams)} ended)"
