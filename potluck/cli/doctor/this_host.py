"""Checks of this host alone: versions, memory, disk, networks, firewalls, clock, ports."""

from __future__ import annotations

import ipaddress
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from devices.hardware.interfaces import LanInterface, is_internal_interface, lan_interfaces
from devices.hardware.memory import host_free_bytes
from devices.pairing.identity import platform_name
from potluck.cli.doctor.check import Check, State
from potluck.head.network import CONTROL_PORT, PIECES_PORT
from potluck.host.local_host import PAIRING_PORT
from potluck.system.byte_sizes import format_bytes
from potluck.system.paths import home_dir
from transport.links.endpoints import port_or_zero
from transport.messages.ring import PROTOCOL_VERSION

_TOOL_TIMEOUT_S = 5.0
_UFW_SETTINGS = Path("/etc/ufw/ufw.conf")
_LINUX = ("ufw", "firewalld", "nftables")
_MACOS_TOOL = "/usr/libexec/ApplicationFirewall/socketfilterfw"

_OPENING_HINTS = {
    "ufw": "let the hosts of this network in: sudo ufw allow proto tcp from {network}",
    "firewalld": "let the hosts of this network in: sudo firewall-cmd --permanent --zone=trusted "
    "--add-source={network}; then sudo firewall-cmd --reload",
    "nftables": "accept TCP from {network} in the rules of nftables",
    "macOS firewall": "System Settings, Network, Firewall, Options: let Python accept incoming connections",
    "Windows firewall": "Windows Security, Firewall, Allow an app: let Python in on private networks, and make this "
    "network a private one in its settings",
}


def active_firewalls() -> tuple[str, ...]:
    """None may mean that it can't be told."""
    if sys.platform == "linux":
        states = dict(zip(_LINUX, _command_output("systemctl", "is-active", *_LINUX).split(), strict=False))
        try:
            ufw = _UFW_SETTINGS.read_text(encoding="utf-8", errors="replace")
        except OSError:
            ufw = ""
        return linux_firewalls(states, ufw)
    if sys.platform == "darwin":
        return macos_firewalls(_command_output(_MACOS_TOOL, "--getglobalstate"))
    if sys.platform == "win32":
        return windows_firewalls(_command_output("netsh", "advfirewall", "show", "currentprofile", "state"))
    return ()


def linux_firewalls(states: Mapping[str, str], ufw_settings: str) -> tuple[str, ...]:
    """`states` are systemd's of the services. That of ufw is active even when its firewall is off."""
    is_ufw_on = re.search(r"^\s*ENABLED\s*=\s*yes", ufw_settings, re.IGNORECASE | re.MULTILINE) is not None
    return tuple(name for name in _LINUX if states.get(name) == "active" and (name != "ufw" or is_ufw_on))


def macos_firewalls(output: str) -> tuple[str, ...]:
    """`said` by `socketfilterfw --getglobalstate`: "Firewall is enabled. (State = 1)"; 2 blocks all."""
    return ("macOS firewall",) if re.search(r"State = [12]\b", output) else ()


def windows_firewalls(output: str) -> tuple[str, ...]:
    """`said` by netsh, in English: "State   ON"."""
    return ("Windows firewall",) if re.search(r"\bON\b", output) else ()


def opening_hint(firewalls: Sequence[str], network: str) -> str:
    """What to do on the host that has these firewalls; `network` is the LAN, as "192.168.1.0/24"."""
    if not firewalls:
        return f"let TCP from {network} through this host's firewall"
    return "; ".join(f"{name} is active here: {_OPENING_HINTS[name].format(network=network)}" for name in firewalls)


def _command_output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TOOL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("ascii", "replace")


