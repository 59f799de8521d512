"""Finding a head on another host: by an invite, by its door's address, or by itself; and finding it again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace
from rich.markup import escape

from devices.credentials import Invite, is_invite, parse_invite
from devices.identity import fingerprint, load_keys
from devices.known_pools import KnownPool, load_known_pools, save_known_pool
from devices.members import own_name
from devices.pair_client import ask_door, ask_standing, check_version, pair
from devices.pairing import DoorFacts
from devices.platform_name import platform_name
from devices.standing import Word
from potluck.config import Settings
from potluck.guest import HeadAddress
from potluck.lan import parse_door
from potluck.paths import identity_dir, known_pools_file
from transport.curve import KeyPair
from transport.endpoints import tcp_endpoint
from transport.errors import Busy, ConfigError, NotAllowed, NotRunning, PairingFailed, PotluckError

if TYPE_CHECKING:
    from devices.discovery import FoundPool

_FIND_S = 4.0
_LOOK_S = 2.0
_MOST_SHOWN = 8
_MOST_SAID = 3
_MOST_AT_ONCE = 16
_ELSEWHERE = (NotRunning, ConfigError, Busy)
"""The head is not where it was looked for; it may be in another place."""
Say = Callable[[str], object]
Place = tuple[str, int]
"""A door's address and port."""
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A head of a pool that this host is paired with, and where it is now."""

    pool: KnownPool
    address: str
    head: HeadAddress


def pool_to_join(where: str | None, code: str | None, settings: Settings, *, say: Say) -> KnownPool:
    """The pool that the user means, paired with if this host is not yet. `where` is an invite, a door's HOST:PORT, or
    None: any that is found. Raises PotluckError."""
    if where is not None and is_invite(where):
        invite = parse_invite(where)
        before = _known_by_key(invite.key)
        try:
            # Also where the pool is known: this host may have been revoked there.
            return _paired(invite.host, invite.port, invite, settings, say)
        except PairingFailed as error:
            if before is None:
                raise
            say(f"{escape(error.message)}; this host has paired with {escape(before.name)} before, and tries that")
            return before
    if where is not None:
        host, port = parse_door(where)
        return _at_door(host, port, code, settings, say)
    known = load_known_pools(known_pools_file())
    if known and code is None:
        return known[0]
    if not settings.discovery:
        raise ConfigError(
            "no head runs on this host, and no head is named",
            hint="say potluck join INVITE, or potluck join --head HOST:PORT",
        )
    say("Looking for a pool on this network")
    pools = _seen(None)
    if not pools:
        raise NotRunning(
            "no pool was found on this network",
            hint="is the head up, and on the same network? Some networks keep devices apart: then say potluck join "
            "--head HOST:PORT as the head prints it; potluck doctor looks for the reason",
        )
    if len(pools) > 1:
        raise ConfigError(f"{len(pools)} pools were found", hint=f"say which with --head: {_doors(pools)}")
    return _at_door(_address_that_answers(pools[0]), pools[0].port, code, settings, say)


def find_again(pool: KnownPool, settings: Settings) -> Found:
    """Where the pool's head is now. Raises NotRunning if it is nowhere, VersionMismatch, and NotAllowed if it has put
    this host out."""
    keys = load_keys(identity_dir())
    problems: list[PotluckError] = []
    known = _places(pool, problems)
    # The last one alone first: usually it is still there.
    for places in (known[:1], known[1:]):
        found = _first_found(pool, places, keys, problems)
        if found is not None:
            return found
    if settings.discovery:
        seen = [(address, one.port) for one in _seen_if_it_can_be(pool.fingerprint) for address in one.addresses]
        found = _first_found(pool, seen, keys, problems)
        if found is not None:
            return found
    busy = [problem for problem in problems if isinstance(problem, Busy)]
    if busy:
        raise busy[0]
    said = list(dict.fromkeys(problem.message for problem in problems))
    elsewhere = ", and nowhere else on this network" if settings.discovery else ""
    raise NotRunning(
        f"the head {pool.name} is not found at {', '.join(pool.doors)}{elsewhere}",
        hint=f"is it up, and on the same network? See: potluck doctor ({'; '.join(said[:_MOST_SAID])})",
    )


def _places(pool: KnownPool, problems: list[PotluckError]) -> list[Place]:
    """Where its door has been; names that nobody knows now are problems."""
    places = []
    for door in pool.doors:
        try:
            places.append(parse_door(door))
        except ConfigError as problem:
            problems.append(problem)
    return places


def _first_found(pool: KnownPool, places: list[Place], keys: KeyPair, problems: list[PotluckError]) -> Found | None:
    """Where the head is of `places`, some of which strangers may have named. Why it is not at the others is added to
    `problems`."""

    def asked(place: Place) -> tuple[DoorFacts, Word] | PotluckError:
        try:
            return ask_standing(*place, pool, keys=keys)
        except _ELSEWHERE as problem:
            return problem

    for place, answer in zip(places, _at_once(asked, places), strict=True):
        if not isinstance(answer, PotluckError):
            return _found(pool, *place, *answer)
        problems.append(answer)
    return None


def _at_once(asked: Callable[[Place], Answer], places: list[Place]) -> list[Answer]:
    """One that does not answer takes seconds, and there may be many. Ctrl-C need not wait for a single one."""
    if len(places) < 2:
        return [asked(place) for place in places]
    with ThreadPoolExecutor(_MOST_AT_ONCE) as threads:
        return list(threads.map(asked, places))


def _found(pool: KnownPool, host: str, port: int, facts: DoorFacts, word: Word) -> Found:
    check_version(facts)
    if word != "member":
        raise put_out(pool, word)
    now = replace(pool.at(f"{host}:{port}"), name=facts.name)
    if now != pool:
        save_known_pool(known_pools_file(), now)
    head = HeadAddress(control=tcp_endpoint(host, facts.control_port), key=pool.key)
    return Found(pool=now, address=host, head=head)


def put_out(pool: KnownPool, word: Word) -> NotAllowed:
    """What a host is told that is no member of a pool it has joined."""
    name = pool.name
    what = f"{name} has revoked this host" if word == "revoked" else f"{name} does not know this host any more"
    return NotAllowed(what, hint="pair again: potluck invite there shows a code for potluck join CODE")


def _at_door(host: str, port: int, code: str | None, settings: Settings, say: Say) -> KnownPool:
    facts = ask_door(host, port)
    check_version(facts)
    known = _known_by_key(facts.key)
    if known is not None and code is None:
        return known.at(f"{host}:{port}")
    return _paired(host, port, code or _typed_code(facts, f"{host}:{port}"), settings, say)


def _paired(host: str, port: int, credential: Invite | str, settings: Settings, say: Say) -> KnownPool:
    keys = load_keys(identity_dir())

    def on_waiting(facts: DoorFacts) -> None:
        own = fingerprint(keys.public)
        say(f"Waiting until {escape(facts.name)}'s owner lets this host in (its key, as shown there: {own})")

    pool = pair(
        host,
        port,
        credential,
        keys=keys,
        name=settings.host_name or own_name(),
        platform=platform_name(),
        on_waiting=on_waiting,
    )
    save_known_pool(known_pools_file(), pool)
    head = f"{escape(pool.name)} (key {fingerprint(pool.key)})"
    say(f"Paired with {head}; this host is called {escape(pool.my_name)} there")
    return pool


def _known_by_key(key: str) -> KnownPool | None:
    return next((pool for pool in load_known_pools(known_pools_file()) if pool.key == key), None)


def _typed_code(facts: DoorFacts, door: str) -> str:
    what = f"this host is not paired with {facts.name} at {door}"
    if not sys.stdin.isatty():
        raise NotAllowed(what, hint=f"potluck invite there shows a code: potluck join --head {door} --code CODE")
    try:
        return input(f"The code that {facts.name} shows ({door}): ")
    except EOFError:
        raise NotAllowed(what, hint="potluck invite there shows a code") from None


def _seen(fingerprint: str | None) -> list[FoundPool]:
    from devices.discovery import find_pools  # Here, since zeroconf takes a while to import.

    return find_pools(_FIND_S, pool_fingerprint=fingerprint)


def _seen_if_it_can_be(fingerprint: str) -> list[FoundPool]:
    """None without a network or multicast: then the head is as little to be found as if nobody had answered."""
    try:
        return _seen(fingerprint)
    except ConfigError:
        return []


def _doors(pools: list[FoundPool]) -> str:
    """And what their heads say that they are called; of the first ones, since anyone can make up more."""
    shown = pools[:_MOST_SHOWN]
    with ThreadPoolExecutor(len(shown)) as threads:
        doors = [f"{door} ({name})" for door, name in threads.map(_door_and_name, shown)]
    return ", ".join([*doors, "…"] if len(pools) > len(shown) else doors)


def _address_that_answers(pool: FoundPool) -> str:
    """Of a head in several networks, not all of which need be this host's."""
    for address in pool.addresses[:-1]:
        try:
            ask_door(address, pool.port, _LOOK_S)
            return address
        except NotRunning:
            continue
    return pool.addresses[-1]


def _door_and_name(pool: FoundPool) -> tuple[str, str]:
    door = f"{pool.addresses[0]}:{pool.port}"
    try:
        return door, ask_door(pool.addresses[0], pool.port, _LOOK_S).name
    except PotluckError:
        return door, "does not answer"
