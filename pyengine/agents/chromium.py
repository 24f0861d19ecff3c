"""A screen in headless Chromium, driven through chromedriver: screenshots, a pointer and a keyboard, nothing of the page's insides.

    python -m pyengine.agents.chromium MODEL URL "Click the red circle." --size 560x560 --longest 140

It asks before each action; --yes does not. The browser reaches no other host than that of the URL. Needs the programs chromium
and chromedriver. The protocol is https://www.w3.org/TR/webdriver2/.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, TYPE_CHECKING
from urllib.parse import urlsplit

from pyengine.agents.agent import Agent, Step
from pyengine.errors import PyEngineError, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)
SECONDS, ATTEMPTS = 60, 3                   # for each command; to start the driver
BUTTONS = {"left": 0, "middle": 1, "right": 2}
# https://www.w3.org/TR/webdriver2/#keyboard-actions
CODES = {"backspace": "\ue003", "tab": "\ue004", "enter": "\ue007", "shift": "\ue008", "ctrl": "\ue009", "alt": "\ue00a",
         "escape": "\ue00c", "space": " ", "pageup": "\ue00e", "pagedown": "\ue00f", "end": "\ue010", "home": "\ue011", "left": "\ue012",
         "up": "\ue013", "right": "\ue014", "down": "\ue015", "insert": "\ue016", "delete": "\ue017", "meta": "\ue03d",
         **{f"f{i}": chr(0xE030 + i) for i in range(1, 13)}}


def missing() -> str:
    """Say which program is not there; "" if none is missing."""
    for names in (BROWSERS, DRIVERS):
        if not any(map(shutil.which, names)):
            return f"{names[0]} is not installed"
    return ""


class Chromium:
    """A window of a headless browser that shows a page; `with` closes it. `size`: its width and height in pixels.

    Raises: RequestError where a program is missing or fails.
    """

    def __init__(self, url: str, size: tuple[int, int] = (1024, 768)):
        if reason := missing():
            raise RequestError(f"{reason}; an agent's browser needs chromium and chromedriver")
        self._size, self._session = size, ""
        self._driver, port = _started()
        try:
            self._base = f"http://127.0.0.1:{port}/session"
            host = urlsplit(url).hostname or "localhost"
            arguments = ["--headless=new", "--hide-scrollbars", "--no-first-run", f"--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE {host}"]
            if getattr(os, "geteuid", lambda: 1)() == 0:
                arguments.append("--no-sandbox")             # which refuses to run as root
            metrics = {"width": size[0], "height": size[1], "pixelRatio": 1, "mobile": False, "touch": False}
            options = {"binary": next(filter(None, map(shutil.which, BROWSERS))), "args": arguments,
                       "mobileEmulation": {"deviceMetrics": metrics}}
            made = self._call("POST", "", {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}})
            self._session = "/" + made["sessionId"]
            self.open(url)
        except BaseException:
            self.close()
            raise

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(self._base + self._session + path, None if body is None else json.dumps(body).encode(),
                                         {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=SECONDS) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as e:
            told = json.loads(e.read())["value"]
            raise RequestError(f"chromium: {told['message'].splitlines()[0]}") from None
        except (OSError, ValueError) as e:
            raise RequestError(f"chromedriver does not answer: {e}") from None

    def open(self, url: str) -> None:
        """Load another page of the same host."""
        self._call("POST", "/url", {"url": url})

    def close(self) -> None:
        """Close the window and end both programs."""
        try:
            if self._session:
                self._call("DELETE", "")
        except RequestError:
            pass                                             # it is gone already
        finally:
            self._session = ""
            self._driver.terminate()
            self._driver.wait()
            if self._driver.stdout:
                self._driver.stdout.close()

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- a screen -----------------------------------------------------------------------------------------------------

    def size(self) -> tuple[int, int]:
        """Return the window's width and height."""
        return self._size

    def screenshot(self) -> Image:
        """Return what the window shows."""
        from PIL import Image

        return Image.open(io.BytesIO(base64.b64decode(self._call("GET", "/screenshot")))).convert("RGB")

    def move(self, x: int, y: int) -> None:
        """Move the pointer."""
        self._pointer(_to(x, y))

    def click(self, x: int, y: int, button: str = "left", times: int = 1) -> None:
        """Send a click of a button."""
        press = [{"type": "pointerDown", "button": BUTTONS[button]}, {"type": "pointerUp", "button": BUTTONS[button]}]
        self._pointer(_to(x, y), *press * times)

    def drag(self, x1: int, y1: int, x2: int, y2: int) -> None:
        """Move the pointer with the left button held."""
        self._pointer(_to(x1, y1), {"type": "pointerDown", "button": 0}, _to((x1 + x2) // 2, (y1 + y2) // 2), _to(x2, y2),
                      {"type": "pointerUp", "button": 0})

    def type(self, text: str) -> None:
        """Write a text by the keyboard."""
        self._keys([{"type": kind, "value": code} for code in (CODES.get({"\n": "enter", "\t": "tab"}.get(c, ""), c) for c in text)
                    for kind in ("keyDown", "keyUp")])

    def key(self, keys: Sequence[str]) -> None:
        """Hold keys together, and let them go."""
        codes = [CODES.get(key, key) for key in keys]
        self._keys([*({"type": "keyDown", "value": c} for c in codes), *({"type": "keyUp", "value": c} for c in reversed(codes))])

    def scroll(self, x: int, y: int, pixels: int) -> None:
        """Turn the wheel."""
        self._actions({"type": "wheel", "id": "wheel", "actions": [{"type": "scroll", "x": x, "y": y, "deltaX": 0, "deltaY": -pixels}]})

    def _pointer(self, *actions: dict[str, Any]) -> None:
        self._actions({"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": list(actions)})

    def _keys(self, actions: list[dict[str, Any]]) -> None:
        self._actions({"type": "key", "id": "keyboard", "actions": actions})

    def _actions(self, source: dict[str, Any]) -> None:
        self._call("POST", "/actions", {"actions": [source]})


def _started() -> tuple[subprocess.Popen[str], int]:
    """Start chromedriver; return it and its port. Another program may take the port that it chose, so it is tried again."""
    told = ""
    for _ in range(ATTEMPTS):
        driver = subprocess.Popen([next(filter(None, map(shutil.which, DRIVERS))), "--port=0"], stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True)
        for line in driver.stdout or ():
            if "started successfully on port" in line:
                return driver, int(line.rsplit(maxsplit=1)[1].rstrip("."))
            told = line.strip()
        driver.communicate()
    raise RequestError(f"chromedriver does not start: {told}")


def _to(x: int, y: int) -> dict[str, Any]:
    return {"type": "pointerMove", "duration": 0, "x": x, "y": y, "origin": "viewport"}


# ---- the example ---------------------------------------------------------------------------------------------------------------


def describe(step: Step) -> str:
    """Say in a line what a step is."""
    place = f" at {step.at[0]}, {step.at[1]}" if step.at else ""
    return f"{step.number}. {step.call.arguments}{place}{': ' + step.result if step.result else ''}"


def _ask(step: Step) -> bool:
    return input(f"{describe(step)}\ndo it? [y/N] ").strip().lower() in ("y", "yes")


def _pair(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no WIDTHxHEIGHT")
    return int(width), int(height)


def main() -> int:
    """Parse arguments, load the model, open the page and let the agent work."""
    parser = argparse.ArgumentParser(prog="python -m pyengine.agents.chromium", description="A model that uses a page in headless Chromium.")
    parser.add_argument("model", help="a GGUF file of a model that sees, or a name")
    parser.add_argument("url")
    parser.add_argument("task")
    parser.add_argument("--size", type=_pair, default=(1024, 768), metavar="WxH", help="of the window (default: 1024x768)")
    parser.add_argument("--longest", type=int, metavar="PIXELS", help="longer side of the pictures that the model gets")
    parser.add_argument("--limit", type=int, default=30, metavar="STEPS")
    parser.add_argument("--context", type=int, metavar="TOKENS")
    parser.add_argument("--yes", action="store_true", help="do not ask before each action")
    parser.add_argument("--save", metavar="FOLDER", help="write the transcript and its screenshots there")
    args = parser.parse_args()
    from pyengine.engine.load import load

    try:
        with load(args.model, n_ctx=args.context) as model, Chromium(args.url, args.size) as screen:
            agent = Agent(model, screen, confirm=None if args.yes else _ask, limit=args.limit, longest=args.longest)
            record = agent.run(args.task, watch=lambda step: print(describe(step), flush=True))
    except PyEngineError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if args.save:
        record.save(args.save)
    print(f"{record.ended} {record.status or record.said}".strip())
    return 0 if record.status == "success" or record.ended == "answer" else 1


if __name__ == "__main__":
    sys.exit(main())
