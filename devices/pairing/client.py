"""The pairing client asks which pool answers, pairs with it, and asks later for its membership."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import NoReturn

from msgspec import Struct
from msgspec.structs import replace

from devices.pairing.credentials import MAX_GUESSES, CredentialKind, Invite, parse_code
from devices.pairing.json_lines import ConnectionClosed, JsonLineSocket, decode_line
from devices.pairing.known_pools import KnownPool
from devices.pairing.membership import MembershipStatus, StatusReply, new_status_request, verify_status
from devices.pairing.pake import (
    HeadMessage,
    JoinerPake,
    PairingHello,
    PairingOutcome,
    PairingPending,
    PairingRefused,
    PairingResult,
    PakeConfirmed,
    PakeReply,
    PoolInfo,
)
from devices.pairing.roster import clean_name, clean_text
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
from transport.messages.ring import PROTOCOL_VERSION
from transport.security.curve import KeyPair, is_key
from transport.timeouts import PAIRING_CONNECT_S, PAIRING_DECISION_S, PAIRING_LINE_S

_SOMEONE_BETWEEN = "if it was right, someone between the two hosts answers in the head's place"


class _Versions(Struct, frozen=True):
    """What every head's facts have, whatever else changes."""

    protocol: int
    potluck: str


def fetch_pool_info(host: str, port: int, timeout: float = PAIRING_CONNECT_S) -> PoolInfo:
    """What the head whose pairing server is there says of itself; unproven.

    Raises NotRunning if nobody answers, Busy if the server is full, ConfigError if something else answers, and
    VersionMismatch if it is a head that says it in other words.
    """
    connection = _connect(host, port, timeout)
    try:
        return _printable(_receive_pool_info(connection, host, port, timeout))
    finally:
        connection.close()


def fetch_membership(
    host: str, port: int, pool: KnownPool, *, keys: KeyPair, timeout: float = PAIRING_CONNECT_S
) -> tuple[PoolInfo, MembershipStatus]:
    """What the head of `pool`, whose pairing server is there, says of itself and of this host; both proven.

    Raises NotRunning if it is not there, whoever answers in its place; Busy, ConfigError.
    """
    where = f"{host}:{port}"
    connection = _connect(host, port, timeout)
    try:
        info, info_line = _receive_pool_info_line(connection, host, port, timeout)
        if info.key != pool.key:
            raise NotRunning(f"at {where} is another head than {pool.name}", hint="pair with it: potluck join --code")
        request = new_status_request(keys)
        connection.send(request, timeout)
        status = verify_status(connection.receive(StatusReply, timeout), request, info_line, pool.key, keys)
        return _printable(info), status
    except VersionMismatch as error:  # Unproven: a stranger must not end a host's wait for its head.
        raise NotRunning(error.message, hint=error.hint) from error
    except (ConnectionClosed, DeadlineExceeded, BadMessage) as error:
        raise NotRunning(
            f"who answers at {where} does not prove that it is {pool.name}: {error}",
            hint="is its Potluck of the same version as this one? If so, someone answers in its place",
        ) from error
    finally:
        connection.close()


def check_version(info: PoolInfo) -> None:
    """Raises VersionMismatch, with both versions and which host to update."""
    if info.protocol != PROTOCOL_VERSION:
        raise _version_mismatch(f"the head ({clean_text(info.name)})", info.protocol, info.potluck)


