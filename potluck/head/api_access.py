"""API access says who may use a head's API by its settings, and the addresses where they reach it."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from devices.hardware.interfaces import lan_interfaces
from potluck.api.access import LOOPBACK_HOSTS, AccessPolicy, parse_host, parse_origin, url_host
from potluck.api.api_key import KeyWatch, make_key, read_key
from potluck.system.settings import Settings
from transport.errors import ConfigError

_MAX_ADDRESSES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointAccess:
    """`new_key` is the key that had to be made; it is shown this once. `pages` are the chat page's addresses for other
    hosts, without a key."""

    access: AccessPolicy
    new_key: str | None = None
    pages: tuple[str, ...] = ()

    def user_lines(self) -> list[str]:
        """What to tell the user who started the head."""
        if self.access.key is None:
            return []
        if self.new_key is None:
            where = f" Other hosts find the chat page at {' and '.join(self.pages)}." if self.pages else ""
            return [f"It takes the API key that this shows: potluck key.{where}"]
        lines = [f"Its API key, made now and kept: {self.new_key} (potluck key shows it again)"]
        return [*lines, *(f"Chat page for other hosts: {page_with_key(page, self.new_key)}" for page in self.pages)]


def is_loopback(host: str) -> bool:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


def endpoint_access(settings: Settings, port: int) -> EndpointAccess:
    """For an endpoint that listens on the settings' host at `port`. Makes a key where one is needed and none is there.
    Raises ConfigError."""
    is_local = is_loopback(settings.host)
    hosts = LOOPBACK_HOSTS | {_valid(parse_host(name), "host", name) for name in settings.allow_host}
    origins = frozenset(_valid(parse_origin(text), "origin", text) for text in settings.allow_origin)
    if is_local and not settings.require_key:
        # Not its network name: on a hostile network, who answers for that may be anyone, and no key keeps them out.
        return EndpointAccess(access=AccessPolicy(port=port, hosts=hosts, origins=origins))
    new_key = make_key() if read_key() is None else None
    names = set() if is_local else _local_names(settings)
    access = AccessPolicy(port=port, hosts=hosts | names, origins=origins, key=KeyWatch())
    pages = () if is_local else tuple(f"http://{url_host(address)}:{port}/" for address in _addresses(settings.host))
    return EndpointAccess(access=access, new_key=new_key, pages=pages)


def local_url(address: str, port: int) -> str:
    """Where programs of this host reach a socket that listens at `address`."""
    parsed = ipaddress.ip_address(address)
    if parsed.is_unspecified:
        address = "127.0.0.1" if parsed.version == 4 else "::1"
    return f"http://{url_host(address)}:{port}"


def page_with_key(page: str, key: str) -> str:
    """The page's address that brings the key along: what follows # is never sent to anyone."""
    return f"{page}#key={key}"


def _local_names(settings: Settings) -> set[str]:
    """What this host is called, also in the network's own domain."""
    found = set()
    for name in (socket.gethostname(), settings.host_name or ""):
        host = parse_host(name)
        if host is not None:
            found |= {host} if host.endswith(".local") else {host, f"{host}.local"}
    return found


def _addresses(host: str) -> list[str]:
    """Where other hosts reach what listens at `host`."""
    if not ipaddress.ip_address(host).is_unspecified:
        return [host]
    return [interface.address for interface in lan_interfaces()][:_MAX_ADDRESSES]


def _valid(value: str | None, what: str, text: str) -> str:
    if value is None:
        raise ConfigError(f"{text!r} is no {what}", hint=_HINTS[what])
    return value


_HINTS = {
    "host": "write a name or an address without a port, such as potluck.home",
    "origin": "write it as a browser does, such as https://chat.example or http://localhost:3000",
}
