"""The pool that this host has joined, seen from here: where its head is, and whether both reach each other."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import zmq

from devices.interfaces import lan_interfaces
from devices.known_pools import KnownPool
from devices.pair_client import ask_door, check_version
from devices.pairing import DoorFacts
from devices.platform_name import platform_name
from potluck.config import Settings
from potluck.doctor.check import Check, failed
from potluck.doctor.later import Later
from potluck.doctor.links import clock_check, measure_link, speed_check, version_check
from potluck.doctor.reach import CONNECT_S, Outcome, Reach, connect, next_step, outcome_in_words
from potluck.guest import Guest, HeadAddress, Membership
from potluck.lan import ThisHost, parse_door, this_host
from transport.curve import Curve, KeyPair
from transport.endpoints import tcp_endpoint
from transport.errors import ConfigError, DeadlineExceeded, PotluckError
from transport.messages import PiecePeer, Welcome

if TYPE_CHECKING:
    from devices.discovery import FoundPool

FIND_S = 3.5
_WELCOME_S = 5.0
_REACH_S = 6.0
_SPEED_S = 4.0
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StayFacts:
    """A short stay with the head. `back` is how its way to this host's port `port` ended, `speed` bytes/s from it, each
    or why it is not known."""

    welcome: Welcome
    clock_off_s: float
    port: int
    back: Outcome | PotluckError
    back_words: str
    speed: float | PotluckError
    is_wifi: bool


def guest_checks(pool: KnownPool, settings: Settings, *, firewall: str) -> Iterator[Check]:
    """`firewall` says what to do about one on this host."""
    tried, discovery = search(pool, settings)
    yield search_check(pool, tried, discovery)
    at = _head_among(pool, tried)
    if at is None or at.facts is None or at.reach is None:
        return
    try:
        check_version(at.facts)
    except PotluckError as error:
        yield failed(f"{pool.name}: version", error)
        return
    yield version_check(f"{pool.name}: version", version("potluck"), at.facts.potluck)
    control = connect(at.reach.address, at.facts.control_port)
    yield control_check(pool, control)
    if control.outcome != "open":
        return
    try:
        here = this_host(settings, towards=control.address)
        facts = visit(HeadAddress(control=tcp_endpoint(control.address, control.port), key=pool.key), here, pool.name)
    except PotluckError as error:
        yield failed(f"{pool.name}: membership", error)
        return
    yield from stay_checks(pool, facts, firewall)


def search(pool: KnownPool, settings: Settings) -> tuple[list[Tried], list[FoundPool] | PotluckError | None]:
    """Every place where the head has been; if it is at none, where discovery says that it is, too. The latter's answer
    is None if it was not asked."""
    tried = _try_all(pool.doors)
    if not settings.discovery or _head_among(pool, tried) is not None:
        return tried, None
    try:
        found = discover(pool.fingerprint)
    except PotluckError as error:
        return tried, error
    more = {f"{address}:{one.port}" for one in found for address in one.addresses} - set(pool.doors)
    return [*tried, *_try_all(sorted(more)[:_MOST_DOORS])], found


def _head_among(pool: KnownPool, tried: Iterable[Tried]) -> Tried | None:
    return next((one for one in tried if one.facts is not None and one.facts.key == pool.key), None)


def _try_all(doors: Sequence[str]) -> list[Tried]:
    """At once."""
    later = [Later(f"the door {door}", partial(_try, door)) for door in doors]
    deadline = time.monotonic() + CONNECT_S + _FACTS_S + _SLACK_S
    return [_in_time(door, one, deadline) for door, one in zip(doors, later, strict=True)]


def discover(fingerprint: str | None) -> list[FoundPool]:
    """Raises ConfigError if this host can't ask the network."""
    from devices.discovery import find_pools  # Here, since zeroconf takes a while to import.

    return find_pools(FIND_S, fingerprint)


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


