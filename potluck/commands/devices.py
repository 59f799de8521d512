"""`potluck devices | rename | revoke | invite | approve | forget`: who is in the pool, and who comes in."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import msgspec
import typer
from rich.markup import escape

from devices.identity import fingerprint
from devices.known_pools import forget_known_pool, load_known_pools
from devices.members import checked_name
from devices.roster import RosterFile
from potluck.devices_view import WaitingRow, device_row, device_table, joined_json, joined_line
from potluck.head_api import get_from_head, post_to_head
from potluck.head_file import running_head
from potluck.invitation import show_invitation
from potluck.leaving.in_use import joining_processes
from potluck.options import JsonOption
from potluck.paths import known_pools_file, roster_file
from potluck.terminal import data, show_table, tell
from transport.errors import ConfigError, NotRunning, PotluckError


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
    """Of the head's status, the hosts that are connected (None if it does not say) and those that wait."""

    hosts: list[HostReport] | None = None
    waiting: list[WaitingRow] = []


def register(app: typer.Typer) -> None:
    app.command("devices")(devices)
    app.command("invite")(invite)
    app.command("approve")(approve)
    app.command("rename")(rename)
    app.command("revoke")(revoke)
    app.command("forget")(forget)


def devices(json_output: JsonOption = False) -> None:
    """Show the hosts that have paired with this one, and those that wait; on a joined host, whose pool it is in."""
    roster = RosterFile(roster_file()).read()
    seen = _seen_by_head()
    connected = None if seen.hosts is None else frozenset(host.name for host in seen.hosts)
    rows = [device_row(member, connected) for member in roster.members]
    joined = load_known_pools(known_pools_file())
    if json_output:
        answer = {
            "pool": roster.pool,
            "name": roster.name,
            "devices": [msgspec.to_builtins(row) for row in rows],
            "waiting": [msgspec.to_builtins(row) for row in seen.waiting],
            "joined": [joined_json(pool) for pool in joined],
        }
        data.file.write(json.dumps(answer) + "\n")
        return
    if rows or seen.waiting:
        show_table(data, device_table(rows, seen.waiting, time.time()))
    for waiting in seen.waiting:
        tell(data, f"{escape(waiting.name)} waits to be let in, or not: potluck approve {escape(waiting.name)}")
    is_joining = bool(joined) and bool(joining_processes())
    for pool in joined:
        tell(data, joined_line(pool, is_joining=is_joining))
    if not rows and not seen.waiting and not joined:
        tell(data, "No device has paired with this host. Start a head with potluck up, and add one: potluck invite")


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
    tell(data, f"{escape(answer.name or name)} is {'not let in' if refuse else 'let in'}")


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
    tell(data, f"{escape(before)} is called {escape(checked_name(new))} {when}")


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
        tell(
            data,
            f"{words} is disconnected within a second if it is there, its key is not accepted any more, and the layers "
            "that it holds go to other devices. What it has downloaded or heard stays on it.",
        )
        if not _is_terminal():
            raise ConfigError("nobody can be asked here", hint="say it with --yes")
        if not typer.confirm(f"Revoke {member.name}?"):
            raise typer.Exit(1)
    roster.revoke(member.name)
    tell(data, f"{words} is revoked")


def forget(
    pool: Annotated[
        str | None, typer.Argument(help="The head's name, or its key's fingerprint. Default: the only one known.")
    ] = None,
) -> None:
    """Forget a pool that this host has joined: it will not join there again unless it is paired anew."""
    forgotten = forget_known_pool(known_pools_file(), pool)
    head = f"{escape(forgotten.name)} (key {fingerprint(forgotten.key)})"
    tell(
        data,
        f"The pool of {head} is forgotten. If this host was not revoked there, its head still knows it as "
        f"{escape(forgotten.my_name)}; there: potluck revoke {escape(forgotten.my_name)}",
    )
    if pids := joining_processes():
        tell(data, f"potluck join still runs here (process {pids[0]}), in that pool or another one: Ctrl-C ends it")


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _head_runs() -> bool:
    try:
        running_head()
        return True
    except NotRunning:
        return False


def _seen_by_head() -> HostsReport:
    try:
        return get_from_head("/potluck/status", HostsReport)
    except PotluckError:
        return HostsReport()
