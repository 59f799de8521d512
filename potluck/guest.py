"""A host in another host's pool, as its `potluck join` sees it: it says that it is there, and hears who else is."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from importlib.metadata import version

import zmq

from devices.interfaces import lan_interfaces
from potluck.host_answers import HostAnswers
from transport.control import REVOKED, ControlClient
from transport.control_messages import ControlMessage, Stop
from transport.curve import Curve
from transport.endpoints import port_of
from transport.errors import DeadlineExceeded, NotAllowed, PotluckError, RingDown, VersionMismatch
from transport.messages import PROTOCOL_VERSION
from transport.pool_messages import Arrive, HostQuestion, Members, Reach, Reached, Welcome

_WELCOME_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadAddress:
    """Where a head's control is, and its key."""

    control: str
    key: str


class Membership:
    """Who is in the pool, as far as the head has said."""

    def __init__(self) -> None:
        self.keys: frozenset[str] = frozenset()

    def admits(self, key: str) -> bool:
        return key in self.keys


class Guest:
    """The node's own connection to the head; what it says of the pool's members goes into `membership`."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        curve: Curve,
        head: HeadAddress,
        *,
        membership: Membership,
        address: str,
        platform: str,
        pieces: str,
        answers: HostAnswers | None = None,
    ) -> None:
        """`address` is this host's, `pieces` where it gives pieces of models; `answers` says what models it has."""
        self._changed = threading.Condition()
        # The door, which is always asked first, has just said that this host is paired.
        self._blocked = (
            f"its door does: does a firewall block TCP port {port_of(head.control)} of the head? See: potluck doctor"
        )
        self._membership = membership
        self._answers = answers
        self._welcome: Welcome | None = None
        self._reached: Reached | None = None
        self._end: PotluckError | None = None
        arrive = Arrive(
            version=PROTOCOL_VERSION,
            potluck=version("potluck"),
            platform=platform,
            address=address,
            pieces=pieces,
            is_wifi=any(one.is_wifi and one.address == address for one in lan_interfaces()),
            clock_s=time.time(),
        )
        self._control = ControlClient(
            context,
            head.control,
            arrive,
            on_message=self._on_message,
            on_lost=self._on_lost,
            prepare=curve.towards(head.key),
        )

    def wait_welcome(self) -> Welcome:
        """Raises what the head says instead, RingDown if it can't be reached or has another key, DeadlineExceeded."""
        with self._changed:
            known = self._changed.wait_for(lambda: self._welcome is not None or self._end is not None, _WELCOME_S)
            if self._welcome is not None:
                return self._welcome
            if not known or self._end is None:
                raise DeadlineExceeded(
                    f"the head did not let this host in within {_WELCOME_S:.0f} s",
                    hint=self._blocked,
                )
            raise self._end

    def reach(self, port: int, timeout_s: float) -> str:
        """Ask the head to connect to a port of this host; why it can't, or nothing. Raises DeadlineExceeded, or what
        has ended the stay."""
        with self._changed:
            self._reached = None
            self._control.send(Reach(port))
            self._changed.wait_for(lambda: self._reached is not None or self._end is not None, timeout_s)
            if self._reached is not None:
                return self._reached.problem
            raise self._end or DeadlineExceeded(f"the head did not say within {timeout_s:.0f} s", hint="try again")

    @property
    def end(self) -> PotluckError | None:
        """Why it is over, if it is: NotAllowed and VersionMismatch for good, RingDown until the head is back."""
        with self._changed:
            return self._end

    def close(self) -> None:
        self._control.close()

    def _on_message(self, message: ControlMessage) -> None:
        if isinstance(message, HostQuestion):
            if self._answers is not None:
                self._answers.hear(message, lambda answer: self._control.send(answer))
            return
        with self._changed:
            match message:
                case Welcome():
                    self._welcome = message
                    self._membership.keys = frozenset(message.members)
                case Members(members=members):
                    self._membership.keys = frozenset(members)
                case Reached():
                    self._reached = message
                case Stop(reason=reason):
                    self._end = _stopped(reason)
            self._changed.notify_all()

    def _on_lost(self) -> None:
        with self._changed:
            self._membership.keys = frozenset()
            if self._welcome is not None:
                lost = RingDown("the head is gone", hint="is it up, and this network the same as its?")
            else:  # As it looks where a key is not admitted: nothing is said, the connection just ends.
                lost = RingDown("the head does not let this host in", hint=self._blocked)
            self._end = self._end or lost
            self._changed.notify_all()


def _stopped(reason: str) -> PotluckError:
    if reason == REVOKED:
        return NotAllowed(reason, hint="pair again: potluck forget, then potluck join with a new code")
    if "protocol" in reason:
        return VersionMismatch(reason, hint="bring both hosts to the same version of Potluck")
    return RingDown(reason or "the head has stopped", hint="start it again, and this host joins by itself")
