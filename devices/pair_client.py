"""The other side of the front door: a host asks who is there, pairs, and asks later whether it still counts."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import NoReturn

from msgspec import Struct
from msgspec.structs import replace

from devices.credentials import MAX_GUESSES, Invite, Kind, parse_code
from devices.known_pools import KnownPool
from devices.lines import HungUp, Lines, decoded
from devices.members import clean_name, clean_words
from devices.pairing import (
    Answer,
    Confirmed,
    DoorFacts,
    HeadMessage,
    JoinerSide,
    Knock,
    Outcome,
    Refused,
    Result,
    Waiting,
)
from devices.standing import Standing, Word, new_ask, word_of
from transport.curve import KeyPair, is_key
from transport.errors import (
    BadMessage,
    Busy,
    ConfigError,
    DeadlineExceeded,
    NotRunning,
    PairingFailed,
    PotluckError,
    VersionMismatch,
)
from transport.messages import PROTOCOL_VERSION

CONNECT_TIMEOUT_S = 5.0
_LINE_TIMEOUT_S = 20.0
_DECISION_TIMEOUT_S = 120.0
_SOMEONE_BETWEEN = "if it was right, someone between the two hosts answers in the head's place"


class _Versions(Struct, frozen=True):
    """What every head's facts have, whatever else changes."""

    protocol: int
    potluck: str


def ask_door(host: str, port: int, timeout: float = CONNECT_TIMEOUT_S) -> DoorFacts:
    """What the head whose door is there says of itself; unproven.

    Raises NotRunning if nobody answers, Busy if the door is full, ConfigError if something else answers, and
    VersionMismatch if it is a head that says it in other words.
    """
    lines = _connected(host, port, timeout)
    try:
        return _printable(_facts(lines, host, port, timeout))
    finally:
        lines.close()


def ask_standing(
    host: str, port: int, pool: KnownPool, *, keys: KeyPair, timeout: float = CONNECT_TIMEOUT_S
) -> tuple[DoorFacts, Word]:
    """What the head of `pool`, whose door is there, says of itself and of this host; proven, both.

    Raises NotRunning if it is not there, whoever answers in its place; Busy, ConfigError.
    """
    where = f"{host}:{port}"
    lines = _connected(host, port, timeout)
    try:
        facts, told = _told(lines, host, port, timeout)
        if facts.key != pool.key:
            raise NotRunning(f"at {where} is another head than {pool.name}", hint="pair with it: potluck join --code")
        ask = new_ask(keys)
        lines.send(ask, timeout)
        word = word_of(lines.receive(Standing, timeout), ask, told, pool.key, keys)
        return _printable(facts), word
    except VersionMismatch as error:  # Unproven: a stranger must not end a host's wait for its head.
        raise NotRunning(error.message, hint=error.hint) from error
    except (HungUp, DeadlineExceeded, BadMessage) as error:
        raise NotRunning(
            f"who answers at {where} does not prove that it is {pool.name}: {error}",
            hint="is its Potluck of the same version as this one? If so, someone answers in its place",
        ) from error
    finally:
        lines.close()


def check_version(facts: DoorFacts) -> None:
    """Raises VersionMismatch, with both versions and which host to update."""
    if facts.protocol != PROTOCOL_VERSION:
        raise _mismatch(f"the head ({clean_words(facts.name)})", facts.protocol, facts.potluck)


