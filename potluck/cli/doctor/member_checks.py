"""Checks of a host without a head: where the head of its pool is, and whether both reach each other."""

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

from devices.hardware.interfaces import lan_interfaces
from devices.pairing.client import check_version, fetch_membership, fetch_pool_info
from devices.pairing.identity import load_keys
from devices.pairing.known_pools import KnownPool
from devices.pairing.pake import PoolInfo
from potluck.cli.doctor.check import Check, clock_check, failed_check, measure_link, speed_check, version_check
from potluck.cli.doctor.probe import (
    CONNECT_TIMEOUT_S,
    ConnectOutcome,
    ConnectResult,
    DeadlineTask,
    next_step,
    parse_outcome,
    try_connect,
)
from potluck.host.find_head import HeadAddress, eviction_error
from potluck.host.local_host import ThisHost, parse_pairing_address, this_host
from potluck.host.member import KnownMembers, PoolMember
from potluck.system.paths import identity_dir
from potluck.system.settings import Settings
from transport.errors import ConfigError, DeadlineExceeded, PotluckError
from transport.links.endpoints import tcp_endpoint
from transport.messages.pool import NodeAccepted, PiecePeer
from transport.security.curve import Curve, KeyPair

if TYPE_CHECKING:
    from devices.discovery.mdns import AdvertisedPool

_DISCOVERY_TIMEOUT_S = 3.5
_POOL_INFO_TIMEOUT_S = 2.0
_SLACK_S = 0.5
_MAX_ADDRESSES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadAttempt:
    """A door where the head might have been, as "HOST:PORT", and who answered; `reach` is None if the place makes no
    sense, which `problem` explains."""

    address: str
    connection: ConnectResult | None = None
    pool_info: PoolInfo | None = None
    problem: PotluckError | None = None


def find_head(
    pool: KnownPool, settings: Settings
) -> tuple[list[HeadAttempt], list[AdvertisedPool] | PotluckError | None]:
    """Every place where the head has been; if it is at none, where discovery says that it is, too. The latter's answer
    is None if it was not asked."""
    tried = _try_all(pool.doors)
    if not settings.discovery or answering_head(pool, tried) is not None:
        return tried, None
    try:
        found = discover_pools(pool.fingerprint)
    except PotluckError as error:
        return tried, error
    more = {f"{address}:{one.port}" for one in found for address in one.addresses} - set(pool.doors)
    return [*tried, *_try_all(sorted(more)[:_MAX_ADDRESSES])], found


def answering_head(pool: KnownPool, tried: Iterable[HeadAttempt]) -> HeadAttempt | None:
    """Where it answered, with its key; what it says is not proven yet."""
    return next((one for one in tried if one.pool_info is not None and one.pool_info.key == pool.key), None)


def _try_all(addresses: Sequence[str]) -> list[HeadAttempt]:
    """At once."""
    later = [DeadlineTask(f"the door {door}", partial(_try_address, door)) for door in addresses]
    deadline = time.monotonic() + CONNECT_TIMEOUT_S + _POOL_INFO_TIMEOUT_S + _SLACK_S
    return [_in_time(door, one, deadline) for door, one in zip(addresses, later, strict=True)]


def discover_pools(fingerprint: str | None) -> list[AdvertisedPool]:
    """Raises ConfigError if this host can't ask the network."""
    from devices.discovery.mdns import browse_pools  # Here, since zeroconf takes a while to import.

    return browse_pools(_DISCOVERY_TIMEOUT_S, fingerprint)


def _in_time(door: str, later: DeadlineTask[HeadAttempt], deadline: float) -> HeadAttempt:
    try:
        return later.wait(deadline - time.monotonic())
    except PotluckError as error:
        return HeadAttempt(address=door, problem=error)


def _try_address(door: str) -> HeadAttempt:
    try:
        address, port = parse_pairing_address(door)
    except ConfigError as error:
        return HeadAttempt(address=door, problem=error)
    reach = try_connect(address, port)
    if reach.outcome != "open":
        return HeadAttempt(address=door, connection=reach)
    try:
        return HeadAttempt(
            address=door, connection=reach, pool_info=fetch_pool_info(address, port, _POOL_INFO_TIMEOUT_S)
        )
    except PotluckError as error:
        return HeadAttempt(address=door, connection=reach, problem=error)


