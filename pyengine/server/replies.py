"""What all interfaces share: reading a request, running it, watching for clients that leave, and errors as statuses."""

from __future__ import annotations

import asyncio
import random
import re
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime, timezone
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from pyengine.engine.loop import Handle
from pyengine.errors import BusyError, ContextOverflowError, ModelNotFoundError, PyEngineError, RequestError
from pyengine.server.allowed import allowed
from pyengine.server.apart import apart
from pyengine.server.exchange import STREAM
from pyengine.server.fields import FieldError, Fields, parse
from pyengine.server.metrics import metrics
from pyengine.server.models import Hold, Models, Served
from pyengine.server.rounds import Turn
from pyengine.server.streams import leaving
from pyengine.text.sampling import SamplingParams
from pyengine.text.search import SEARCH

BODY_BYTES = 64 << 20                # of one request: some large pictures in base64
BODY_SECONDS = 60.0                  # until all of it has come

# Of the settings of an answer, what OpenAI and llama.cpp's server call them, and `SamplingParams` here; and those of `Search`.
SAMPLING = {name: name for name in (*SamplingParams.__dataclass_fields__, *SEARCH) if name not in ("logprobs", "logit_bias")}   # both have forms of their own
_NAMED = re.compile(r"([a-z][a-z_]*)((?:\[\d+\]|\.[\w$-]+)*)(?:: | (?=must |is missing))")     # how errors of the library name an argument, and a place in it
_names = random.Random()             # begins at a number of the system's
_LEASES = "pyengine.leases"          # where a request has the models that it uses
_TOLD = [(re.compile(ours), said) for ours, said in (
    (r"\bload with(?= a larger n_ctx| (?:mmproj|adapters|images|n_seq)=)", "serve the model with"), (r"\ba larger n_ctx\b", "a larger --ctx"), (r"\bmmproj=", "--mmproj"),
    (r"\badapters=", "--lora"), (r"\bn_seq=", "--seq "), (r"\bimages=0", "--pictures 0"), (r"\bimages=\((\d+), ?(\d+)\)", r"--picture \1x\2"),
    (r"\bimages=\(width, height\)", "--picture WIDTHxHEIGHT"), (r"\bimages=\(width, height, number\)", "--picture WIDTHxHEIGHT --pictures NUMBER"),
    (r"; (?:for (?:vectors|those) of its hidden states )?give pooling=.*", ""))]
OFF = "give false"                   # how they say that thinking is switched off


class TooLarge(RequestError):
    """A body that exceeds the limit."""


class Missing(RequestError):
    """Something that a request names, and that is not here."""


class TooSlow(PyEngineError):
    """An answer that took more time than the server gives one."""


def told(message: str) -> str:
    """Return a message of the library with the arguments of `load` as the options of the command that serves, and without those that no
    interface has."""
    for ours, said in _TOLD:
        message = ours.sub(said, message)
    return message


async def read(request: Request) -> Fields:
    """Read a request's JSON. Raises: as `body`; RequestError for what is no JSON object."""
    return parse(await body(request))


async def body(request: Request) -> bytes:
    """Read a request's body. Raises: TooLarge; TimeoutError for one that does not come."""
    exchange = request.scope.get("extensions", {}).get(STREAM)
    there = None if exchange is None else exchange.rest()
    if there is None:
        with nullcontext() if exchange is not None and exchange.whole else anyio.fail_after(BODY_SECONDS):
            there = await _coming(request)
    elif len(there) > BODY_BYTES:
        raise _too_large()
    return there


async def _coming(request: Request) -> bytes:
    """Read a body as it comes."""
    chunks, n, more = list[bytes](), 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect()
        chunks.append(message.get("body", b""))
        more, n = message.get("more_body", False), n + len(chunks[-1])
        if n > BODY_BYTES:
            raise _too_large()
    return b"".join(chunks)


def _too_large() -> TooLarge:
    return TooLarge(f"the body exceeds {BODY_BYTES} bytes")


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, TooLarge):
        return 413
    if isinstance(error, BusyError):
        return 503
    if isinstance(error, (ModelNotFoundError, Missing)):
        return 404
    if isinstance(error, (RequestError, ContextOverflowError)):
        return 400
    if isinstance(error, (TimeoutError, TooSlow)):
        return 408
    return 400 if isinstance(error, PyEngineError) else 500


def sampling(fields: Fields) -> dict[str, Any]:
    """Return the settings of the sampler that are there, and of adapters; a negative top_k is none, as llama.cpp, vLLM and Ollama have it."""
    given = fields.given(SAMPLING)
    k, lora = given.get("top_k"), adapters(fields)
    given = given if lora is None else {**given, "adapters": lora}
    if (policy := fields.policy("compress")) is not None:    # an extension: a policy's text, its settings as an object, or false
        given = {**given, "compress": policy}
    return {**given, "top_k": 0} if isinstance(k, int) and k < 0 else given


def adapters(fields: Fields) -> dict[int, Any] | None:
    """Return the scales that llama.cpp's field `lora` gives to adapters, by their numbers; None where it is not there. Raises: FieldError."""
    given = fields.items("lora", None)
    if given is None:
        return None
    for i, one in enumerate(given):
        if not isinstance(one, dict) or one.keys() != {"id", "scale"}:
            raise FieldError(f"lora[{i}]", 'must be an object as {"id": number, "scale": number}')
    each = [Fields(one, f"lora[{i}].") for i, one in enumerate(given)]
    return {one.whole("id"): one.number("scale") for one in each}


