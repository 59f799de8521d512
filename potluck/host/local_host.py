"""This host in its pool: its name, its keys, and where other hosts reach it."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

import zmq

from devices.hardware.interfaces import lan_address
from devices.pairing.identity import load_keys
from devices.pairing.roster import default_host_name
from potluck.system.paths import identity_dir
from potluck.system.settings import Settings
from transport.errors import ConfigError
from transport.links.endpoints import has_ipc, is_port
from transport.links.secure_endpoints import SecureEndpoints
from transport.security.curve import KEY_FILE, KeyPair

PAIRING_PORT = 11501
NO_NETWORK_TEXT = "this host has no IPv4 address in a network with other devices"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThisHost:
    """This host in the pool. `address` is where other hosts reach it; None: they don't. `keys` are None where no socket
    needs any."""

    name: str
    address: str | None = None
    keys: KeyPair | None = None

    @property
    def keys_file(self) -> Path | None:
        return None if self.keys is None else identity_dir() / KEY_FILE

    def secure_endpoints(self, context: zmq.Context[zmq.Socket[bytes]], run_dir: Path) -> SecureEndpoints:
        return SecureEndpoints(context, run_dir, keys=self.keys, address=self.address)


def keys_file(*, exposed: bool) -> Path | None:
    """The file with the keys that processes of this host need, if they need any: `exposed` to other hosts, or without
    ipc."""
    return identity_dir() / KEY_FILE if exposed or not has_ipc() else None


def isolated_host(name: str) -> ThisHost:
    """A host that no other one reaches."""
    return ThisHost(name=name, keys=None if has_ipc() else load_keys(identity_dir()))


def this_host(settings: Settings, *, target: str | None = None) -> ThisHost:
    """By the settings; `target` is the address of a head on another host. Raises ConfigError."""
    name = settings.host_name or default_host_name()
    if not settings.lan and target is None:
        return isolated_host(name)
    address = settings.lan_host
    if address is not None:
        _check_local_address(address)
    else:
        address = lan_address(target)
    if address is None:
        if target is not None:
            raise ConfigError(NO_NETWORK_TEXT, hint="set its IPv4 address with --lan-host; there is no IPv6 yet")
        return isolated_host(name)
    return ThisHost(name=name, address=address, keys=load_keys(identity_dir()))


def parse_pairing_address(text: str) -> tuple[str, int]:
    """ "HOST", "HOST:PORT" or "ADDRESS:PORT" of a head as an IPv4 address and a port. Raises ConfigError."""
    if text.count(":") > 1:
        hint = "Potluck connects over IPv4 alone: write an IPv4 address, or a host's name"
        raise ConfigError(f"{text!r} is an IPv6 address", hint=hint)
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(PAIRING_PORT)
    if not host or not is_port(port):
        raise ConfigError(f"{text!r} is not a head's address", hint="write HOST:PORT, as potluck up prints it")
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"no host {host} is known: {error}", hint="write its IPv4 address") from error
    return address, int(port)


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _check_local_address(address: str) -> None:
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
