"""Heads and joiners find each other on the LAN: DNS service discovery over multicast DNS (RFC 6763, RFC 6762).

What everyone is told is where a pairing server is, and a fingerprint of the pool's id by which its members know it: no
name of a host or a user, and no address but those on the LAN. It proves nothing; pairing and keys do.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from zeroconf import Error, IPVersion, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

from devices.hardware.interfaces import lan_addresses
from devices.pairing.identity import fingerprint
from transport.errors import ConfigError
from transport.timeouts import ADVERTISER_CLOSE_S

SERVICE = "_potluck._tcp.local."
_RECORD_VERSION = "1"
_FINGERPRINT = re.compile(r"([0-9a-f]{4}-){3}[0-9a-f]{4}")
_CHECK_INTERVAL_S = 5.0
_RETRY_S = 30.0
_POLL_S = 0.05
_QUERY_S = 0.5
_MAX_NAMES = 64
_MAX_ADDRESSES = 8

Addresses = Callable[[], tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvertisedPool:
    """A head's pairing server as it, or someone else, says: addresses to try in this order, a port, the pool's
    fingerprint."""

    addresses: tuple[str, ...]
    port: int
    fingerprint: str


class Advertiser:
    """Tells the LAN where the pairing server of `pool` is, until it is closed; again when an address changes.

    `addresses` are those of this host; with only one of them the server listens at that alone. `problem` says
    why nobody can be told, if so.
    """

    def __init__(self, port: int, pool: str, *, addresses: Addresses = lan_addresses) -> None:
        self._port = port
        self._fingerprint = fingerprint(pool)
        self._addresses = addresses
        self._problem: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="advertiser", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        return self._problem

    def close(self) -> None:
        """Say goodbye. Takes a second, at most three."""
        self._end.set()
        self._thread.join(ADVERTISER_CLOSE_S)

    def _run(self) -> None:
        advertised: tuple[str, ...] = ()
        zeroconf: Zeroconf | None = None
        while not self._end.is_set():
            try:
                now = self._addresses()
            except OSError:  # Networks come and go while they are listed.
                now = ()
            wait_s = _CHECK_INTERVAL_S
            if now != advertised:
                _close(zeroconf)
                zeroconf = self._advertise(now) if now else None
                advertised = now if zeroconf is not None else ()
                wait_s = _CHECK_INTERVAL_S if zeroconf is not None or not now else _RETRY_S
            if not now:
                self._problem = "this host has no network with IPv4"
            self._end.wait(wait_s)
        _close(zeroconf)

    def _advertise(self, addresses: tuple[str, ...]) -> Zeroconf | None:
        zeroconf: Zeroconf | None = None
        try:
            zeroconf = Zeroconf(interfaces=list(addresses), ip_version=IPVersion.V4Only)
            zeroconf.register_service(service_info(self._fingerprint, self._port, addresses), allow_name_change=True)
        except (OSError, Error) as error:
            self._problem = f"multicast DNS does not work here: {error or type(error).__name__}"
            _close(zeroconf)
            return None
        self._problem = None
        return zeroconf


def service_info(pool_fingerprint: str, port: int, addresses: tuple[str, ...]) -> ServiceInfo:
    """The record, named by the fingerprint alone."""
    return ServiceInfo(
        SERVICE,
        f"{pool_fingerprint}.{SERVICE}",
        port=port,
        properties={"v": _RECORD_VERSION, "pool": pool_fingerprint},
        server=f"potluck-{pool_fingerprint}.local.",
        parsed_addresses=list(addresses),
    )


def browse_pools(
    timeout_s: float, pool_fingerprint: str | None = None, *, addresses: Addresses = lan_addresses
) -> list[AdvertisedPool]:
    """The pools whose heads answer within that time; with a fingerprint, only that pool's, and as soon as one is
    found. Raises ConfigError if this host can't ask."""
    own = addresses()
    if not own:
        raise ConfigError("this host has no IPv4 network to look for heads on", hint="join with --head HOST:PORT")
    deadline = time.monotonic() + timeout_s
    try:
        zeroconf = Zeroconf(interfaces=list(own), ip_version=IPVersion.V4Only)
    except (OSError, Error) as error:
        raise ConfigError(
            f"this host can't look for heads by multicast DNS: {error}",
            hint="join with --head HOST:PORT; see: potluck doctor",
        ) from error
    names = _ServiceNames(pool_fingerprint or "")
    browser = ServiceBrowser(zeroconf, SERVICE, listener=names)
    try:
        return _collect(zeroconf, names, deadline, pool_fingerprint)
    finally:
        browser.cancel()
        _close(zeroconf)


