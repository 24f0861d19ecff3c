"""`pyengine-run serve`: models over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from pyengine.cli.screen import note
from pyengine.errors import RequestError


def default_threads() -> int:
    """Return the usual number of threads less one: a processor is left to the connections, which would have to wait for steps otherwise."""
    from pyengine import hardware

    return max(1, hardware.default_threads() - 1)


def serve(names: Sequence[str], host: str, port: int, options: dict[str, Any], api_keys: Sequence[str], hosts: Sequence[str],
          origins: Sequence[str], tls: tuple[str, str] | None) -> None:
    """Load models and serve them until Ctrl-C. Raises: RequestError where the server's packages are missing, and as `load`."""
    try:
        from pyengine.server import app, models
    except ModuleNotFoundError as error:
        raise RequestError(f"the server needs the package {error.name}: pip install starlette uvicorn") from None
    taken = app.listen(host, port)
    if not api_keys and taken.getsockname()[0] not in ("127.0.0.1", "::1"):
        note("note: other machines can reach this server, and it asks for no key: --api-key KEY")
    from pyengine.memory.plan import amount

    served = []
    for name in names:
        print(f"loading {name}", file=sys.stderr, flush=True)
        served.append(models.load(name, **options))
    found = models.Models(served).all
    for s in found:
        pictures = ", pictures" if s.model.media is not None else ""
        print(f"  {s.name}: context {s.model.n_ctx:,}, {s.model.n_seq} at once{pictures}, {amount(s.model.plan.total)}", file=sys.stderr)
    address = f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{taken.getsockname()[1]}"
    print(f"serving at {address} (OpenAI: {address}/v1; Ollama: {address}); Ctrl-C ends", file=sys.stderr, flush=True)
    app.serve(app.application(found, api_keys, hosts, origins), taken, *(tls or ()))