def visit(head: HeadAddress, here: ThisHost, name: str) -> StayFacts:
    """Arrive, let the head connect to a port of this host, measure, leave. No pieces are offered meanwhile.

    Raises what the head says instead, or DeadlineExceeded if it does not let this host in.
    """
    assert here.keys is not None and here.address is not None
    with ExitStack() as stack:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.destroy, 0)
        curve = Curve(context, here.keys)
        stack.callback(curve.close)
        try:
            listener = stack.enter_context(socket.create_server((here.address, 0)))
        except OSError as error:
            raise ConfigError(f"can't listen at {here.address}: {error.strerror}", hint="see --lan-host") from error
        guest = Guest(
            context,
            curve,
            head,
            membership=Membership(),
            address=here.address,
            platform=platform_name(),
            pieces="",
        )
        stack.callback(guest.close)
        try:
            welcome = Later("the head", guest.wait_welcome).wait(_WELCOME_S)
        except DeadlineExceeded as error:
            raise DeadlineExceeded(
                f"the head did not let this host in within {_WELCOME_S:.0f} s",
                hint="was it revoked there (potluck devices)? Then: potluck forget, and join with a new code",
            ) from error
        off_s = welcome.clock_s - time.time()
        speed = Later("the link", lambda: _speed(welcome, head, name, here.keys))
        port = int(listener.getsockname()[1])
        back, words = _way_back(guest, port)
        return StayFacts(
            welcome=welcome,
            clock_off_s=off_s,
            port=port,
            back=back,
            back_words=words,
            speed=_waited(speed),
            is_wifi=any(one.is_wifi and one.address == here.address for one in lan_interfaces()),
        )


def _way_back(guest: Guest, port: int) -> tuple[Outcome | PotluckError, str]:
    try:
        problem = guest.reach(port, _REACH_S)
    except PotluckError as error:
        return error, ""
    return outcome_in_words(problem), problem


def _waited(speed: Later[float]) -> float | PotluckError:
    try:
        return speed.wait(_SPEED_S + _SLACK_S)
    except PotluckError as error:
        return error


def _speed(welcome: Welcome, head: HeadAddress, name: str, keys: KeyPair | None) -> float:
    assert keys is not None
    if not welcome.pieces:
        raise ConfigError(f"{name} gives no pieces of models", hint="is its version another one?")
    return measure_link(PiecePeer(name, welcome.pieces, head.key), keys, _SPEED_S)


def search_check(
    pool: KnownPool, tried: Sequence[Tried], discovery: Sequence[FoundPool] | PotluckError | None
) -> Check:
    """Whether the head is somewhere; where it is not, each place with what happened there."""
    name = f"head {pool.name}"
    at = _head_among(pool, tried)
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


def control_check(pool: KnownPool, control: Reach) -> Check:
    """The door answers there, so that only the port can be in the way."""
    name = f"{pool.name}: control"
    if control.outcome == "open":
        return Check(name=name, state="ok", what=f"listens at {control.place}")
    on_head = f"its door is open and this port is not: on {pool.name}, let TCP port {control.port} through the firewall"
    hint = next_step(control.outcome, whose=pool.name, firewall=on_head)
    return Check(name=name, state="problem", what=f"{control.place}: {control.meaning}", hint=hint)


def stay_checks(pool: KnownPool, facts: StayFacts, firewall: str) -> list[Check]:
    name = facts.welcome.name
    checks = [
        Check(name=f"{pool.name}: membership", state="ok", what=f"lets this host in, as {name}"),
        _back_check(pool, facts, firewall),
        clock_check(f"{pool.name}: clock", facts.clock_off_s),
    ]
    if isinstance(facts.speed, PotluckError):
        checks.append(failed(f"{pool.name}: link", facts.speed))
    else:
        checks.append(speed_check(f"{pool.name}: link", facts.speed, is_wifi=facts.is_wifi))
    return checks


def _back_check(pool: KnownPool, facts: StayFacts, firewall: str) -> Check:
    name = f"{pool.name}: way back"
    if isinstance(facts.back, PotluckError):
        return failed(name, facts.back)
    if facts.back == "open":
        return Check(name=name, state="ok", what="it can connect to ports of this host")
    meaning = Reach(address="", port=facts.port, outcome=facts.back, words=facts.back_words).meaning
    return Check(
        name=name,
        state="problem",
        what=f"it can't connect to port {facts.port} of this host: {meaning}",
        hint=firewall if facts.back != "unreachable" else f"{firewall}; or see --lan-host: is it this host's address?",
    )
