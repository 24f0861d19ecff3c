"""Answers and streams of pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pyengine.engine.request import Report, Request
from pyengine.engine.scheduler import Scheduler


class Answer(str):
    """Generated text; the fields of its `report` can be read from it directly."""

    report: Report

    def __new__(cls, text: str, report: Report) -> Answer:
        answer = super().__new__(cls, text)
        answer.report = report
        return answer

    @property
    def boxes(self) -> list[Any]:
        """Boxes and points that the text names, in pixels of the last picture's original; see `boxes_in`."""
        return self.boxes_in(-1) if self.report.media else []

    def boxes_in(self, number: int) -> list[Any]:
        """Find boxes and points (`boxes.Box`, `boxes.Point`) that the text names, in pixels of the original of one picture.

        A text does not say which of several pictures it speaks of, so the caller does. Raises: IndexError.
        """
        from pyengine.chat.boxes import find_boxes                              # Pillow takes 20 ms to import

        n = range(len(self.report.media))[number]
        return find_boxes(self, self.report.media[n].size, self.report.media[n].processed, image=n)

    def __getattr__(self, name: str) -> Any:
        if name in Report.__dataclass_fields__:
            return getattr(self.report, name)
        raise AttributeError(name)


class Stream(Iterator[str]):
    """Pieces of an answer as they come; `report` grows with them.

    Work on the request begins with the first piece that is asked for. Streams of one model may be read side by side: whichever
    is read moves all of them on. One that is closed, or forgotten, is no longer worked on.
    progress(done, total) is called before each step that reads the prompt, with the tokens that are in the cache by then.
    """

    progress: Callable[[int, int], None] | None = None

    def __init__(self, request: Request, scheduler: Scheduler):
        self._request, self._scheduler, self._begun = request, scheduler, False
        self.report = request.report

    def __next__(self) -> str:
        r = self._request
        self.begin()
        while not r.pieces and not r.finished:
            if self.progress is not None and r.pending is None:
                self.progress(r.done, len(r.rows))
            with self._scheduler.lock:
                if not r.pieces and not r.finished:          # another thread may have moved it on
                    self._scheduler.advance()
        if r.pieces:
            return r.pieces.popleft()
        if r.error is not None:
            error, r.error = r.error, None
            raise error
        raise StopIteration

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

    def __del__(self) -> None:
        self.close()
