"""This host in its pool: its name, its keys, and where other hosts reach it."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

import zmq

from devices.identity import load_keys
from devices.members import own_name
from potluck.config import Settings
from potluck.paths import identity_dir
from transport.curve import KeyPair
from transport.edges import Edges
from transport.endpoints import has_ipc, is_port
from transport.errors import ConfigError
from transport.key_file import KEY_FILE

DOOR_PORT = 11501
NO_NETWORK = "this host has no IPv4 address in a network with other devices"


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

    def edges(self, context: zmq.Context[zmq.Socket[bytes]], run_dir: Path) -> Edges:
        return Edges(context, run_dir, keys=self.keys, address=self.address)


def lan_address(towards: str | None) -> str | None:
    from devices.interfaces import lan_address as find

    return find(towards)


def keys_file(*, exposed: bool) -> Path | None:
    """The file with the keys that processes of this host need, if they need any: `exposed` to other hosts, or without
    ipc."""
    return identity_dir() / KEY_FILE if exposed or not has_ipc() else None


def alone(name: str) -> ThisHost:
    """A host that no other one reaches."""
    return ThisHost(name=name, keys=None if has_ipc() else load_keys(identity_dir()))


def this_host(settings: Settings, *, towards: str | None = None) -> ThisHost:
    """By the settings; `towards` is the address of a head on another host. Raises ConfigError."""
    name = settings.host_name or own_name()
    if not settings.lan and towards is None:
        return alone(name)
    address = settings.lan_host
    if address is not None:
        _check_own(address)
    else:
        address = lan_address(towards)
    if address is None:
        if towards is not None:
            raise ConfigError(NO_NETWORK, hint="say its IPv4 address with --lan-host; there is no IPv6 yet")
        return alone(name)
    return ThisHost(name=name, address=address, keys=load_keys(identity_dir()))


def parse_door(text: str) -> tuple[str, int]:
    """ "HOST", "HOST:PORT" or "ADDRESS:PORT" of a head as an IPv4 address and a port. Raises ConfigError."""
    if text.count(":") > 1:
        hint = "Potluck connects over IPv4 alone: write an IPv4 address, or a host's name"
        raise ConfigError(f"{text!r} is an IPv6 address", hint=hint)
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(DOOR_PORT)
    if not host or not is_port(port):
        raise ConfigError(f"{text!r} is not a head's address", hint="write HOST:PORT, as potluck up prints it")
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"no host {host} is known: {error}", hint="write its IPv4 address") from error
    return address, int(port)


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


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
