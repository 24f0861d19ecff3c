"""Requests that are bounded: in size, in time, in where they lead. Only http and https, and never from https back to http."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException, HTTPMessage, HTTPResponse
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin, urlsplit

import pyengine
from pyengine.errors import DownloadError

TIMEOUT_SECONDS = 30                 # for a connection, and between two pieces of an answer
ANSWER_SECONDS = 120                 # for the whole of an answer that is read at once
PIECE_BYTES = 1 << 20


class Refused(DownloadError):
    """An answer with a status that is no success."""

    def __init__(self, message: str, status: int, headers: Mapping[str, str]):
        super().__init__(message)
        self.status, self.headers = status, headers


class Broken(DownloadError):
    """A connection that was not made, or that ended too early: trying again may help."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects to http and https, with the key for the first host given to no other."""

    max_redirections = 5

    def http_error_302(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage) -> Any:
        to = urljoin(req.full_url, headers.get("Location") or "")
        old, new = urlsplit(req.full_url), urlsplit(to)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http") or not new.hostname:
            raise DownloadError(f"{_shown(req.full_url)}: redirects to {_shown(to)}, which is refused: "
                                f"only https{' and http are' if old.scheme == 'http' else ' is'} followed")
        try:
            return super().http_error_302(req, fp, 307 if code == 308 else code, msg, headers)   # Python 3.10 knows no 308
        except URLError as error:
            if not isinstance(error, HTTPError):
                error.host = getattr(error, "host", new.hostname)    # of several redirects the last one's
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            new.remove_header("Authorization")
        return new


@cache
def _opener() -> urllib.request.OpenerDirector:
    """Return what opens http and https, through the environment's proxies, and nothing else: no files, no ftp."""
    import ssl

    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:            # a Python that was installed without the system's certificates
        try:
            import certifi
        except ImportError:
            pass                                             # the handshake will say that no certificate is known
        else:
            context.load_verify_locations(certifi.where())
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(context=context), _Redirects(),
                    urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(), urllib.request.UnknownHandler()):
        opener.add_handler(handler)
    return opener


@contextmanager
def answer(url: str, headers: Mapping[str, str]) -> Iterator[HTTPResponse]:
    """Open the answer to a GET. What goes wrong in the body, where the answer is read, is raised as the same errors.

    Raises: Refused for a status beyond 2xx; Broken where the connection fails; DownloadError for a redirect that leads elsewhere.
    """
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"pyengine/{pyengine.__version__}", **headers})
        with _opener().open(request, timeout=TIMEOUT_SECONDS) as response:
            yield response
    except HTTPError as error:
        with error:
            raise Refused(f"{_shown(url)}: the server answers {error.code} {_clean(error.reason)}", error.code, error.headers) from None
    except URLError as error:
        why = _clean(getattr(error.reason, "strerror", None) or error.reason)
        if isinstance(error.reason, OSError) and not isinstance(error.reason, SSLError):
            why = f"no connection to {getattr(error, 'host', None) or urlsplit(url).hostname} ({why})"
        raise Broken(f"{_shown(url)}: {why}") from None
    except (OSError, HTTPException) as error:                # from the headers, and from the body while it is read
        raise Broken(f"{_shown(url)}: {_clean(error) or type(error).__name__}") from None
    except ValueError as error:                              # a URL, or sizes of pieces, that are none
        raise DownloadError(f"{_shown(url)}: {_clean(error)}") from None


def read(url: str, headers: Mapping[str, str], limit: int) -> bytes:
    """Return a whole answer of at most `limit` bytes. Raises as `answer`, and DownloadError beyond the limit or after two minutes."""
    pieces, n_bytes, started = [], 0, time.monotonic()
    with answer(url, headers) as response:
        while piece := response.read1(PIECE_BYTES):
            pieces.append(piece)
            n_bytes += len(piece)
            if n_bytes > limit:
                raise DownloadError(f"{_shown(url)}: the answer is larger than {limit} bytes")
            if time.monotonic() - started > ANSWER_SECONDS:
                raise DownloadError(f"{_shown(url)}: the answer takes longer than {ANSWER_SECONDS} seconds")
        if response.length:                                  # `read1` says nothing of it
            raise Broken(f"{_shown(url)}: the answer ended {response.length} bytes too early")
    return b"".join(pieces)


def _shown(url: str) -> str:
    """Return a URL without its query, which may hold keys, for a message."""
    return _clean(url.partition("?")[0])


def _clean(text: object) -> str:
    """Return what a server says, for a message: one line, cut where it is long."""
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else line[:200] + "..."