PORTS = (PAIRING_PORT, CONTROL_PORT, PIECES_PORT)
_LOW_MEMORY_BYTES = 2**30
_LOW_DISK_BYTES = 5 * 2**30
_MIN_DISK_BYTES = 2**29
# The start of 2025: the program is younger.
_EARLIEST_S = 1735689600.0
_TUNNEL = re.compile(r"tun|tap|utun|wg|ppp|ipsec|tailscale|zt|nordlynx|proton|.*(wireguard|openvpn|wintun)", re.I)
_LOOPBACK = re.compile(r"lo\d*$|loopback", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExcludedInterface:
    """An interface that others are not told of, and what it is."""

    name: str
    address: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalHostFacts:
    """`busy_ports` are those of Potluck that somebody listens at, other than a head of this user."""

    potluck: str
    protocol: int
    python: str
    platform: str
    free_bytes: int
    total_bytes: int
    home: Path
    is_home_writable: bool
    disk_free_bytes: int
    interfaces: tuple[LanInterface, ...]
    excluded: tuple[ExcludedInterface, ...]
    clock_s: float
    head_ports: tuple[int, ...]
    busy_ports: tuple[int, ...]


def gather_host(head_ports: Collection[int]) -> LocalHostFacts:
    """`head_ports` are those that the head of this host listens at."""
    home = home_dir()
    existing = next(folder for folder in (home.absolute(), *home.absolute().parents) if folder.exists())
    return LocalHostFacts(
        potluck=version("potluck"),
        protocol=PROTOCOL_VERSION,
        python=platform.python_version(),
        platform=platform_name(),
        free_bytes=host_free_bytes(),
        total_bytes=int(psutil.virtual_memory().total),
        home=home,
        is_home_writable=os.access(existing, os.W_OK | os.X_OK),
        disk_free_bytes=int(psutil.disk_usage(str(existing)).free),
        interfaces=lan_interfaces(),
        excluded=_excluded_interfaces(),
        clock_s=time.time(),
        head_ports=tuple(port for port in PORTS if port in head_ports),
        busy_ports=tuple(port for port in PORTS if port not in head_ports and not port_or_zero("*", port)),
    )


def listening_ports(pid: int) -> frozenset[int]:
    """TCP ports of a process of this user, those for this host alone left out; none if the system does not say."""
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except (psutil.Error, OSError):
        return frozenset()
    return frozenset(
        int(connection.laddr.port)
        for connection in connections
        if connection.status == psutil.CONN_LISTEN and connection.laddr
    )


def lan_network(interfaces: Sequence[LanInterface]) -> str:
    """The network of the first, as a firewall's rule names it; words without any."""
    if not interfaces:
        return "your network"
    first = interfaces[0]
    return str(ipaddress.IPv4Interface(f"{first.address}/{first.prefix}").network)


def host_checks(facts: LocalHostFacts, *, is_lan_wanted: bool = True) -> list[Check]:
    return [
        _versions(facts),
        _memory(facts),
        _disk(facts),
        *_network(facts, is_lan_wanted),
        _clock(facts),
        _ports(facts),
    ]


def _versions(facts: LocalHostFacts) -> Check:
    is_inside_windows = "WSL" in facts.platform
    return Check(
        name="versions",
        state="warning" if is_inside_windows else "ok",
        what=f"Potluck {facts.potluck} (protocol {facts.protocol}), Python {facts.python}, {facts.platform}",
        hint="other hosts can't reach a Linux inside Windows: install Potluck in Windows, or set "
        "networkingMode=mirrored in .wslconfig"
        if is_inside_windows
        else "",
    )


def _memory(facts: LocalHostFacts) -> Check:
    is_little = facts.free_bytes < _LOW_MEMORY_BYTES
    return Check(
        name="memory",
        state="warning" if is_little else "ok",
        what=f"{format_bytes(facts.free_bytes)} free of {format_bytes(facts.total_bytes)}",
        hint="close programs that use much memory: a model's layers need it" if is_little else "",
    )


def _disk(facts: LocalHostFacts) -> Check:
    what = f"{format_bytes(facts.disk_free_bytes)} free at {facts.home}"
    if not facts.is_home_writable:
        hint = "set POTLUCK_HOME to a folder that you can write"
        return Check(name="disk", state="problem", what=f"{facts.home} can't be written", hint=hint)
    state: State = "ok"
    if facts.disk_free_bytes < _LOW_DISK_BYTES:
        state = "problem" if facts.disk_free_bytes < _MIN_DISK_BYTES else "warning"
    hint = "make room (potluck cache shows what can go), or set POTLUCK_HOME to a larger disk"
    return Check(name="disk", state=state, what=what, hint="" if state == "ok" else hint)


def _network(facts: LocalHostFacts, is_lan_wanted: bool) -> list[Check]:
    checks = []
    if not facts.interfaces:
        checks.append(
            Check(
                name="network",
                state="problem" if is_lan_wanted else "warning",
                what="this host is on no network that other devices are on",
                hint="plug in a cable or join the Wi-Fi of the other devices",
            )
        )
    else:
        words = (
            f"{one.name} {one.address}/{one.prefix} ({'Wi-Fi' if one.is_wifi else 'cable'})" for one in facts.interfaces
        )
        is_all_wifi = all(one.is_wifi for one in facts.interfaces)
        checks.append(
            Check(
                name="network",
                state="warning" if is_all_wifi else "ok",
                what=", ".join(words),
                hint="a cable is faster and steadier than Wi-Fi" if is_all_wifi else "",
            )
        )
    if facts.excluded:
        words = (f"{one.name} {one.address} ({one.kind})" for one in facts.excluded)
        checks.append(Check(name="not used", state="ok", what=", ".join(words)))
    return checks


def _clock(facts: LocalHostFacts) -> Check:
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts.clock_s))
    if facts.clock_s < _EARLIEST_S:
        hint = "set it: downloads fail, and certificates of other sites look wrong"
        return Check(name="clock", state="problem", what=f"it is {now} by this host's clock", hint=hint)
    return Check(name="clock", state="ok", what=now)


