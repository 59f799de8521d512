"""`potluck devices | rename | revoke | invite | approve | forget`: who is in the pool, and who comes in."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from devices.identity import fingerprint
from devices.known_pools import forget_known_pool
from devices.members import Member, checked_name
from devices.roster import RosterFile
from potluck.head_api import get_from_head, post_to_head
from potluck.invitation import show_invitation
from potluck.options import JsonOption
from potluck.paths import known_pools_file, roster_file
from potluck.terminal import data
from transport.errors import ConfigError, PotluckError


class InviteAnswer(msgspec.Struct, frozen=True):
    """The head's fresh invite and code, and for how long they are good."""

    invite: str
    code: str
    code_expires_s: float
    invite_expires_s: float


class ApproveAnswer(msgspec.Struct, frozen=True):
    """Who was let in, or not."""

    name: str = ""


class HostReport(msgspec.Struct, frozen=True):
    name: str


class HostsReport(msgspec.Struct, frozen=True):
    """Of the head's status, the hosts that are connected; None if it does not say."""

    hosts: list[HostReport] | None = None


class DeviceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A host of the pool. `connected` is None without a running head that says it."""

    name: str
    fingerprint: str
    platform: str
    paired_at: float
    revoked_at: float | None
    connected: bool | None


def register(app: typer.Typer) -> None:
    app.command("devices")(devices)
    app.command("invite")(invite)
    app.command("approve")(approve)
    app.command("rename")(rename)
    app.command("revoke")(revoke)
    app.command("forget")(forget)


def devices(json_output: JsonOption = False) -> None:
    """Show the hosts that have paired with this one."""
    roster = RosterFile(roster_file()).read()
    connected = _connected()
    rows = [_row(member, connected) for member in roster.members]
    if json_output:
        answer = {"pool": roster.pool, "name": roster.name, "devices": [msgspec.to_builtins(row) for row in rows]}
        data.file.write(json.dumps(answer) + "\n")
        return
    if not rows:
        data.print("No device has paired with this host. Start a head with potluck up, and add one: potluck invite")
        return
    data.print(_table(rows, time.time()))


def invite(json_output: JsonOption = False) -> None:
    """Make a new invite and a new code, with which another host can join; those before are void."""
    answer = post_to_head("/potluck/invite", {}, InviteAnswer)
    if json_output:
        data.file.write(json.dumps(msgspec.to_builtins(answer)) + "\n")
        return
    show_invitation(
        data,
        answer.invite,
        answer.code,
        code_expires_s=answer.code_expires_s,
        invite_expires_s=answer.invite_expires_s,
    )


def approve(
    name: Annotated[str, typer.Argument(help="The host that waits, by its name or its key's fingerprint.")],
    refuse: Annotated[bool, typer.Option("--refuse", help="Do not let it in.")] = False,
) -> None:
    """Let a host in that has the code or the invite and waits."""
    answer = post_to_head("/potluck/approve", {"name": name, "allow": not refuse}, ApproveAnswer)
    data.print(f"{escape(answer.name or name)} is {'not let in' if refuse else 'let in'}", highlight=False)


def rename(
    old: Annotated[str, typer.Argument(help="The host's name, or its key's fingerprint.")],
    new: Annotated[str, typer.Argument(help="What to call it.")],
) -> None:
    """Give a host of the pool another name."""
    roster = RosterFile(roster_file())
    before = old if old == roster.read().name else roster.find(old).name
    roster.rename(old, new)
    data.print(f"{escape(before)} is called {escape(checked_name(new))} now", highlight=False)


def revoke(
    name: Annotated[str, typer.Argument(help="The host's name, or its key's fingerprint.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Put a host out of the pool, at once and for good: it can only come back by pairing anew."""
    roster = RosterFile(roster_file())
    member = roster.find(name)
    words = f"{escape(member.name)} (key {fingerprint(member.key)})"
    if not yes and not member.is_revoked:
        data.print(
            f"{words} is disconnected within a second if it is there, its key is not accepted any more, and the layers "
            "that it holds go to other devices. What it has downloaded or heard stays on it.",
            highlight=False,
            soft_wrap=True,
        )
        if not _is_terminal():
            raise ConfigError("nobody can be asked here", hint="say it with --yes")
        if not typer.confirm(f"Revoke {member.name}?"):
            raise typer.Exit(1)
    roster.revoke(member.name)
    data.print(f"{words} is revoked", highlight=False)


def forget(
    pool: Annotated[
        str | None, typer.Argument(help="The head's name, or its key's fingerprint. Default: the only one known.")
    ] = None,
) -> None:
    """Forget a pool that this host has joined: it will not join there again unless it is paired anew."""
    forgotten = forget_known_pool(known_pools_file(), pool)
    head = f"{escape(forgotten.name)} (key {fingerprint(forgotten.key)})"
    data.print(
        f"The pool of {head} is forgotten. Its head still knows this host "
        f"as {escape(forgotten.my_name)}; there: potluck revoke {escape(forgotten.my_name)}",
        highlight=False,
        soft_wrap=True,
    )


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _connected() -> frozenset[str] | None:
    try:
        hosts = get_from_head("/potluck/status", HostsReport).hosts
    except PotluckError:
        return None
    return None if hosts is None else frozenset(host.name for host in hosts)


def _row(member: Member, connected: frozenset[str] | None) -> DeviceRow:
    return DeviceRow(
        name=member.name,
        fingerprint=fingerprint(member.key),
        platform=member.platform,
        paired_at=member.paired_at,
        revoked_at=member.revoked_at,
        connected=None if connected is None else member.name in connected and not member.is_revoked,
    )


def _table(rows: list[DeviceRow], now: float) -> Table:
    """One host a row, within 80 characters."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("device", "key", "platform", "paired", "state"):
        table.add_column(heading, no_wrap=heading == "key", overflow="fold")
    for row in rows:
        table.add_row(
            escape(row.name), row.fingerprint, escape(row.platform), _when(row.paired_at, now), _state(row, now)
        )
    return table


def _state(row: DeviceRow, now: float) -> str:
    if row.revoked_at is not None:
        return f"[red]revoked {_when(row.revoked_at, now)}[/red]"
    return {None: "–", True: "[green]connected[/green]", False: "away"}[row.connected]


def _when(at: float, now: float) -> str:
    """ "today 18:03", "2026-11-24"."""
    then, today = time.localtime(at), time.localtime(now)
    is_today = (then.tm_year, then.tm_yday) == (today.tm_year, today.tm_yday)
    return time.strftime("today %H:%M" if is_today else "%Y-%m-%d", then)
