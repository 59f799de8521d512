"""Who is in a pool, as a user reads it and as JSON: on the head who has paired and who waits, elsewhere the head."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from rich.markup import escape
from rich.table import Table

from devices.identity import fingerprint
from devices.known_pools import KnownPool
from devices.members import Member


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
        table.add_row(escape(row.name), row.fingerprint, escape(row.platform), _state(row), _when(since, now))
    for one in waiting:
        table.add_row(escape(one.name), one.fingerprint, escape(one.platform), "[yellow]waits[/yellow]", "")
    return table


def joined_line(pool: KnownPool, *, is_joining: bool) -> str:
    """Of a pool that this host has joined, in rich markup."""
    door = f", at {pool.doors[0]} when it was last seen" if pool.doors else ""
    line = f"This host is {escape(pool.my_name)} in the pool of {escape(pool.name)} (key {fingerprint(pool.key)}{door})"
    return line if is_joining else f"{line}. potluck join takes it there"


def joined_json(pool: KnownPool) -> dict[str, Any]:
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


def _when(at: float, now: float) -> str:
    """ "today 18:03", "2026-11-24"."""
    then, today = time.localtime(at), time.localtime(now)
    is_today = (then.tm_year, then.tm_yday) == (today.tm_year, today.tm_yday)
    return time.strftime("today %H:%M" if is_today else "%Y-%m-%d", then)
