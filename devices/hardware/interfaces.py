"""The networks this host shares with the others at home, and its address there."""

from __future__ import annotations

import ipaddress
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from transport.timeouts import TOOL_S

# An address of the range for documentation: a route to it is the default route. Nothing is sent there.
_DOCUMENTATION_ADDRESS = "198.51.100.1"
_LINUX_NETWORK = Path("/sys/class/net")

# Networks inside this host (containers, virtual machines) and tunnels: nobody at home can reach it there.
_INTERNAL_INTERFACE = re.compile(
    r"lo\d*$|docker|br-|virbr|lxc|lxd|veth|cni|cali|flannel|cilium|podman|kube|vnet|vmnet|vboxnet|bridge\d{3}|"
    r"incusbr|vxlan|ovs-|azure|nerdctl|"
    r"tun|tap|utun|wg|ppp|ipsec|gif|stf|tailscale|zt|nordlynx|proton|awdl|llw|anpi|dummy|"
    r"ham\d|gpd\d|wt\d|nebula|.*tun\d+$|"
    r"loopback|vethernet|.*(virtualbox|vmware|hyper-v|wsl|tailscale|zerotier|wireguard|openvpn|wintun|bluetooth|"
    r"cloudflarewarp|nordvpn|anyconnect|globalprotect|hamachi)",
    re.IGNORECASE,
)
_WIFI_NAME = re.compile(r"wl|wi-?fi|wlan|.*wireless", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanInterface:
    """An IPv4 address of this host in a network of `prefix` bits."""

    name: str
    address: str
    prefix: int
    is_wifi: bool


def lan_interfaces() -> tuple[LanInterface, ...]:
    """Those that are up and lead to other devices; loopback, containers, virtual machines and VPNs are left out.

    Cables come first. The order is stable.
    """
    wifi_names = _wifi_names()
    found = [
        LanInterface(name=name, address=address, prefix=prefix, is_wifi=name in wifi_names)
        for name, address, prefix in _lan_entries()
    ]
    return tuple(sorted(found, key=lambda interface: (interface.is_wifi, interface.name, interface.address)))


def lan_addresses() -> tuple[str, ...]:
    """This host's addresses on them; cheaper, since Wi-Fi is not looked for."""
    return tuple(sorted({address for _, address, _ in _lan_entries()}))


def is_internal_interface(name: str) -> bool:
    """Whether an interface of that name leads into this host, or into a tunnel."""
    return _INTERNAL_INTERFACE.match(name) is not None


def lan_address(target: str | None = None) -> str | None:
    """This host's address for the others: the one that it would use to reach `target`; else that of the default
    route, or a LAN's if the default route is a tunnel or missing. None without a network. Sends nothing."""
    if target is not None:
        chosen = _source_address(target)
        if chosen is not None:
            return chosen
    return preferred_address(
        _source_address(_DOCUMENTATION_ADDRESS), [interface.address for interface in lan_interfaces()]
    )


def leads_to_lan(address: str) -> bool:
    """Whether this host would look for that address in a network that it shares with other devices."""
    return _source_address(address) in lan_addresses()


def preferred_address(default_route: str | None, lan: Iterable[str]) -> str | None:
    """Which of a host's addresses others are told."""
    addresses = tuple(lan)
    if default_route in addresses or not addresses:
        return default_route
    return addresses[0]


def _lan_entries() -> Iterator[tuple[str, str, int]]:
    """Name, address and prefix."""
    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        if is_internal_interface(name) or name not in states or not states[name].isup:
            continue
        for entry in addresses:
            if entry.family == socket.AF_INET and _is_usable(entry.address):
                yield name, entry.address, _prefix(entry.netmask)


def _source_address(target: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if ipaddress.IPv4Address(address).is_unspecified else address


def _is_usable(address: str) -> bool:
    parsed = ipaddress.IPv4Address(address)
    return not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified or parsed.is_multicast)


def _prefix(netmask: str | None) -> int:
    try:
        return ipaddress.IPv4Network(f"0.0.0.0/{netmask}").prefixlen
    except ValueError:
        return 32


def _wifi_names() -> frozenset[str]:
    if sys.platform == "linux":
        return frozenset(path.parent.name for path in _LINUX_NETWORK.glob("*/wireless"))
    if sys.platform == "darwin":
        return wifi_in_hardware_ports(_output("networksetup", "-listallhardwareports"))
    return frozenset(name for name in psutil.net_if_addrs() if _WIFI_NAME.match(name))


def wifi_in_hardware_ports(text: str) -> frozenset[str]:
    """The devices that macOS's `networksetup -listallhardwareports` calls Wi-Fi: "en0"."""
    return frozenset(re.findall(r"Hardware Port: (?:Wi-Fi|AirPort)\s*\nDevice: (\S+)", text))


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TOOL_S, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
