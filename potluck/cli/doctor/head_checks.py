"""Checks of the host that runs the head: is it open to others, and how is each of them connected?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from devices.hardware.interfaces import lan_interfaces
from devices.pairing.client import fetch_pool_info
from devices.pairing.identity import fingerprint, load_keys
from devices.pairing.roster import Member, RosterFile
from potluck.cli.doctor.check import Check, clock_check, failed_check, measure_link, speed_check, version_check
from potluck.cli.doctor.probe import ConnectResult, next_step, try_connect
from potluck.head.client import get_from_head
from potluck.head.network import CONTROL_PORT
from potluck.head.status import HostReport, StatusReport
from potluck.host.local_head import LocalHead
from potluck.host.local_host import parse_pairing_address
from potluck.system.paths import identity_dir, roster_file
from transport.errors import PotluckError
from transport.links.endpoints import port_of
from transport.messages.pool import PiecePeer

_STATUS_S = 4.0
_HOSTS_S = 10.0
_LINK_S = 4.0
_CONNECT_S = 2.0
_SHORTEST_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLink:
    """A host that is connected, and how the way from here to it is; None where nobody looked. `speed` is bytes/s, or
    why it is not known. `is_wifi`: whether one end of it is on Wi-Fi."""

    report: HostReport
    is_wifi: bool
    connection: ConnectResult | None = None
    speed: float | PotluckError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNetwork:
    """`ports` are the head's at this host's address in the LAN, by what they are for."""

    ports: tuple[tuple[str, ConnectResult], ...]
    links: tuple[HostLink, ...]
    away: tuple[str, ...]


def head_checks(head: LocalHead, *, firewall: str) -> Iterator[Check]:
    """`firewall` says what to do about one on this host."""
    if head.lan is None:
        hint = "to let others in, start it without --no-lan"
        yield Check(name="head", state="ok", what=f"serves {head.model}; closed to other hosts", hint=hint)
        return
    yield Check(name="head", state="ok", what=f"serves {head.model}, open to other hosts at {head.lan}")
    try:
        facts = gather_pool(head)
    except PotluckError as error:
        yield failed_check("head", error)
        return
    yield from pool_checks(facts, own_version=version("potluck"), firewall=firewall)


def gather_pool(head: LocalHead) -> HeadNetwork:
    """Raises PotluckError if the head does not say how it is."""
    assert head.lan is not None
    deadline = time.monotonic() + _HOSTS_S
    address, port = parse_pairing_address(head.lan)
    ports = [("door", try_connect(address, port, _CONNECT_S))]
    try:
        ports.append(
            ("control", try_connect(address, fetch_pool_info(address, port, _CONNECT_S).control_port, _CONNECT_S))
        )
    except PotluckError:
        ports.append(("control", ConnectResult(address=address, port=CONTROL_PORT, outcome="failed", error="no door")))
    if head.pieces is not None:
        ports.append(("pieces", try_connect(address, port_of(head.pieces), _CONNECT_S)))
    status = get_from_head("/potluck/status", StatusReport, timeout_s=_STATUS_S)
    # Who gives no pieces is only visiting: somebody asks the doctor there.
    hosts = [host for host in status.hosts if host.pieces]
    is_wifi = any(one.is_wifi and one.address == address for one in lan_interfaces())
    members = _members(roster_file())
    keys = {fingerprint(member.key): member.key for member in members}
    links = []
    for number, host in enumerate(hosts):
        left_s = (deadline - time.monotonic()) / (len(hosts) - number)
        links.append(_link(host, keys.get(host.fingerprint), is_wifi or host.is_wifi, min(left_s, _LINK_S)))
    connected = {host.fingerprint for host in hosts}
    away = [member.name for member in members if fingerprint(member.key) not in connected and not member.is_revoked]
    return HeadNetwork(ports=tuple(ports), links=tuple(links), away=tuple(away))


def _members(path: Path) -> Sequence[Member]:
    return RosterFile(path).read().members if path.exists() else ()


def _link(host: HostReport, key: str | None, is_wifi: bool, within_s: float) -> HostLink:
    if within_s < _SHORTEST_S:
        return HostLink(report=host, is_wifi=is_wifi)
    address = host.pieces.removeprefix("tcp://").rpartition(":")[0]
    reach = try_connect(address, port_of(host.pieces), min(within_s, _CONNECT_S))
    if reach.outcome != "open" or key is None:
        return HostLink(report=host, is_wifi=is_wifi, connection=reach)
    speed: float | PotluckError
    try:
        peer = PiecePeer(host.name, host.pieces, key)
        speed = measure_link(peer, load_keys(identity_dir()), within_s)
    except PotluckError as error:
        speed = error
    return HostLink(report=host, is_wifi=is_wifi, connection=reach, speed=speed)


def pool_checks(facts: HeadNetwork, *, own_version: str, firewall: str) -> list[Check]:
    """`firewall` says what to do about one on this host."""
    checks = [_port_check(use, reach) for use, reach in facts.ports]
    for link in facts.links:
        checks.extend(_host_checks(link, own_version))
    if facts.away:
        hint = "start potluck join on them"
        if not facts.links:
            hint += f". If they do not reach this host: {firewall}"
        checks.append(Check(name="away", state="ok", what=", ".join(facts.away), hint=hint))
    elif not facts.links:
        hint = f"add one: potluck invite, and there potluck join. If it does not reach this host: {firewall}"
        checks.append(Check(name="devices", state="ok", what="no other host has paired", hint=hint))
    return checks


def _port_check(use: str, reach: ConnectResult) -> Check:
    if reach.outcome == "open":
        return Check(name=f"{use} port", state="ok", what=f"listens at {reach.host_port}")
    hint = "has this host another address now? Start the head again"
    return Check(name=f"{use} port", state="problem", what=f"{reach.host_port}: {reach.meaning}", hint=hint)


def _host_checks(link: HostLink, own_version: str) -> list[Check]:
    host = link.report
    checks = [
        version_check(f"{host.name}: version", own_version, host.potluck),
        clock_check(f"{host.name}: clock", host.clock_off_s),
    ]
    name = f"{host.name}: link"
    if link.connection is not None and link.connection.outcome != "open":
        hint = next_step(
            link.connection.outcome,
            whose=host.name,
            firewall=f"on {host.name}, let Potluck through the firewall: potluck doctor on it says how",
        )
        checks.append(
            Check(name=name, state="problem", what=f"{link.connection.host_port}: {link.connection.meaning}", hint=hint)
        )
    elif isinstance(link.speed, PotluckError):
        checks.append(failed_check(name, link.speed, state="warning"))
    elif link.speed is not None:
        checks.append(speed_check(name, link.speed, is_wifi=link.is_wifi))
    else:
        checks.append(Check(name=name, state="ok", what="not measured"))
    return checks
