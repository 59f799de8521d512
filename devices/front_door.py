"""The head's front door: where hosts that are not paired knock, ask who is there, and pair; and those that are, whether
they still count.

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

from devices.credentials import Code, Invite, Offered, Refusal
from devices.identity import fingerprint
from devices.interfaces import lan_address
from devices.lines import HungUp, Lines
from devices.members import clean_name, clean_words
from devices.pairing import (
    MAX_WORDS,
    Begin,
    Candidate,
    Confirm,
    DoorFacts,
    HeadSide,
    Knock,
    Outcome,
    Refused,
    Waiting,
)
from devices.roster import RosterFile
from devices.standing import Ask, answered
from transport.curve import KeyPair, is_key
from transport.errors import BadMessage, ConfigError, DeadlineExceeded, PortInUse, PotluckError

__all__ = ["Candidate", "DoorFacts", "FrontDoor"]

DOOR_PORT = 11501
MAX_CONNECTIONS = 16
MAX_PER_ADDRESS = 4
LINE_TIMEOUT_S = 10.0
_KEEPALIVE_S = 2.0
_LOOK_S = 0.2
_EXCHANGE_SPACING_S = 0.25
_WARN_EVERY_S = 5.0
_BACKLOG = 128
_CLOSE_TIMEOUT_S = 3.0

Approve = Callable[[Candidate], bool]
"""Whether the head's user lets it in. Raises DeadlineExceeded if nobody says. Called in a thread of its own."""


@dataclass(slots=True, eq=False)
class _Guest:
    """`is_known` once it has proved that it knows the secret."""

    address: str
    thread: threading.Thread
    is_known: bool = False
    is_sent_away: bool = False


