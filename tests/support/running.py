"""A server of this project in a thread, at a port of its own; and whether its model has nothing left to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Serve an application. Gives its address: http://127.0.0.1:port."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def idle(model: Any, seconds: float = 30) -> bool:
    """Wait until a model works on nothing and nobody waits for it; say whether that came in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not model.loop.n_running and not model.loop.n_waiting and not model._scheduler.active:
            return True
        time.sleep(0.02)
    return False
