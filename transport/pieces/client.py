"""A client of a piece server: its connection, one small thing fetched whole, and the link's speed."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.errors import BadMessage, DeadlineExceeded, DownloadFailed, NotAllowed
from transport.links.endpoints import is_tcp
from transport.links.zmq_link import set_bulk_options
from transport.messages.pieces import (
    MAX_REPLY_FRAME_BYTES,
    MAX_SPEED_TEST_BYTES,
    PART_BYTES,
    PieceMissing,
    PiecePart,
    PieceRefused,
    PieceRequest,
    PieceServerReply,
    PieceServerRequest,
    SpeedTest,
    decode_reply,
    encode,
)
from transport.messages.pool import PiecePeer
from transport.security.curve import Curve
from transport.timeouts import FETCH_PATIENCE_S, PEER_SILENT_S, SPEED_TEST_S

_AUTH_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_FAILED = _AUTH_FAILED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED
_NO_WAIT = int(zmq.DONTWAIT)
_EMPTY = memoryview(b"")


class ReceivedReply(NamedTuple):
    """`buffer` is a part's; empty for all else."""

    reply: PieceServerReply
    buffer: memoryview


class PieceConnection:
    """One connection: when it is lost, a new one is made by a new line. One owner thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], peer: PiecePeer, curve: Curve) -> None:
        """Raises BadMessage for an endpoint or a key that can't be one."""
        if not is_tcp(peer.endpoint):
            raise BadMessage(f"{peer.endpoint!r} is not an address of {peer.name}")
        prepare = curve.client_auth(peer.key)
        self.is_open = False
        self.lost_reason = ""
        """Why it is of no use any more; empty while it is."""
        self.socket = context.socket(zmq.DEALER)
        set_bulk_options(self.socket, max_message_bytes=MAX_REPLY_FRAME_BYTES)
        prepare(self.socket)
        self.monitor = self.socket.get_monitor_socket(_MONITORED)
        try:
            self.socket.connect(peer.endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise BadMessage(f"{peer.endpoint!r} is not an address of {peer.name}") from error

    def send(self, request: PieceServerRequest) -> bool:
        """Whether it could be sent: there is a connection, which takes requests."""
        try:
            self.socket.send(encode(request), _NO_WAIT)
        except zmq.Again:
            return False
        return True

    def replies(self) -> Iterator[ReceivedReply]:
        """What has come. Raises BadMessage."""
        while True:
            try:
                first = self.socket.recv(_NO_WAIT, copy=False)
            except zmq.Again:
                return
            frames = [first.buffer]
            last = first
            while last.more:
                last = self.socket.recv(_NO_WAIT, copy=False)
                if len(frames) < 3:  # More are refused anyway.
                    frames.append(last.buffer)
            yield ReceivedReply(decode_reply(frames), frames[1] if len(frames) == 2 else _EMPTY)

    def poll_monitor(self) -> None:
        """Take news of the connection: `is_open` and `lost` change only here."""
        while self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.is_open = True
            elif event & _AUTH_FAILED:
                self.lost_reason = "it does not let this host in"
            elif event & zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self.lost_reason = "the connection was closed before it was secure"
            elif self.is_open:
                self.lost_reason = "the connection broke"

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)


log = logging.getLogger("potluck.pieces")

_RETRY_S = 0.5
_TICK_S = 0.05


class _PeerFailed(Exception):
    """What this peer did not do."""


def fetch_small(
    digest: str,
    peers: Sequence[PiecePeer],
    max_bytes: int,
    *,
    curve: Curve,
    context: zmq.Context[zmq.Socket[bytes]],
    what: str,
    stop: Callable[[], bool] = lambda: False,
    patience_s: float = FETCH_PATIENCE_S,
) -> bytes:
    """What has the SHA-256 `digest`, from one of the peers, which are tried in turn until `patience_s` have passed.
    Raises DownloadFailed if none has it, or when it is stopped."""
    give_up_at_s = time.monotonic() + patience_s
    reasons: dict[str, str] = {}
    refused: set[str] = set()
    while True:
        for peer in peers:
            if peer.key in refused:
                continue
            try:
                found = _fetch_from(peer, digest, max_bytes, curve, context, stop)
            except (_PeerFailed, BadMessage) as error:
                reasons[peer.name] = str(error)
                continue
            if hashlib.sha256(found).hexdigest() == digest:
                return found
            reasons[peer.name] = "it sent wrong bytes"
            refused.add(peer.key)
            log.warning("nothing more is taken from %s: it sent wrong bytes for %s", peer.name, what)
        if stop() or time.monotonic() >= give_up_at_s or len(refused) == len(peers):
            break
        time.sleep(_RETRY_S)
    tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no host offers it"
    raise DownloadFailed(
        f"{what} can't be got from the pool ({tried})", hint="is the head running, and reachable from here?"
    )