class _ServiceNames(ServiceListener):
    """The names of what has been seen that begin so, few enough of them that nobody can fill the memory."""

    def __init__(self, beginning: str = "") -> None:
        self._beginning = beginning
        self._names: dict[str, float] = {}
        self._lock = threading.Lock()

    def seen(self) -> dict[str, float]:
        """And when."""
        with self._lock:
            return dict(self._names)

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        with self._lock:
            if len(self._names) < _MAX_NAMES and name.startswith(self._beginning):
                self._names.setdefault(name, time.monotonic())

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        with self._lock:
            self._names.pop(name, None)


def _collect(zeroconf: Zeroconf, names: _ServiceNames, deadline: float, wanted: str | None) -> list[AdvertisedPool]:
    found: dict[str, AdvertisedPool] = {}
    asked: set[str] = set()
    while (now := time.monotonic()) < deadline:
        seen = names.seen()
        found = {name: pool for name, pool in found.items() if name in seen}
        unknown = []
        for name, since in seen.items():
            if name in found:
                continue
            info = ServiceInfo(SERVICE, name)
            if info.load_from_cache(zeroconf):
                _add_if_wanted(found, name, info, wanted)
            elif name not in asked and now - since > _QUERY_S:
                unknown.append(name)
        if wanted is not None and found:
            break
        if not unknown:
            time.sleep(_POLL_S)
            continue
        # What an answer leaves out is asked for, once and one at a time: names that lead nowhere, of which anyone can
        # make up many, must not use up the time of the others.
        asked.add(unknown[0])
        info = ServiceInfo(SERVICE, unknown[0])
        if info.request(zeroconf, min(_QUERY_S, deadline - now) * 1000):
            _add_if_wanted(found, unknown[0], info, wanted)
    return sorted(set(found.values()), key=lambda pool: (pool.fingerprint, pool.addresses, pool.port))


def _add_if_wanted(found: dict[str, AdvertisedPool], name: str, info: ServiceInfo, wanted: str | None) -> None:
    pool = parse_service(info)
    if pool is not None and wanted in (None, pool.fingerprint):
        found[name] = pool


def parse_service(info: ServiceInfo) -> AdvertisedPool | None:
    """What a record says, if it is one of ours; anyone may have sent it."""
    try:
        name = (info.properties.get(b"pool") or b"").decode("ascii")
    except UnicodeDecodeError:
        return None
    usable = [address for address in info.parsed_addresses(IPVersion.V4Only) if _is_lan(address)]
    if not _FINGERPRINT.fullmatch(name) or not usable or not info.port or not 0 < info.port < 65536:
        return None
    return AdvertisedPool(addresses=tuple(usable[:_MAX_ADDRESSES]), port=info.port, fingerprint=name)


def _is_lan(address: str) -> bool:
    parsed = ipaddress.IPv4Address(address)
    return not (parsed.is_loopback or parsed.is_multicast or parsed.is_unspecified or parsed.is_reserved)


def _close(zeroconf: Zeroconf | None) -> None:
    if zeroconf is not None:
        with contextlib.suppress(OSError, Error):
            zeroconf.close()
