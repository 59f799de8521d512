"""How other hosts reach this one, until encryption comes: not at all, unless the user says so."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from potluck.config import Settings
from transport.errors import ConfigError, NotRunning

INSECURE_WARNING = (
    "[bold yellow]Not encrypted:[/bold yellow] anyone on this network can read prompts and answers, change them, "
    "and join the pool. Use --insecure-lan only where you trust everyone."
)
_REACH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ThisHost:
    """This host in the pool. `address` is where other hosts reach it; None: they don't."""

    name: str
    address: str | None = None

    @property
    def is_exposed(self) -> bool:
        """Whether what it says crosses a network that others use."""
        return self.address is not None and not _is_loopback(self.address)


def this_host(settings: Settings, *, towards: str | None = None) -> ThisHost:
    """By the settings; `towards` is the address of a head on another host. Raises ConfigError."""
    name = settings.host_name or socket.gethostname()
    address = settings.lan_host
    if address is None and (settings.insecure_lan or towards is not None):
        address = _address_towards(towards)
    if address is None:
        return ThisHost(name=name)
    _check_own(address)
    if not settings.insecure_lan and not _is_loopback(address):
        raise ConfigError(
            f"the ring would leave this host unencrypted, over {address}",
            hint="add --insecure-lan if everyone on that network may read the prompts",
        )
    return ThisHost(name=name, address=address)


def parse_head(text: str, settings: Settings) -> tuple[str, int]:
    """ "HOST:PORT" of a head's control socket as an IPv4 address and a port. Raises ConfigError, NotRunning."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{text!r} is not a head's address", hint="write HOST:PORT, as potluck up prints it")
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"no host {host} is known: {error.strerror}", hint="write its IPv4 address") from error
    if not settings.insecure_lan and not _is_loopback(address):
        raise ConfigError(
            f"the head at {text} can only be reached unencrypted",
            hint="add --insecure-lan if everyone on that network may read the prompts",
        )
    try:
        socket.create_connection((address, int(port)), _REACH_TIMEOUT_S).close()
    except OSError as error:
        raise NotRunning(
            f"nobody answers at {text}: {error.strerror or error}",
            hint="is the head up with --insecure-lan, and no firewall between?",
        ) from error
    return address, int(port)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _address_towards(target: str | None) -> str:
    """The address that this host would use towards `target`, or towards anywhere. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target or "192.0.2.1", 9))
        except OSError as error:
            raise ConfigError("this host has no network", hint="say its address with --lan-host") from error
        return str(probe.getsockname()[0])


def _check_own(address: str) -> None:
    hint = "write an IPv4 address of this host that the others can reach, such as 192.168.1.20"
    try:
        parsed = ipaddress.IPv4Address(address)
        if parsed.is_unspecified:
            raise ConfigError(f"--lan-host {address} is every address and none", hint=hint)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except ValueError as error:
        raise ConfigError(f"--lan-host {address} is not an IPv4 address", hint=hint) from error
    except OSError as error:
        raise ConfigError(f"--lan-host {address} is not an address of this host", hint=hint) from error
