"""What requests may ask of a server beside answers: each application has its own, and each request finds it in its context."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from pyengine.media.policy import MediaPolicy

MOST_PICTURES = 64                   # pictures, and frames of lists of frames, of one request
REMOTE = MediaPolicy(paths=False, most=MOST_PICTURES)   # what a message may show: its own bytes, no file of this machine, nothing of a network


@dataclass(frozen=True)
class Allowed:
    """Settings of a server that hold for all of its requests.

    media           what messages may show
    answer_seconds  that one answer may take, from when it was asked for; None: any time
    pulls           whether requests may fetch models, which writes to this machine's disk
    """

    media: MediaPolicy = REMOTE
    answer_seconds: float | None = None
    pulls: bool = False


_allowed: ContextVar[Allowed] = ContextVar("allowed", default=Allowed())
set_allowed = _allowed.set
allowed = _allowed.get