def pair(
    host: str,
    port: int,
    credential: Invite | str,
    *,
    keys: KeyPair,
    name: str,
    platform: str,
    on_waiting: Callable[[DoorFacts], object] = lambda facts: None,
    decision_timeout_s: float = _DECISION_TIMEOUT_S,
) -> KnownPool:
    """Pair with the head whose door is there, by an invite or a code; `on_waiting` when its user is being asked.

    What is returned is proven: the head knows the secret, and its key is the one returned. Raises PairingFailed,
    VersionMismatch, NotRunning, Busy, ConfigError.
    """
    kind: Kind = "invite" if isinstance(credential, Invite) else "code"
    secret = credential.token if isinstance(credential, Invite) else parse_code(credential)
    lines = _connected(host, port, CONNECT_TIMEOUT_S)
    try:
        facts = _facts(lines, host, port, _LINE_TIMEOUT_S)
        check_version(facts)
        _check_head(facts, credential, keys, f"{host}:{port}")
        side = JoinerSide(secret, facts, kind=kind, key=keys.public, name=name, platform=platform)
        _exchange(lines, side, kind)
        on_waiting(_printable(facts))
        outcome = _decision(lines, side, decision_timeout_s)
        _check_outcome(outcome, facts)
        door = f"{host}:{port}"
        return KnownPool(
            pool=facts.pool,
            key=facts.key,
            name=clean_name(facts.name),
            my_name=clean_words(outcome.name),
            doors=(door,),
        )
    except HungUp as error:
        raise PairingFailed(
            f"the head at {host}:{port} hung up: {error}", hint="is it still up? Try again with a new code"
        ) from error
    except BadMessage as error:
        raise PairingFailed(
            f"the head at {host}:{port} said something that makes no sense: {error.message}",
            hint="try again; if it stays so, someone between the two hosts may be changing what they say",
        ) from error
    except DeadlineExceeded as error:
        raise PairingFailed(
            f"the head at {host}:{port} fell silent: {error.message}", hint="try again with a new code"
        ) from error
    finally:
        lines.close()


def _mismatch(head: str, protocol: int, potluck: str) -> VersionMismatch:
    older = "this host" if protocol > PROTOCOL_VERSION else head
    return VersionMismatch(
        f"this host has Potluck {version('potluck')} (protocol {PROTOCOL_VERSION}) and {head} has "
        f"{clean_words(potluck)} (protocol {protocol}); they do not understand each other",
        hint=f"update Potluck on {older}",
    )


def _printable(facts: DoorFacts) -> DoorFacts:
    """As a user may see them: anyone can send anything. The exchange is about what was really said."""
    return replace(facts, name=clean_name(facts.name), pool=clean_words(facts.pool), potluck=clean_words(facts.potluck))


def _connected(host: str, port: int, timeout_s: float) -> Lines:
    try:
        return Lines(socket.create_connection((host, port), timeout_s))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no answer in time" if isinstance(error, OSError) else error
        raise NotRunning(
            f"nobody answers at {host}:{port}: {reason}",
            hint="is the head up, on this network, and no firewall between? see: potluck doctor",
        ) from error


def _facts(lines: Lines, host: str, port: int, timeout_s: float) -> DoorFacts:
    return _told(lines, host, port, timeout_s)[0]


def _told(lines: Lines, host: str, port: int, timeout_s: float) -> tuple[DoorFacts, bytes]:
    """The facts, and the line that told them."""
    try:
        lines.send(Knock(protocol=PROTOCOL_VERSION, potluck=version("potluck")), timeout_s)
        line = lines.receive_line(timeout_s)
        message = _door_says(line)
    except HungUp as error:
        raise NotRunning(
            f"what listens at {host}:{port} hung up: {error}", hint="is it a head's door? If so, try again in a moment"
        ) from error
    except (BadMessage, DeadlineExceeded) as error:
        raise ConfigError(
            f"what answers at {host}:{port} is no head of this Potluck: {error.message}",
            hint="write HOST:PORT as potluck up prints it, and check that both hosts have the same version",
        ) from error
    if isinstance(message, Refused):
        raise Busy(f"too many hosts knock at {host}:{port}", hint="try again in a moment")
    if not is_key(message.key):
        raise ConfigError(f"what answers at {host}:{port} has no key", hint="is it a head?")
    return message, line


