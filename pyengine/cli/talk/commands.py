"""The commands of a conversation: one table for what they do, for `/help`, and for what Tab completes."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from pyengine.cli import answer, pictures
from pyengine.cli.talk import settings, toolbox
from pyengine.cli.talk.conversation import Chat
from pyengine.cli.screen import note, show, show_lines, show_rows, size
from pyengine.cli.talk.place import RemotePlan
from pyengine.errors import RequestError

FORM = re.compile(r"/[\w?]*(?!\S)")                        # "/clear", not "/home/me/cat.png"
NOTES = '''
Alt-Enter begins a new line, and so does a backslash at a line's end; """ begins and ends a text of several lines. \
Ctrl-X Ctrl-E, or Ctrl-G, opens the line in $EDITOR. Tab completes commands, settings and file names.
Ctrl-C stops an answer; what there is of it stays in the conversation. Ctrl-D ends.
A message that begins with / needs a space before it.'''


class Command(NamedTuple):
    """One command. `file`: what kind of file it names, for completion; `words`: its first arguments that are known, with meanings."""

    argument: str
    meaning: str
    do: Callable[[Chat, str], None]
    file: str = ""
    words: Mapping[str, str] = {}


class Ended(Exception):
    """The user ends the conversation."""


def end(chat: Chat, rest: str) -> None:
    """End the conversation. Raises: Ended."""
    raise Ended


def add(kind: str) -> Callable[[Chat, str], None]:
    """Return the command that adds pictures or videos to the next message."""
    def do(chat: Chat, rest: str) -> None:
        chat.add(pictures.named_pictures(_needed(kind, rest), chat.options[kind], kind))

    return do


def system(chat: Chat, rest: str) -> None:
    """Set the system message, or remove it. Raises: RequestError where no template takes one."""
    chat.instruct(rest or None)


def choose(chat: Chat, rest: str) -> None:
    """Set a setting, or show all. `/set parameter NAME VALUE` and `/set system TEXT` are Ollama's forms."""
    name, _, value = rest.partition(" ")
    if name == "parameter" and value.strip():
        name, _, value = value.strip().partition(" ")
    if name == "system":
        system(chat, value.strip())
    elif name:
        note(f"({chat.choices.set(name, value.strip() or None)})")
    else:
        show_rows(chat.choices.rows(chat.model))


def think(chat: Chat, rest: str) -> None:
    """Set whether the model thinks before it answers."""
    note(f"({chat.choices.set('think', rest or None)})")


def compress(chat: Chat, rest: str) -> None:
    """Set how the conversation's cells are compressed from the next question on; without a policy, tell. Raises: RequestError."""
    if rest:
        note(f"({chat.choices.set('compress', rest)})")
    else:
        if not hasattr(chat.model, "cells_held"):
            raise RequestError("/compress: how much is kept is known where the model is in this process")
        held = chat.model.cells_held()
        note("(nothing is read yet)" if held is None else f"({held.n_tokens:,} tokens are in {held.n_cells:,} cells of each layer that sees all, {size(held.nbytes)})")


def equip(chat: Chat, rest: str) -> None:
    """Let the model call the tools of a file, or none of them; without a file, list them. Raises: RequestError."""
    if rest == "off":
        chat.equip(None)
        note("(no tools)")
        return
    if rest:
        chat.equip(toolbox.read_tools(_path("tools", rest)))
    if chat.tools is None:
        note("(no tools: /tools FILE.py lets the model call the functions of a Python file, which run here; FILE.json has OpenAI's list, "
             "and you are asked for results)")
    else:
        show_rows([(schema["function"]["name"], schema["function"]["description"]) for schema in chat.tools.schemas])


def shape(chat: Chat, rest: str) -> None:
    """Let answers be JSON of the schema in a file, any JSON, or free; without a file, show the schema. Raises: RequestError."""
    if rest == "off":
        chat.shape(None, None)
        note("(answers are free)")
    elif rest == "json":
        chat.shape({"type": "object"}, None)
        note("(answers are objects of JSON)")
    elif rest:
        path = _path("format", rest)
        chat.shape(toolbox.read_format(path), path)
        note(f"(answers are JSON as {path} says)")
    elif chat.choices.answer.format is None:
        note("(answers are free: /format FILE.json holds them to a JSON schema, /format json to objects)")
    else:
        show_lines(json.dumps(chat.choices.answer.format, indent=2, ensure_ascii=False))


def tell(chat: Chat, rest: str) -> None:
    """Show one thing about the conversation, or the most important ones. Raises: RequestError."""
    if rest not in SHOWN:
        raise RequestError(f"/show {rest}: there are {', '.join(filter(None, SHOWN))}")
    SHOWN[rest][1](chat)


def tell_short(chat: Chat) -> None:
    """Show the model, how much of its context is used, and what is set."""
    plan, used = chat.model.plan, chat.used()
    room = "an unknown number of" if plan.n_ctx is None else f"{plan.n_ctx:,}"
    asked = sum(turn["role"] == "user" for turn in chat.turns)
    rows = [("model", plan.model),
            ("form", "continues text, without a chat template" if chat.raw else "answers through its chat template"),
            ("context", f"{'an unknown part' if used is None else f'{used:,}'} of {room} tokens used, {asked} question{'s' * (asked != 1)}"),
            ("memory", plan.short() if isinstance(plan, RemotePlan) else f"{size(plan.total)}, {plan.kv_dtype} cache"),
            ("system", textwrap.shorten(_system(chat)[0], 200, placeholder=" ...")),
            ("set", chat.choices.changed(chat.model) or "nothing")]
    if chat.tools is not None:
        rows.append(("tools", f"{', '.join(chat.tools.names)}: {chat.tools.path}"))
    if chat.choices.answer.format is not None:
        rows.append(("format", f"JSON as {chat.form} says" if chat.form else "objects of JSON"))
    if chat.waiting:
        rows.append(("next", f"{', '.join(map(str, chat.waiting))}"))
    show_rows([*rows, ("more", " ".join(f"/show {name}" for name in SHOWN if name))])


def tell_memory(chat: Chat) -> None:
    """Show what the model takes, by purpose."""
    show_lines(chat.model.plan.table())


def tell_template(chat: Chat) -> None:
    """Show the chat template."""
    if chat.raw:
        show("(no chat template is used: the text is continued)")
    else:
        show(chat.model.template.source)


def tell_system(chat: Chat) -> None:
    """Show the system message."""
    text, source = _system(chat)
    show_lines(f"({source})\n{text}" if source else text)


def tell_messages(chat: Chat) -> None:
    """Show the conversation."""
    for message in chat.messages():
        show_lines(f"{message['role']}: {answer.written(message)}")
    if chat.waiting:
        show_lines(f"for the next message: {', '.join(map(str, chat.waiting))}")


def tell_settings(chat: Chat) -> None:
    """Show all settings."""
    choose(chat, "")


def tell_commands(chat: Chat, rest: str) -> None:
    """Show what can be typed."""
    show_rows([(f"{name} {c.argument}".rstrip(), c.meaning) for name, c in COMMANDS.items()])
    show_lines(NOTES)


def _system(chat: Chat) -> tuple[str, str]:
    """Return the system message and where it is from, if not from the user."""
    if chat.system:
        return chat.system, ""
    if not chat.raw and chat.model.system_default:
        return chat.model.system_default, "the model's own"
    return "none set", ""


def _needed(name: str, rest: str) -> str:
    if not rest:
        raise RequestError(f"/{name} FILE: the file is missing")
    return rest


def _path(name: str, rest: str) -> Path:
    return pictures.local_path(_needed(name, rest).strip("'\""))


SHOWN: dict[str, tuple[str, Callable[[Chat], None]]] = {
    "": ("", tell_short), "memory": ("the memory that the model takes, by purpose", tell_memory), "template": ("the chat template of the model", tell_template),
    "system": ("the system message", tell_system), "messages": ("all messages of the conversation", tell_messages),
    "settings": ("all settings, with their values", tell_settings)}

COMMANDS: dict[str, Command] = {
    "/help": Command("", "this list; also /?", tell_commands),
    "/image": Command("FILE", "add a picture to the next message; a message may also hold its path, dropped or typed", add("image"), "image"),
    "/video": Command("FILE", "add a video to the next message", add("video"), "video"),
    "/draw": Command("FILE", "write the picture that the last answer is about, with its boxes and points",
                     lambda chat, rest: chat.draw(_path("draw", rest)), "image"),
    "/retry": Command("", "ask the last question again, in place of its answer; a set seed gives the same one", lambda chat, rest: chat.retry()),
    "/undo": Command("", "take back the last question and its answer", lambda chat, rest: chat.undo()),
    "/clear": Command("", "forget the conversation and its pictures; the system message stays", lambda chat, rest: chat.clear()),
    "/save": Command("FILE", "write the conversation, with what is computed of it, to a file",
                     lambda chat, rest: chat.save(_path("save", rest)), "saved"),
    "/load": Command("FILE", "go on with a conversation that /save wrote, without computing it again",
                     lambda chat, rest: chat.load(_path("load", rest)), "saved"),
    "/think": Command("[HOW]", "let the model think before it answers: on, off, low, medium, high, at most N tokens, or auto, as it does by itself",
                      think, words=dict.fromkeys(settings.THINK, "")),
    "/compress": Command("[POLICY]", "keep a part of what was read, from the next question on: look-m, h2o, snapkv .., look-m:ratio=0.2; off: all of it; "
                         "without POLICY, tell how much is kept", compress, words={"off": "keep all of it"}),
    "/tools": Command("FILE", "let the model call the functions of a Python file, which run here, or the tools of a JSON file, whose results you "
                      "type; off: none; without FILE, list them", equip, "tools", {"off": "no tools"}),
    "/format": Command("FILE", "hold answers to the JSON schema in a file; json: to objects; off: they are free; without FILE, show the schema",
                       shape, "json", {"json": "any object", "off": "free text"}),
    "/system": Command("TEXT", "set the system message; without TEXT, remove it", system),
    "/set": Command("NAME VALUE", "set a setting; without VALUE, take the default again; /set alone shows all, with their values", choose),
    "/show": Command("[WHAT]", f"show the model, how full its context is, and what is set; or one of {', '.join(filter(None, SHOWN))}", tell,
                     words={name: meaning for name, (meaning, _) in SHOWN.items() if name}),
    "/bye": Command("", "end, as Ctrl-D does; also /exit and /quit", end),
}
OTHER_NAMES = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}
ENDS = ("exit", "quit")                                    # alone on a line at a terminal


def execute(chat: Chat, line: str) -> None:
    """Do what a line that begins with / asks for. Raises: Ended, RequestError, and what the command raises."""
    name, _, rest = line.strip().partition(" ")
    command = COMMANDS.get(OTHER_NAMES.get(name, name))
    if command is None:
        from pyengine.errors import nearest

        raise RequestError(f"there is no command {name}{nearest(name, COMMANDS)}; /help lists them")
    command.do(chat, rest.strip())
