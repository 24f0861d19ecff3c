"""JSON that is still coming: values checked letter by letter, given on as they are written (RFC 8259).

One liberty: control characters that stand raw in a string, as models like to write them, come out escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from pyengine.chat.reply.tape import Malformed, Reading, Tape
from pyengine.text.marks import MARK

Out = Callable[[str], object]
Scalar = Callable[[Tape, str, Out], Reading[None]]               # reads a value that begins with this letter
Key = Callable[[Tape, Out], Reading[None]]                       # reads a key and its colon
_PLAIN = re.compile(r'[^"\\\x00-\x1f' + MARK + r"]*")
_HEX = frozenset("0123456789abcdefABCDEF")
# A number's states: what may come, and what follows; those in _WHOLE may end it.
_NUMBER = {"start": {"-": "minus", "0": "zero", "d": "whole"}, "minus": {"0": "zero", "d": "whole"}, "zero": {".": "dot", "e": "e"},
           "whole": {"0": "whole", "d": "whole", ".": "dot", "e": "e"}, "dot": {"0": "part", "d": "part"},
           "part": {"0": "part", "d": "part", "e": "e"}, "e": {"-": "sign", "+": "sign", "0": "power", "d": "power"},
           "sign": {"0": "power", "d": "power"}, "power": {"0": "power", "d": "power"}}
_WHOLE = ("zero", "whole", "part", "power")
_CLASS = {**{d: "d" for d in "123456789"}, "0": "0", "-": "-", "+": "+", ".": ".", "e": "e", "E": "e"}


def escaped(text: str) -> str:
    """Return text as the inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def read_string(tape: Tape, out: Out) -> Reading[None]:
    """Read a string with its quotes."""
    yield from tape.expect('"')
    out('"')
    while True:
        end = _PLAIN.match(tape.text, tape.at).end()             # type: ignore[union-attr]
        if end > tape.at:
            out(tape.take(end))
        letter = yield from tape.peek()
        if letter == '"':
            out(tape.take(tape.at + 1))
            return
        if letter == "\\":
            yield from _escape(tape, out)
        elif letter == MARK:                                     # a mark inside of a string is but its letters
            tape.take(tape.at + 1)
        elif not letter:
            raise Malformed
        elif letter < " ":
            out(escaped(tape.take(tape.at + 1)))


def _escape(tape: Tape, out: Out) -> Reading[None]:
    """Read an escape; it comes out when it is whole."""
    text = tape.take(tape.at + 1)
    letter = yield from tape.peek()
    if not letter or letter not in '"\\/bfnrtu':
        raise Malformed
    text += tape.take(tape.at + 1)
    for _ in range(4 if letter == "u" else 0):
        digit = yield from tape.peek()
        if digit not in _HEX:
            raise Malformed
        text += tape.take(tape.at + 1)
    out(text)


def read_number(tape: Tape, out: Out) -> Reading[None]:
    """Read a number."""
    state = "start"
    while True:
        letter = yield from tape.peek()
        following = _NUMBER[state].get(_CLASS.get(letter, ""))
        if following is None:
            if state in _WHOLE:
                return
            raise Malformed
        state = following
        out(tape.take(tape.at + 1))


def _read_scalar(tape: Tape, letter: str, out: Out) -> Reading[None]:
    if letter == '"':
        yield from read_string(tape, out)
    elif letter in ("t", "f", "n"):
        for expected in {"t": "true", "f": "false", "n": "null"}[letter]:
            yield from tape.expect(expected)
            out(expected)
    else:
        yield from read_number(tape, out)


def read_value(tape: Tape, out: Out) -> Reading[None]:
    """Read one value, which begins after blanks; `out` sees its text as it is written. Raises Malformed where it is none, or at the end."""
    yield from read_nested(tape, out, _read_scalar, _read_key, out)


def _read_key(tape: Tape, out: Out) -> Reading[None]:
    yield from read_string(tape, out)
    yield from tape.skip_blanks(out)
    yield from tape.expect(":")
    out(":")


def read_nested(tape: Tape, out: Out, scalar: Scalar, key: Key, blanks: Out | None) -> Reading[None]:
    """Read one value of a notation that is JSON but for its scalars and keys; `out` sees JSON.

    With `blanks` they come out too, and a comma before a closing bracket is an error; without them both are left out.
    """
    closers: list[str] = []                                      # of what is open, the innermost last
    while True:
        letter = yield from tape.skip_blanks(blanks)
        if letter in ("{", "["):
            out(tape.take(tape.at + 1))
            closers.append("}" if letter == "{" else "]")
            if (yield from tape.skip_blanks(blanks)) != closers[-1]:
                if letter == "{":
                    yield from key(tape, out)
                continue
        else:
            yield from scalar(tape, letter, out)
        # A value has ended: what encloses it may end too, or go on.
        while closers:
            letter = yield from tape.skip_blanks(blanks)
            if letter not in (closers[-1], ","):
                raise Malformed
            if letter == ",":
                tape.take(tape.at + 1)
                if blanks:
                    out(",")
                if (yield from tape.skip_blanks(blanks)) != closers[-1] or blanks:
                    if not blanks:
                        out(", ")
                    if closers[-1] == "}":
                        yield from key(tape, out)
                    break
            out(tape.take(tape.at + 1))
            closers.pop()
        if not closers:
            return


def read_text(tape: Tape) -> Reading[str]:
    """Read a string and give what it says."""
    pieces: list[str] = []
    yield from read_string(tape, pieces.append)
    return json.loads("".join(pieces))
