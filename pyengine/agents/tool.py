"""Qwen2.5-VL's computer tool: what a model is told of it, and its calls, read and checked before anything is done.

Actions, arguments and their meaning are those of `ComputerUse` in cookbooks/utils/agent_function_call.py of
https://github.com/QwenLM/Qwen2.5-VL; a place is [x, y] in pixels of the picture as the model's processor resized it.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyengine.errors import nearest, RequestError, shown

NAME = "computer_use"
ACTIONS = {
    "key": "Press the keys in `keys` together, in their order, and let them go.",
    "type": "Type `text` where the keyboard's focus is.",
    "mouse_move": "Move the pointer to `coordinate`.",
    "left_click": "Click the left button at `coordinate`.",
    "left_click_drag": "Hold the left button, move the pointer from where it is to `coordinate`, and let go.",
    "right_click": "Click the right button at `coordinate`.",
    "middle_click": "Click the middle button at `coordinate`.",
    "double_click": "Click the left button twice at `coordinate`.",
    "scroll": "Turn the wheel by `pixels`: up if positive, down if negative.",
    "wait": "Wait for `time` seconds.",
    "terminate": "End the task and say its `status`.",
}
ALLOWED = frozenset(ACTIONS)
POINTED = ("mouse_move", "left_click", "left_click_drag", "right_click", "middle_click", "double_click")
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "keys": {"type": "array", "items": {"type": "string"}, "description": "For `key`: names of keys, as [\"ctrl\", \"a\"]."},
    "text": {"type": "string", "description": "For `type`: the text."},
    "coordinate": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2,
                   "description": "[x, y]: pixels from the left and from the upper edge of the screenshot."},
    "pixels": {"type": "number", "description": "For `scroll`: how far."},
    "time": {"type": "number", "description": "For `wait`: seconds."},
    "status": {"type": "string", "enum": ["success", "failure"], "description": "For `terminate`: whether the task is done."},
}
_USED_BY = {"keys": ("key",), "text": ("type",), "coordinate": POINTED, "pixels": ("scroll",), "time": ("wait",), "status": ("terminate",)}
LONGEST_WAIT, LONGEST_TEXT, FARTHEST = 60.0, 10_000, 100_000       # seconds, characters, pixels

_ALIASES = {"return": "enter", "control": "ctrl", "esc": "escape", "del": "delete", "ins": "insert", "pgup": "pageup", "pgdn": "pagedown",
            "page_up": "pageup", "page_down": "pagedown", "arrowup": "up", "arrowdown": "down", "arrowleft": "left", "arrowright": "right",
            "spacebar": "space", " ": "space", "cmd": "meta", "command": "meta", "super": "meta", "win": "meta", "windows": "meta",
            "option": "alt", "altleft": "alt", "shiftleft": "shift", "ctrlleft": "ctrl", "back_space": "backspace"}
MODIFIERS = ("ctrl", "alt", "shift", "meta")
NAMED_KEYS = frozenset({*MODIFIERS, "enter", "tab", "escape", "backspace", "delete", "insert", "home", "end", "pageup", "pagedown", "up", "down",
                        "left", "right", "space", *(f"f{i}" for i in range(1, 13))})
_EDITING = ("enter", "tab", "escape", "backspace", "delete", "home", "end", "pageup", "pagedown", "up", "down", "left", "right", "space")
# what stays inside of a window: editing and moving; nothing that closes, opens or leaves it
KEYS = frozenset({*_EDITING, *(f"shift+{k}" for k in _EDITING), *(f"ctrl+{k}" for k in "acvxzy"),
                  *(f"ctrl+{k}" for k in ("left", "right", "home", "end", "backspace", "delete"))})


class ActionError(RequestError):
    """An action that is not done: unknown, not allowed, or out of range. The model is told, and may try another one."""


@dataclass(frozen=True)
class Action:
    """A checked action. at: in pixels of the picture that the model saw."""

    name: str
    at: tuple[float, float] | None = None
    keys: tuple[str, ...] = ()
    text: str = ""
    pixels: float = 0.0
    seconds: float = 0.0
    status: str = ""


def computer_tool(size: tuple[int, int], allowed: Collection[str] = ALLOWED) -> dict[str, Any]:
    """Describe the tool to a model that sees pictures of this size (width, height), with the actions that it may use."""
    check_allowed(allowed)
    names = [name for name in ACTIONS if name in allowed]
    lines = ["Use the mouse and the keyboard of a computer whose screen you see in screenshots. Actions:",
             *(f"* {name}: {ACTIONS[name]}" for name in names),
             f"The screenshots are {size[0]} x {size[1]} pixels. Click the middle of things. After each action you get a new screenshot; what "
             "takes time may not be there yet: wait, and look again."]
    arguments = {k: v for k, v in _ARGUMENTS.items() if any(name in _USED_BY[k] for name in names)}
    return {"type": "function", "function": {"name": NAME, "description": "\n".join(lines), "parameters": {
        "type": "object", "required": ["action"],
        "properties": {"action": {"type": "string", "enum": names, "description": "What to do."}, **arguments}}}}


def check_allowed(allowed: Collection[str]) -> None:
    """Raise a RequestError for what is no collection of names of actions."""
    if isinstance(allowed, (str, bytes)) or not isinstance(allowed, Collection):
        raise RequestError(f"allowed: a set of names of actions, not {shown(allowed)}")
    for name in allowed:
        if name not in ACTIONS:
            raise RequestError(f"allowed: {shown(name)} is no action{nearest(str(name), ACTIONS)}; actions are {', '.join(ACTIONS)}")


def read_action(arguments: str, size: tuple[int, int], allowed: Collection[str] = ALLOWED, keys: Collection[str] | None = KEYS) -> Action:
    """Read a call's arguments (JSON text) as an action on a picture of this size.

    keys: the combinations that may be pressed, as in `KEYS`; None: all. Raises: ActionError.
    """
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        raise ActionError(f"arguments: no JSON: {shown(arguments)}") from None
    if not isinstance(given, Mapping):
        raise ActionError(f"arguments: an object with an action, not {shown(given)}")
    name = given.get("action")
    if not isinstance(name, str) or name not in ACTIONS:
        raise ActionError(f"action: {shown(name)} is none; actions are {', '.join(n for n in ACTIONS if n in allowed)}")
    if name not in allowed:
        raise ActionError(f"action: {name} is not allowed here; allowed are {', '.join(n for n in ACTIONS if n in allowed)}")
    at = _place(given.get("coordinate"), size) if name in POINTED or name == "scroll" else None
    if name in ("mouse_move", "left_click_drag") and at is None:
        raise ActionError(f"coordinate: {name} needs one, [x, y]")
    if name == "key":
        return Action(name, keys=_pressed(given.get("keys"), keys))
    if name == "type":
        return Action(name, text=_typed(given.get("text"), keys))
    if name == "scroll":
        return Action(name, at, pixels=_number(given.get("pixels"), "pixels", -FARTHEST, FARTHEST))
    if name == "wait":
        return Action(name, seconds=_number(given.get("time"), "time", 0, LONGEST_WAIT))
    if name == "terminate":
        if given.get("status") not in ("success", "failure"):
            raise ActionError(f"status: success or failure, not {shown(given.get('status'))}")
        return Action(name, status=given["status"])
    return Action(name, at)


def _number(value: Any, field: str, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ActionError(f"{field}: a number from {least:g} to {most:g}, not {shown(value)}")
    return float(value)


def _place(value: Any, size: tuple[int, int]) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value):
        raise ActionError(f"coordinate: [x, y], two numbers, not {shown(value)}")
    if not (0 <= value[0] < size[0] and 0 <= value[1] < size[1]):
        raise ActionError(f"coordinate: {shown(value)} is outside of the screenshot of {size[0]} x {size[1]} pixels")
    return float(value[0]), float(value[1])


def _typed(text: Any, keys: Collection[str] | None) -> str:
    """Check a text: private-use characters are keys to drivers of browsers, and control characters are keys to terminals."""
    if not isinstance(text, str) or not text or len(text) > LONGEST_TEXT:
        raise ActionError(f"text: a text of 1 to {LONGEST_TEXT} characters, not {shown(text)}")
    text = text.replace("\r\n", "\n")
    for char in text:
        if unicodedata.category(char) in ("Cc", "Co", "Cs", "Cn") and char not in "\n\t":
            raise ActionError(f"text: the character U+{ord(char):04X} cannot be typed")
    for char, key in (("\n", "enter"), ("\t", "tab")):
        if char in text and keys is not None and key not in keys:
            raise ActionError(f"text: the key {key} is not allowed here")
    return text


def read_keys(names: Sequence[str]) -> tuple[str, ...]:
    """Return keys by the names that screens know: NAMED_KEYS or a character. Raises: ActionError."""
    out = []
    for name in (part for n in names for part in (n.split("+") if len(n) > 1 else [n])):
        key = name if len(name) == 1 and name != " " else _ALIASES.get(name.lower(), name.lower())
        if key not in NAMED_KEYS and not (len(key) == 1 and key.isprintable()):
            raise ActionError(f"keys: {shown(name)} is no key{nearest(key, NAMED_KEYS)}")
        out.append(key)
    return tuple(out)


def _pressed(names: Any, keys: Collection[str] | None) -> tuple[str, ...]:
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not 1 <= len(names) <= 4 or not all(isinstance(n, str) and 1 <= len(n) <= 40 for n in names):
        raise ActionError(f"keys: a list of 1 to 4 names of keys, not {shown(names)}")
    pressed = read_keys(names)
    if keys is None or len(pressed) == 1 and len(pressed[0]) == 1:             # a character is what `type` types
        return pressed
    held, last = [k for k in MODIFIERS if k in pressed[:-1]], pressed[-1].lower()
    if len(set(pressed)) != len(pressed) or len(held) != len(pressed) - 1 or "+".join((*held, last)) not in keys:
        raise ActionError(f"keys: {'+'.join(pressed)} is not allowed here; allowed are {', '.join(sorted(keys))}")
    return pressed


def on_screen(at: tuple[float, float], picture: tuple[int, int], screen: tuple[int, int]) -> tuple[int, int]:
    """Map a place of the picture that the model saw to the pixel of the screen that lies there."""
    x, y = (math.floor((v + 0.5) * s / p) for v, p, s in zip(at, picture, screen))
    return min(max(x, 0), screen[0] - 1), min(max(y, 0), screen[1] - 1)
