"""Who may ask the endpoint: hosts it answers to, pages of other origins, and whether a key is needed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Protocol
from urllib.parse import urlsplit

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::([0-9]{1,5}))?", re.ASCII)
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*", re.ASCII)
_MAX_NAME_CHARS = 253


class KeyCheck(Protocol):
    def is_right(self, presented: bytes) -> bool:
        """Takes as long for a wrong key as for the right one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """`hosts` are names and addresses as a Host header has them, in lower case, without the port, which is `port`.
    `origins` are those of pages elsewhere that may ask. `key` None: none is needed."""

    port: int
    hosts: frozenset[str] = LOOPBACK_HOSTS
    origins: frozenset[str] = frozenset()
    key: KeyCheck | None = None

    def knows_host(self, host: str, local_address: str | None) -> bool:
        """Whether a Host header names this endpoint. `local_address` is where the connection came in: a page that
        renames itself (DNS rebinding) has a name, never an address that it is not at."""
        found = _HOST.fullmatch(host.lower())
        if found is None or found[2] not in (None, str(self.port)):
            return False
        return found[1] in self.hosts or (local_address is not None and found[1] == as_host(local_address))


def as_host(address: str) -> str:
    """An IP address as it stands in a URL; one of IPv4 that a socket of IPv6 reports stays one of IPv4."""
    plain = address.partition("%")[0].lower()
    mapped = ip_address(plain).ipv4_mapped if ":" in plain else None  # type: ignore[union-attr]
    if mapped is not None:
        return str(mapped)
    return f"[{plain}]" if ":" in plain else plain


def host_of(text: str) -> str | None:
    """A name or an address that a user allows, as a Host header has it; None if it is neither."""
    plain = text.strip().lower().removeprefix("[").removesuffix("]")
    try:
        address = ip_address(plain)
    except ValueError:
        return plain if len(plain) <= _MAX_NAME_CHARS and _NAME.fullmatch(plain) else None
    return None if address.is_unspecified else as_host(str(address))


def origin_of(text: str) -> str | None:
    """An origin that a user allows ("https://chat.example:8443"), as an Origin header has it; None if it is none."""
    try:
        parts = urlsplit(text.strip().lower())
        port = parts.port
    except ValueError:
        return None
    host = host_of(parts.hostname or "")
    has_more = parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc
    if parts.scheme not in ("http", "https") or host is None or has_more:
        return None
    is_default = port is None or port == {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" if is_default else f"{parts.scheme}://{host}:{port}"