def unexpected(error: Exception) -> None:
    """Print an error that is a fault of ours, for the server's log."""
    traceback.print_exception(error)


def guarded(endpoint: Callable[[Request], Any], failed: Callable[[BaseException, int], dict[str, Any]]) -> Callable[[Request], Any]:
    """Turn an endpoint's errors into replies of its interface's own form. What is not expected is printed, and not told."""
    async def answer(request: Request) -> Any:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as error:
            status = status_of(error)
            if status == 500:
                unexpected(error)
                error = RuntimeError("an error of the server; its log has more")
            if isinstance(error, PyEngineError):
                error.args = (told(str(error)),)
            return JSONResponse(failed(error, status), status)

    return answer


def leases(scope: Scope) -> list[Hold]:
    """Return where the models that a request uses will stand, to be released when all of its reply is sent, or its client has left."""
    held: list[Hold] = []
    scope[_LEASES] = held
    return held


async def using(request: Request, models: Models, name: str | None, keep: float | None = None) -> Served:
    """Return a model by its name, loaded if it is not, which stays in memory until the reply is sent.

    For endpoints that are `guarded`. keep: seconds that it stays afterwards; None: as before. Raises as `Models.lease`; ClientDisconnect when
    the client leaves before the model is there.
    """
    hold = models.there(name, keep)
    if hold is None:
        wish, left = asyncio.ensure_future(models.lease(name, keep)), asyncio.get_running_loop().create_future()
        try:
            with leaving(request, lambda: left.done() or left.set_result(None)):
                await asyncio.wait({wish, left}, return_when=asyncio.FIRST_COMPLETED)
            if not wish.done():
                raise ClientDisconnect()
            hold = wish.result()
        finally:
            left.cancel()
            wish.cancel()
    request.scope[_LEASES].append(hold)
    return hold.served


def waited(request: Request) -> float:
    """Return the seconds that a request waited for its models to be loaded."""
    return sum(hold.waited for hold in request.scope[_LEASES])


def fresh(prefix: str) -> str:
    """Return a name that no other request or reply has; it opens nothing, so it is not secret (the system's own numbers cost a call each)."""
    return f"{prefix}{_names.getrandbits(96):024x}"


async def submit(call: Callable[[], Handle], names: Mapping[str, str] = {}) -> Handle:
    """Queue a request, from a thread of its own; it is counted, and ends when its time is over.

    names: what an interface calls the library's arguments, for errors that name one; and its words for those of the library.
    """
    began, seconds, counts = time.perf_counter(), allowed().answer_seconds, metrics()
    try:
        handle = await apart(call)
    except RequestError as error:
        raise renamed(error, names) from error
    if counts is not None:
        counts.follow(handle, began)
    if seconds is not None:                                  # a timer must not keep what has ended
        left = max(0.0, seconds - (time.perf_counter() - began))
        asyncio.get_running_loop().call_later(left, _late, weakref.ref(handle), seconds)
    return handle


def renamed(error: RequestError, names: Mapping[str, str] = {}) -> RequestError:
    """Return an error that begins with the name of an argument as a FieldError with the interface's name of it; others as they are."""
    names = {"adapters": "lora", **names}
    found = None if isinstance(error, FieldError) else _NAMED.match(str(error))
    if found is None:
        return error
    field, message = names.get(found[1], found[1]) + found[2], str(error)[found.end():]
    return FieldError(field, message.replace(OFF, names.get(OFF, OFF)) if found[1] == "think" else message)


def _late(of: weakref.ref[Handle], seconds: float) -> None:
    handle = of()
    if handle is not None and not handle.done:
        handle.cancel(TooSlow(f"the answer takes more than the {seconds:g} seconds that this server gives one (--timeout)"))


def client_of(request: Request) -> str:
    """Return who asks, for taking turns: the key, or the address."""
    client = request.scope.get("client")
    return header(request.scope, b"authorization") or (client[0] if client else "")


def header(scope: Scope, name: bytes) -> str | None:
    """Return the first header of a name, or None."""
    for given, value in scope["headers"]:
        if given == name:
            return value.decode("latin-1")
    return None


async def finished(request: Request, handles: Sequence[Handle]) -> None:
    """Wait for answers; those of a client that leaves are cancelled. Raises: ClientDisconnect, and what ended an answer."""
    loop = asyncio.get_running_loop()
    over = Turn(loop=loop)                                   # whether they have ended, and the client has not left

    def look() -> None:
        if all(h.done for h in handles) or any(h.error for h in handles):
            over.settle(True)

    def ended(handle: Handle) -> None:
        with suppress(RuntimeError):                         # the event loop is closed
            loop.call_soon_threadsafe(look)

    try:
        with leaving(request, lambda: over.settle(False)):
            for handle in handles:
                handle.on_done(ended)
            if not await over:
                raise ClientDisconnect()
        for handle in handles:
            if handle.error is not None:
                raise handle.error
    finally:
        for handle in handles:
            handle.cancel()


def moment(seconds: float) -> str:
    """Return a time in seconds since 1970 as ISO 8601 writes it."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


class Untold:
    """Log-probabilities of an answer's tokens that a stream has not told yet; none where they are not wanted."""

    def __init__(self, handle: Handle, wanted: bool):
        self._handle, self._wanted, self._told = handle, wanted, 0

    def take(self) -> list[Any]:
        """Return those of the tokens since the last time."""
        if not self._wanted:
            return []
        new = self._handle.report.sampled[self._told:]
        self._told += len(new)
        return new