def _fetch_from(
    peer: PiecePeer,
    digest: str,
    max_bytes: int,
    curve: Curve,
    context: zmq.Context[zmq.Socket[bytes]],
    stop: Callable[[], bool],
) -> bytes:
    """Part by part until one is short. Raises _Failed, BadMessage."""
    connection = PieceConnection(context, peer, curve)
    parts: list[bytes] = []
    offset = 0
    try:
        while True:
            part = _fetch_part(connection, PieceRequest(len(parts), digest, offset, PART_BYTES), stop)
            parts.append(part)
            offset += len(part)
            if offset > max_bytes:
                raise _PeerFailed(f"it has more than {max_bytes} bytes for it")
            if len(part) < PART_BYTES:
                return b"".join(parts)
    finally:
        connection.close()


def _fetch_part(connection: PieceConnection, request: PieceRequest, stop: Callable[[], bool]) -> bytes:
    silent_at_s = time.monotonic() + PEER_SILENT_S
    is_sent = False
    while time.monotonic() < silent_at_s:
        if stop():
            raise _PeerFailed("it was stopped")
        connection.poll_monitor()
        if not is_sent and connection.is_open:
            is_sent = connection.send(request)
        zmq.zmq_poll([(connection.socket, zmq.POLLIN), (connection.monitor, zmq.POLLIN)], int(_TICK_S * 1000))
        for answer, buffer in connection.replies():
            match answer:
                case PiecePart(token=request.token, offset=request.offset):
                    return bytes(buffer)
                case PieceMissing():
                    raise _PeerFailed("it does not have it")
                case PieceRefused(reason=reason):
                    raise _PeerFailed(f"it refused: {reason!r}")
                case _:
                    raise BadMessage("it sent what was not asked for")
        if connection.lost_reason:
            raise _PeerFailed(connection.lost_reason)
    raise _PeerFailed(f"it was silent for {PEER_SILENT_S:.0f} s")


SPEED_TEST_BYTES = 8 * 2**20
_POLL_S = 0.05


def measure_link_speed(
    peer: PiecePeer,
    curve: Curve,
    context: zmq.Context[zmq.Socket[bytes]],
    *,
    num_bytes: int = SPEED_TEST_BYTES,
    within_s: float = SPEED_TEST_S,
) -> float:
    """Bytes per second from `peer` to this host, from the first part to the last: what came in `within_s` counts.

    Raises NotAllowed if it does not let this host in, DeadlineExceeded if nothing comes, BadMessage.
    """
    connection = PieceConnection(context, peer, curve)
    try:
        return _measure_speed(connection, peer, min(num_bytes, MAX_SPEED_TEST_BYTES), within_s)
    finally:
        connection.close()


def _measure_speed(connection: PieceConnection, peer: PiecePeer, num_bytes: int, within_s: float) -> float:
    began_s = last_reply_s = time.monotonic()
    is_sent = False
    first_s, first_bytes, came_bytes = 0.0, 0, 0
    while came_bytes < num_bytes:
        zmq.zmq_poll([(connection.socket, zmq.POLLIN), (connection.monitor, zmq.POLLIN)], int(_POLL_S * 1000))
        now_s = time.monotonic()
        for answer, buffer in connection.replies():
            if isinstance(answer, PieceRefused):
                raise NotAllowed(f"{peer.name} refused to measure: {answer.reason!r}")
            if not isinstance(answer, PiecePart) or answer.offset != came_bytes or not buffer:
                raise BadMessage(f"{peer.name} sent what was not asked for")
            last_reply_s = time.monotonic()
            if not came_bytes:
                first_s, first_bytes = last_reply_s, len(buffer)
            came_bytes += len(buffer)
        connection.poll_monitor()
        if connection.lost_reason:
            raise NotAllowed(f"{peer.name}: {connection.lost_reason}", hint="is this host paired with it?")
        if connection.is_open and not is_sent:
            is_sent = connection.send(SpeedTest(1, num_bytes))
            last_reply_s = now_s
        if not connection.is_open and now_s - began_s > PEER_SILENT_S:
            raise DeadlineExceeded(f"nobody answers at {peer.endpoint}", hint=f"is potluck running on {peer.name}?")
        if connection.is_open and now_s - last_reply_s > PEER_SILENT_S:
            raise DeadlineExceeded(f"{peer.name} was silent for {PEER_SILENT_S:.0f} s")
        if came_bytes > first_bytes and now_s - began_s > within_s:
            break
    took_s = last_reply_s - first_s
    return (came_bytes - first_bytes) / took_s if took_s > 0 else 0.0
