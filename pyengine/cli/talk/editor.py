"""The line that is typed at a terminal: history, keys, completion, and below it how much of the context is used."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.styles import Style

from pyengine.cli.talk import completion
from pyengine.cli.answer import RATED
from pyengine.cli.talk.conversation import Chat
from pyengine.cli.screen import note, printable
from pyengine.cli.talk.terminal import typed_ahead

HIGH, FULL = 75, 90                                            # percents of the context from which the number is coloured
STYLE = Style.from_dict({"prompt": "bold ansigreen", "bottom-toolbar": "noreverse", "high": "bold ansiyellow", "full": "bold ansired"})


class Editor:
    """What is typed, a line or several: an instance takes the prompt to show and gives the text. Raises: EOFError at Ctrl-D.

    What was typed ahead of a Ctrl-C stands in the line and is not sent.
    """

    def __init__(self, chat: Chat):
        self._chat = chat
        keys = KeyBindings()
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        keys.add("c-g")(lambda event: event.current_buffer.open_in_editor())
        self._session: Any = PromptSession(
            history=history(), key_bindings=keys, completer=Completions(), complete_while_typing=False,
            enable_open_in_editor=True, tempfile_suffix=".txt", bottom_toolbar=lambda: status(chat), style=STYLE,
            prompt_continuation=lambda width, line, wraps: [("class:prompt", "    " if wraps else "... ")])

    def __call__(self, prompt: str) -> str:
        begun = typed_ahead() if self._chat.stopped else ""
        self._chat.stopped = False
        return self._session.prompt([("class:prompt", prompt)], default=begun)


def status(chat: Chat) -> list[tuple[str, str]]:
    """Say how much of the context is used, how fast the last answer was, what waits: styled texts for the line below."""
    used, n_ctx = chat.used(), chat.model.plan.n_ctx
    if used is None:
        shown = [("", "ctx ?" if n_ctx is None else f"ctx ? of {n_ctx:,} tokens")]
    elif n_ctx is None:
        shown = [("", f"ctx {used:,} tokens")]
    else:
        percent = min(100, round(100 * used / n_ctx))
        style = "class:full" if percent >= FULL else "class:high" if percent >= HIGH else ""
        shown = [(style, f"ctx {percent} %"), ("", f"  {used:,} of {n_ctx:,} tokens")]
    if chat.last is not None and chat.last[0].n_generated >= RATED:
        shown.append(("", f"  {chat.last[0].generated_per_second:.1f} tokens/s"))
    if chat.waiting:
        shown.append(("", printable(f"  + {', '.join(picture.name for picture in chat.waiting)}")))
    return shown


class Completions(Completer):
    """What Tab offers."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """List it for the text before the cursor."""
        for offer in completion.offers(document.text_before_cursor):
            yield Completion(offer.text, -offer.n, printable(offer.shown), offer.meaning)


def history() -> History:
    """Return the history of this user, which is kept in the state folder."""
    path = state_folder() / "history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        note(f"(the history is not kept: {path}: {error.strerror})")
        return InMemoryHistory()
    return FileHistory(str(path))


def state_folder() -> Path:
    """Return the folder for this user's history: $XDG_STATE_HOME, %LOCALAPPDATA% or ~/.local/state (XDG base directories)."""
    base = os.environ.get("XDG_STATE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return Path(base or "~/.local/state").expanduser() / "pyengine"
