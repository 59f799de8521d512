"""What members have asked a piece server for, and whose turn it is. Pure: time is passed in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from transport.pieces.connection import Connection
from transport.pieces.messages import Request

MAX_WAITING = 64
"""Requests of one peer that wait for an answer. A fetcher has fewer outstanding."""

MAX_CONNECTIONS_PER_KEY = 16
"""Worker processes of one host fetch at the same time."""

_FIRST_RETRY_S = 0.001
_LAST_RETRY_S = 0.05


@dataclass(slots=True)
class Waiting:
    """A request; `done_bytes` of a speed test have been sent."""

    request: Request
    done_bytes: int = 0


@dataclass(slots=True)
class Peer:
    """One connection of a member. `is_refused`: nothing that it says is listened to any more."""

    routing_id: bytes
    key: str
    connection: Connection
    waiting: deque[Waiting] = field(default_factory=deque)
    is_refused: bool = False
    blocked_since_s: float | None = None
    retry_at_s: float = 0.0
    _retry_s: float = _FIRST_RETRY_S

    def note_blocked(self, now_s: float) -> None:
        """It has not taken what was sent to it. ZeroMQ does not tell when a single peer does: try now and then."""
        if self.blocked_since_s is None:
            self.blocked_since_s, self._retry_s = now_s, _FIRST_RETRY_S
        self.retry_at_s = now_s + self._retry_s
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)

    def note_sent(self) -> None:
        self.blocked_since_s, self.retry_at_s = None, 0.0


class Peers:
    """All connections that have said something, and the order in which they are answered: one answer each in turn."""

    def __init__(self) -> None:
        self._peers: dict[bytes, Peer] = {}
        self._turns: deque[bytes] = deque()

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, routing_id: bytes) -> Peer | None:
        return self._peers.get(routing_id)

    def all(self) -> list[Peer]:
        return list(self._peers.values())

    def num_of_key(self, key: str) -> int:
        return sum(peer.key == key for peer in self._peers.values())

    def add(self, peer: Peer) -> None:
        """In place of another with its routing id, which is gone: what that one had asked for is forgotten."""
        self._peers[peer.routing_id] = peer

    def remove(self, peer: Peer) -> None:
        if self._peers.get(peer.routing_id) is peer:
            del self._peers[peer.routing_id]

    def ask(self, peer: Peer, request: Request) -> bool:
        """Whether there was room for one more request of this peer."""
        if len(peer.waiting) >= MAX_WAITING:
            return False
        peer.waiting.append(Waiting(request))
        if peer.routing_id not in self._turns:
            self._turns.append(peer.routing_id)
        return True

    def round(self, now_s: float) -> list[Peer]:
        """Who gets one answer now, each of those that wait once, beginning with the one whose turn it is."""
        found: list[Peer] = []
        for routing_id in list(self._turns):
            peer = self._peers.get(routing_id)
            if peer is None or not peer.waiting:
                self._turns.remove(routing_id)
            elif peer.retry_at_s <= now_s:
                found.append(peer)
        self._turns.rotate(-1)
        return found

    def wait_s(self, now_s: float, most_s: float) -> float:
        """Until there is something to send: 0 if it is now."""
        waits = [peer.retry_at_s - now_s for peer in self._peers.values() if peer.waiting]
        return max(0.0, min([*waits, most_s]))
