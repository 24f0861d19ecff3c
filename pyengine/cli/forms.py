"""The command line's forms: MODEL [PROMPT], and the commands; modules that are imported with the command line add theirs to `commands`."""

from __future__ import annotations

import re
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pyengine.cli import words

HELP = {"help_option_names": ["-h", "--help"]}
_settings: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": "rich", "context_settings": HELP}


_NUMBERS = {int: re.compile("-?[0-9]{1,18}"), float: re.compile(r"-?([0-9]{1,15}(\.[0-9]{0,15})?|\.[0-9]{1,15})")}


class ReaderLeft(Exception):
    """Whoever read standard output has closed it."""


class _Plain:
    """A reader of texts and plain numbers that are as they must be; all else, and what is wrong, goes to Typer's own of that parameter.

    That one is pydantic's, which takes longer to import than NumPy.
    """

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the value of a parameter. Raises: as Typer's."""
        kind, many = param.type_descriptor.annotation, param.multiple or param.nargs == -1
        info = param.type_descriptor.parameter_info
        if value is None:
            return () if many else None
        if info.parser is None and (not many and kind is str and type(value) is str
                                    or many and kind == list[str] and all(type(v) is str for v in value) and not isinstance(value, str)):
            return list(value) if many else value
        if info.parser is None and not many and kind in _NUMBERS and not info.clamp:
            number = kind(value) if type(value) is str and _NUMBERS[kind].fullmatch(value) else value
            if type(number) is kind and (info.min is None or number >= info.min) and (info.max is None or number <= info.max):
                return number
        param._runtime_param = None
        return param.get_runtime_param().coerce(value, param=param, ctx=ctx)


class _Read:
    """A form whose parameters are read so."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, `--help` too; where this version of Typer would read them by pydantic, with a reader of plain values."""
        found: list[Any] = super().get_params(ctx)           # type: ignore[misc]
        for p in found:
            if getattr(p, "_runtime_param", self) is None and hasattr(p, "get_runtime_param") and hasattr(p, "type_descriptor"):
                p._runtime_param = _Plain()
        return found


class _Group(_Read, TyperGroup):
    """All commands."""


class Form(_Read, TyperCommand):
    """A form of the command that knows other programs' options too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments. Raises: RequestError for an option of others that has nothing like it here."""
        takes_value = {name: not getattr(p, "is_flag", True) for p in self.params for name in p.opts if name.startswith("-")}
        return super().parse_args(ctx, words.translated(args, takes_value))

    def invoke(self, ctx: Any) -> Any:
        """Do it. Raises: ReaderLeft."""
        try:
            found = super().invoke(ctx)
            sys.stdout.flush()
            return found
        except BrokenPipeError:
            raise ReaderLeft from None


main_form = typer.Typer(**_settings)
commands = typer.Typer(cls=_Group, **_settings)
