"""`potluck devices, invite, approve, rename, revoke, forget` show and change who is in the pool."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from devices.pairing.identity import fingerprint
from devices.pairing.known_pools import KnownPool, forget_known_pool, load_known_pools
from devices.pairing.roster import Member, RosterFile, checked_name
from potluck.cli.invitation import show_invitation
from potluck.cli.options import JsonOption
from potluck.cli.running_processes import joining_processes
from potluck.cli.terminal import show_line, show_table, stdout
from potluck.head.client import get_from_head, post_to_head
from potluck.host.local_head import running_head
from potluck.system.paths import known_pools_file, roster_file
from transport.errors import ConfigError, NotRunning, PotluckError


class InviteReply(msgspec.Struct, frozen=True):
    """The head's fresh invite and code, and for how long they are good."""

    invite: str
    code: str
    code_expires_s: float
    invite_expires_s: float


class ApproveReply(msgspec.Struct, frozen=True):
    """Who was let in, or not."""

    name: str = ""


class ConnectedHost(msgspec.Struct, frozen=True):
    name: str


class HeadHosts(msgspec.Struct, frozen=True):
    """Of the head's status, the hosts that are connected (None if it does not say) and those that wait."""

    hosts: list[ConnectedHost] | None = None
    waiting: list[WaitingRow] = []


def devices(json_output: JsonOption = False) -> None:
    """Show the hosts that have paired with this one, and those that wait; on a joined host, whose pool it is in."""
    roster = RosterFile(roster_file()).read()
    head_hosts = _hosts_of_head()
    connected = None if head_hosts.hosts is None else frozenset(host.name for host in head_hosts.hosts)
    rows = [device_row(member, connected) for member in roster.members]
    joined = load_known_pools(known_pools_file())
    if json_output:
        answer = {
            "pool": roster.pool,
            "name": roster.name,
            "devices": [msgspec.to_builtins(row) for row in rows],
            "waiting": [msgspec.to_builtins(row) for row in head_hosts.waiting],
            "joined": [joined_pool_json(pool) for pool in joined],
        }
        stdout.file.write(json.dumps(answer) + "\n")
        return
    if rows or head_hosts.waiting:
        show_table(stdout, device_table(rows, head_hosts.waiting, time.time()))
    for waiting in head_hosts.waiting:
        show_line(stdout, f"{escape(waiting.name)} waits to be let in, or not: potluck approve {escape(waiting.name)}")
    is_joining = bool(joined) and bool(joining_processes())
    for pool in joined:
        show_line(stdout, joined_pool_line(pool, is_joining=is_joining))
    if not rows and not head_hosts.waiting and not joined:
        show_line(
            stdout, "No device has paired with this host. Start a head with potluck up, and add one: potluck invite"
        )


