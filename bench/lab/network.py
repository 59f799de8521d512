"""A lab's network: a namespace a host, one more with the bridge between them; nothing of it touches the real network.

Rates are HTB classes on each host's card, one for every target with a limit. A link with delay or loss has a route
through a TUN device whose other end is the relay (`bench.lab.relay`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.lab.spec import HostSpec, LabError, LabSpec

CARD = "eth0"
RELAY_DEVICE = "relay0"
RELAY_READY = "ready"
NAMESPACES = Path("/run/netns")
_SWITCH = "_switch"  # no host can be called that
_NO_LIMIT_BITS_PER_S = 40e9
_MTU_BYTES = 1500
_HTB_BURST_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class CardBytes:
    """What a host's card has received and sent since it was made, headers included."""

    received: int
    sent: int


def addresses(spec: LabSpec) -> dict[str, str]:
    return {host.name: f"10.77.0.{number}" for number, host in enumerate(spec.hosts, start=1)}


def namespace(lab: str, host: str) -> str:
    return f"{lab}-{host}"


def build_network(lab: str, spec: LabSpec) -> None:
    """Raises LabError with what `ip` or `tc` said."""
    switch = namespace(lab, _SWITCH)
    ip("netns", "add", switch)
    ip("-n", switch, "link", "add", "bridge", "type", "bridge")
    ip("-n", switch, "link", "set", "bridge", "up")
    for number, host in enumerate(spec.hosts):
        own = namespace(lab, host.name)
        port = f"port{number}"
        ip("netns", "add", own)
        ip("-n", own, "link", "set", "lo", "up")
        ip("-n", own, "link", "add", CARD, "type", "veth", "peer", "name", port, "netns", switch)
        ip("-n", own, "address", "add", f"{addresses(spec)[host.name]}/24", "dev", CARD)
        ip("-n", own, "link", "set", CARD, "up")
        ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        _limit_rates(own, spec, host)
        if host.rate_bits_per_s is not None:
            _htb(switch, port, host.rate_bits_per_s)


def route_through_relay(lab: str, spec: LabSpec, host: HostSpec) -> None:
    """Once the relay holds the TUN device: send what it shall delay or drop there."""
    own, known = namespace(lab, host.name), addresses(spec)
    ip("-n", own, "link", "set", RELAY_DEVICE, "mtu", str(_MTU_BYTES), "txqueuelen", "10000", "up")
    for link in spec.links_from(host.name):
        if link.is_relayed:
            route = (known[link.target], "dev", RELAY_DEVICE, "src", known[host.name])
            ip("-n", own, "route", "add", *route)


def remove_network(lab: str) -> None:
    """What is in a namespace goes with it."""
    for own in sorted(NAMESPACES.glob(f"{lab}-*")):
        ip("netns", "delete", own.name)


def labs_with_network(prefix: str) -> set[str]:
    """Their ids: what is before the first "-" of a namespace's name."""
    return {own.name.partition("-")[0] for own in NAMESPACES.glob(f"{prefix}*-*")}


def missing_tools() -> list[str]:
    return [tool for tool in ("ip", "tc", "nsenter") if shutil.which(tool) is None]


def try_network(lab: str) -> None:
    """One namespace with what a lab needs of the kernel, made and removed. Raises LabError."""
    own = namespace(lab, _SWITCH)
    ip("netns", "add", own)
    try:
        ip("-n", own, "link", "add", "bridge", "type", "bridge")
        ip("-n", own, "link", "add", CARD, "type", "veth", "peer", "name", "port")
        _htb(own, CARD, _NO_LIMIT_BITS_PER_S)
    finally:
        ip("netns", "delete", own)


def card_bytes(own: str) -> CardBytes:
    """Of the host with that namespace."""
    counted = json.loads(ip("-n", own, "-s", "-j", "link", "show", "dev", CARD))[0]["stats64"]
    return CardBytes(received=counted["rx"]["bytes"], sent=counted["tx"]["bytes"])


def change_address(own: str, old: str, new: str) -> None:
    """As a router does that hands out another one: connections of the old one break without a word."""
    ip("-n", own, "address", "delete", f"{old}/24", "dev", CARD)
    ip("-n", own, "address", "add", f"{new}/24", "dev", CARD)


def ip(*arguments: str) -> str:
    """What it says. Raises LabError."""
    return _run(("ip", *arguments))


def _limit_rates(own: str, spec: LabSpec, host: HostSpec) -> None:
    limited = [link for link in spec.links_from(host.name) if link.rate_bits_per_s is not None]
    if not limited and host.rate_bits_per_s is None:
        return
    card_rate = host.rate_bits_per_s or _NO_LIMIT_BITS_PER_S
    _htb(own, CARD, card_rate)
    for number, link in enumerate(limited, start=16):
        assert link.rate_bits_per_s is not None
        classid = f"1:{number:x}"
        rate = min(link.rate_bits_per_s, card_rate)
        _tc(own, "class", "add", "dev", CARD, "parent", "1:1", "classid", classid, "htb", *_rate(rate))
        match = ("match", "ip", "dst", f"{addresses(spec)[link.target]}/32")
        _tc(own, "filter", "add", "dev", CARD, "parent", "1:", "protocol", "ip", "u32", *match, "flowid", classid)


def _htb(where: str, device: str, rate_bits_per_s: float) -> None:
    """All that leaves the device, at most this fast; 1:1 is the whole, 1:2 what has no class of its own."""
    _tc(where, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "2")
    for classid, parent in (("1:1", "1:"), ("1:2", "1:1")):
        whole = _rate(rate_bits_per_s)
        _tc(where, "class", "add", "dev", device, "parent", parent, "classid", classid, "htb", *whole)


def _rate(bits_per_s: float) -> tuple[str, ...]:
    burst_bytes = max(2 * _MTU_BYTES, round(bits_per_s / 8 * _HTB_BURST_S))
    rate = f"{bits_per_s:.0f}bit"
    return ("rate", rate, "ceil", rate, "burst", str(burst_bytes), "cburst", str(burst_bytes), "quantum", "1514")


def _tc(where: str, *arguments: str) -> None:
    _run(("tc", "-n", where, *arguments))


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(
            f"{' '.join(command)}: {done.stderr.strip()}", hint="root and the kernel's tun, veth and sch_htb"
        )
    return done.stdout
