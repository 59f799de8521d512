"""Which firewalls are active on this host, as far as a user without rights can tell, and how to open them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_TOOL_TIMEOUT_S = 5.0
_UFW_SETTINGS = Path("/etc/ufw/ufw.conf")
_LINUX = ("ufw", "firewalld", "nftables")
_MACOS_TOOL = "/usr/libexec/ApplicationFirewall/socketfilterfw"

_OPENING = {
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
        states = dict(zip(_LINUX, _said("systemctl", "is-active", *_LINUX).split(), strict=False))
        try:
            ufw = _UFW_SETTINGS.read_text(encoding="utf-8", errors="replace")
        except OSError:
            ufw = ""
        return linux_firewalls(states, ufw)
    if sys.platform == "darwin":
        return macos_firewalls(_said(_MACOS_TOOL, "--getglobalstate"))
    if sys.platform == "win32":
        return windows_firewalls(_said("netsh", "advfirewall", "show", "currentprofile", "state"))
    return ()


def linux_firewalls(states: Mapping[str, str], ufw_settings: str) -> tuple[str, ...]:
    """`states` are systemd's of the services. That of ufw is active even when its firewall is off."""
    is_ufw_on = re.search(r"^\s*ENABLED\s*=\s*yes", ufw_settings, re.IGNORECASE | re.MULTILINE) is not None
    return tuple(name for name in _LINUX if states.get(name) == "active" and (name != "ufw" or is_ufw_on))


def macos_firewalls(said: str) -> tuple[str, ...]:
    """`said` by `socketfilterfw --getglobalstate`: "Firewall is enabled. (State = 1)"; 2 blocks all."""
    return ("macOS firewall",) if re.search(r"State = [12]\b", said) else ()


def windows_firewalls(said: str) -> tuple[str, ...]:
    """`said` by netsh, in English: "State   ON"."""
    return ("Windows firewall",) if re.search(r"\bON\b", said) else ()


def how_to_open(firewalls: Sequence[str], network: str) -> str:
    """What to do on the host that has these firewalls; `network` is the LAN, as "192.168.1.0/24"."""
    if not firewalls:
        return f"let TCP from {network} through this host's firewall"
    return "; ".join(f"{name} is active here: {_OPENING[name].format(network=network)}" for name in firewalls)


def _said(*command: str) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TOOL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("ascii", "replace")
