"""The `potluck` command imports one subcommand and prints an error as `error:` and `hint:`, with exit code 1."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from potluck.cli.terminal import replace_unencodable, show_line, stderr, stdout
from transport.errors import PotluckError

# Which function, or group of commands, each command is, in the order of `--help`.
COMMANDS = {
    "demo": "demo:demo",
    "up": "up:up",
    "join": "join:join",
    "devices": "devices:devices",
    "invite": "devices:invite",
    "approve": "devices:approve",
    "rename": "devices:rename",
    "revoke": "devices:revoke",
    "forget": "devices:forget",
    "run": "chat:run",
    "chat": "chat:chat",
    "plan": "plan:plan",
    "status": "status:status",
    "replan": "status:replan",
    "bench": "bench:bench",
    "pull": "models:pull",
    "list": "models:list_models",
    "show": "models:show",
    "rm": "models:remove",
    "cache": "cache:cache_app",
    "config": "config:config",
    "key": "key:key",
    "doctor": "doctor.command:doctor",
    "service": "service.command:service_app",
    "uninstall": "uninstall.command:uninstall",
    "version": "version:version_command",
}
# Commands whose arguments another program reads.
_PASSED_ON: dict[str, dict[str, Any]] = {
    "bench": {
        "add_help_option": False,
        "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
    }
}


def _print_version(requested: bool) -> None:
    if requested:
        stdout.file.write(f"potluck {version('potluck')}\n")
        raise typer.Exit


def _global_options(
    _version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_print_version, is_eager=True)
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
    app.callback()(_global_options)
    for name in arguments[:1] if arguments and arguments[0] in COMMANDS else COMMANDS:
        module, _, attribute = COMMANDS[name].partition(":")
        command = getattr(importlib.import_module(f"potluck.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name, **_PASSED_ON.get(name, {}))(command)
    return app


def print_error(error: PotluckError, console: Console) -> None:
    show_line(console, f"[bold red]error:[/bold red] {escape(error.message)}")
    if error.hint:
        show_line(console, f"[bold cyan]hint:[/bold cyan] {escape(error.hint)}")


def main() -> None:
    """Runs the command line. Exits with 1 after an error, which it prints, and with 130 when interrupted."""
    replace_unencodable()
    try:
        app_for(sys.argv[1:])()
    except PotluckError as error:
        print_error(error, stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
