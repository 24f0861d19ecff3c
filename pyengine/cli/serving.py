"""`pyengine-run serve`: models over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pyengine.cli.screen import note, PROGRAM
from pyengine.errors import RequestError


def default_threads() -> int:
    """Return the usual number of threads less one: a processor is left to the connections, which would have to wait for steps otherwise."""
    from pyengine import hardware

    return max(1, hardware.default_threads() - 1)


class Asked(NamedTuple):
    """Which models are served: those of these names are loaded at once, with `any` every one of this machine when it is asked for.

    options: as of `pyengine.load`; keep_alive: seconds that models stay which are loaded when they are asked for
    """

    names: Sequence[str]
    any: bool
    options: dict[str, Any]
    keep_alive: float


def keep_alive(text: str) -> float:
    """Return the seconds that --keep-alive says. Raises: RequestError."""
    from pyengine.engine.residents import keep_alive_of

    try:
        return keep_alive_of(text)
    except RequestError as error:
        raise RequestError(f"--keep-alive {text}: {str(error).partition(': ')[2].partition('; got')[0]}") from None


def serve(asked: Asked, host: str, port: int, access: dict[str, Any], permits: tuple[float | None, bool, bool],
          tls: tuple[str, str] | None) -> None:
    """Load models and serve them until Ctrl-C.

    access: keys, hosts and origins, as `application` takes them; permits: seconds of an answer, whether models are
    pulled, whether pictures are fetched; tls: files of certificate and key.
    Raises: RequestError where the server's packages are missing, and as `load`.
    """
    try:
        from pyengine.server import allowed, app, fetching, models
    except ModuleNotFoundError as error:
        raise RequestError(f"the server needs the package {error.name}: pip install starlette uvicorn prometheus_client") from None
    taken = app.listen(host, port)
    if not access["api_keys"] and taken.getsockname()[0] not in ("127.0.0.1", "::1"):
        note("note: other machines can reach this server, and it asks for no key: --api-key KEY")
    from pyengine.files.stores import list_models
    from pyengine.memory.plan import amount

    served = []
    for name in asked.names:
        print(f"loading {name}", file=sys.stderr, flush=True)
        served.append(models.load(name, **asked.options))
    others = {name: value for name, value in asked.options.items() if name not in ("mmproj", "adapters", "draft")}
    found = models.Models(served, list_models if asked.any else None, others, asked.keep_alive)
    for s, _ in found.running():
        if "completion" not in s.capabilities:
            print(f"  {s.name}: {', '.join(s.capabilities)}, {amount(s.model.plan.total)}", file=sys.stderr)
            continue
        pictures = ", pictures" if s.model.media is not None else ""
        adapters = "".join(f", {name} x {scale:g}" for name, scale in s.model.adapters.items())
        print(f"  {s.name}: context {s.model.n_ctx:,}, {s.model.n_seq} at once{pictures}{adapters}, {amount(s.model.plan.total)}", file=sys.stderr)
    if asked.any:
        n = len(found.all) - len(found.running())
        print(f"  {n} {'others' if served else 'models'} of `{PROGRAM} list`, each loaded when it is asked for", file=sys.stderr)
    address = f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{taken.getsockname()[1]}"
    taken.listen(1024)                                       # so that nobody who reads the next line is refused
    print(f"serving at {address} (OpenAI: {address}/v1; Ollama: {address}); Ctrl-C ends", file=sys.stderr, flush=True)
    seconds, pulls, urls = permits
    media = replace(allowed.REMOTE, fetch=fetching.fetch) if urls else allowed.REMOTE
    try:
        app.serve(app.application(found, **access, allowed=allowed.Allowed(media, seconds, pulls)), taken, *(tls or ()))
    finally:
        found.close()
