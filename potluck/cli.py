"""The `potluck` command. Errors go to stderr as `error:` and `hint:` with exit code 1; data goes to stdout."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from potluck.output_encoding import speak_plainly
from potluck.terminal import data, errors, tell
from transport.errors import PotluckError

# Who registers which commands, in the order of `--help`.
MODULES: dict[str, tuple[str, ...]] = {
    "demo": ("demo",),
    "up": ("up",),
    "join": ("join",),
    "devices": ("devices", "invite", "approve", "rename", "revoke", "forget"),
    "run": ("run",),
    "chat": ("chat",),
    "plan": ("plan",),
    "status": ("status",),
    "replan": ("replan",),
    "bench": ("bench",),
    "models": ("pull", "list", "show", "rm"),
    "cache": ("cache",),
    "key": ("key",),
    "doctor": ("doctor",),
    "service": ("service",),
    "uninstall": ("uninstall",),
    "versions": ("version",),
}


def _say_version(asked: bool) -> None:
    if asked:
        data.file.write(f"potluck {version('potluck')}\n")
        raise typer.Exit


def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Pool the devices of a home to serve one large language model."""


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """With the command that they begin with, or with all where they begin with none: what others import takes half a
    second."""
    app = typer.Typer(
        name="potluck",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_options)
    named = [module for module, commands in MODULES.items() if arguments and arguments[0] in commands]
    for module in named or MODULES:
        importlib.import_module(f"potluck.commands.{module}").register(app)
    return app


def print_error(error: PotluckError, console: Console) -> None:
    tell(console, f"[bold red]error:[/bold red] {escape(error.message)}")
    if error.hint:
        tell(console, f"[bold cyan]hint:[/bold cyan] {escape(error.hint)}")


def main() -> None:
    """Runs the command line. Exits with 1 after an error, which it prints, and with 130 when interrupted."""
    speak_plainly()
    try:
        app_for(sys.argv[1:])()
    except PotluckError as error:
        print_error(error, errors)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