def _door_says(line: bytes) -> DoorFacts | Refused:
    """Raises VersionMismatch for a head of a version whose facts are others, BadMessage for what is none."""
    try:
        said: DoorFacts | Refused = decoded(line, DoorFacts | Refused)  # type: ignore[arg-type]
        return said
    except BadMessage:
        versions = decoded(line, _Versions)
        if versions.protocol == PROTOCOL_VERSION:
            raise
        raise _mismatch("the head", versions.protocol, versions.potluck) from None


def _check_head(facts: DoorFacts, credential: Invite | str, keys: KeyPair, where: str) -> None:
    if facts.key == keys.public:
        raise PairingFailed(
            f"the head at {where} is this host itself", hint="its devices take part without being paired"
        )
    if isinstance(credential, Invite) and (facts.key, facts.pool) != (credential.key, credential.pool):
        raise PairingFailed(
            f"at {where} answers another head than the one that gave the invite",
            hint="make a new invite on the head; if it is refused again, someone between the two hosts answers in its "
            "place",
        )


def _exchange(lines: Lines, side: JoinerSide, kind: Kind) -> None:
    lines.send(side.begin, _LINE_TIMEOUT_S)
    answer = _next(lines, kind)
    if not isinstance(answer, Answer):
        raise BadMessage("another message than the key exchange's")
    lines.send(side.confirm(answer), _LINE_TIMEOUT_S)
    confirmed = _next(lines, kind)
    if not isinstance(confirmed, Confirmed) or not side.is_right(confirmed):
        raise PairingFailed("the head does not know the secret", hint=f"make a new one; {_SOMEONE_BETWEEN}")


def _decision(lines: Lines, side: JoinerSide, timeout_s: float) -> Outcome:
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > 0:
        message: HeadMessage = lines.receive(HeadMessage, min(left_s, _LINE_TIMEOUT_S))  # type: ignore[arg-type]
        if isinstance(message, Result):
            return side.outcome(message)
        if not isinstance(message, Waiting):
            raise BadMessage("another message than the result")
    return Outcome(decision="unanswered")


def _check_outcome(outcome: Outcome, facts: DoorFacts) -> None:
    name = clean_words(facts.name)
    match outcome.decision:
        case "allowed":
            return
        case "refused":
            raise PairingFailed(f"{name} refused this host", hint="ask its user, and pair with a new code")
        case "unanswered":
            raise PairingFailed(
                f"nobody let this host in at {name} in time",
                hint="pair with a new code, and answer on the head: potluck approve NAME",
            )
        case "failed":
            raise PairingFailed(f"{name} could not take this host in", hint="the head's terminal says why")


def _next(lines: Lines, kind: Kind) -> HeadMessage:
    message: HeadMessage = lines.receive(HeadMessage, _LINE_TIMEOUT_S)  # type: ignore[arg-type]
    if isinstance(message, Refused):
        _raise_refused(message, kind)
    return message


def _raise_refused(refused: Refused, kind: Kind) -> NoReturn:
    new = f"make a new {kind} on the head: potluck invite"
    errors: dict[str, PotluckError] = {
        "wrong": PairingFailed(
            f"the code is wrong; guesses left: {refused.guesses_left}"
            if kind == "code"
            else "the head does not know the invite",
            hint=f"type it as the head shows it; {_SOMEONE_BETWEEN}"
            if kind == "code"
            else f"{new}; {_SOMEONE_BETWEEN}",
        ),
        "locked": PairingFailed(
            f"the code is locked after {MAX_GUESSES} guesses",
            hint=f"{new}; if that is locked too, someone else guesses: use the invite, which can't be locked",
        ),
        "used": PairingFailed(f"the {kind} was used already", hint=new),
        "expired": PairingFailed(f"the {kind} is too old", hint=new),
        "none": PairingFailed(f"the head has given out no {kind}", hint=new),
        "busy": Busy("too many hosts knock at the head", hint="try again in a moment"),
        "version": VersionMismatch(
            "the head does not understand this host's version of Potluck",
            hint="bring both hosts to the same version of Potluck",
        ),
    }
    raise errors[refused.reason]
