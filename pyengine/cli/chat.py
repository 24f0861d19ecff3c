"""A conversation at the terminal, or with a program that writes one turn a line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyengine.cli import answer, pictures, talks
from pyengine.cli.screen import complain, note, show, size
from pyengine.errors import PyEngineError, RequestError

HELP = '''\
/help              this list
/image FILE        add a picture to the next message; a message may also hold its path, dropped or typed
/video FILE        add a video to the next message
/save FILE         write the conversation, with what is computed of it, to a file
/load FILE         go on with a conversation that /save wrote, without computing it again
/clear             forget the conversation and its pictures; the system message stays
/system TEXT       set the system message; without TEXT, remove it
/set NAME VALUE    set temperature, top_k, top_p, min_p, typical_p, repeat_penalty, repeat_last_n, presence_penalty,
                   frequency_penalty, seed, max_tokens (-1: no limit) or stop; without VALUE, take the default again
/set               what is set
/show              the model, its memory, and the conversation
/bye               end, as Ctrl-D does
Alt-Enter begins a new line, and so does a backslash at a line's end; """ begins and ends a text of several lines.
Ctrl-C stops an answer; what there is of it stays in the conversation.
A message that begins with / needs a space before it.'''

BLOCK = '"""'
_COMMAND = re.compile(r"/\w*(?!\S)")  # "/clear", not "/home/me/cat.png"
SAMPLING: dict[str, type] = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "typical_p": float,
                             "repeat_penalty": float, "repeat_last_n": int, "presence_penalty": float,
                             "frequency_penalty": float, "seed": int}

ReadLine = Callable[[str], str]      # gives the line after a prompt, without its newline; EOFError at the end


class Chat:
    """One conversation and what its user has set. Raw, the model continues the text of all turns, without template.

    options   settings of the model's processor, for pictures under "image" and for videos under "video"
    waiting   pictures and videos that begin the next message
    """

    def __init__(self, model: Any, settings: answer.Settings, system: str | None = None, raw: bool = False,
                 verbose: bool = False, options: Mapping[str, pictures.Options] | None = None):
        self.model, self.settings, self.raw, self.verbose = model, settings, raw, verbose
        self.turns: answer.Messages = []
        self.system = system
        self.options = options or {"image": {}, "video": {}}
        self.waiting: list[pictures.Picture] = []

    def messages(self) -> answer.Messages:
        """Return the system message, if there is one, and the turns."""
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else list(self.turns)

    def add(self, found: Sequence[pictures.Picture]) -> None:
        """Let pictures and videos wait for the next message. Raises: RequestError if the model takes none."""
        if found:
            pictures.need_encoder(self.model)
        self.waiting += found
        for picture in found:
            note(f"Added {picture}")

    def read(self, text: str) -> None:
        """Take a message as it was typed: find pictures in it, and answer it; pictures alone wait for a question."""
        parts, remarks = pictures.find_pictures(text, self.options["image"])
        found = [part for part in parts if not isinstance(part, str)]
        asked = any(isinstance(part, str) and part.strip() for part in parts)
        if found and self.model.media is None:
            names, model = ", ".join(picture.name for picture in found), Path(self.model.file.path).name
            note(f"({model} has no image encoder: {names} {'stays text' if asked else 'is not added'})")
            parts, found = [text], []
        elif self.model.media is not None:
            for remark in remarks:
                note(remark)
        for picture in found:
            note(f"Added {picture}")
        if asked:
            self.say([*self.waiting, *parts])
        else:
            self.waiting += found

    def say(self, parts: Sequence[str | pictures.Picture]) -> None:
        """Take a turn: show the answer and keep it. Raises what generation raises, and keeps what was shown."""
        self.waiting = []
        self.turns.append(answer.user_message(parts))
        shown: list[str] = []

        def write(piece: str) -> None:
            shown.append(piece)
            show(piece, end="")

        try:
            report = answer.stream(self.model, answer.Question(self.messages(), self.raw), self.settings, write)
        finally:
            said = "".join(shown)
            if said:
                self.turns.append({"role": "assistant", "content": said})
                show(end="" if said.endswith("\n") else "\n")
            else:
                question = self.turns.pop()           # without an answer it would stand before the next one
                if names := answer.Question([question]).names():
                    note(f"(no answer: the question is not kept, nor {', '.join(names)})")
        if report.stopped:
            note("(stopped)")
        elif not said:
            note("(the model ended without a text)")
        elif report.n_generated == self.settings.max_tokens:
            note(f"(cut after {report.n_generated} tokens; /set max_tokens N allows more)")
        if self.verbose:
            for line in report.lines():
                note(line)

    def command(self, line: str) -> bool:
        """Do what a line that begins with / asks for; returns False at the conversation's end. Raises: RequestError."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/bye":
            return False
        if name == "/help":
            show(HELP)
        elif name == "/clear":
            self.turns.clear()
            self.waiting.clear()
            self.model.reset()
        elif name in ("/save", "/load"):
            if not rest:
                raise RequestError(f"{name} FILE: the file is missing")
            (self.save if name == "/save" else self.load)(pictures.local_path(rest.strip("'\"")))
        elif name in ("/image", "/video"):
            if not rest:
                raise RequestError(f"{name} FILE: the file is missing")
            self.add(pictures.named_pictures(rest, self.options[name[1:]], name[1:]))
        elif name == "/system":
            if self.raw:
                raise RequestError("/system needs the chat template, which is not used here")
            self.system = rest or None
        elif name == "/set":
            self.set(*rest.split(None, 1)) if rest else self.show_settings()
        elif name == "/show":
            self.show()
        else:
            raise RequestError(f"there is no command {name}; /help lists them")
        return True

    def save(self, path: Path) -> None:
        """Write the conversation and its part of the caches. Raises: RequestError, SessionError."""
        if not self.turns:
            raise RequestError("/save: there is no conversation yet")
        notes = talks.pack(talks.Talk(self.turns, self.system, self.raw))
        nbytes = self.model.save(path, messages=None if self.raw else self.messages(), notes=notes)
        note(f"(saved {len(self.turns)} messages: {path}, {size(nbytes)})")

    def load(self, path: Path) -> None:
        """Take up a conversation in place of this one, which stays as it is if that fails. Raises: RequestError, PyEngineError."""
        from pyengine.cache.sessions import read_notes

        talk = talks.unpack(path, read_notes(path))
        if talk.raw != self.raw:
            was, now = ("continued as text" if raw else "answered through the template" for raw in (talk.raw, self.raw))
            raise RequestError(f"{path}: its messages were {was}, here they would be {now}: start with{'out' * self.raw} --raw")
        n = self.model.restore(path)
        self.turns, self.system, self.waiting = talk.turns, talk.system, []
        note(f"(loaded {len(self.turns)} messages, {n} tokens: {path})")

    def set(self, name: str, value: str | None = None) -> None:
        """Set a setting; without a value, go back to the default. Raises: RequestError."""
        if name == "stop":
            self.settings.stop = (value,) if value else ()
        elif name == "max_tokens":
            n = answer.MAX_TOKENS if value is None else _number(name, value, int)
            self.settings.max_tokens = None if n < 0 else n
        elif name in SAMPLING:
            sampling = {k: v for k, v in self.settings.sampling.items() if k != name}
            if value is not None:
                sampling[name] = _number(name, value, SAMPLING[name])
            answer.check_sampling(sampling)
            self.settings.sampling = sampling
        else:
            raise RequestError(f"/set {name}: there are {', '.join((*SAMPLING, 'max_tokens', 'stop'))}")

    def show_settings(self) -> None:
        """Show what is set; what is not has the engine's default."""
        limit = self.settings.max_tokens
        show(f"max_tokens {'-1 (no limit)' if limit is None else limit}")
        for name, value in self.settings.sampling.items():
            show(f"{name} {value}")
        for text in self.settings.stop:
            show(f"stop {text!r}")

    def show(self) -> None:
        """Show the model, its memory, and the conversation."""
        show(self.model.plan.table())
        show("continues text, without a chat template" if self.raw else "answers through its chat template")
        self.show_settings()
        for message in self.messages():
            show(f"{message['role']}: {answer.written(message)}")
        if self.waiting:
            show(f"for the next message: {', '.join(map(str, self.waiting))}")


def _number(name: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"/set {name} {value}: must be {'a whole number' if kind is int else 'a number'}") from None


def read_message(read_line: ReadLine) -> str:
    """Read one message: a line, lines that end in a backslash and the one after them, or a block between two \"\"\".

    Raises: EOFError if there is nothing more; an end within a message ends the message.
    """
    line = read_line(">>> ")
    try:
        if line.startswith(BLOCK):
            text = line[len(BLOCK):]
            while not text.rstrip().endswith(BLOCK):
                text += "\n" + read_line("... ")
            return text.rstrip()[:-len(BLOCK)].strip("\n")
        while line.endswith("\\"):
            line = line[:-1] + "\n"
            line += read_line("... ")
    except EOFError:
        return text.strip("\n") if line.startswith(BLOCK) else line.rstrip("\n")
    return line


def run(chat: Chat, shown: Sequence[pictures.Picture] = ()) -> None:
    """Hold the conversation: at a terminal with a history and keys, else with one turn a line of standard input.

    shown: pictures and videos that begin the first message.
    At a terminal an error is shown and the conversation goes on; else it is raised, for the program at the other end.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    read_line = _terminal_reader() if terminal else _read_stdin_line
    if terminal:
        form = "continues your text: the file has no chat template, or --raw was given" if chat.raw else "answers"
        note(f"{chat.model.plan.model} {form}. /help lists the commands, Ctrl-D ends.")
    chat.add(shown)
    while True:
        try:
            text = read_message(read_line)
            if _COMMAND.match(text) and "\n" not in text:
                if not chat.command(text):
                    return
            elif text.strip():
                chat.read(text)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            note("(Ctrl-D or /bye ends)")
        except PyEngineError as error:
            if not terminal:
                raise
            complain(error)


def _read_stdin_line(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def state_folder() -> Path:
    """Return the folder for this user's history: $XDG_STATE_HOME, %LOCALAPPDATA% or ~/.local/state (XDG base directories)."""
    base = os.environ.get("XDG_STATE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return Path(base or "~/.local/state").expanduser() / "pyengine"


def _terminal_reader() -> ReadLine:
    """Return a reader with line editing, a history that is kept in the state folder, and Alt-Enter for a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    path = state_folder() / "history"
    history: History
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history = FileHistory(str(path))
    except OSError as error:
        note(f"(the history is not kept: {path}: {error.strerror})")
        history = InMemoryHistory()
    session: Any = PromptSession(history=history, key_bindings=keys)
    return session.prompt