def pair(
    host: str,
    port: int,
    credential: Invite | str,
    *,
    keys: KeyPair,
    name: str,
    platform: str,
    on_waiting: Callable[[PoolInfo], object] = lambda facts: None,
    decision_timeout_s: float = PAIRING_DECISION_S,
) -> KnownPool:
    """Pair with the head whose pairing server is there, by an invite or a code; `on_waiting` when its user is being
    asked.

    What is returned is proven: the head knows the secret, and its key is the one returned. Raises PairingFailed,
    VersionMismatch, NotRunning, Busy, ConfigError.
    """
    kind: CredentialKind = "invite" if isinstance(credential, Invite) else "code"
    secret = credential.token if isinstance(credential, Invite) else parse_code(credential)
    connection = _connect(host, port, PAIRING_CONNECT_S)
    try:
        info = _receive_pool_info(connection, host, port, PAIRING_LINE_S)
        check_version(info)
        _check_head(info, credential, keys, f"{host}:{port}")
        pake = JoinerPake(secret, info, kind=kind, key=keys.public, name=name, platform=platform)
        _exchange(connection, pake, kind)
        on_waiting(_printable(info))
        outcome = _decision(connection, pake, decision_timeout_s)
        _check_outcome(outcome, info)
        address = f"{host}:{port}"
        return KnownPool(
            pool=info.pool,
            key=info.key,
            name=clean_name(info.name),
            my_name=clean_text(outcome.name),
            doors=(address,),
        )
    except ConnectionClosed as error:
        raise PairingFailed(
            f"the head at {host}:{port} closed the connection: {error}",
            hint="is it still up? Try again with a new code",
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
        connection.close()


def _version_mismatch(head: str, protocol: int, potluck: str) -> VersionMismatch:
    older = "this host" if protocol > PROTOCOL_VERSION else head
    return VersionMismatch(
        f"this host has Potluck {version('potluck')} (protocol {PROTOCOL_VERSION}) and {head} has "
        f"{clean_text(potluck)} (protocol {protocol}); they do not understand each other",
        hint=f"update Potluck on {older}",
    )


def _printable(info: PoolInfo) -> PoolInfo:
    """As a user may see them: anyone can send anything. The exchange is about what was really said."""
    return replace(info, name=clean_name(info.name), pool=clean_text(info.pool), potluck=clean_text(info.potluck))


def _connect(host: str, port: int, timeout_s: float) -> JsonLineSocket:
    try:
        return JsonLineSocket(socket.create_connection((host, port), timeout_s))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no answer in time" if isinstance(error, OSError) else error
        raise NotRunning(
            f"nobody answers at {host}:{port}: {reason}",
            hint="is the head up, on this network, and no firewall between? see: potluck doctor",
        ) from error


def _receive_pool_info(connection: JsonLineSocket, host: str, port: int, timeout_s: float) -> PoolInfo:
    return _receive_pool_info_line(connection, host, port, timeout_s)[0]


def _receive_pool_info_line(
    connection: JsonLineSocket, host: str, port: int, timeout_s: float
) -> tuple[PoolInfo, bytes]:
    """The pool's information, and the line that it came in."""
    try:
        connection.send(PairingHello(protocol=PROTOCOL_VERSION, potluck=version("potluck")), timeout_s)
        line = connection.receive_line(timeout_s)
        message = _decode_pool_info(line)
    except ConnectionClosed as error:
        raise NotRunning(
            f"what listens at {host}:{port} closed the connection: {error}",
            hint="is it a head's pairing port? If so, try again in a moment",
        ) from error
    except (BadMessage, DeadlineExceeded) as error:
        raise ConfigError(
            f"what answers at {host}:{port} is no head of this Potluck: {error.message}",
            hint="write HOST:PORT as potluck up prints it, and check that both hosts have the same version",
        ) from error
    if isinstance(message, PairingRefused):
        raise Busy(f"too many hosts want to pair at {host}:{port}", hint="try again in a moment")
    if not is_key(message.key):
        raise ConfigError(f"what answers at {host}:{port} has no key", hint="is it a head?")
    return message, line


def _decode_pool_info(line: bytes) -> PoolInfo | PairingRefused:
    """Raises VersionMismatch for a head of a version whose facts are others, BadMessage for what is none."""
    try:
        said: PoolInfo | PairingRefused = decode_line(line, PoolInfo | PairingRefused)  # type: ignore[arg-type]
        return said
    except BadMessage:
        versions = decode_line(line, _Versions)
        if versions.protocol == PROTOCOL_VERSION:
            raise
        raise _version_mismatch("the head", versions.protocol, versions.potluck) from None


def _check_head(info: PoolInfo, credential: Invite | str, keys: KeyPair, where: str) -> None:
    if info.key == keys.public:
        raise PairingFailed(
            f"the head at {where} is this host itself", hint="its devices take part without being paired"
        )
    if isinstance(credential, Invite) and (info.key, info.pool) != (credential.key, credential.pool):
        raise PairingFailed(
            f"at {where} answers another head than the one that gave the invite",
            hint="make a new invite on the head; if it is refused again, someone between the two hosts answers in its "
            "place",
        )


def _exchange(connection: JsonLineSocket, pake: JoinerPake, kind: CredentialKind) -> None:
    connection.send(pake.start, PAIRING_LINE_S)
    answer = _receive_reply(connection, kind)
    if not isinstance(answer, PakeReply):
        raise BadMessage("another message than the key exchange's")
    connection.send(pake.confirm(answer), PAIRING_LINE_S)
    confirmed = _receive_reply(connection, kind)
    if not isinstance(confirmed, PakeConfirmed) or not pake.verify(confirmed):
        raise PairingFailed("the head does not know the secret", hint=f"make a new one; {_SOMEONE_BETWEEN}")


def _decision(connection: JsonLineSocket, pake: JoinerPake, timeout_s: float) -> PairingOutcome:
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > 0:
        message: HeadMessage = connection.receive(HeadMessage, min(left_s, PAIRING_LINE_S))  # type: ignore[arg-type]
        if isinstance(message, PairingResult):
            return pake.outcome(message)
        if not isinstance(message, PairingPending):
            raise BadMessage("another message than the result")
    return PairingOutcome(decision="unanswered")


def _check_outcome(outcome: PairingOutcome, info: PoolInfo) -> None:
    name = clean_text(info.name)
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


def _receive_reply(connection: JsonLineSocket, kind: CredentialKind) -> HeadMessage:
    message: HeadMessage = connection.receive(HeadMessage, PAIRING_LINE_S)  # type: ignore[arg-type]
    if isinstance(message, PairingRefused):
        _raise_refused(message, kind)
    return message


def _raise_refused(refused: PairingRefused, kind: CredentialKind) -> NoReturn:
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
        "busy": Busy("too many hosts want to pair with the head", hint="try again in a moment"),
        "version": VersionMismatch(
            "the head does not understand this host's version of Potluck",
            hint="bring both hosts to the same version of Potluck",
        ),
    }
    raise errors[refused.reason]
