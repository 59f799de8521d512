"""Requests that wait at a piece server, their connections, and whose turn it is."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import zmq

from transport.messages.pieces import PieceServerRequest

# struct linger, of shorts on Windows: what the kernel has not sent yet is thrown away.
_RESET = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


@dataclass(frozen=True, slots=True)
class TcpConnection:
    """`descriptor` is libzmq's; it is this connection's as long as its far end is `far_end`."""

    descriptor: int
    far_end: tuple[Any, ...]

    def end(self) -> None:
        """Nothing that waits in the kernel still goes out. To libzmq it looks as if the peer had gone."""
        with contextlib.suppress(OSError):  # It has ended already.
            sock = socket.socket(fileno=self.descriptor)
            try:
                if sock.getpeername() == self.far_end:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    sock.shutdown(socket.SHUT_RDWR)
            finally:
                sock.detach()  # libzmq's, to close

    def is_there(self) -> bool:
        return _far_end(self.descriptor) == self.far_end


def connection_of(frame: zmq.Frame) -> TcpConnection | None:
    """The one that the frame came by; None if it has ended, or is none of TCP."""
    try:
        descriptor = int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return None
    far_end = _far_end(descriptor)
    return TcpConnection(descriptor, far_end) if far_end is not None else None


def _far_end(descriptor: int) -> tuple[Any, ...] | None:
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        return None
    try:
        return tuple(sock.getpeername())
    except OSError:
        return None
    finally:
        sock.detach()


MAX_PENDING = 64
"""Requests of one peer that wait for an answer. A fetcher has fewer outstanding."""

MAX_CONNECTIONS_PER_KEY = 16
"""Worker processes of one host fetch at the same time."""

_MIN_RETRY_S = 0.001
_MAX_RETRY_S = 0.05


@dataclass(slots=True)
class QueuedRequest:
    """A request; `done_bytes` of a speed test have been sent."""

    request: PieceServerRequest
    done_bytes: int = 0


@dataclass(slots=True)
class PeerConnection:
    """One connection of a member. `is_refused`: nothing that it says is listened to any more."""

    routing_id: bytes
    key: str
    connection: TcpConnection
    pending: deque[QueuedRequest] = field(default_factory=deque)
    is_refused: bool = False
    blocked_since_s: float | None = None
    retry_at_s: float = 0.0
    _retry_s: float = _MIN_RETRY_S

    def note_blocked(self, now_s: float) -> None:
        """It has not taken what was sent to it. ZeroMQ does not tell when a single peer does: try now and then."""
        if self.blocked_since_s is None:
            self.blocked_since_s, self._retry_s = now_s, _MIN_RETRY_S
        self.retry_at_s = now_s + self._retry_s
        self._retry_s = min(2 * self._retry_s, _MAX_RETRY_S)

    def note_sent(self) -> None:
        self.blocked_since_s, self.retry_at_s = None, 0.0


class FairQueue:
    """All connections that have said something, and the order in which they are answered: one answer each in turn."""

    def __init__(self) -> None:
        self._peers: dict[bytes, PeerConnection] = {}
        self._turns: deque[bytes] = deque()

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, routing_id: bytes) -> PeerConnection | None:
        return self._peers.get(routing_id)

    def all(self) -> list[PeerConnection]:
        return list(self._peers.values())

    def num_of_key(self, key: str) -> int:
        return sum(peer.key == key for peer in self._peers.values())

    def add(self, peer: PeerConnection) -> None:
        """In place of another with its routing id, which is gone: what that one had asked for is forgotten."""
        self._peers[peer.routing_id] = peer

    def remove(self, peer: PeerConnection) -> None:
        if self._peers.get(peer.routing_id) is peer:
            del self._peers[peer.routing_id]

    def enqueue(self, peer: PeerConnection, request: PieceServerRequest) -> bool:
        """Whether there was room for one more request of this peer."""
        if len(peer.pending) >= MAX_PENDING:
            return False
        peer.pending.append(QueuedRequest(request))
        if peer.routing_id not in self._turns:
            self._turns.append(peer.routing_id)
        return True

    def next_round(self, now_s: float) -> list[PeerConnection]:
        """Who gets one answer now, each of those that wait once, beginning with the one whose turn it is."""
        found: list[PeerConnection] = []
        for routing_id in list(self._turns):
            peer = self._peers.get(routing_id)
            if peer is None or not peer.pending:
                self._turns.remove(routing_id)
            elif peer.retry_at_s <= now_s:
                found.append(peer)
        self._turns.rotate(-1)
        return found

    def wait_s(self, now_s: float, most_s: float) -> float:
        """Until there is something to send: 0 if it is now."""
        waits = [peer.retry_at_s - now_s for peer in self._peers.values() if peer.pending]
        return max(0.0, min([*waits, most_s]))
