"""The `potluck` command. Errors go to stderr as `error:` and `hint:` with exit code 1; data goes to stdout."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from potluck.commands import (
    bench,
    cache,
    chat,
    demo,
    devices,
    doctor,
    join,
    key,
    models,
    plan,
    replan,
    run,
    service,
    status,
    uninstall,
    up,
    versions,
)
from potluck.output_encoding import speak_plainly
from potluck.terminal import data, errors, tell
from transport.errors import PotluckError

app = typer.Typer(
    name="potluck",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _say_version(asked: bool) -> None:
    if asked:
        data.file.write(f"potluck {version('potluck')}\n")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Pool the devices of a home to serve one large language model."""


for command in (
    demo,
    up,
    join,
    devices,
    run,
    chat,
    plan,
    status,
    replan,
    bench,
    models,
    cache,
    key,
    doctor,
    service,
    uninstall,
    versions,
):
    command.register(app)


def print_error(error: PotluckError, console: Console) -> None:
    tell(console, f"[bold red]error:[/bold red] {escape(error.message)}")
    if error.hint:
        tell(console, f"[bold cyan]hint:[/bold cyan] {escape(error.hint)}")


def main() -> None:
    """Runs the command line. Exits with 1 after an error, which it prints, and with 130 when interrupted."""
    speak_plainly()
    try:
        app()
    except PotluckError as error:
        print_error(error, errors)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
