"""A connection to a host that gives pieces, as who fetches has it: requests out, checked answers in, and bad news."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.curve import Curve
from transport.endpoints import is_tcp
from transport.errors import BadMessage
from transport.pieces.bulk_options import set_bulk_options
from transport.pieces.messages import MAX_ANSWER_FRAME_BYTES, Answer, Request, decode_answer, encode
from transport.pool_messages import PiecePeer

_AUTH_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_FAILED = _AUTH_FAILED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED
_NO_WAIT = int(zmq.DONTWAIT)
_EMPTY = memoryview(b"")


class Received(NamedTuple):
    """`buffer` is a part's; empty for all else."""

    answer: Answer
    buffer: memoryview


class PeerLine:
    """One connection: when it is lost, a new one is made by a new line. One owner thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], peer: PiecePeer, curve: Curve) -> None:
        """Raises BadMessage for an endpoint or a key that can't be one."""
        if not is_tcp(peer.endpoint):
            raise BadMessage(f"{peer.endpoint!r} is not an address of {peer.name}")
        prepare = curve.towards(peer.key)
        self.is_open = False
        self.lost = ""
        """Why it is of no use any more; empty while it is."""
        self.socket = context.socket(zmq.DEALER)
        set_bulk_options(self.socket, max_message_bytes=MAX_ANSWER_FRAME_BYTES)
        prepare(self.socket)
        self.monitor = self.socket.get_monitor_socket(_MONITORED)
        try:
            self.socket.connect(peer.endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise BadMessage(f"{peer.endpoint!r} is not an address of {peer.name}") from error

    def send(self, request: Request) -> bool:
        """Whether it could be sent: there is a connection, which takes requests."""
        try:
            self.socket.send(encode(request), _NO_WAIT)
        except zmq.Again:
            return False
        return True

    def received(self) -> Iterator[Received]:
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
            yield Received(decode_answer(frames), frames[1] if len(frames) == 2 else _EMPTY)

    def look(self) -> None:
        """Take news of the connection: `is_open` and `lost` change only here."""
        while self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.is_open = True
            elif event & _AUTH_FAILED:
                self.lost = "it does not let this host in"
            elif event & zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self.lost = "the connection was closed before it was secure"
            elif self.is_open:
                self.lost = "the connection broke"

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)
