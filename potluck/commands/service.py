"""`potluck service install | uninstall | status`: keep Potluck running for this user."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from devices.known_pools import load_known_pools
from potluck.options import JsonOption
from potluck.paths import known_pools_file
from potluck.service.job import job_of
from potluck.service.keeper import keeper
from potluck.service.state import Done
from potluck.store import Store
from potluck.store.sources import parse_source
from potluck.terminal import data, errors, tell
from transport.errors import ConfigError, ModelNotFound

_group = typer.Typer(no_args_is_help=True, help="Keep Potluck running: started when you log in, and should it fail.")


def register(app: typer.Typer) -> None:
    app.add_typer(_group, name="service")


@_group.command("install")
def install(
    model: Annotated[str | None, typer.Option("--model", help="Serve this model, as potluck up does.")] = None,
    join: Annotated[bool, typer.Option("--join", help="Join the head that this host is paired with.")] = False,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Start it now, and from now on.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and do nothing.")] = False,
) -> None:
    """Have this host serve a model, or join its head, without a terminal."""
    job = job_of(model, join=join)
    kept_by = keeper()
    if dry_run:
        tell(errors, f"{kept_by.file} would be:", markup=False)
        data.file.write(kept_by.text(job))
        return
    if model is not None:
        _check(model)
    elif not load_known_pools(known_pools_file()):
        raise ConfigError("this host is paired with no head yet", hint="pair it once, by hand: potluck join CODE")
    done = kept_by.install(job, start=start)
    _say(f"Installed, and {job.what}: {kept_by.file}", data)
    _tell(done, data)


@_group.command("uninstall")
def uninstall() -> None:
    """Stop the service and remove it."""
    _tell(keeper().uninstall(), data)


@_group.command("status")
def status(json_output: JsonOption = False) -> None:
    """Show whether the service is installed, and whether it runs."""
    state = keeper().state()
    facts = {
        "installed": state.file is not None,
        "file": str(state.file) if state.file is not None else None,
        "running": state.is_running,
        "starts_by_itself": state.starts_by_itself,
        "detail": state.detail,
    }
    if json_output:
        data.file.write(json.dumps(facts) + "\n")
        return
    if state.file is None:
        _say("No service is installed. Install one with: potluck service install --model MODEL (or --join)", data)
        return
    runs = {True: "It runs", False: "It does not run", None: "Whether it runs could not be found out"}[state.is_running]
    _say(f"Installed: {state.file}", data)
    _say(f"{runs} ({state.detail})" if state.detail else runs, data)
    if state.is_running and state.starts_by_itself is False:
        _say("It will not be started when you log in.", data)


def _check(model: str) -> None:
    """Raises PotluckError for what the service could only fail with, again and again."""
    try:
        Store().show(model)
    except ModelNotFound:
        parse_source(model)
        _say(f"{model} is not here yet: the service pulls it when it is first started.", errors)


def _tell(done: Done, console: Console) -> None:
    for line in done.said:
        _say(line, console)
    if done.to_do:
        _say("To do by hand:", console)
    for command in done.to_do:
        _say(f"  {command}", console)


def _say(line: str, console: Console) -> None:
    tell(console, line, markup=False)
