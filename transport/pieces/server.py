"""The piece server serves pieces of models to members of the pool, in turns: one ROUTER, owned by one thread.

A member that asks for much and takes nothing costs a few parts' memory: ZeroMQ queues at most `_QUEUED_PARTS` for a
connection, further requests wait here, and members are answered in turns.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.errors import BadMessage
from transport.links.endpoints import bind
from transport.links.zmq_link import set_bulk_options
from transport.messages.pieces import (
    MAX_REASON_CHARACTERS,
    MAX_REQUEST_FRAME_BYTES,
    PART_BYTES,
    HaveList,
    HaveRequest,
    PieceMissing,
    PiecePart,
    PieceRefused,
    PieceRequest,
    PieceServerReply,
    PieceServerRequest,
    SpeedTest,
    decode_request,
    encode,
)
from transport.pieces.piece_source import PieceSource
from transport.process.files import OpenFileCache
from transport.process.polling import PollThread
from transport.security.connection_cap import MONITORED_EVENTS, ConnectionCap
from transport.security.curve import Guard, peer_key
from transport.timeouts import PEER_STALLED_S, PORT_CLOSED_S

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


log = logging.getLogger("potluck.pieces")

MAX_CONNECTIONS = 64
MAX_CONNECTIONS_PER_ADDRESS = 24
_QUEUED_PARTS = 4
_QUEUED_REQUESTS = 64
_MAX_REQUESTS_AT_ONCE = 64
_ROUNDS_AT_ONCE = 4
_UNREAD_BYTES = 2**20
_ENFORCE_INTERVAL_S = 0.1

_MORE = int(zmq.SNDMORE)
_NO_WAIT = int(zmq.DONTWAIT)


class PieceServer:
    """Listens at `endpoint` until it is closed. `sources` may be replaced by others at any time, as a whole."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        guard: Guard,
        sources: Sequence[PieceSource],
    ) -> None:
        """`endpoint` without a port takes any that is free: see `self.endpoint`. Raises ConfigError."""
        self.sources = tuple(sources)
        self.num_refused = 0
        self.sent_bytes = 0
        self.sent_by_key: Counter[str] = Counter()
        self._is_authorized = guard.is_authorized
        self._peers = FairQueue()
        self._files = OpenFileCache()
        self._noise = os.urandom(PART_BYTES)
        self._cap = ConnectionCap(
            max_connections=MAX_CONNECTIONS, max_per_address=MAX_CONNECTIONS_PER_ADDRESS, max_unread_bytes=_UNREAD_BYTES
        )
        self._next_enforce_s = 0.0
        self._socket = context.socket(zmq.ROUTER)
        set_bulk_options(self._socket, max_message_bytes=MAX_REQUEST_FRAME_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUED_PARTS)
        self._socket.setsockopt(zmq.RCVHWM, _QUEUED_REQUESTS)
        guard.prepare(self._socket)
        self._monitor = self._socket.get_monitor_socket(MONITORED_EVENTS)
        self.endpoint = bind(self._socket, endpoint)
        self._loop = PollThread(
            "pieces",
            (self._socket, self._monitor),
            self._on_ready,
            wait_s=lambda: self._peers.wait_s(time.monotonic(), _ENFORCE_INTERVAL_S),
            on_end=self._end_sockets,
        )
        self._loop.start()

    def close(self) -> None:
        """Waits at most 2 s. Members notice that the connection ends."""
        self._loop.close()

    def _end_sockets(self) -> None:
        self._unbind()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._files.close()

    def _unbind(self) -> None:
        """The next server shall find the port free: libzmq closes it in its own thread."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.unbind(self.endpoint)
            deadline_s = time.monotonic() + PORT_CLOSED_S
            while self._monitor.poll(max(0, int((deadline_s - time.monotonic()) * 1000))):
                if parse_monitor_message(self._monitor.recv_multipart())["event"] == zmq.EVENT_CLOSED:
                    return

    def _on_ready(self, ready: Container[Any]) -> None:
        now_s = time.monotonic()
        if self._monitor in ready:
            self._cap.on_event(parse_monitor_message(self._monitor.recv_multipart()))
        if now_s >= self._next_enforce_s:
            self._next_enforce_s = now_s + _ENFORCE_INTERVAL_S
            self._enforce_limits(now_s)
        if self._socket in ready:
            for _ in range(_MAX_REQUESTS_AT_ONCE):
                if not self._take():
                    break
        for _ in range(_ROUNDS_AT_ONCE):
            for peer in self._peers.next_round(time.monotonic()):
                self._reply(peer, peer.pending[0].request)

    def _enforce_limits(self, now_s: float) -> None:
        """Forget connections that have ended; end those of keys that are not admitted now, or that take nothing."""
        self._cap.enforce(now_s)
        for peer in self._peers.all():
            if not peer.connection.is_there():
                self._peers.remove(peer)
            elif not self._is_authorized(peer.key):
                self._end(peer, "it is not a member any more")
            elif peer.blocked_since_s is not None and now_s - peer.blocked_since_s > PEER_STALLED_S:
                self._end(peer, f"it has taken nothing for {PEER_STALLED_S:.0f} s")

    def _take(self) -> bool:
        """One message; whether there was one."""
        try:
            routing_id = self._socket.recv(_NO_WAIT)
        except zmq.Again:
            return False
        frames = [self._socket.recv(_NO_WAIT, copy=False)]
        num_frames = 1
        while frames[-1].more:  # more than one frame is refused: only the last is kept
            frames[-1] = self._socket.recv(_NO_WAIT, copy=False)
            num_frames += 1
        peer = self._peer_of(routing_id, frames[0])
        if peer is None or peer.is_refused:
            self.num_refused += 1
            return True
        self._cap.mark_active(peer.connection.descriptor)
        try:
            if num_frames != 1:
                raise BadMessage(f"a request of {num_frames} frames")
            request = decode_request([frames[0].buffer])
        except BadMessage as error:
            self._refuse(peer, error.message)
            return True
        if not self._peers.enqueue(peer, request):
            self._refuse(peer, "more requests at once than are allowed")
        return True

    def _peer_of(self, routing_id: bytes, frame: zmq.Frame) -> PeerConnection | None:
        """The peer whose message it is. A routing id that another key had is another peer's."""
        key = peer_key(frame)
        if not key or not self._is_authorized(key):
            return None
        peer = self._peers.get(routing_id)
        if peer is not None and peer.key == key:
            return peer
        connection = connection_of(frame)
        if connection is None:
            return None  # It has ended already.
        peer = PeerConnection(routing_id, key, connection)
        self._peers.add(peer)
        if self._peers.num_of_key(key) > MAX_CONNECTIONS_PER_KEY:
            self._end(peer, f"it has {MAX_CONNECTIONS_PER_KEY} other connections")
            return None
        return peer

    def _reply(self, peer: PeerConnection, request: PieceServerRequest) -> None:
        """The first request that waits, if the peer takes messages now; of a speed test one part."""
        if not self._is_authorized(peer.key):
            self._end(peer, "it is not a member any more")
            return
        try:
            # Before anything is read for it: a queue that is full says so at the first frame.
            self._socket.send(peer.routing_id, _NO_WAIT | _MORE)
        except zmq.Again:
            peer.note_blocked(time.monotonic())
            return
        except zmq.ZMQError:
            self._peers.remove(peer)  # It is gone.
            return
        peer.note_sent()
        answer, buffer = self._find_reply(request, peer)
        self._socket.send(encode(answer), _NO_WAIT | (_MORE if isinstance(answer, PiecePart) else 0))
        if isinstance(answer, PiecePart):
            self._socket.send(buffer, _NO_WAIT)
            self.sent_bytes += len(buffer)
            self.sent_by_key[peer.key] += len(buffer)

    def _find_reply(self, request: PieceServerRequest, peer: PeerConnection) -> tuple[PieceServerReply, bytes]:
        if isinstance(request, SpeedTest):
            pending = peer.pending[0]
            offset = pending.done_bytes
            buffer = self._noise[: request.num_bytes - offset]
            pending.done_bytes += len(buffer)
            if pending.done_bytes == request.num_bytes:
                peer.pending.popleft()
            return PiecePart(request.token, "", offset), buffer
        peer.pending.popleft()
        if isinstance(request, HaveRequest):
            return HaveList(request.token, self._have_bitmap(request.digest)), b""
        found = self._read(request)
        if found is None:
            return PieceMissing(request.token, request.digest), b""
        return PiecePart(request.token, request.digest, request.offset), found

    def _read(self, request: PieceRequest) -> bytes | None:
        for source in self.sources:
            try:
                located = source.locate(request.digest)
                if located is None:
                    continue
                wanted = max(0, min(request.num_bytes, located.num_bytes - request.offset))
                found = self._files.read(located.path, located.offset + request.offset, wanted) if wanted else b""
            except OSError as error:
                log.warning("a piece can't be read: %s", error)
                continue
            if len(found) == wanted:
                return found
        return None

    def _have_bitmap(self, model: str) -> bytes:
        found = 0
        num_bytes = 0
        for source in self.sources:
            try:
                bitmap = source.have_bitmap(model)
            except OSError as error:
                log.warning("the pieces of a model can't be counted: %s", error)
                continue
            found |= int.from_bytes(bitmap, "little")
            num_bytes = max(num_bytes, len(bitmap))
        return found.to_bytes(num_bytes, "little")

    def _refuse(self, peer: PeerConnection, reason: str) -> None:
        self.num_refused += 1
        log.warning("pieces: the connection of %s is refused: %s", peer.key, reason)
        peer.pending.clear()
        peer.is_refused = True
        try:
            self._socket.send(peer.routing_id, _NO_WAIT | _MORE)
            self._socket.send(encode(PieceRefused(reason[:MAX_REASON_CHARACTERS])), _NO_WAIT)
        except zmq.ZMQError:
            return  # It takes nothing, or is gone.

    def _end(self, peer: PeerConnection, reason: str) -> None:
        log.warning("pieces: the connection of %s is ended: %s", peer.key, reason)
        self._peers.remove(peer)
        peer.connection.end()
