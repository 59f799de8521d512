"""A client of a piece server: its connection, one small thing fetched whole, and the link's speed."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.errors import BadMessage, DeadlineExceeded, DownloadFailed, NotAllowed, PotluckError
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
_TICK_S = 0.05


class ReceivedReply(NamedTuple):
    """`buffer` is a part's; empty for all else."""

    reply: PieceServerReply
    buffer: memoryview


class PieceConnection:
    """One connection: when it is lost, a new one is made. One owner thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], peer: PiecePeer, curve: Curve) -> None:
        """Raises BadMessage for an endpoint or a key that can't be one."""
        if not is_tcp(peer.endpoint):
            raise BadMessage(f"{peer.endpoint!r} is not an address of {peer.name}")
        prepare = curve.client_auth(peer.key)
        self.endpoint = peer.endpoint
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

    def exchange(
        self,
        requests: Iterable[PieceServerRequest],
        *,
        silent_after_s: float,
        ends_at_s: float = math.inf,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[PiecePart, memoryview]]:
        """Send the requests, as the peer takes them, and give the parts that come, until the caller has enough or it is
        `ends_at_s`. Raises DeadlineExceeded for a peer that is silent, NotAllowed for one that refuses or ends the
        connection, DownloadFailed for one that does not have it or if it is stopped, and BadMessage."""
        waiting = deque(requests)
        was_open, last_s = self.is_open, time.monotonic()
        while True:
            self.poll_monitor()
            if self.is_open and not was_open:
                was_open, last_s = True, time.monotonic()
            while waiting and self.is_open and self.send(waiting[0]):
                waiting.popleft()
            zmq.zmq_poll([(self.socket, zmq.POLLIN), (self.monitor, zmq.POLLIN)], int(_TICK_S * 1000))
            for reply, buffer in self.replies():
                last_s = time.monotonic()
                yield _part(reply), buffer
            now_s = time.monotonic()
            if self.lost_reason:
                raise NotAllowed(self.lost_reason)
            if stop():
                raise DownloadFailed("it was stopped")
            if now_s >= ends_at_s:
                return
            if now_s - last_s > silent_after_s:
                silent = f"it was silent for {silent_after_s:.0f} s"
                raise DeadlineExceeded(silent if self.is_open else f"nobody answers at {self.endpoint}")

    def poll_monitor(self) -> None:
        """Note what has happened to the connection: `is_open` and `lost_reason` change only here."""
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


def _part(reply: PieceServerReply) -> PiecePart:
    match reply:
        case PiecePart():
            return reply
        case PieceMissing():
            raise DownloadFailed("it does not have it")
        case PieceRefused(reason=reason):
            raise NotAllowed(f"it refused: {reason!r}")
    raise BadMessage("it sent what was not asked for")


log = logging.getLogger("potluck.pieces")

_RETRY_S = 0.5


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
            except PotluckError as error:
                reasons[peer.name] = error.message
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
    """Part by part until one is short. Raises what `exchange` does."""
    connection = PieceConnection(context, peer, curve)
    found = bytearray()
    try:
        while True:
            request = PieceRequest(0, digest, len(found), PART_BYTES)
            part, buffer = next(connection.exchange([request], silent_after_s=PEER_SILENT_S, stop=stop))
            if (part.digest, part.offset) != (digest, len(found)):
                raise BadMessage("it sent another part than was asked for")
            found += buffer
            if len(found) > max_bytes:
                raise DownloadFailed(f"it has more than {max_bytes} bytes for it")
            if len(buffer) < PART_BYTES:
                return bytes(found)
    finally:
        connection.close()


SPEED_TEST_BYTES = 8 * 2**20


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
    request = SpeedTest(1, min(num_bytes, MAX_SPEED_TEST_BYTES))
    first_s, last_s, first_bytes, came_bytes = 0.0, 0.0, 0, 0
    try:
        ends_at_s = time.monotonic() + within_s
        for part, buffer in connection.exchange([request], silent_after_s=PEER_SILENT_S, ends_at_s=ends_at_s):
            last_s = time.monotonic()
            if part.offset != came_bytes or not buffer:
                raise BadMessage("it sent what was not asked for")
            if not came_bytes:
                first_s, first_bytes = last_s, len(buffer)
            came_bytes += len(buffer)
            if came_bytes >= request.num_bytes:
                break
    except NotAllowed as error:
        raise NotAllowed(f"{peer.name}: {error.message}", hint="is this host paired with it?") from error
    except DeadlineExceeded as error:
        message = f"{peer.name}: {error.message}"
        raise DeadlineExceeded(message, hint=f"is potluck running on {peer.name}?") from error
    except BadMessage as error:
        raise BadMessage(f"{peer.name}: {error.message}") from error
    finally:
        connection.close()
    took_s = last_s - first_s
    return (came_bytes - first_bytes) / took_s if took_s > 0 else 0.0
