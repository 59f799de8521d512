"""Whether a TCP port lets this host in, and what each way of not doing so means."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from typing import Literal

# A little more than Linux takes to find that nobody on the LAN has an address.
CONNECT_S = 3.5

Outcome = Literal["open", "refused", "timed out", "unreachable", "failed"]

_UNREACHABLE = frozenset(
    getattr(errno, name)
    for name in ("ENETUNREACH", "EHOSTUNREACH", "ENETDOWN", "EHOSTDOWN", "WSAENETUNREACH", "WSAEHOSTUNREACH")
    if hasattr(errno, name)
)
_MEANINGS: dict[Outcome, str] = {
    "open": "",
    "refused": "the connection is refused, so nobody listens there",
    "timed out": "no answer, so a firewall drops it, or the network keeps devices apart",
    "unreachable": "there is no way there, so it is off, or on another network",
    "failed": "it can't be connected to",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How an attempt to connect to `address`:`port` ended."""

    address: str
    port: int
    outcome: Outcome
    words: str = ""

    @property
    def place(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def meaning(self) -> str:
        """Empty if it is open."""
        more = f" ({self.words})" if self.outcome == "failed" and self.words else ""
        return _MEANINGS[self.outcome] + more


def connect(address: str, port: int, timeout_s: float = CONNECT_S) -> Reach:
    """Connect, and hang up."""
    try:
        socket.create_connection((address, port), timeout_s).close()
    except OSError as error:
        outcome, words = outcome_of(error), error.strerror or str(error)
    else:
        outcome, words = "open", ""
    return Reach(address=address, port=port, outcome=outcome, words=words)


def outcome_of(error: OSError) -> Outcome:
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, TimeoutError):
        return "timed out"
    if error.errno in _UNREACHABLE:
        return "unreachable"
    return "failed"


def outcome_in_words(problem: str) -> Outcome:
    """Of an attempt that another host made; `problem` is what its system said, or nothing."""
    said = problem.lower()
    if not said:
        return "open"
    if "refused" in said:
        return "refused"
    if "timed out" in said or "in time" in said:
        return "timed out"
    if "route" in said or "unreachable" in said or "host is down" in said:
        return "unreachable"
    return "failed"


def next_step(outcome: Outcome, *, whose: str, firewall: str) -> str:
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