def invite(json_output: JsonOption = False) -> None:
    """Make a new invite and a new code, with which another host can join; those before are void."""
    answer = post_to_head("/potluck/invite", {}, InviteReply)
    if json_output:
        stdout.file.write(json.dumps(msgspec.to_builtins(answer)) + "\n")
        return
    show_invitation(
        stdout,
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
    answer = post_to_head("/potluck/approve", {"name": name, "allow": not refuse}, ApproveReply)
    show_line(stdout, f"{escape(answer.name or name)} is {'not let in' if refuse else 'let in'}")


def rename(
    old: Annotated[str, typer.Argument(help="The host's name, or its key's fingerprint.")],
    new: Annotated[str, typer.Argument(help="What to call it.")],
) -> None:
    """Give a host of the pool another name."""
    roster = RosterFile(roster_file())
    is_own = old == roster.read().name
    before = old if is_own else roster.find(old).name
    roster.rename(old, new)
    # A head has told its own name to everyone there.
    when = "when its head is started again" if is_own and _head_runs() else "now"
    show_line(stdout, f"{escape(before)} is called {escape(checked_name(new))} {when}")


def revoke(
    name: Annotated[str, typer.Argument(help="The host's name, or its key's fingerprint.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Put a host out of the pool, at once and for good: it can only come back by pairing anew."""
    roster = RosterFile(roster_file())
    if name == roster.read().name:
        raise ConfigError(f"{name} is this pool's head, which can't be put out of it", hint="stop it with Ctrl-C there")
    member = roster.find(name)
    words = f"{escape(member.name)} (key {fingerprint(member.key)})"
    if not yes and not member.is_revoked:
        show_line(
            stdout,
            f"{words} is disconnected within a second if it is there, its key is not accepted any more, and the layers "
            "that it holds go to other devices. What it has downloaded or heard stays on it.",
        )
        if not _is_terminal():
            raise ConfigError("nobody can be asked here", hint="say it with --yes")
        if not typer.confirm(f"Revoke {member.name}?"):
            raise typer.Exit(1)
    roster.revoke(member.name)
    show_line(stdout, f"{words} is revoked")


def forget(
    pool: Annotated[
        str | None, typer.Argument(help="The head's name, or its key's fingerprint. Default: the only one known.")
    ] = None,
) -> None:
    """Forget a pool that this host has joined: it will not join there again unless it is paired anew."""
    forgotten = forget_known_pool(known_pools_file(), pool)
    head = f"{escape(forgotten.name)} (key {fingerprint(forgotten.key)})"
    show_line(
        stdout,
        f"The pool of {head} is forgotten. If this host was not revoked there, its head still knows it as "
        f"{escape(forgotten.my_name)}; there: potluck revoke {escape(forgotten.my_name)}",
    )
    if pids := joining_processes():
        show_line(
            stdout, f"potluck join still runs here (process {pids[0]}), in that pool or another one: Ctrl-C ends it"
        )


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _head_runs() -> bool:
    try:
        running_head()
        return True
    except NotRunning:
        return False


def _hosts_of_head() -> HeadHosts:
    try:
        return get_from_head("/potluck/status", HeadHosts)
    except PotluckError:
        return HeadHosts()


class DeviceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A host of the pool. `connected` is None without a running head that says it."""

    name: str
    fingerprint: str
    platform: str
    paired_at: float
    revoked_at: float | None
    connected: bool | None


class WaitingRow(msgspec.Struct, frozen=True, kw_only=True):
    """A host that has the code or the invite, and waits to be let in."""

    name: str
    fingerprint: str
    platform: str
    address: str


def device_row(member: Member, connected: frozenset[str] | None) -> DeviceRow:
    return DeviceRow(
        name=member.name,
        fingerprint=fingerprint(member.key),
        platform=member.platform,
        paired_at=member.paired_at,
        revoked_at=member.revoked_at,
        connected=None if connected is None else member.name in connected and not member.is_revoked,
    )


def device_table(rows: Sequence[DeviceRow], waiting: Sequence[WaitingRow], now: float) -> Table:
    """One host a row, within 80 characters; "since" is when it paired, or was revoked."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("device", "key", "platform", "state", "since"):
        table.add_column(heading, no_wrap=heading not in ("device", "platform"), overflow="fold")
    for row in rows:
        since = row.paired_at if row.revoked_at is None else row.revoked_at
        table.add_row(escape(row.name), row.fingerprint, escape(row.platform), _state(row), _date_text(since, now))
    for one in waiting:
        table.add_row(escape(one.name), one.fingerprint, escape(one.platform), "[yellow]waits[/yellow]", "")
    return table


def joined_pool_line(pool: KnownPool, *, is_joining: bool) -> str:
    """Of a pool that this host has joined, in rich markup."""
    door = f", at {pool.doors[0]} when it was last seen" if pool.doors else ""
    line = f"This host is {escape(pool.my_name)} in the pool of {escape(pool.name)} (key {fingerprint(pool.key)}{door})"
    return line if is_joining else f"{line}. potluck join takes it there"


def joined_pool_json(pool: KnownPool) -> dict[str, Any]:
    return {
        "head": pool.name,
        "fingerprint": fingerprint(pool.key),
        "name": pool.my_name,
        "doors": list(pool.doors),
    }


def _state(row: DeviceRow) -> str:
    if row.revoked_at is not None:
        return "[red]revoked[/red]"
    return {None: "–", True: "[green]connected[/green]", False: "away"}[row.connected]


def _date_text(at: float, now: float) -> str:
    """ "today 18:03", "2026-11-24"."""
    then, today = time.localtime(at), time.localtime(now)
    is_today = (then.tm_year, then.tm_yday) == (today.tm_year, today.tm_yday)
    return time.strftime("today %H:%M" if is_today else "%Y-%m-%d", then)
