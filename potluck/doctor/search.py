"""Where the head of a pool that this host has joined is: at a door that is known, or where discovery sees it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from devices.known_pools import KnownPool
from devices.pair_client import ask_door
from devices.pairing import DoorFacts
from potluck.config import Settings
from potluck.doctor.check import Check
from potluck.doctor.later import Later
from potluck.doctor.reach import CONNECT_S, Outcome, Reach, connect, next_step
from potluck.lan import parse_door
from transport.errors import ConfigError, PotluckError

if TYPE_CHECKING:
    from devices.discovery import FoundPool

_FIND_S = 3.5
_FACTS_S = 2.0
_SLACK_S = 0.5
_MOST_DOORS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A door where the head might have been, as "HOST:PORT", and who answered; `reach` is None if the place makes no
    sense, which `problem` explains."""

    door: str
    reach: Reach | None = None
    facts: DoorFacts | None = None
    problem: PotluckError | None = None


def search(pool: KnownPool, settings: Settings) -> tuple[list[Tried], list[FoundPool] | PotluckError | None]:
    """Every place where the head has been; if it is at none, where discovery says that it is, too. The latter's answer
    is None if it was not asked."""
    tried = _try_all(pool.doors)
    if not settings.discovery or head_among(pool, tried) is not None:
        return tried, None
    try:
        found = discover(pool.fingerprint)
    except PotluckError as error:
        return tried, error
    more = {f"{address}:{one.port}" for one in found for address in one.addresses} - set(pool.doors)
    return [*tried, *_try_all(sorted(more)[:_MOST_DOORS])], found


def head_among(pool: KnownPool, tried: Iterable[Tried]) -> Tried | None:
    """Where it answered, with its key; what it says is not proven yet."""
    return next((one for one in tried if one.facts is not None and one.facts.key == pool.key), None)


def _try_all(doors: Sequence[str]) -> list[Tried]:
    """At once."""
    later = [Later(f"the door {door}", partial(_try, door)) for door in doors]
    deadline = time.monotonic() + CONNECT_S + _FACTS_S + _SLACK_S
    return [_in_time(door, one, deadline) for door, one in zip(doors, later, strict=True)]


def discover(fingerprint: str | None) -> list[FoundPool]:
    """Raises ConfigError if this host can't ask the network."""
    from devices.discovery import find_pools  # Here, since zeroconf takes a while to import.

    return find_pools(_FIND_S, fingerprint)


def _in_time(door: str, later: Later[Tried], deadline: float) -> Tried:
    try:
        return later.wait(deadline - time.monotonic())
    except PotluckError as error:
        return Tried(door=door, problem=error)


def _try(door: str) -> Tried:
    try:
        address, port = parse_door(door)
    except ConfigError as error:
        return Tried(door=door, problem=error)
    reach = connect(address, port)
    if reach.outcome != "open":
        return Tried(door=door, reach=reach)
    try:
        return Tried(door=door, reach=reach, facts=ask_door(address, port, _FACTS_S))
    except PotluckError as error:
        return Tried(door=door, reach=reach, problem=error)


def search_check(
    pool: KnownPool, tried: Sequence[Tried], discovery: Sequence[FoundPool] | PotluckError | None
) -> Check:
    """Whether the head is somewhere; where it is not, each place with what happened there."""
    name = f"head {pool.name}"
    at = head_among(pool, tried)
    if at is not None:
        return Check(name=name, state="ok", what=f"answers at {at.door}")
    words = [f"{one.door}: {_door_words(pool, one)}" for one in tried]
    if discovery is None:
        words.append("discovery is switched off")
    elif isinstance(discovery, PotluckError):
        words.append(discovery.message)
    elif not discovery:
        words.append("discovery finds it nowhere on this network")
    outcomes = {one.reach.outcome for one in tried if one.reach is not None and one.facts is None}
    return Check(name=name, state="problem", what="; ".join(words), hint=_search_hint(pool, outcomes))


def _search_hint(pool: KnownPool, outcomes: set[Outcome]) -> str:
    on_head = f"see that {pool.name} is on; there, let Potluck through the firewall: potluck doctor on it says how"
    for outcome in ("timed out", "refused", "unreachable"):
        if outcome in outcomes:
            step = next_step(outcome, whose=pool.name, firewall=on_head)
            break
    else:
        step = f"is {pool.name} up, and on the same network?"
    return f"{step}{'' if step.endswith('?') else '.'} If it has another address now: potluck join --head HOST:PORT"


def _door_words(pool: KnownPool, tried: Tried) -> str:
    if tried.facts is not None:
        return f"another head answers there, not {pool.name}"
    if tried.problem is not None:
        return tried.problem.message
    assert tried.reach is not None
    return tried.reach.meaning
