"""A model's conversations in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy as np

from pyengine.arguments import place, takes
from pyengine.engine.answer import Answer, Reported, Stream
from pyengine.engine.scheduler import alone
from pyengine.errors import RequestError, shown
from pyengine.programs.rows import lay_out_rows

if TYPE_CHECKING:
    from pyengine.engine.prompts import Prompts
    from pyengine.engine.runner import Runner
    from pyengine.files.model_files import Files


class Saves:
    """The part of a model that writes conversations to files and reads them."""

    n_ctx: int
    _runner: Runner
    _prompts: Prompts
    _files: Files
    _axes: int
    _n_ids: int
    _ropes: Sequence[Any]
    _fingerprint: bytes
    _scales: Callable[[Any], tuple[float, ...]]

    @alone
    @takes()
    def save(self, path: str | Path, answer: Answer | Stream | None = None, messages: Sequence[dict[str, Any]] | None = None,
             notes: bytes = b"") -> int:
        """Write a conversation's part of the caches to a file: the one that `answer` belongs to, or else the one used last.

        messages: the conversation with its last answer; then what later prompts of it do not begin with is left out (an answer's text
        may be cut into other tokens than it was generated in): layers that see a window could not go on from before that.
        notes: bytes that are kept beside the cells, for `sessions.read_notes`. Returns the file's bytes.
        Raises: SessionError, RequestError where the conversation is no longer in the caches.
        """
        from pyengine.cache import sessions

        place("path", path)
        if answer is not None and not isinstance(answer, Reported):
            raise RequestError(f"save: answer is what `generate`, `chat` or `stream` gave, not {shown(answer)}")
        if not isinstance(notes, bytes):
            raise RequestError(f"save: notes are bytes, not {type(notes).__name__}")
        held = self._runner.cells.conversations
        s = answer.report.conversation if answer is not None else max(held, key=lambda s: s.used, default=None)
        if s not in held:
            raise RequestError("that conversation is not in the caches: it was never begun, or has gone on or gone for others")
        if messages is not None:
            rows = lay_out_rows(self._prompts.chat(messages).segments, self._axes)
            n = self._runner.reach(s, rows, len(rows))
            if n:
                s = replace(s, keys=s.keys[:n], next=rows.position(n))
        return sessions.save(path, self._runner.store, s, self._identity(s.adapters), notes)

    @alone
    @takes()
    def restore(self, path: str | Path, adapters: Any = None) -> int:
        """Read a conversation that `save` wrote; returns its tokens. A prompt that begins as it does goes on from it.

        adapters: those that it was computed with, as in `stream`.
        Raises: SessionError for a file that is damaged, or of another model, adapters or kv_dtype; ContextOverflowError; PlanError when
        no cells are free.
        """
        from pyengine.cache import sessions

        scales = self._scales(adapters)
        return len(sessions.restore(place("path", path), self._runner.store, self._identity(scales), self._n_ids, self.n_ctx, scales))

    def _identity(self, adapters: tuple[float, ...]) -> bytes:
        """Return what tells the model with these adapters from others; with none of them in use it is that of the model alone."""
        if not self._fingerprint:
            from pyengine.cache import sessions

            tables = [a for r in self._ropes for a in (r.inv_freq, np.array([r.scale, r.interleaved], np.float64))]
            self._fingerprint = sessions.fingerprint(self._files.opened, tables)
        return self._fingerprint if not any(adapters) else self._adapted_identity(adapters)

    def _adapted_identity(self, adapters: tuple[float, ...]) -> bytes:
        from pyengine.cache import sessions

        used = [(a.file, s) for a, s in zip(self._files.adapters, adapters) if s]
        of_files = [sessions.fingerprint([file], [np.array([file.metadata["adapter.lora.alpha"], scale])]) for file, scale in used]
        from hashlib import sha256                           # OpenSSL takes 2 ms to load

        return sha256(b"".join([self._fingerprint, *of_files])).digest()
