"""A link over ZeroMQ: DEALER (connects, sends) → ROUTER (binds, receives); one connection is admitted, the one that
says Hello with the right fence. Socket options and their values are those of the project's reliability measurements."""

from __future__ import annotations

import time
from collections.abc import Sequence

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.codec import EdgeLimits, decode_data, encode
from transport.errors import BadMessage, NeighbourGone
from transport.link import Received
from transport.messages import PROTOCOL_VERSION, DataMessage, Fence, Hello
from transport.wake import Wake

CONNECT_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 30.0
_HEARTBEAT_MS = 500
_HEARTBEAT_TIMEOUT_MS = 1500
_BUFFER_BYTES = 2**20
_ZERO_COPY_BYTES = 2**16


def set_options(
    sock: zmq.Socket[bytes], *, max_message_bytes: int, silent_after_ms: int = _HEARTBEAT_TIMEOUT_MS
) -> None:
    """The options every Potluck socket has. A peer that gives no sign of life for `silent_after_ms` counts as gone."""
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    sock.setsockopt(zmq.HANDSHAKE_IVL, 3000)
    sock.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, silent_after_ms)
    sock.setsockopt(zmq.HEARTBEAT_TTL, silent_after_ms)
    sock.setsockopt(zmq.RECONNECT_IVL, 100)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    sock.setsockopt(zmq.SNDBUF, _BUFFER_BYTES)
    sock.setsockopt(zmq.RCVBUF, _BUFFER_BYTES)
    if sock.type == zmq.ROUTER:
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
    else:
        sock.setsockopt(zmq.IMMEDIATE, 1)


class ZmqSender:
    """Connects to `endpoint` and says Hello. Implements `transport.link.Sender`."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        limits: EdgeLimits,
        *,
        name: str,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """Raises NeighbourGone if nobody listens at `endpoint` within `connect_timeout_s`."""
        self._endpoint = endpoint
        self._timeout_s = connect_timeout_s
        self._socket = context.socket(zmq.DEALER)
        set_options(self._socket, max_message_bytes=limits.max_message_bytes)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLOUT)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(endpoint)
        try:
            self.send(Hello(PROTOCOL_VERSION, limits.fence, name))
        except NeighbourGone:
            self.close()
            raise
        self._timeout_s = SEND_TIMEOUT_S

    def send(self, message: DataMessage, buffers: Sequence[memoryview] = ()) -> None:
        frames: list[bytes | memoryview] = [encode(message), *buffers]
        last = len(frames) - 1
        for index, frame in enumerate(frames):
            flags = zmq.DONTWAIT if index == last else zmq.DONTWAIT | zmq.SNDMORE
            while not self._is_sent(frame, flags):
                self._wait_until_it_takes_messages()
        # Afterwards, since asking takes as long as sending and the neighbour need not wait for it.
        if int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            raise NeighbourGone(f"the neighbour at {self._endpoint} is gone")

    def _is_sent(self, frame: bytes | memoryview, flags: int) -> bool:
        try:
            # Small frames are copied: to track a buffer until it has left takes longer.
            self._socket.send(frame, flags=flags, copy=len(frame) < _ZERO_COPY_BYTES)
        except zmq.Again:
            return False
        return True

    def _wait_until_it_takes_messages(self) -> None:
        """Raises NeighbourGone: at once if it has gone, since then there is nothing to wait for."""
        ready = dict(self._poller.poll(int(self._timeout_s * 1000)))
        if self._monitor in ready:
            raise NeighbourGone(f"the neighbour at {self._endpoint} is gone")
        if not ready:
            raise NeighbourGone(f"the neighbour at {self._endpoint} does not take messages")

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)


class ZmqReceiver:
    """Binds `endpoint` and admits one sender. Implements `transport.link.Receiver`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, limits: EdgeLimits) -> None:
        self._limits = limits
        self._peer: bytes | None = None
        self._peer_name = ""
        self.num_refused = 0
        self._socket = context.socket(zmq.ROUTER)
        set_options(self._socket, max_message_bytes=limits.max_message_bytes)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.bind(endpoint)
        self._wake = Wake()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._poller.register(self._wake.fileno(), zmq.POLLIN)

    @property
    def is_connected(self) -> bool:
        return self._peer is not None

    def receive(self, timeout_s: float) -> Received | None:
        deadline = time.monotonic() + timeout_s
        while True:
            remaining_ms = max(0, int((deadline - time.monotonic()) * 1000 + 0.999))
            ready = dict(self._poller.poll(remaining_ms))
            if self._socket in ready:
                received = self._take()
                if received is not None:
                    return received
            elif self._monitor in ready:
                self._note_disconnect()
            elif ready:
                self._wake.clear()
                return None
            if time.monotonic() >= deadline:
                return None

    def wake(self) -> None:
        self._wake.set()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._wake.close()

    def _take(self) -> Received | None:
        frames = self._socket.recv_multipart(copy=False)
        peer, body = frames[0].bytes, [frame.buffer for frame in frames[1:]]
        try:
            received = decode_data(body, self._limits)
        except BadMessage as error:
            self.num_refused += 1
            if peer != self._peer:
                return None
            raise BadMessage(f"from {self._peer_name}: {error.message}") from error
        if isinstance(received.message, Hello):
            self._greet(peer, received.message)
            return None
        if peer != self._peer or not self._is_current(received.message.fence):
            self.num_refused += 1
            return None
        return received

    def _greet(self, peer: bytes, hello: Hello) -> None:
        if self._peer is not None or hello.version != PROTOCOL_VERSION or not self._is_current(hello.fence):
            self.num_refused += 1
            return
        self._peer, self._peer_name = peer, hello.sender

    def _is_current(self, fence: Fence) -> bool:
        return fence == self._limits.fence

    def _note_disconnect(self) -> None:
        parse_monitor_message(self._monitor.recv_multipart())
        # A stranger that goes away is nobody's loss, and ROUTER does not say who went: ask for the peer.
        if self._peer is not None and not self._can_reach(self._peer):
            raise NeighbourGone(f"{self._peer_name} is gone")

    def _can_reach(self, peer: bytes) -> bool:
        try:
            self._socket.send_multipart([peer, b""], flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            return error.errno != zmq.EHOSTUNREACH
        return True
