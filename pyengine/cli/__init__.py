"""The command `pyengine-run`: arguments in, text out. Everything else is in the library.

    pyengine-run MODEL [PROMPT]      one answer, or a conversation
    pyengine-run COMMAND ...         pull, plan, bench, perplexity, serve, ps, stop, show, list, hardware, graph,
                                     attention, embed, classify, index, search
"""

from __future__ import annotations

import atexit
import os
import sys
import threading

from pyengine.cli.collector import rest


def main() -> None:
    """Run the command line and end the process with its exit code."""
    rest()
    from pyengine.cli import command

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")      # a terminal that has no such character shows a question mark
    if os.environ.get(f"_{command.PROGRAM.replace('-', '_').upper()}_COMPLETE"):
        command.complete()
    _leave(command.execute(sys.argv[1:]))


def _leave(code: int) -> None:
    """End the process. Modules and models are not taken apart before: that takes a while, and the system frees all at once."""
    if threading.active_count() == 1 and not sys.flags.inspect:
        atexit._run_exitfuncs()                       # here, for os._exit does not
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):
            sys.exit(code)                            # the interpreter's own end says what is to be said of a stream that is closed
        os._exit(code)
    sys.exit(code)
