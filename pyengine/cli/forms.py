"""The command line's forms: MODEL [PROMPT], and the commands; modules that are imported with the command line add theirs to `commands`."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand

from pyengine.cli import words

HELP = {"help_option_names": ["-h", "--help"]}
_settings: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": "rich", "context_settings": HELP}
main_form = typer.Typer(**_settings)
commands = typer.Typer(**_settings)


class ReaderLeft(Exception):
    """Whoever read standard output has closed it."""


class Form(TyperCommand):
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
