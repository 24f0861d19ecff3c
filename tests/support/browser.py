"""A headless Chromium, driven by ChromeDriver's plain HTTP (W3C WebDriver, https://www.w3.org/TR/webdriver2/): Debian's packages chromium and
chromium-driver. What it is for: tests of the web page, and a screen for programs that see and click.

    with Browser(width=1100, height=800) as browser:
        browser.go("http://127.0.0.1:8080/")
        png = browser.screenshot()
        browser.click_at(100, 200)
        browser.type("hello")
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"              # the key of an element's id in JSON (WebDriver, 12.1)
KEYS = {"enter": "\ue007", "tab": "\ue004", "escape": "\ue00c", "backspace": "\ue003", "delete": "\ue017", "left": "\ue012", "up": "\ue013",
        "right": "\ue014", "down": "\ue015", "home": "\ue011", "end": "\ue010", "pageup": "\ue00e", "pagedown": "\ue00f", "space": " ",
        "shift": "\ue008", "ctrl": "\ue009", "alt": "\ue00a"}


def missing() -> str:
    """Say what is not installed, for a test's skip; "" where everything is there."""
    absent = [package for program, package in (("chromium", "chromium"), ("chromedriver", "chromium-driver")) if shutil.which(program) is None]
    return f"needs Debian's {' and '.join(absent)}: apt-get install {' '.join(absent)}" if absent else ""


class BrowserError(Exception):
    """What ChromeDriver refuses, in its words."""