def head_found_check(
    pool: KnownPool, tried: Sequence[HeadAttempt], discovery: Sequence[AdvertisedPool] | PotluckError | None
) -> Check:
    """Whether the head is somewhere; where it is not, each place with what happened there."""
    name = f"head {pool.name}"
    at = answering_head(pool, tried)
    if at is not None:
        return Check(name=name, state="ok", what=f"answers at {at.address}")
    words = [f"{one.address}: {_attempt_text(pool, one)}" for one in tried]
    if discovery is None:
        words.append("discovery is switched off")
    elif isinstance(discovery, PotluckError):
        words.append(discovery.message)
    elif not discovery:
        words.append("discovery finds it nowhere on this network")
    outcomes = {one.connection.outcome for one in tried if one.connection is not None and one.pool_info is None}
    return Check(name=name, state="problem", what="; ".join(words), hint=_search_hint(pool, outcomes))


def _search_hint(pool: KnownPool, outcomes: set[ConnectOutcome]) -> str:
    on_head = f"see that {pool.name} is on; there, let Potluck through the firewall: potluck doctor on it says how"
    for outcome in ("timed out", "refused", "unreachable"):
        if outcome in outcomes:
            step = next_step(outcome, whose=pool.name, firewall=on_head)
            break
    else:
        step = f"is {pool.name} up, and on the same network?"
    return f"{step}{'' if step.endswith('?') else '.'} If it has another address now: potluck join --head HOST:PORT"


def _attempt_text(pool: KnownPool, tried: HeadAttempt) -> str:
    if tried.pool_info is not None:
        return f"another head answers there, not {pool.name}"
    if tried.problem is not None:
        return tried.problem.message
    assert tried.connection is not None
    return tried.connection.meaning


_START_HINT = (
    "serve a model with potluck up MODEL; or join another host's pool: potluck invite there, potluck join here"
)


def no_pool_checks(settings: Settings, why: PotluckError) -> Iterator[Check]:
    """`why` there is no head."""
    yield Check(name="head", state="ok", what=f"{why.message}, and this host has joined no pool", hint=_START_HINT)
    if not settings.discovery:
        return
    try:
        found = discover_pools(None)
    except PotluckError as error:
        yield failed_check("pools", error, state="warning")
        return
    yield pools_check(found)


def pools_check(found: Sequence[AdvertisedPool]) -> Check:
    """What discovery saw; anyone may have said it."""
    if not found:
        hint = "a head on this network is not seen? Join with potluck join --head HOST:PORT, as it prints it"
        return Check(name="pools", state="ok", what="none is seen on this network", hint=hint)
    words = ", ".join(f"pool {pool.fingerprint} at {pool.addresses[0]}:{pool.port}" for pool in found)
    address = f"{found[0].addresses[0]}:{found[0].port}"
    hint = f"join one with the code that potluck invite shows there: potluck join --head {address} --code CODE"
    return Check(name="pools", state="ok", what=words, hint=hint)


_ACCEPT_TIMEOUT_S = 5.0
_RETURN_TIMEOUT_S = 6.0
_SPEED_TIMEOUT_S = 4.0
_LINK_SLACK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipProbe:
    """A short stay with the head. `back` is how its way to this host's port `port` ended, `speed` bytes/s from it, each
    or why it is not known."""

    accepted: NodeAccepted
    clock_off_s: float
    port: int
    return_outcome: ConnectOutcome | PotluckError
    return_error: str
    speed: float | PotluckError
    is_wifi: bool


def member_checks(pool: KnownPool, settings: Settings, *, firewall: str) -> Iterator[Check]:
    """`firewall` says what to do about one on this host."""
    tried, discovery = find_head(pool, settings)
    yield head_found_check(pool, tried, discovery)
    at = answering_head(pool, tried)
    if at is None or at.pool_info is None or at.connection is None:
        return
    try:
        check_version(at.pool_info)
    except PotluckError as error:
        yield failed_check(f"{pool.name}: version", error)
        return
    yield version_check(f"{pool.name}: version", version("potluck"), at.pool_info.potluck)
    control = try_connect(at.connection.address, at.pool_info.control_port)
    yield control_check(pool, control)
    if control.outcome != "open":
        return
    try:
        here = this_host(settings, target=control.address)
        _, status = fetch_membership(at.connection.address, at.connection.port, pool, keys=load_keys(identity_dir()))
        if status != "member":
            raise eviction_error(pool, status)
        facts = probe_membership(
            HeadAddress(control=tcp_endpoint(control.address, control.port), key=pool.key), here, pool.name
        )
    except PotluckError as error:
        yield failed_check(f"{pool.name}: membership", error)
        return
    yield from membership_checks(pool, facts, firewall)


