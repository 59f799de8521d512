"""`potluck doctor` runs groups of checks side by side and prints what to do about each problem."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from devices.hardware.interfaces import LanInterface, lan_interfaces
from devices.pairing.known_pools import load_known_pools
from potluck.cli.doctor.check import Check, State, failed_check, worst_state
from potluck.cli.doctor.head_checks import head_checks
from potluck.cli.doctor.member_checks import member_checks, no_pool_checks
from potluck.cli.doctor.probe import DeadlineTask, multicast_problem
from potluck.cli.doctor.this_host import (
    active_firewalls,
    gather_host,
    host_checks,
    lan_network,
    listening_ports,
    multicast_check,
    opening_hint,
)
from potluck.cli.options import JsonOption, with_settings
from potluck.cli.terminal import stderr, stdout
from potluck.host.local_head import LocalHead, running_head
from potluck.system.paths import known_pools_file
from potluck.system.settings import Settings
from transport.errors import NotRunning, PotluckError

_COLOURS: dict[State, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@with_settings("discovery", "lan_host")
def doctor(settings: Settings, json_output: JsonOption = False) -> None:
    """Check this host, its network and its pool, and say what to do about each problem. At most 20 seconds."""
    with stderr.status("Looking at this host, its network and its pool"):
        checks = run_checks(settings)
    state = worst_state(checks)
    if json_output:
        stdout.file.write(json.dumps({"state": state, "checks": [asdict(check) for check in checks]}) + "\n")
    else:
        stdout.print(check_table(checks))
        stdout.print(summary(checks), highlight=False)
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


DOCTOR_TIMEOUT_S = 19.0
_FIREWALL_S = 5.5
_MULTICAST_S = 3.0


def run_checks(settings: Settings, *, timeout_s: float = DOCTOR_TIMEOUT_S) -> list[Check]:
    """Ends in that time; what has not ended then is a problem of its own. Raises ConfigError if Potluck's own folders
    can't be used."""
    deadline = time.monotonic() + timeout_s
    try:
        head: LocalHead | NotRunning = running_head()
    except NotRunning as error:
        head = error
    firewalls = DeadlineTask("the firewall", active_firewalls)
    groups = [CheckGroup("this host", _this_host_group(settings, head))]
    if settings.discovery:
        groups.append(CheckGroup("multicast", _multicast_group()))
    groups.append(CheckGroup("pool", _pool_group(settings, head, firewalls)))
    return [check for part in groups for check in part.checks(deadline)]


class CheckGroup:
    """Checks that follow from one another, in a thread of their own."""

    def __init__(self, name: str, checks: Iterator[Check]) -> None:
        self._name = name
        self._checks = checks
        self._found: list[Check] = []
        self._task: DeadlineTask[None] = DeadlineTask(name, self._run)

    def checks(self, deadline: float) -> list[Check]:
        """Those that there are then, and what has kept the rest away."""
        try:
            self._task.wait(deadline - time.monotonic())
        except PotluckError as error:
            return [*self._found, failed_check(self._name, error)]
        except OSError as error:
            return [*self._found, Check(name=self._name, state="problem", what=error.strerror or str(error))]
        return list(self._found)

    def _run(self) -> None:
        for check in self._checks:
            self._found.append(check)


def _this_host_group(settings: Settings, head: LocalHead | NotRunning) -> Iterator[Check]:
    facts = gather_host(listening_ports(head.pid) if isinstance(head, LocalHead) else ())
    yield from host_checks(facts, is_lan_wanted=settings.lan)


def _multicast_group() -> Iterator[Check]:
    interfaces = lan_interfaces()
    tasks = [DeadlineTask(one.name, partial(multicast_problem, one.address)) for one in interfaces]
    if interfaces:
        yield multicast_check([(one, tried.wait(_MULTICAST_S)) for one, tried in zip(interfaces, tasks, strict=True)])


def _pool_group(
    settings: Settings, head: LocalHead | NotRunning, firewalls: DeadlineTask[tuple[str, ...]]
) -> Iterator[Check]:
    firewall = _opening_hint(firewalls, lan_interfaces())
    if isinstance(head, LocalHead):
        yield from head_checks(head, firewall=firewall)
        return
    pools = load_known_pools(known_pools_file())
    if pools:
        yield from member_checks(pools[0], settings, firewall=firewall)
    else:
        yield from no_pool_checks(settings, head)


def _opening_hint(firewalls: DeadlineTask[tuple[str, ...]], interfaces: Sequence[LanInterface]) -> str:
    try:
        active = firewalls.wait(_FIREWALL_S)
    except PotluckError:
        active = ()
    return opening_hint(active, lan_network(interfaces))
