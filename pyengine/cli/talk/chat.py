"""A conversation at the terminal, or with a program that writes one turn a line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pyengine.cli import pictures
from pyengine.cli.talk import commands as commands
from pyengine.cli.talk.conversation import Chat
from pyengine.cli.screen import complain, note, show
from pyengine.cli.talk.terminal import quiet
from pyengine.errors import PyEngineError

BLOCK = '"""'

ReadLine = Callable[[str], str]      # gives the line after a prompt, without its newline; EOFError at the end


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
    read_line: ReadLine = _read_stdin_line
    if terminal:
        from pyengine.cli.talk.editor import Editor

        read_line = Editor(chat)
        name = chat.model.plan.model
        form = f"{name} continues your text: the file has no chat template, or --raw was given" if chat.raw else f"Chatting with {name}"
        note(f"{form}. /help for commands, Ctrl-D to quit.")
    chat.ask = read_line
    chat.add(shown)
    with quiet():
        while True:
            try:
                if not _turn(chat, read_line, terminal):
                    return
            except KeyboardInterrupt:
                if not terminal:
                    raise
                note("(Ctrl-D or /bye ends)")


def _turn(chat: Chat, read_line: ReadLine, terminal: bool) -> bool:
    """Take one message or command; returns False at the end of the conversation."""
    asked = chat.n_asked
    try:
        text = read_message(read_line)
        if commands.FORM.match(text) and "\n" not in text:
            commands.execute(chat, text)
        elif terminal and text.strip() in commands.ENDS:
            return False
        elif text.strip():
            chat.read(text)
    except (EOFError, commands.Ended):
        return False
    except PyEngineError as error:
        if not terminal:
            raise
        complain(error)
    if terminal and chat.n_asked != asked:
        show()
    return True


def _read_stdin_line(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")
