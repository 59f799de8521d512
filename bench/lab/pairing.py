"""Hosts of a lab that are paired before anything runs in them, for measurements that are not about pairing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.lab.lab import Lab
from devices.identity import load_keys
from devices.known_pools import KnownPool, save_known_pool
from devices.platform_name import platform_name
from devices.roster import RosterFile

DOOR_PORT = 11501


def pair_hosts(lab: Lab, head: str, others: Sequence[str], *, port: int = DOOR_PORT) -> str:
    """Write what pairing would leave behind: the head's roster and the others' known pools. Returns the head's door,
    "ADDRESS:PORT". A head started there with `head_options` lets the others in by `join_options`."""
    door = f"{lab.address(head)}:{port}"
    home = home_of(lab, head)
    head_key = load_keys(home / "identity").public
    roster = RosterFile(home / "roster.json", name=head)
    for name in others:
        own = home_of(lab, name)
        member = roster.add(load_keys(own / "identity").public, name, platform_name())
        pool = KnownPool(pool=roster.read().pool, key=head_key, name=head, my_name=member.name, doors=(door,))
        save_known_pool(own / "pools.json", pool)
    return door


def head_options(lab: Lab, head: str, *, port: int = DOOR_PORT) -> tuple[str, ...]:
    """Options of `potluck up` in that host."""
    return (*_network(lab, head), "--lan-port", str(port))


def join_options(lab: Lab, host: str, door: str) -> tuple[str, ...]:
    """Options of `potluck join` in a host that is paired."""
    return ("--head", door, *_network(lab, host))


def home_of(lab: Lab, host: str) -> Path:
    """The host's POTLUCK_HOME."""
    return lab.facts.folder / host / "home"


def _network(lab: Lab, host: str) -> tuple[str, ...]:
    return ("--no-discovery", "--lan-host", lab.address(host), "--host-name", host)