class FrontDoor:
    """Listens at `host` and `port`; None is 11501, or any free one if that is taken. Raises PortInUse, ConfigError.

    `facts` are told to anyone; whoever pairs and is approved of goes into the `roster`. `say` gets lines of rich
    markup for the user.
    """

    def __init__(
        self,
        host: str,
        port: int | None,
        *,
        facts: Callable[[], DoorFacts],
        roster: RosterFile,
        keys: KeyPair,
        approve: Approve,
        say: Callable[[str], object],
        ticks: Callable[[], float] = time.monotonic,
        line_timeout_s: float = LINE_TIMEOUT_S,
    ) -> None:
        self._facts = facts
        self._roster = roster
        self._keys = keys
        self._approve = approve
        self._say = say
        self._ticks = ticks
        self._line_timeout_s = line_timeout_s
        self._offered = Offered()
        self._exchange = threading.Lock()
        self._exchange_at = 0.0
        self._warn_at = 0.0
        self._lock = threading.Lock()
        self._open: dict[Lines, _Guest] = {}
        self._listener = _listener(host, port)
        self._host, self.port = self._listener.getsockname()
        self._wake_read, self._wake_write = socket.socketpair()
        self._is_closed = False
        self._thread = threading.Thread(target=self._listen, name="front-door", daemon=True)
        self._thread.start()

    def new_code(self) -> Code:
        """The code before is void."""
        return self._offered.new_code(now=self._ticks())

    def new_invite(self, address: str | None = None) -> Invite:
        """The invite before is void. `address` is where other hosts reach this one; None: find out. Raises ConfigError
        without a network."""
        reached = address or (self._host if self._host != "0.0.0.0" else lan_address())
        if reached is None:
            raise ConfigError("this host has no IPv4 network", hint="say its address with --lan-host")
        pool = self._facts().pool
        return self._offered.new_invite(reached, self.port, key=self._keys.public, pool=pool, now=self._ticks())

    def close(self) -> None:
        """Hang up on everyone. Returns soon, whatever they do."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            threads = [self._thread, *(guest.thread for guest in self._open.values())]
            for lines in self._open:
                lines.interrupt()
        self._wake_write.close()
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
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
                    time.sleep(_LOOK_S)
                    continue
                self._admit(sock, address)

    def _admit(self, sock: socket.socket, address: str) -> None:
        lines = Lines(sock)
        thread = threading.Thread(target=self._serve, args=(lines, address), name="front-door-guest", daemon=True)
        with self._lock:
            if self._has_room(address) and not self._is_closed and _started(thread):
                self._open[lines] = _Guest(address, thread)
                return
        with contextlib.suppress(HungUp):  # It fits into the socket's buffer: nobody is waited for.
            lines.send(Refused(reason="busy"), 0.0)
        lines.close()

    def _has_room(self, address: str) -> bool:
        """For one more from there. If all places are taken, one is made free for it, of an address that has more of
        them than it would: who holds many from few addresses keeps nobody out."""
        there = [guest for guest in self._open.values() if not guest.is_sent_away]
        if sum(guest.address == address for guest in there) >= MAX_PER_ADDRESS:
            return False
        if len(there) < MAX_CONNECTIONS:
            return True
        strangers = Counter(guest.address for guest in there if not guest.is_known)
        most_from, num = max(strangers.items(), key=lambda item: item[1], default=("", 0))
        if num <= strangers[address] + 1:
            return False
        for lines, guest in self._open.items():
            if guest.address == most_from and not guest.is_known and not guest.is_sent_away:
                guest.is_sent_away = True
                lines.interrupt()
                break
        return True

    def _serve(self, lines: Lines, address: str) -> None:
        try:
            self._talk(lines, address)
        except (HungUp, BadMessage, DeadlineExceeded):
            pass
        except PotluckError as error:
            self._warn(f"A host at {address} could not pair: {escape(error.message)}")
        except Exception as error:  # noqa: BLE001 - the root of the thread: one guest's trouble is not the door's
            self._warn(f"A host at {address} could not pair: {escape(repr(error))}")
        finally:
            lines.close()
            with self._lock:
                del self._open[lines]

    def _talk(self, lines: Lines, address: str) -> None:
        knock = lines.receive(Knock, self._line_timeout_s)
        facts = self._facts()
        facts = replace(facts, name=facts.name[:MAX_WORDS])
        told = lines.send(facts, self._line_timeout_s)
        begin: Begin | Ask = lines.receive(Begin | Ask, self._line_timeout_s)  # type: ignore[arg-type]
        if isinstance(begin, Ask):  # Of any version: it has to learn that it is of another one.
            lines.send(answered(begin, told, self._roster.read(), self._keys), self._line_timeout_s)
            return
        if knock.protocol != facts.protocol:
            lines.send(Refused(reason="version"), self._line_timeout_s)
            return
        if not is_key(begin.key) or begin.key == self._keys.public:
            return
        refusal = self._prove(lines, facts, begin, address)
        if refusal is None:
            return
        lines.send(Refused(reason=refusal.reason, guesses_left=refusal.guesses_left), self._line_timeout_s)

    def _prove(self, lines: Lines, facts: DoorFacts, begin: Begin, address: str) -> Refusal | None:
        """Pair, if the other host knows the secret; else the reason why not."""
        with self._exchange:
            self._pause()
            attempt = self._offered.begin(begin.kind, now=self._ticks())
            if isinstance(attempt, Refusal):
                return attempt
            try:
                side = HeadSide(attempt.secret, facts, begin)
            except BadMessage:
                self._offered.withdraw(attempt)
                raise
        is_right = False
        try:
            lines.send(side.answer, self._line_timeout_s)
            is_right = side.is_right(lines.receive(Confirm, self._line_timeout_s))
        finally:
            refusal = self._offered.settle(attempt, is_right=is_right, now=self._ticks())
            if refusal is not None and refusal.reason != "expired" and not is_right:
                self._tell_wrong(begin, address, refusal)
        if refusal is None:
            self._welcome(lines, side, begin, address)
        return refusal

    def _tell_wrong(self, begin: Begin, address: str, refusal: Refusal) -> None:
        """The user learns of every guess at a code, finished or broken off: there are three at most."""
        name = clean_name(begin.name)
        if begin.kind == "invite":
            self._warn(f"{name} at {address} came with a wrong invite")
        elif refusal.guesses_left:
            self._say(f"{name} at {address} came with a wrong code; guesses left: {refusal.guesses_left}")
        else:
            self._say(
                f"{name} at {address} came with a wrong code, which is locked now; a new one: potluck invite. "
                "An invite can't be locked: use that if someone goes on guessing"
            )

    def _warn(self, line: str) -> None:
        """For lines that strangers could cause without end."""
        now = time.monotonic()
        if now >= self._warn_at:
            self._warn_at = now + _WARN_EVERY_S
            self._say(line)

    def _pause(self) -> None:
        """Key exchanges cost 20 ms of this process, whoever asks for them: some a second are enough."""
        wait_s = self._exchange_at - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        self._exchange_at = time.monotonic() + _EXCHANGE_SPACING_S

    def _welcome(self, lines: Lines, side: HeadSide, begin: Begin, address: str) -> None:
        with self._lock:
            self._open[lines].is_known = True
        lines.send(side.confirmed(), self._line_timeout_s)
        candidate = Candidate(
            key=begin.key, name=clean_name(begin.name), platform=clean_words(begin.platform), address=address
        )
        outcome = self._decided(lines, candidate)
        if outcome is not None:
            lines.send(side.result(outcome), self._line_timeout_s)

    def _decided(self, lines: Lines, candidate: Candidate) -> Outcome | None:
        """None if the candidate has gone meanwhile."""
        answers: list[Outcome] = []
        asked = threading.Thread(
            target=lambda: answers.append(self._ask(candidate)), name="front-door-question", daemon=True
        )
        asked.start()
        said_at = time.monotonic()
        while asked.is_alive():
            asked.join(_LOOK_S)
            if not lines.is_silent():
                candidate.gone.set()
                return None
            if time.monotonic() - said_at >= _KEEPALIVE_S:
                lines.send(Waiting(), self._line_timeout_s)
                said_at = time.monotonic()
        outcome = answers[0] if answers else Outcome(decision="failed")
        if outcome.decision != "allowed":
            return outcome
        try:
            member = self._roster.add(candidate.key, candidate.name, candidate.platform)
        except PotluckError as error:
            self._say(f"{candidate.name} could not be let in: {escape(error.message)}")
            return Outcome(decision="failed")
        self._say(f"{member.name} (key {fingerprint(member.key)}) has paired")
        return Outcome(decision="allowed", name=member.name)

    def _ask(self, candidate: Candidate) -> Outcome:
        try:
            return Outcome(decision="allowed" if self._approve(candidate) else "refused")
        except DeadlineExceeded:
            return Outcome(decision="unanswered")


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
        return _listening(host, DOOR_PORT)
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
