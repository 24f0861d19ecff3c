"""Templates in a process of their own, which the operating system bounds and which can be ended.

The process runs plain jinja2 and checks nothing itself: whatever a template does in whatever corner of Python, it has an
address space of so many bytes, so many seconds, and no way to write a file. Where the system does not hold address spaces
to a limit (macOS, Windows), its memory is read every few milliseconds instead. It starts in some 65 ms with jinja2 alone,
from any thread, and without a copy of this process.

In:  source, names and values, as marshal writes them (this process is the only writer). Out: a letter, then UTF-8.
"""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyengine.errors import TemplateError

MAX_SECONDS = 5.0                                       # for compiling and rendering; real templates take milliseconds
MEMORY = 160 << 20                                      # bytes beyond the interpreter, jinja2 and the messages
MAX_OUTPUT = 16_000_000                                 # bytes of text; a million tokens are some 5,000,000
POLL_SECONDS = 0.01

_START = "import sys; sys.path += sys.argv[1:]; from pyengine.chat.helper import serve; serve()"
_LIMITED = sys.platform == "linux"                      # RLIMIT_AS is kept


class OverBudget(TemplateError):
    """A template takes more time or memory than templates get."""


def over_budget(why: str = "") -> OverBudget:
    return OverBudget(f"the chat template takes more than the {MAX_SECONDS:g} s and {MEMORY >> 20} MiB that templates get{why}; those of "
                      "real models do not: use another file, or continue the prompt without a template (--raw)")


# ---------------------------------------------------------------------------------------------------------------------
# This side


def render_apart(source: str, values: Mapping[str, Any], deadline: float) -> str:
    """Render a template in a helper process.

    values    None, booleans, numbers, strings, lists, tuples and mappings of these
    deadline  on time.monotonic's clock
    Raises: TemplateError, and as OverBudget if it takes too long or too much.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise over_budget()
    request = marshal.dumps((source, dict(values), seconds))
    try:
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", _START, *_roots()], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except (OSError, ValueError, TypeError) as error:
        raise TemplateError(f"the chat template is none that can be rendered in this process, and a helper process cannot be "
                            f"started with {sys.executable!r}: {error}") from error
    with process:
        try:
            answer = _answer(process, request, deadline)
        finally:
            process.kill()
    kind, text = answer[:1], answer[1:].decode("utf-8", "surrogatepass" if process.returncode == 0 else "replace")
    if kind == b"t" and process.returncode == 0:
        return text
    if kind == b"e":
        raise TemplateError(text)
    raise over_budget("" if kind == b"m" else ", or crashes")


def _answer(process: subprocess.Popen[bytes], request: bytes, deadline: float) -> bytes:
    waited = request
    while True:
        left = deadline - time.monotonic()
        try:
            return process.communicate(waited, timeout=max(0.0, left if _LIMITED else min(left, POLL_SECONDS)))[0]
        except subprocess.TimeoutExpired:
            waited = None
        if left <= 0:
            raise over_budget()
        if not _LIMITED and _resident(process.pid) > MEMORY + len(request) * 8 + (64 << 20):
            raise over_budget()


def _roots() -> list[str]:
    """Return folders of the packages that the helper needs."""
    import jinja2
    import markupsafe

    files = (Path(__file__).parent.parent / "__init__.py", jinja2.__file__, markupsafe.__file__)
    return list(dict.fromkeys(str(Path(f).parent.parent) for f in files))


def _resident(pid: int) -> int:
    import psutil

    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# The helper's side


def serve() -> None:
    """Answer one request and end."""
    out = sys.stdout.fileno()
    source, values, seconds = marshal.loads(sys.stdin.buffer.read())
    from pyengine.chat import dialect                   # before the limits: jinja2 is not the template's

    time.localtime()                                    # reads the zone's file
    _limit(seconds)
    try:
        answer = _rendered(dialect, source, values)
    except MemoryError:
        answer = b"m"
    while answer:
        answer = answer[os.write(out, answer):]
    os._exit(0)                                         # gives back a large heap at once


def _rendered(dialect: Any, source: str, values: Mapping[str, Any]) -> bytes:
    try:
        text = dialect.Environment().from_string(source).render(values).encode("utf-8", "surrogatepass")
        if len(text) > MAX_OUTPUT:
            return f"ethe chat template gives {len(text)} bytes of text, more than {MAX_OUTPUT}".encode()
        return b"t" + text
    except MemoryError:
        raise
    except Exception as error:
        return b"e" + dialect.explained(error).encode("utf-8", "surrogatepass")


def _limit(seconds: float) -> None:
    try:
        import resource
    except ImportError:                                 # Windows: the other side watches
        return
    limits = {"RLIMIT_CPU": int(seconds) + 2, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    if _LIMITED:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits["RLIMIT_AS"] = pages * resource.getpagesize() + MEMORY
    for name, limit in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (limit, limit))
        except (ValueError, OSError):                   # a lower one is in force already
            pass
