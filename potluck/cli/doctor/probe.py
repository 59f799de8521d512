"""Probes try the network within a deadline: any slow call, a TCP port, multicast on an interface."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from transport.errors import DeadlineExceeded

Value = TypeVar("Value")


class DeadlineTask(Generic[Value]):
    """Begins at once. A call that hangs for ever, as those to a dead network disk do, holds up no one: the thread ends
    with the process."""

    def __init__(self, name: str, function: Callable[[], Value]) -> None:
        self._name = name
        self._function = function
        self._result: list[Value] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> Value:
        """Raises what finding it out raised, or DeadlineExceeded."""
        self._thread.join(max(0.0, timeout_s))
        if self._error is not None:
            raise self._error
        if not self._result:
            raise DeadlineExceeded(f"{self._name}: no answer in time", hint="try again; if it stays so, restart it")
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._function())
        except BaseException as error:  # noqa: BLE001 - it goes on in whoever waits
            self._error = error


# A little more than Linux takes to find that nobody on the LAN has an address.
CONNECT_TIMEOUT_S = 3.5

ConnectOutcome = Literal["open", "refused", "timed out", "unreachable", "failed"]

_UNREACHABLE = frozenset(
    getattr(errno, name)
    for name in ("ENETUNREACH", "EHOSTUNREACH", "ENETDOWN", "EHOSTDOWN", "WSAENETUNREACH", "WSAEHOSTUNREACH")
    if hasattr(errno, name)
)
_MEANINGS: dict[ConnectOutcome, str] = {
    "open": "",
    "refused": "the connection is refused, so nobody listens there",
    "timed out": "no answer, so a firewall drops it, or the network keeps devices apart",
    "unreachable": "there is no way there, so it is off, or on another network",
    "failed": "it can't be connected to",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectResult:
    """How an attempt to connect to `address`:`port` ended."""

    address: str
    port: int
    outcome: ConnectOutcome
    error: str = ""

    @property
    def host_port(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def meaning(self) -> str:
        """Empty if it is open."""
        more = f" ({self.error})" if self.outcome == "failed" and self.error else ""
        return _MEANINGS[self.outcome] + more


def try_connect(address: str, port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> ConnectResult:
    """Connect, and hang up."""
    try:
        socket.create_connection((address, port), timeout_s).close()
    except OSError as error:
        outcome, words = outcome_of(error), error.strerror or str(error)
    else:
        outcome, words = "open", ""
    return ConnectResult(address=address, port=port, outcome=outcome, error=words)


def outcome_of(error: OSError) -> ConnectOutcome:
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, TimeoutError):
        return "timed out"
    if error.errno in _UNREACHABLE:
        return "unreachable"
    return "failed"


def parse_outcome(problem: str) -> ConnectOutcome:
    """Of an attempt that another host made; `problem` is what its system said, or nothing."""
    text = problem.lower()
    if not text:
        return "open"
    if "refused" in text:
        return "refused"
    if "timed out" in text or "in time" in text:
        return "timed out"
    if "route" in text or "unreachable" in text or "host is down" in text:
        return "unreachable"
    return "failed"


def next_step(outcome: ConnectOutcome, *, whose: str, firewall: str) -> str:
    """What to do about a port of `whose` host that is not open; `firewall` is what to do about one."""
    match outcome:
        case "refused":
            return f"is potluck running on {whose}, and does it still use this port?"
        case "timed out":
            return f"{firewall}. Without a firewall, see that neither host is on a guest network of the router"
        case "unreachable":
            return f"is {whose} switched on and on the same network? Both need the same router, and no guest Wi-Fi"
        case _:
            return f"see the network settings of this host and of {whose}"


_GROUP, _PORT = "224.0.0.251", 5353
_WAIT_S = 1.0
_MAX_BYTES = 9000
# Header: one question; name; type PTR, class IN (RFC 1035, section 4.1).
_QUESTION = b"\0\0\0\0\0\1\0\0\0\0\0\0" + b"\x08_potluck\x04_tcp\x05local\0" + b"\0\x0c\0\1"


def multicast_problem(address: str) -> str:
    """Why what is sent to the group at the interface with that address does not come back; empty if it does."""
    try:
        with _listener(address) as listener, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((address, 0))
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
            sender.sendto(_QUESTION, (_GROUP, _PORT))
            return "" if _received_question(listener, sender.getsockname()) else "what is sent does not come back"
    except OSError as error:
        return error.strerror or str(error)


def _listener(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        # Others of this host listen there too: the system's own resolver, and Potluck's discovery.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            with contextlib.suppress(OSError):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("" if sys.platform == "win32" else _GROUP, _PORT))
        member = socket.inet_aton(_GROUP) + socket.inet_aton(address)
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
    except OSError:
        listener.close()
        raise
    return listener


def _received_question(listener: socket.socket, sender: tuple[str, int]) -> bool:
    deadline = time.monotonic() + _WAIT_S
    while (left_s := deadline - time.monotonic()) > 0:
        listener.settimeout(left_s)
        try:
            data, source = listener.recvfrom(_MAX_BYTES)
        except TimeoutError:
            return False
        if source == sender and data == _QUESTION:
            return True
    return False
