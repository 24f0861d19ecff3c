"""What an agent works on: a screen that can be seen, a pointer and a keyboard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


class Screen(Protocol):
    """Places are pixels of the screen, from its upper left corner; errors of the screen itself are raised as RequestError.

    size        width and height
    screenshot  what is there to see at this moment, of that size
    click       button: "left", "right" or "middle"; times: 2 is a double click
    drag        with the left button
    type        a text as from the keyboard; a newline is the enter key
    key         keys pressed together, by names of `tool.read_keys`, released in the opposite order
    scroll      by pixels at a place: up where they are positive, down where they are negative
    """

    def size(self) -> tuple[int, int]: ...
    def screenshot(self) -> Image: ...
    def move(self, x: int, y: int) -> None: ...
    def click(self, x: int, y: int, button: str = "left", times: int = 1) -> None: ...
    def drag(self, x1: int, y1: int, x2: int, y2: int) -> None: ...
    def type(self, text: str) -> None: ...
    def key(self, keys: Sequence[str]) -> None: ...
    def scroll(self, x: int, y: int, pixels: int) -> None: ...
