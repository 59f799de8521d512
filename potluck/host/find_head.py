"""A host finds a head on the network: by an invite, by an address, or by itself; and finds it again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace
from rich.markup import escape

from devices.pairing.client import check_version, fetch_membership, fetch_pool_info, pair
from devices.pairing.credentials import Invite, is_invite, parse_invite
from devices.pairing.identity import fingerprint, load_keys, platform_name
from devices.pairing.known_pools import KnownPool, load_known_pools, save_known_pool
from devices.pairing.membership import MembershipStatus
from devices.pairing.pake import PoolInfo
from devices.pairing.roster import default_host_name
from potluck.host.local_host import parse_pairing_address
from potluck.system.paths import identity_dir, known_pools_file
from potluck.system.settings import Settings
from transport.errors import Busy, ConfigError, NotAllowed, NotRunning, PairingFailed, PotluckError
from transport.links.endpoints import tcp_endpoint
from transport.security.curve import KeyPair
from transport.timeouts import BROWSE_S, POOL_INFO_S

if TYPE_CHECKING:
    from devices.discovery.mdns import AdvertisedPool


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadAddress:
    """Where a head's control is, and its key."""

    control: str
    key: str


_MAX_SHOWN = 8
_MAX_REASONS = 3
_MAX_THREADS = 16
_NOT_AT_ADDRESS = (NotRunning, ConfigError, Busy)
"""The head is not where it was looked for; it may be in another place."""
Say = Callable[[str], object]
Address = tuple[str, int]
"""A pairing server's address and port."""
PromptForCode = Callable[[str], str | None]
"""Asks the user a question; None where nobody can answer."""
Target = TypeVar("Target")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveredPool:
    """A head of a pool that this host is paired with, and where it is now."""

    pool: KnownPool
    address: str
    head: HeadAddress


def pool_to_join(
    where: str | None,
    code: str | None,
    settings: Settings,
    *,
    say: Say,
    prompt: PromptForCode = lambda question: None,
) -> KnownPool:
    """The pool that the user means, paired with if this host is not yet. `where` is an invite, a pairing address
    HOST:PORT, or None: any that is found. Raises PotluckError."""
    if where is not None and is_invite(where):
        invite = parse_invite(where)
        before = _known_by_key(invite.key)
        try:
            # Also where the pool is known: this host may have been revoked there.
            return _pair(invite.host, invite.port, invite, settings, say)
        except PairingFailed as error:
            if before is None:
                raise
            say(f"{escape(error.message)}; this host has paired with {escape(before.name)} before, and tries that")
            return before
    if where is not None:
        host, port = parse_pairing_address(where)
        return _pool_at_address(host, port, code, settings, say, prompt)
    known = load_known_pools(known_pools_file())
    if known and code is None:
        return known[0]
    if not settings.discovery:
        raise ConfigError(
            "no head runs on this host, and no head is named",
            hint="name one: potluck join INVITE, or potluck join --head HOST:PORT",
        )
    say("Looking for a pool on this network")
    pools = _browse(None)
    if not pools:
        raise NotRunning(
            "no pool was found on this network",
            hint="is the head up, and on the same network? Some networks keep devices apart: then use potluck join "
            "--head HOST:PORT as the head prints it; potluck doctor looks for the reason",
        )
    if len(pools) > 1:
        raise ConfigError(f"{len(pools)} pools were found", hint=f"name one with --head: {_describe_pools(pools)}")
    return _pool_at_address(_responding_address(pools[0]), pools[0].port, code, settings, say, prompt)


def locate_head(pool: KnownPool, settings: Settings) -> DiscoveredPool:
    """Where the pool's head is now. Raises NotRunning if it is nowhere, VersionMismatch, and NotAllowed if it has
    removed this host."""
    keys = load_keys(identity_dir())
    problems: list[PotluckError] = []
    known = _known_addresses(pool, problems)
    # The last one alone first: usually it is still there.
    for places in (known[:1], known[1:]):
        found = _find_first(pool, places, keys, problems)
        if found is not None:
            return found
    if settings.discovery:
        advertised = [(address, one.port) for one in _browse_if_possible(pool.fingerprint) for address in one.addresses]
        found = _find_first(pool, advertised, keys, problems)
        if found is not None:
            return found
    busy = [problem for problem in problems if isinstance(problem, Busy)]
    if busy:
        raise busy[0]
    reasons = list(dict.fromkeys(problem.message for problem in problems))
    elsewhere = ", and nowhere else on this network" if settings.discovery else ""
    raise NotRunning(
        f"the head {pool.name} is not found at {', '.join(pool.doors)}{elsewhere}",
        hint=f"is it up, and on the same network? See: potluck doctor ({'; '.join(reasons[:_MAX_REASONS])})",
    )


def _known_addresses(pool: KnownPool, problems: list[PotluckError]) -> list[Address]:
    """Where its pairing server has been; names that nobody knows now are problems."""
    addresses = []
    for address in pool.doors:
        try:
            addresses.append(parse_pairing_address(address))
        except ConfigError as problem:
            problems.append(problem)
    return addresses