def _ports(facts: LocalHostFacts) -> Check:
    def listed(ports: Sequence[int]) -> str:
        return ", ".join(map(str, ports))

    free = [port for port in PORTS if port not in facts.head_ports and port not in facts.busy_ports]
    parts = []
    if free:
        parts.append(f"{listed(free)} free")
    if facts.head_ports:
        parts.append(f"{listed(facts.head_ports)} used by the head of this host")
    if facts.busy_ports:
        parts.append(f"{listed(facts.busy_ports)} taken by another program")
    return Check(
        name="ports",
        state="warning" if facts.busy_ports else "ok",
        what="; ".join(parts),
        hint="a head takes any free port instead: join with HOST:PORT as it prints it" if facts.busy_ports else "",
    )


def _excluded_interfaces() -> tuple[ExcludedInterface, ...]:
    states = psutil.net_if_stats()
    return tuple(
        ExcludedInterface(name=name, address=entry.address, kind=kind)
        for name, addresses in sorted(psutil.net_if_addrs().items())
        if name in states and states[name].isup
        for entry in addresses
        if entry.family == socket.AF_INET and (kind := exclusion_reason(name, entry.address)) is not None
    )


def exclusion_reason(name: str, address: str) -> str | None:
    """Of an interface that others are not told of; None for one of the LAN, and for this host's own loopback."""
    if _LOOPBACK.match(name) is not None:
        return None
    if is_internal_interface(name):
        return "a VPN" if _TUNNEL.match(name) is not None else "inside this host"
    return "no router gave it an address" if ipaddress.IPv4Address(address).is_link_local else None


def multicast_check(problems: Sequence[tuple[LanInterface, str]]) -> Check:
    """What came of multicast at each interface; a problem's words are empty where it works."""
    broken = [f"{interface.name}: {problem}" for interface, problem in problems if problem]
    if not broken:
        names = ", ".join(interface.name for interface, _ in problems)
        return Check(name="multicast", state="ok", what=f"works on {names}")
    hint = "devices do not find each other by themselves here: join with potluck join --head HOST:PORT"
    return Check(name="multicast", state="warning", what="; ".join(broken), hint=hint)
