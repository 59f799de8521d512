"""The pairing server of a head: hosts that are not paired ask who is there, and pair; paired ones ask whether they are
still members.

It is plain TCP and anyone may come, so that nobody gets much: few connections, short lines, little time, and one key
exchange at a time, spaced out, however many ask.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace
from rich.markup import escape

from devices.hardware.interfaces import lan_address
from devices.pairing.credentials import Code, Invite, PairingCodes, PairingRefusal
from devices.pairing.identity import fingerprint
from devices.pairing.json_lines import ConnectionClosed, JsonLineSocket
from devices.pairing.membership import StatusRequest, prove_status
from devices.pairing.pake import (
    MAX_TEXT_CHARACTERS,
    Candidate,
    HeadPake,
    PairingHello,
    PairingOutcome,
    PairingPending,
    PairingRefused,
    PakeConfirm,
    PakeStart,
    PoolInfo,
)
from devices.pairing.roster import RosterFile, clean_name, clean_text
from transport.errors import BadMessage, ConfigError, DeadlineExceeded, PortInUse, PotluckError
from transport.security.curve import KeyPair, is_key
from transport.timeouts import PAIRING_SERVER_LINE_S, THREAD_JOIN_S

__all__ = ["Candidate", "PairingServer", "PoolInfo"]

PAIRING_PORT = 11501
MAX_CONNECTIONS = 16
MAX_PER_ADDRESS = 4
_KEEPALIVE_S = 2.0
_POLL_S = 0.2
_EXCHANGE_SPACING_S = 0.25
_WARN_EVERY_S = 5.0
_BACKLOG = 128

Approve = Callable[[Candidate], bool]
"""Whether the head's user lets it in. Raises DeadlineExceeded if nobody says. Called in a thread of its own."""


@dataclass(slots=True, eq=False)
class _PairingConnection:
    """`is_known` once it has proved that it knows the secret."""

    address: str
    thread: threading.Thread
    is_known: bool = False
    is_evicted: bool = False


