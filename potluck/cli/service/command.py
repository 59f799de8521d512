"""`potluck service install, uninstall, status` keep Potluck running for this user."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from devices.pairing.known_pools import load_known_pools
from potluck.cli.options import JsonOption
from potluck.cli.service.launchd import Launchd
from potluck.cli.service.manager import ServiceManager, ServiceOutcome, make_job
from potluck.cli.service.systemd import Systemd
from potluck.cli.service.task_scheduler import TaskScheduler
from potluck.cli.terminal import show_line, stderr, stdout
from potluck.store.sources import parse_source
from potluck.store.store import Store
from potluck.system.paths import config_file, known_pools_file
from potluck.system.settings import load_settings
from transport.errors import ConfigError, ModelNotFound


def service_manager() -> ServiceManager:
    """This host's. Elsewhere than on a Mac and Windows it is systemd, whether or not that answers."""
    if sys.platform == "darwin":
        return Launchd()
    return TaskScheduler() if sys.platform == "win32" else Systemd()


service_app = typer.Typer(
    no_args_is_help=True, help="Keep Potluck running: started when you log in, and should it fail."
)


@service_app.command("install")
def install(
    model: Annotated[str | None, typer.Option("--model", help="Serve this model, as potluck up does.")] = None,
    join: Annotated[bool, typer.Option("--join", help="Join the head that this host is paired with.")] = False,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Start it now, and from now on.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and do nothing.")] = False,
) -> None:
    """Have this host serve a model, or join its head, without a terminal."""
    load_settings(config_file())  # With a file that does not load the service could only fail, again and again.
    job = make_job(model, join=join)
    manager = service_manager()
    if dry_run:
        show_line(stderr, f"{manager.file} would be:", markup=False)
        stdout.file.write(manager.text(job))
        return
    if model is not None:
        _check(model)
    elif not load_known_pools(known_pools_file()):
        raise ConfigError("this host is paired with no head yet", hint="pair it once, by hand: potluck join CODE")
    done = manager.install(job, start=start)
    _show(f"Installed, and {job.description}: {manager.file}", stdout)
    _show_outcome(done, stdout)


@service_app.command("uninstall")
def uninstall() -> None:
    """Stop the service and remove it."""
    _show_outcome(service_manager().uninstall(), stdout)


@service_app.command("status")
def status(json_output: JsonOption = False) -> None:
    """Show whether the service is installed, and whether it runs."""
    state = service_manager().state()
    facts = {
        "installed": state.file is not None,
        "file": str(state.file) if state.file is not None else None,
        "running": state.is_running,
        "starts_by_itself": state.starts_by_itself,
        "detail": state.detail,
    }
    if json_output:
        stdout.file.write(json.dumps(facts) + "\n")
        return
    if state.file is None:
        _show("No service is installed. Install one with: potluck service install --model MODEL (or --join)", stdout)
        return
    runs = {True: "It runs", False: "It does not run", None: "Whether it runs could not be found out"}[state.is_running]
    _show(f"Installed: {state.file}", stdout)
    _show(f"{runs} ({state.detail})" if state.detail else runs, stdout)
    if state.is_running and state.starts_by_itself is False:
        _show("It will not be started when you log in.", stdout)


def _check(model: str) -> None:
    """Raises PotluckError for what the service could only fail with, again and again."""
    try:
        Store().show(model)
    except ModelNotFound:
        parse_source(model)
        _show(f"{model} is not here yet: the service pulls it when it is first started.", stderr)


def _show_outcome(done: ServiceOutcome, console: Console) -> None:
    for line in done.messages:
        _show(line, console)
    if done.next_commands:
        _show("To do by hand:", console)
    for command in done.next_commands:
        _show(f"  {command}", console)


def _show(line: str, console: Console) -> None:
    show_line(console, line, markup=False)
