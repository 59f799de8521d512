"""The pool that this host has joined, seen from here: whether its head lets it in, and both reach each other."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version

import zmq

from devices.identity import load_keys
from devices.interfaces import lan_interfaces
from devices.known_pools import KnownPool
from devices.pair_client import ask_standing, check_version
from devices.platform_name import platform_name
from potluck.config import Settings
from potluck.doctor.check import Check, failed
from potluck.doctor.later import Later
from potluck.doctor.links import clock_check, measure_link, speed_check, version_check
from potluck.doctor.reach import Outcome, Reach, connect, next_step, outcome_in_words
from potluck.doctor.search import head_among, search, search_check
from potluck.guest import Guest, HeadAddress, Membership
from potluck.head_search import put_out
from potluck.lan import ThisHost, this_host
from potluck.paths import identity_dir
from transport.curve import Curve, KeyPair
from transport.endpoints import tcp_endpoint
from transport.errors import ConfigError, DeadlineExceeded, PotluckError
from transport.pool_messages import PiecePeer, Welcome

_WELCOME_S = 5.0
_REACH_S = 6.0
_SPEED_S = 4.0
_SLACK_S = 0.5


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
    at = head_among(pool, tried)
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
        _, word = ask_standing(at.reach.address, at.reach.port, pool, keys=load_keys(identity_dir()))
        if word != "member":
            raise put_out(pool, word)
        facts = visit(HeadAddress(control=tcp_endpoint(control.address, control.port), key=pool.key), here, pool.name)
    except PotluckError as error:
        yield failed(f"{pool.name}: membership", error)
        return
    yield from stay_checks(pool, facts, firewall)


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
                hint="its door does: is another head's key at this address?",
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