class PairingServer:
    """Listens at `host` and `port`; None is 11501, or any free one if that is taken. Raises PortInUse, ConfigError.

    `pool_info` is sent to anyone; whoever pairs and is approved of goes into the `roster`. `notify` gets lines of rich
    markup for the user.
    """

    def __init__(
        self,
        host: str,
        port: int | None,
        *,
        pool_info: Callable[[], PoolInfo],
        roster: RosterFile,
        keys: KeyPair,
        approve: Approve,
        notify: Callable[[str], object],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool_info = pool_info
        self._roster = roster
        self._keys = keys
        self._approve = approve
        self._notify = notify
        self._monotonic = monotonic
        self._codes = PairingCodes()
        self._exchange = threading.Lock()
        self._exchange_at = 0.0
        self._warn_at = 0.0
        self._lock = threading.Lock()
        self._connections: dict[JsonLineSocket, _PairingConnection] = {}
        self._listener = _listener(host, port)
        self._host, self.port = self._listener.getsockname()
        self._wake_read, self._wake_write = socket.socketpair()
        self._is_closed = False
        self._thread = threading.Thread(target=self._listen, name="pairing", daemon=True)
        self._thread.start()

    def new_code(self) -> Code:
        """The code before is void."""
        return self._codes.new_code(now=self._monotonic())

    def new_invite(self, address: str | None = None) -> Invite:
        """The invite before is void. `address` is where other hosts reach this one; None: find out. Raises ConfigError
        without a network."""
        reached = address or (self._host if self._host != "0.0.0.0" else lan_address())
        if reached is None:
            raise ConfigError("this host has no IPv4 network", hint="say its address with --lan-host")
        pool = self._pool_info().pool
        return self._codes.new_invite(reached, self.port, key=self._keys.public, pool=pool, now=self._monotonic())

    def close(self) -> None:
        """Hang up on everyone. Returns soon, whatever they do."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            threads = [self._thread, *(client.thread for client in self._connections.values())]
            for connection in self._connections:
                connection.interrupt()
        self._wake_write.close()
        deadline = time.monotonic() + THREAD_JOIN_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _listen(self) -> None:
        with self._listener, self._wake_read, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while not self._is_closed:
                selector.select()
                if self._is_closed:
                    return
                try:
                    sock, (address, _) = self._listener.accept()
                except BlockingIOError:
                    continue
                except OSError:  # Out of files, most likely: others end, and free some.
                    time.sleep(_POLL_S)
                    continue
                self._accept(sock, address)

    def _accept(self, sock: socket.socket, address: str) -> None:
        connection = JsonLineSocket(sock)
        thread = threading.Thread(
            target=self._serve, args=(connection, address), name="pairing-connection", daemon=True
        )
        with self._lock:
            if self._has_room(address) and not self._is_closed and _started(thread):
                self._connections[connection] = _PairingConnection(address, thread)
                return
        with contextlib.suppress(ConnectionClosed):  # It fits into the socket's buffer: nobody is waited for.
            connection.send(PairingRefused(reason="busy"), 0.0)
        connection.close()

    def _has_room(self, address: str) -> bool:
        """For one more from there. If all places are taken, one is made free for it, of an address that has more of
        them than it would: who holds many from few addresses keeps nobody out."""
        there = [client for client in self._connections.values() if not client.is_evicted]
        if sum(client.address == address for client in there) >= MAX_PER_ADDRESS:
            return False
        if len(there) < MAX_CONNECTIONS:
            return True
        strangers = Counter(client.address for client in there if not client.is_known)
        most_from, num = max(strangers.items(), key=lambda item: item[1], default=("", 0))
        if num <= strangers[address] + 1:
            return False
        for connection, client in self._connections.items():
            if client.address == most_from and not client.is_known and not client.is_evicted:
                client.is_evicted = True
                connection.interrupt()
                break
        return True

    def _serve(self, connection: JsonLineSocket, address: str) -> None:
        try:
            self._handle(connection, address)
        except (ConnectionClosed, BadMessage, DeadlineExceeded):
            pass
        except PotluckError as error:
            self._warn(f"A host at {address} could not pair: {escape(error.message)}")
        except Exception as error:  # noqa: BLE001 - the root of the thread: the others go on
            self._warn(f"A host at {address} could not pair: {escape(repr(error))}")
        finally:
            connection.close()
            with self._lock:
                del self._connections[connection]

    def _handle(self, connection: JsonLineSocket, address: str) -> None:
        hello = connection.receive(PairingHello, PAIRING_SERVER_LINE_S)
        info = self._pool_info()
        info = replace(info, name=info.name[:MAX_TEXT_CHARACTERS])
        info_line = connection.send(info, PAIRING_SERVER_LINE_S)
        start: PakeStart | StatusRequest = connection.receive(PakeStart | StatusRequest, PAIRING_SERVER_LINE_S)  # type: ignore[arg-type]
        if isinstance(start, StatusRequest):  # Of any version: it has to learn that it is of another one.
            connection.send(prove_status(start, info_line, self._roster.read(), self._keys), PAIRING_SERVER_LINE_S)
            return
        if hello.protocol != info.protocol:
            connection.send(PairingRefused(reason="version"), PAIRING_SERVER_LINE_S)
            return
        if not is_key(start.key) or start.key == self._keys.public:
            return
        refusal = self._authenticate(connection, info, start, address)
        if refusal is None:
            return
        connection.send(PairingRefused(reason=refusal.reason, guesses_left=refusal.guesses_left), PAIRING_SERVER_LINE_S)

    def _authenticate(
        self, connection: JsonLineSocket, info: PoolInfo, start: PakeStart, address: str
    ) -> PairingRefusal | None:
        """Pair, if the other host knows the secret; else the reason why not."""
        with self._exchange:
            self._space_exchanges()
            attempt = self._codes.begin(start.kind, now=self._monotonic())
            if isinstance(attempt, PairingRefusal):
                return attempt
            try:
                pake = HeadPake(attempt.secret, info, start)
            except BadMessage:
                self._codes.cancel(attempt)
                raise
        is_right = False
        try:
            connection.send(pake.reply, PAIRING_SERVER_LINE_S)
            is_right = pake.verify(connection.receive(PakeConfirm, PAIRING_SERVER_LINE_S))
        finally:
            refusal = self._codes.verify(attempt, is_right=is_right, now=self._monotonic())
            if refusal is not None and refusal.reason != "expired" and not is_right:
                self._report_wrong_guess(start, address, refusal)
        if refusal is None:
            self._accept_candidate(connection, pake, start, address)
        return refusal

    def _report_wrong_guess(self, start: PakeStart, address: str, refusal: PairingRefusal) -> None:
        """The user learns of every guess at a code, finished or broken off: there are three at most."""
        name = clean_name(start.name)
        if start.kind == "invite":
            self._warn(f"{name} at {address} sent a wrong invite")
        elif refusal.guesses_left:
            self._notify(f"{name} at {address} sent a wrong code; guesses left: {refusal.guesses_left}")
        else:
            self._notify(
                f"{name} at {address} sent a wrong code, which is locked now; a new one: potluck invite. "
                "An invite can't be locked: use that if someone goes on guessing"
            )

    def _warn(self, line: str) -> None:
        """For lines that strangers could cause without end."""
        now = time.monotonic()
        if now >= self._warn_at:
            self._warn_at = now + _WARN_EVERY_S
            self._notify(line)

    def _space_exchanges(self) -> None:
        """Key exchanges cost 20 ms of this process, whoever asks for them: some a second are enough."""
        wait_s = self._exchange_at - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        self._exchange_at = time.monotonic() + _EXCHANGE_SPACING_S

    def _accept_candidate(self, connection: JsonLineSocket, pake: HeadPake, start: PakeStart, address: str) -> None:
        with self._lock:
            self._connections[connection].is_known = True
        connection.send(pake.confirmed(), PAIRING_SERVER_LINE_S)
        candidate = Candidate(
            key=start.key, name=clean_name(start.name), platform=clean_text(start.platform), address=address
        )
        outcome = self._await_decision(connection, candidate)
        if outcome is not None:
            connection.send(pake.result(outcome), PAIRING_SERVER_LINE_S)

    def _await_decision(self, connection: JsonLineSocket, candidate: Candidate) -> PairingOutcome | None:
        """None if the candidate has gone meanwhile."""
        answers: list[PairingOutcome] = []
        approval = threading.Thread(
            target=lambda: answers.append(self._ask_user(candidate)), name="pairing-approval", daemon=True
        )
        approval.start()
        said_at = time.monotonic()
        while approval.is_alive():
            approval.join(_POLL_S)
            if not connection.is_waiting():
                candidate.gone.set()
                return None
            if time.monotonic() - said_at >= _KEEPALIVE_S:
                connection.send(PairingPending(), PAIRING_SERVER_LINE_S)
                said_at = time.monotonic()
        outcome = answers[0] if answers else PairingOutcome(decision="failed")
        if outcome.decision != "allowed":
            return outcome
        try:
            member = self._roster.add(candidate.key, candidate.name, candidate.platform)
        except PotluckError as error:
            self._notify(f"{candidate.name} could not be let in: {escape(error.message)}")
            return PairingOutcome(decision="failed")
        self._notify(f"{member.name} (key {fingerprint(member.key)}) has paired")
        return PairingOutcome(decision="allowed", name=member.name)

    def _ask_user(self, candidate: Candidate) -> PairingOutcome:
        try:
            return PairingOutcome(decision="allowed" if self._approve(candidate) else "refused")
        except DeadlineExceeded:
            return PairingOutcome(decision="unanswered")


def _started(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:  # The system has no more threads.
        return False
    return True


def _listener(host: str, port: int | None) -> socket.socket:
    if port is not None:
        return _listening(host, port)
    try:
        return _listening(host, PAIRING_PORT)
    except PortInUse:
        return _listening(host, 0)


def _listening(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # There it would let two processes listen at one port.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} of {host} is taken by another program",
                hint="choose another one with --lan-port, or 0 for any",
            ) from error
        raise ConfigError(
            f"this host can't listen at {host}:{port}: {error.strerror}", hint="say its address with --lan-host"
        ) from error
    return sock
