"""A page with coloured shapes on a server of its own: which one is clicked is told to the server, and the page shows DONE."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

COLOURS, SHAPES = ("red", "green", "blue", "yellow", "purple", "orange"), ("circle", "square", "triangle", "star", "cross")
PAGE = """<!doctype html><meta charset="utf-8"><style>html, body {{ margin: 0; background: white; overflow: hidden }}
h1 {{ margin: 0; padding: 30% 0; text-align: center; font: bold {big}px sans-serif }}</style>
<svg width="{width}" height="{height}">{shapes}</svg>
<script>
document.onclick = async event => {{
  const what = event.target.id || "nothing";
  await fetch("/clicked/" + encodeURIComponent(what), {{method: "POST"}});
  if (what !== "nothing") document.body.innerHTML = "<h1>DONE</h1>";
}};
</script>"""


def outline(shape: str, x: float, y: float, r: float) -> str:
    """Draw a shape in a box with the middle (x, y) and sides 2 r, as SVG."""
    if shape == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{r}"'
    a = 0.36 * r
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)], "triangle": [(0, -r), (r, r), (-r, r)],
        "star": [(0, -r), (0.264 * r, -0.364 * r), (0.951 * r, -0.309 * r), (0.428 * r, 0.139 * r), (0.588 * r, 0.809 * r), (0, 0.45 * r),
                 (-0.588 * r, 0.809 * r), (-0.428 * r, 0.139 * r), (-0.951 * r, -0.309 * r), (-0.264 * r, -0.364 * r)],
        "cross": [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a)]}[shape]
    return '<polygon points="' + " ".join(f"{x + dx},{y + dy}" for dx, dy in corners) + '"'


def layout(rng: random.Random, asked: str, n: int, size: tuple[int, int]) -> str:
    """Draw the shape that is asked for, "red circle", and n - 1 others at random places, as a page of this size."""
    names = [f"{c} {s}" for c in COLOURS for s in SHAPES]
    names.remove(asked)
    unit = max(size) / 140
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(200):
            r = rng.uniform(10, 19) * unit
            x, y = rng.uniform(r, size[0] - r), rng.uniform(r, size[1] - r)
            if all(max(abs(x - a), abs(y - b)) > r + q + 4 * unit for a, b, q in placed):
                placed.append((x, y, r))
            if len(placed) == n:
                break
        if len(placed) == n:
            break
    drawn = "".join(f'{outline(what.split()[1], x, y, r)} id="{what}" fill="{what.split()[0]}"/>'
                    for what, (x, y, r) in zip([asked, *rng.sample(names, n - 1)], placed))
    return PAGE.format(width=size[0], height=size[1], shapes=drawn, big=round(18 * unit))


@dataclass
class Site:
    """A server on this machine: `page` is what it shows, `clicked` what was clicked, in order; how often the page was asked for."""

    url: str
    page: str = ""
    clicked: list[str] = field(default_factory=list)
    n_pages: int = 0


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until something is true. Raises: TimeoutError."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError("it did not become true")
        time.sleep(0.02)


@contextmanager
def serve(page: str = "") -> Iterator[Site]:
    """Serve a page on a port of its own."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.n_pages += self.path == "/"
            body = site.page.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            site.clicked.append(unquote(self.path.removeprefix("/clicked/")))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site(f"http://127.0.0.1:{server.server_address[1]}/", page)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
