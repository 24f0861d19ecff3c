"""Pictures by their addresses, where a server was told to fetch them: bounded, and never from the machine or the network it stands in.

An address is resolved first; only if all that it resolves to is public is one of these connected to, under the name for `Host` and TLS.
So a name cannot mean another machine a moment later. Each redirect begins anew. No proxy is used, and no key or cookie is sent.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from functools import cache
from urllib.parse import SplitResult, urljoin, urlsplit

import pyengine
from pyengine.errors import BusyError, ImageError

MOST_BYTES = 32 << 20
SECONDS = 20.0                       # for one picture, with all redirects
REDIRECTS = 4
AT_ONCE = 8                          # of the whole process: each holds a thread

_NAT64 = ipaddress.ip_network("64:ff9b::/96")                # RFC 6052: IPv4 addresses in the last 32 bits
_places = threading.BoundedSemaphore(AT_ONCE)


def fetch(url: str) -> bytes:
    """Return what is at an http or https address. Raises: ImageError for what is refused or does not come, BusyError for too many at once."""
    if not _places.acquire(blocking=False):
        raise BusyError(f"{AT_ONCE} pictures are being fetched already; try again later, or send the picture's bytes")
    try:
        return _fetch(url, time.monotonic() + SECONDS)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ImageError(f"picture {_shown(url)}: it cannot be fetched: {_reason(error)}") from None
    finally:
        _places.release()


def _fetch(url: str, deadline: float) -> bytes:
    for _ in range(REDIRECTS + 1):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or any(ord(c) <= 32 for c in url):
            raise ImageError(f"picture {_shown(url)}: only plain http and https addresses are fetched")
        connection = _connected(parts, deadline)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": f"pyengine/{pyengine.__version__}", "Accept": "image/*", "Connection": "close"})
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                new = urljoin(url, answer.headers.get("Location") or "")
                if parts.scheme == "https" and urlsplit(new).scheme != "https":
                    raise ImageError(f"picture {_shown(url)}: redirects from https to {_shown(new)}")
                url = new
                continue
            if answer.status != 200:
                raise ImageError(f"picture {_shown(url)}: the server answers {answer.status}")
            return _body(connection, answer, url, deadline)
        finally:
            connection.end()
    raise ImageError(f"picture {_shown(url)}: more than {REDIRECTS} redirects")


def _body(connection: http.client.HTTPConnection, answer: http.client.HTTPResponse, url: str, deadline: float) -> bytes:
    pieces, n_bytes = [], 0
    if answer.length is not None and answer.length > MOST_BYTES:
        raise ImageError(f"picture {_shown(url)}: it has more than {MOST_BYTES} bytes")
    while piece := answer.read1(1 << 16):
        pieces.append(piece)
        n_bytes += len(piece)
        if n_bytes > MOST_BYTES:
            raise ImageError(f"picture {_shown(url)}: it has more than {MOST_BYTES} bytes")
    if time.monotonic() > deadline:
        raise TimeoutError
    if answer.length:
        raise ImageError(f"picture {_shown(url)}: the answer ended {answer.length} bytes too early")
    return b"".join(pieces)


def _wait(sock: socket.socket, deadline: float) -> None:
    """Let a socket wait until the deadline. Raises: TimeoutError when that is over."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)


def _connected(parts: SplitResult, deadline: float) -> _Connection:
    """Connect to one of the public addresses of a host."""
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for _, _, _, _, address in found:
        if not is_public(str(address[0])):
            raise ImageError(f"picture {_shown(parts.geturl())}: {host[:100]} is no address of the public internet")
    error: OSError = OSError("no address")
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            _wait(sock, deadline)
            sock.connect(address)
            return _Connection(sock, parts, port, deadline)
        except OSError as failed:
            sock.close()
            error = failed
    raise error


@cache
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Connection(http.client.HTTPConnection):
    """A connection over a socket that is connected, to the name in the address; it ends at the deadline, whatever it is doing."""

    def __init__(self, sock: socket.socket, parts: SplitResult, port: int, deadline: float):
        secure = parts.scheme == "https"
        super().__init__(str(parts.hostname), port)
        if secure:
            self.default_port = 443                          # of which `Host` says nothing
            sock = _context().wrap_socket(sock, server_hostname=parts.hostname, do_handshake_on_connect=False)
        self.sock = self._held = sock                        # http.client lets go of it when the answer's headers are there
        self._timer = threading.Timer(max(0.0, deadline - time.monotonic()), self._late)
        self._timer.daemon = True
        self._timer.start()
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
        except BaseException:
            self.end()
            raise

    def _late(self) -> None:
        with suppress(OSError):                              # it has ended just now
            socket.socket.shutdown(self._held, socket.SHUT_RDWR)

    def end(self) -> None:
        """Close it, and forget the deadline."""
        self._timer.cancel()
        self.close()


def is_public(address: str) -> bool:
    """Say whether an address belongs to the public internet; one that holds an IPv4 address does if that one does."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [a for a in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ()), ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None) if a]
        if inner:
            return all(is_public(str(a)) for a in inner)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback or ip.is_link_local or ip.is_private)


def _shown(url: str) -> str:
    """Return an address for a message, without its query."""
    return repr(url.partition("?")[0][:200])


def _reason(error: Exception) -> str:
    return "it takes too long" if isinstance(error, TimeoutError) else str(getattr(error, "strerror", None) or error or type(error).__name__)[:200]