class Browser:
    """One window with a profile of its own, gone when it is closed."""

    def __init__(self, width: int = 1100, height: int = 800):
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._session = ""
        try:
            self._address = f"http://127.0.0.1:{self._port()}"
            options = {"args": [*FLAGS, f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"]}
            asked = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
            self._session = f"/session/{self._ask('POST', '/session', asked)['sessionId']}"
            self.size(width, height)
        except BaseException:
            self.close()
            raise

    def _port(self) -> int:
        for line in self._driver.stdout or ():
            if found := re.search(r"started successfully on port (\d+)", line):
                return int(found[1])
        raise BrowserError("chromedriver did not start")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and its driver."""
        try:
            if self._session:
                self._ask("DELETE", self._session)
        except (OSError, BrowserError):
            pass                                             # it is gone already
        self._driver.terminate()
        self._driver.wait(10)
        self._profile.cleanup()

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None and method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            said = json.load(error)["value"]
            raise BrowserError(f"{said['error']}: {said['message'].partition(chr(10))[0]}") from None

    def _post(self, path: str, body: Any = None) -> Any:
        return self._ask("POST", self._session + path, body)

    # -- the window ---------------------------------------------------------------------------------------------------------

    def go(self, url: str) -> None:
        """Load an address and wait for it."""
        self._post("/url", {"url": url})

    def reload(self) -> None:
        """Load the page again."""
        self._post("/refresh")

    def size(self, width: int, height: int) -> None:
        """Make the page so large, below the narrowest window too. A screenshot has these pixels."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""
        return self._post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def prefer(self, **features: str) -> None:
        """Let media queries match: prefer(color_scheme="dark", reduced_motion="reduce")."""
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": f"prefers-{k.replace('_', '-')}", "value": v} for k, v in features.items()])

    def screenshot(self) -> bytes:
        """Return what the window shows, as PNG."""
        return base64.b64decode(self._ask("GET", f"{self._session}/screenshot"))

    def logged(self) -> list[str]:
        """Return errors of the console since the last call: exceptions, what the page's policy refuses."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    # -- by pixels ------------------------------------------------------------------------------------------------------------

    def _act(self, *actions: dict[str, Any]) -> None:
        self._post("/actions", {"actions": actions})

    def move_to(self, x: float, y: float) -> None:
        """Move the mouse to a pixel of the screenshot."""
        self._act({"type": "pointer", "id": "mouse", "actions": [_moved(x, y)]})

    def click_at(self, x: float, y: float, button: int = 0, times: int = 1) -> None:
        """Click at a pixel of the screenshot."""
        press = [{"type": "pointerDown", "button": button}, {"type": "pointerUp", "button": button}]
        self._act({"type": "pointer", "id": "mouse", "actions": [_moved(x, y), *press * times]})

    def drag(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Press at one pixel and let go at another."""
        path = [_moved(x1, y1), {"type": "pointerDown", "button": 0}, _moved(x2, y2, 100), {"type": "pointerUp", "button": 0}]
        self._act({"type": "pointer", "id": "mouse", "actions": path})

    def scroll(self, x: float, y: float, dx: float = 0, dy: float = 0) -> None:
        """Turn the wheel over a pixel: dy > 0 shows what is below."""
        turn = {"type": "scroll", "x": round(x), "y": round(y), "deltaX": round(dx), "deltaY": round(dy), "origin": "viewport"}
        self._act({"type": "wheel", "id": "wheel", "actions": [turn]})

    # -- by keys --------------------------------------------------------------------------------------------------------------

    def type(self, text: str) -> None:
        """Type a text into what has the focus."""
        self._act({"type": "key", "id": "keys", "actions": [a for c in text for a in _pressed(KEYS["enter"] if c == "\n" else c)]})

    def press(self, *keys: str) -> None:
        """Press keys together: press("shift", "tab"); names are those of `KEYS`, or single characters."""
        codes = [KEYS.get(k, k) for k in keys]
        down, up = ([{"type": kind, "value": c} for c in order] for kind, order in (("keyDown", codes), ("keyUp", codes[::-1])))
        self._act({"type": "key", "id": "keys", "actions": down + up})

    # -- by elements ----------------------------------------------------------------------------------------------------------

    def script(self, text: str, *arguments: Any) -> Any:
        """Run JavaScript in the page: the body of a function of `arguments`; a promise that it returns is waited for."""
        return self._post("/execute/sync", {"script": text, "args": list(arguments)})

    def wait(self, text: str, *arguments: Any, seconds: float = 15.0) -> Any:
        """Wait until an expression of JavaScript is true and return it. Raises: TimeoutError with what the page says."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.script(f"return ({text})", *arguments):
                return found
            time.sleep(0.03)
        shown = self.script("return document.body.innerText")
        raise TimeoutError(f"{text}: not within {seconds} seconds; the page says {shown[:1500]!r}; {self.logged()}")

    def click(self, selector: str) -> None:
        """Click the first element of a CSS selector, once it is there."""
        self.wait("document.querySelector(arguments[0])", selector)
        self._post(f"/element/{self._found(selector)}/click")

    def _found(self, selector: str) -> str:
        return self._post("/element", {"using": "css selector", "value": selector})[ELEMENT]

    def fill(self, selector: str, text: str) -> None:
        """Put a text, or the path of a file, into a field of a form."""
        element = self._found(selector)
        self._post(f"/element/{element}/value", {"text": text})

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements of a selector, as they are shown."""
        return self.script("return Array.from(document.querySelectorAll(arguments[0]), (e) => e.innerText)", selector)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Return left, top, right, bottom of the first element, in pixels of the screenshot."""
        left, top, right, bottom = self.script(
            "const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]", selector)
        return left, top, right, bottom

    def drop(self, selector: str, files: Sequence[tuple[str, str, bytes]], kind: str = "drop") -> None:
        """Drop files on an element, each (name, media type, content); kind "paste" pastes them."""
        packed = [[name, media, base64.b64encode(content).decode()] for name, media, content in files]
        self.script("""
            const data = new DataTransfer();
            for (const [name, type, text] of arguments[1])
              data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, {type}));
            const target = document.querySelector(arguments[0]), more = {bubbles: true, cancelable: true};
            if (arguments[2] === "paste") target.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, ...more}));
            else for (const name of ["dragenter", "dragover", "drop"]) target.dispatchEvent(new DragEvent(name, {dataTransfer: data, ...more}));
            """, selector, packed, kind)


def _moved(x: float, y: float, milliseconds: int = 0) -> dict[str, Any]:
    return {"type": "pointerMove", "duration": milliseconds, "x": round(x), "y": round(y), "origin": "viewport"}


def _pressed(key: str) -> list[dict[str, str]]:
    return [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