def _find_first(
    pool: KnownPool, addresses: list[Address], keys: KeyPair, problems: list[PotluckError]
) -> DiscoveredPool | None:
    """At which of the addresses, some of which strangers may have named, the head is. Why it is not at the others is
    added to `problems`."""

    def fetch(place: Address) -> tuple[PoolInfo, MembershipStatus] | PotluckError:
        try:
            return fetch_membership(*place, pool, keys=keys)
        except _NOT_AT_ADDRESS as problem:
            return problem

    for place, answer in zip(addresses, _map_concurrently(fetch, addresses), strict=True):
        if not isinstance(answer, PotluckError):
            return _discovered(pool, *place, *answer)
        problems.append(answer)
    return None


def _map_concurrently(call: Callable[[Target], Answer], places: list[Target]) -> list[Answer]:
    """One that does not answer takes seconds, and there may be many. Ctrl-C need not wait for a single one."""
    if len(places) < 2:
        return [call(place) for place in places]
    with ThreadPoolExecutor(_MAX_THREADS) as threads:
        return list(threads.map(call, places))


def _discovered(pool: KnownPool, host: str, port: int, info: PoolInfo, status: MembershipStatus) -> DiscoveredPool:
    check_version(info)
    if status != "member":
        raise eviction_error(pool, status)
    now = replace(pool.at(f"{host}:{port}"), name=info.name)
    if now != pool:
        save_known_pool(known_pools_file(), now)
    head = HeadAddress(control=tcp_endpoint(host, info.control_port), key=pool.key)
    return DiscoveredPool(pool=now, address=host, head=head)


def eviction_error(pool: KnownPool, status: MembershipStatus) -> NotAllowed:
    """The error of a host that is no member of a pool it has joined."""
    name = pool.name
    what = f"{name} has revoked this host" if status == "revoked" else f"{name} does not know this host any more"
    return NotAllowed(what, hint="pair again: potluck invite there shows a code for potluck join CODE")


def _pool_at_address(
    host: str, port: int, code: str | None, settings: Settings, say: Say, prompt: PromptForCode
) -> KnownPool:
    info = fetch_pool_info(host, port)
    check_version(info)
    known = _known_by_key(info.key)
    if known is not None and code is None:
        return known.at(f"{host}:{port}")
    if code is None:
        code = prompt(f"Pairing code of {info.name} ({host}:{port}): ")
    if code is None:
        raise NotAllowed(
            f"this host is not paired with {info.name} at {host}:{port}",
            hint=f"potluck invite there shows a code: potluck join --head {host}:{port} --code CODE",
        )
    return _pair(host, port, code, settings, say)


def _pair(host: str, port: int, credential: Invite | str, settings: Settings, say: Say) -> KnownPool:
    keys = load_keys(identity_dir())

    def on_waiting(facts: PoolInfo) -> None:
        own = fingerprint(keys.public)
        say(f"Waiting until {escape(facts.name)}'s owner lets this host in (its key, as shown there: {own})")

    pool = pair(
        host,
        port,
        credential,
        keys=keys,
        name=settings.host_name or default_host_name(),
        platform=platform_name(),
        on_waiting=on_waiting,
    )
    save_known_pool(known_pools_file(), pool)
    head = f"{escape(pool.name)} (key {fingerprint(pool.key)})"
    say(f"Paired with {head}; this host is called {escape(pool.my_name)} there")
    return pool


def _known_by_key(key: str) -> KnownPool | None:
    return next((pool for pool in load_known_pools(known_pools_file()) if pool.key == key), None)


def _browse(fingerprint: str | None) -> list[AdvertisedPool]:
    from devices.discovery.mdns import browse_pools  # Here, since zeroconf takes a while to import.

    return browse_pools(BROWSE_S, pool_fingerprint=fingerprint)


def _browse_if_possible(fingerprint: str) -> list[AdvertisedPool]:
    """Nothing without a network or multicast, as if nobody had answered."""
    try:
        return _browse(fingerprint)
    except ConfigError:
        return []


def _describe_pools(pools: list[AdvertisedPool]) -> str:
    """Addresses and the names that their heads claim; of the first ones, since anyone can make up more."""

    def describe(pool: AdvertisedPool) -> str:
        return f"{pool.addresses[0]}:{pool.port} ({_name_at((pool.addresses[0], pool.port)) or 'does not answer'})"

    more = ["…"] if len(pools) > _MAX_SHOWN else []
    return ", ".join(_map_concurrently(describe, pools[:_MAX_SHOWN]) + more)


def _responding_address(pool: AdvertisedPool) -> str:
    """Of a head in several networks, not all of which need be this host's."""
    answers = _map_concurrently(_name_at, [(address, pool.port) for address in pool.addresses[:-1]])
    responding = (address for address, name in zip(pool.addresses, answers, strict=False) if name is not None)
    return next(responding, pool.addresses[-1])


def _name_at(place: Address) -> str | None:
    try:
        return fetch_pool_info(*place, POOL_INFO_S).name
    except PotluckError:
        return None
