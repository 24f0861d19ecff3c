"""Prompts of encoder-decoders: read by the encoder when they are needed, and kept while there is room.

What stands in the decoder's sequence for one is a single position, whose id is the first that the decoder reads; all of its layers see the
encoder's rows across (`Cross`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from pyengine.backends.base import Program
from pyengine.errors import ContextOverflowError, RequestError
from pyengine.models.architecture import SourceEncoder
from pyengine.programs import encoder as runs
from pyengine.programs.rows import lay_out_rows, Rows, Segment, SourceSegment


class Awaited:
    """Rows float32 [n, d_model] that the encoder makes when somebody reads them."""

    def __init__(self, sources: Sources, rows: Rows, digest: bytes):
        self.sources, self.rows, self.digest = sources, rows, digest

    def __len__(self) -> int:
        return len(self.rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.sources.encoded(self.rows, self.digest)


class Sources:
    """A model's encoder of prompts, and what it has made of the last ones.

    most     rows of one prompt
    budget   bytes of encoded prompts that are kept; least recently used go first
    """

    def __init__(self, encoder: SourceEncoder, program: Program, most: int, budget: int):
        self.encoder, self.program, self.most, self.budget = encoder, program, most, budget
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self.stats = {"source_hits": 0, "source_misses": 0}

    def resident(self) -> int:
        """Return the bytes of the encoder and of kept prompts that are in memory."""
        return self.program.resident() + sum(a.nbytes for a in list(self._kept.values()))

    def segment(self, segments: Sequence[Segment], first: int | None = None) -> SourceSegment:
        """Return what stands in the decoder's sequence for a prompt, with the id `first` or the one that decoders begin with.

        Raises: RequestError for an empty prompt, ContextOverflowError for one that is too long.
        """
        rows = self.rows(segments)
        digest = digest_of(rows)
        token = self.encoder.start if first is None else first
        embedding: Any = Awaited(self, rows, digest)
        return SourceSegment(embedding, np.zeros((1, 1), np.int32), 1, None, True, False, digest, token)

    def rows(self, segments: Sequence[Segment]) -> Rows:
        """Lay a prompt out for the encoder. Raises as `segment`."""
        rows = lay_out_rows(segments)
        if not len(rows):
            raise RequestError("the prompt is empty")
        if len(rows) > self.most:
            raise ContextOverflowError(f"the prompt has {len(rows)} tokens, but the encoder reads {self.most}; load with a larger n_ctx")
        return rows

    def states(self, rows: Rows) -> np.ndarray:
        """Return the encoder's last hidden states of a prompt, float32 [n, d_model]."""
        return self.encoded(rows, digest_of(rows))

    def encoded(self, rows: Rows, digest: bytes) -> np.ndarray:
        """Do the same for one whose digest is known."""
        with self._lock:                                     # one program: another thread waits
            found = self._kept.pop(digest, None)
            self.stats["source_hits" if found is not None else "source_misses"] += 1
            if found is None:
                found = runs.run_source(self.program, rows)
            while self._kept and sum(a.nbytes for a in self._kept.values()) + found.nbytes > self.budget:
                self._kept.popitem(last=False)
            self._kept[digest] = found
            return found


def digest_of(rows: Rows) -> bytes:
    """Return the sha256 of a prompt's ids and pictures."""
    seen = sha256(rows.ids.tobytes())
    for first, s in rows.media:
        seen.update(first.to_bytes(8, "little") + s.digest)
    return seen.digest()