def probe_membership(head: HeadAddress, here: ThisHost, name: str) -> MembershipProbe:
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
        pool_member = PoolMember(
            context,
            curve,
            head,
            known_members=KnownMembers(),
            address=here.address,
            pieces="",
        )
        stack.callback(pool_member.close)
        try:
            welcome = DeadlineTask("the head", pool_member.wait_accepted).wait(_ACCEPT_TIMEOUT_S)
        except DeadlineExceeded as error:
            raise DeadlineExceeded(
                f"the head did not let this host in within {_ACCEPT_TIMEOUT_S:.0f} s",
                hint="its door does: is another head's key at this address?",
            ) from error
        off_s = welcome.clock_s - time.time()
        speed = DeadlineTask("the link", lambda: _link_speed(welcome, head, name, here.keys))
        port = int(listener.getsockname()[1])
        back, words = _probe_return_path(pool_member, port)
        return MembershipProbe(
            accepted=welcome,
            clock_off_s=off_s,
            port=port,
            return_outcome=back,
            return_error=words,
            speed=_speed_or_error(speed),
            is_wifi=any(one.is_wifi and one.address == here.address for one in lan_interfaces()),
        )


def _probe_return_path(pool_member: PoolMember, port: int) -> tuple[ConnectOutcome | PotluckError, str]:
    try:
        problem = pool_member.probe_connection(port, _RETURN_TIMEOUT_S)
    except PotluckError as error:
        return error, ""
    return parse_outcome(problem), problem


def _speed_or_error(speed: DeadlineTask[float]) -> float | PotluckError:
    try:
        return speed.wait(_SPEED_TIMEOUT_S + _LINK_SLACK_S)
    except PotluckError as error:
        return error


def _link_speed(welcome: NodeAccepted, head: HeadAddress, name: str, keys: KeyPair | None) -> float:
    assert keys is not None
    if not welcome.pieces:
        raise ConfigError(f"{name} gives no pieces of models", hint="is its version another one?")
    return measure_link(PiecePeer(name, welcome.pieces, head.key), keys, _SPEED_TIMEOUT_S)


def control_check(pool: KnownPool, control: ConnectResult) -> Check:
    """The door answers there, so that only the port can be in the way."""
    name = f"{pool.name}: control"
    if control.outcome == "open":
        return Check(name=name, state="ok", what=f"listens at {control.host_port}")
    on_head = f"its door is open and this port is not: on {pool.name}, let TCP port {control.port} through the firewall"
    hint = next_step(control.outcome, whose=pool.name, firewall=on_head)
    return Check(name=name, state="problem", what=f"{control.host_port}: {control.meaning}", hint=hint)


def membership_checks(pool: KnownPool, facts: MembershipProbe, firewall: str) -> list[Check]:
    name = facts.accepted.name
    checks = [
        Check(name=f"{pool.name}: membership", state="ok", what=f"lets this host in, as {name}"),
        _return_path_check(pool, facts, firewall),
        clock_check(f"{pool.name}: clock", facts.clock_off_s),
    ]
    if isinstance(facts.speed, PotluckError):
        checks.append(failed_check(f"{pool.name}: link", facts.speed))
    else:
        checks.append(speed_check(f"{pool.name}: link", facts.speed, is_wifi=facts.is_wifi))
    return checks


def _return_path_check(pool: KnownPool, facts: MembershipProbe, firewall: str) -> Check:
    name = f"{pool.name}: way back"
    if isinstance(facts.return_outcome, PotluckError):
        return failed_check(name, facts.return_outcome)
    if facts.return_outcome == "open":
        return Check(name=name, state="ok", what="it can connect to ports of this host")
    meaning = ConnectResult(address="", port=facts.port, outcome=facts.return_outcome, error=facts.return_error).meaning
    return Check(
        name=name,
        state="problem",
        what=f"it can't connect to port {facts.port} of this host: {meaning}",
        hint=firewall
        if facts.return_outcome != "unreachable"
        else f"{firewall}; or see --lan-host: is it this host's address?",
    )
