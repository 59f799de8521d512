"""`potluck doctor`: what works on this host and in its pool, and what to do about the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from potluck.doctor.check import Check, State, worst
from potluck.doctor.examine import examine
from potluck.options import ConfigOption, JsonOption, LanHostOption, NoDiscoveryOption, settings_with
from potluck.terminal import data, errors

_COLOURS: dict[State, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    json_output: JsonOption = False,
    no_discovery: NoDiscoveryOption = False,
    lan_host: LanHostOption = None,
    config: ConfigOption = None,
) -> None:
    """Check this host, its network and its pool, and say what to do about each problem. At most 20 seconds."""
    settings = settings_with(config, no_discovery=no_discovery, lan_host=lan_host)
    with errors.status("Looking at this host, its network and its pool"):
        checks = examine(settings)
    state = worst(checks)
    if json_output:
        data.file.write(json.dumps({"state": state, "checks": [asdict(check) for check in checks]}) + "\n")
    else:
        data.print(check_table(checks))
        data.print(summary(checks), highlight=False)
    if state == "problem":
        raise typer.Exit(1)


def check_table(checks: Sequence[Check]) -> Table:
    """A check a line, its hint below it. All of it fits into 80 characters; what is long is folded, never cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=24)
    table.add_column(overflow="fold")
    for check in checks:
        colour = _COLOURS[check.state]
        table.add_row(f"[{colour}]{check.state}[/{colour}]", escape(check.name), escape(check.what))
        if check.hint:
            table.add_row("", "", Padding(f"[cyan]→[/cyan] {escape(check.hint)}", (0, 0, 0, 2)))
    return table


def summary(checks: Sequence[Check]) -> str:
    """ "12 checks: 1 problem, 2 warnings"."""
    parts = []
    for state in ("problem", "warning"):
        count = sum(check.state == state for check in checks)
        if count:
            parts.append(f"{count} {state}{'s' if count > 1 else ''}")
    return f"{len(checks)} checks: {', '.join(parts) or 'all is well'}"
