"""A link over ZeroMQ with one admitted connection, and the options of every Potluck socket."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.codec import (
    FRAME_BYTES,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    EdgeLimits,
    Received,
    decode_data,
    encode,
    join_frames,
    split_frames,
)
from transport.errors import BadMessage, ConfigError, NeighbourGone
from transport.links.endpoints import bind, is_tcp
from transport.messages.ring import PROTOCOL_VERSION, DataMessage, Hello
from transport.process.polling import Waker
from transport.security.connection_cap import ENFORCE_INTERVAL_S, ConnectionCap, ConnectionWatch
from transport.security.curve import Guard, Prepare, descriptor_of, is_authenticated, peer_key
from transport.timeouts import (
    BULK_SILENT_S,
    LINK_CONNECT_S,
    LINK_HEARTBEAT_S,
    LINK_SEND_S,
    LINK_SILENT_S,
    TCP_CONNECT_S,
)

_LOCAL_BUFFER_BYTES = 2**20
# What the kernel may hold back: heartbeats stand behind it in the queue of a slow network.
_NETWORK_BUFFER_BYTES = 2**18
_MAX_CONNECTIONS = 16
_MAX_PER_ADDRESS = 8
_ZERO_COPY_BYTES = 2**16
# In how many pieces the header is, its last piece, and the buffer's: the frames of a message that are not full.
_PARTIAL_FRAMES = 3
_PROBE_INTERVAL_S = 0.02
_STOP_INTERVAL_S = 0.1
_NUM_PROBES = 25
# As plain numbers: to combine flags that are enumerations takes 20 µs when caches are cold, as they are after a step.
_NO_WAIT = int(zmq.DONTWAIT)
_NO_WAIT_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)
_POLL_IN = int(zmq.POLLIN)
_POLL_OUT = int(zmq.POLLOUT)


def set_options(
    sock: zmq.Socket[bytes],
    *,
    max_message_bytes: int,
    on_network: bool = False,
    silent_after_s: float = LINK_SILENT_S,
) -> None:
    """The options every Potluck socket has. `on_network`: over TCP, perhaps a slow one, where a peer that gives no sign
    of life for `silent_after_s` counts as gone.

    On one host there are no heartbeats: a process that ends closes its connection, and one that hangs is found by what
    it does not answer. They would only break every connection when the whole host pauses for a moment.
    """
    buffer_bytes = _NETWORK_BUFFER_BYTES if on_network else _LOCAL_BUFFER_BYTES
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    sock.setsockopt(zmq.HANDSHAKE_IVL, int(TCP_CONNECT_S * 1000))
    sock.setsockopt(zmq.HEARTBEAT_IVL, int(LINK_HEARTBEAT_S * 1000) if on_network else 0)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(silent_after_s * 1000))
    sock.setsockopt(zmq.HEARTBEAT_TTL, int(silent_after_s * 1000))
    sock.setsockopt(zmq.CONNECT_TIMEOUT, int(TCP_CONNECT_S * 1000))
    sock.setsockopt(zmq.RECONNECT_IVL, 100)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    sock.setsockopt(zmq.SNDBUF, buffer_bytes)
    sock.setsockopt(zmq.RCVBUF, buffer_bytes)
    if sock.type == zmq.ROUTER:
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
    else:
        sock.setsockopt(zmq.IMMEDIATE, 1)


class ZmqSender:
    """Connects to `endpoint` and says Hello. Over TCP `prepare` sets CURVE's keys (`Curve.client_auth`). Implements
    `transport.links.link.Sender`."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        limits: EdgeLimits,
        *,
        name: str,
        connect_timeout_s: float = LINK_CONNECT_S,
        prepare: Prepare | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Raises NeighbourGone if nobody listens at `endpoint`, or who does has another key, within
        `connect_timeout_s`, and soon after `stop()` is true."""
        assert prepare is not None or not is_tcp(endpoint), "nothing goes over TCP without CURVE"
        self._endpoint = endpoint
        self._frame_bytes = FRAME_BYTES if is_tcp(endpoint) else limits.max_message_bytes
        self._timeout_s = connect_timeout_s
        self._socket = context.socket(zmq.DEALER)
        set_options(self._socket, max_message_bytes=limits.max_message_bytes, on_network=is_tcp(endpoint))
        if prepare is not None:
            prepare(self._socket)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._monitor_events = [(self._monitor, _POLL_IN)]
        self._send_events = [(self._socket, _POLL_OUT), *self._monitor_events]
        self._socket.connect(endpoint)
        try:
            self._wait_until_connected(stop)
            self.send(Hello(PROTOCOL_VERSION, limits.fence, name))
        except NeighbourGone:
            self.close()
            raise
        self._timeout_s = LINK_SEND_S

    def send(self, message: DataMessage, buffers: Sequence[memoryview] = ()) -> None:
        frames = split_frames(encode(message), buffers, self._frame_bytes)
        left = len(frames)
        for frame in frames:
            left -= 1
            while True:
                try:
                    # Small frames are copied: to track a buffer until it has left takes longer.
                    self._socket.send(frame, _NO_WAIT_MORE if left else _NO_WAIT, len(frame) < _ZERO_COPY_BYTES)
                    break
                except zmq.Again:
                    self._wait_until_it_takes_messages()
        # Afterwards, since asking takes as long as sending and the neighbour need not wait for it.
        if zmq.zmq_poll(self._monitor_events, 0):
            raise NeighbourGone(f"the neighbour at {self._endpoint} is gone")

    def _wait_until_connected(self, stop: Callable[[], bool]) -> None:
        """Connections that end before both ends know each other don't count: a process that has just bound may need
        longer to start than a handshake may take, and libzmq tries again."""
        deadline = time.monotonic() + self._timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            if stop():
                raise NeighbourGone(f"connecting to {self._endpoint} was interrupted")
            if not self._monitor.poll(int(min(left_s, _STOP_INTERVAL_S) * 1000) + 1):
                continue
            if parse_monitor_message(self._monitor.recv_multipart())["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
        raise NeighbourGone(f"the neighbour at {self._endpoint} does not answer")

    def _wait_until_it_takes_messages(self) -> None:
        """Raises NeighbourGone: at once if it has gone, since then there is nothing to wait for."""
        ready = zmq.zmq_poll(self._send_events, int(self._timeout_s * 1000))
        if any(source is self._monitor for source, _ in ready):
            raise NeighbourGone(f"the neighbour at {self._endpoint} is gone")
        if not ready:
            raise NeighbourGone(f"the neighbour at {self._endpoint} does not take messages")

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)


class ZmqReceiver:
    """Binds `endpoint` and admits one sender. Implements `transport.links.link.Receiver`.

    Over TCP `guard` says whose key comes in.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        limits: EdgeLimits,
        *,
        guard: Guard | None = None,
    ) -> None:
        """Raises ConfigError if it can't listen at `endpoint`."""
        on_network = is_tcp(endpoint)
        assert guard is not None or not on_network, "nothing listens at TCP without CURVE"
        self._limits = limits
        self._guard = guard if on_network else None
        self._most_bytes = MAX_HEADER_BYTES + limits.max_message_bytes
        self._most_frames = _PARTIAL_FRAMES + self._most_bytes // FRAME_BYTES
        self._peer: bytes | None = None
        self._peer_descriptor = -1
        self._peer_name = ""
        self._probes_left = 0
        self.num_refused = 0
        self._socket = context.socket(zmq.ROUTER)
        # A prompt's step of 4 MB takes 3 s at 10 Mbit/s: it comes in frames, and each whole one is a sign of life.
        max_frame_bytes = MAX_FRAME_BYTES if on_network else limits.max_message_bytes
        set_options(self._socket, max_message_bytes=max_frame_bytes, on_network=on_network)
        if self._guard is not None:
            self._guard.prepare(self._socket)
        self._watch: ConnectionWatch | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        if on_network:
            # What CURVE adds to frames is far below an eighth.
            unread_bytes = self._most_bytes + self._most_bytes // 8
            cap = ConnectionCap(
                max_connections=_MAX_CONNECTIONS, max_per_address=_MAX_PER_ADDRESS, max_unread_bytes=unread_bytes
            )
            self._watch = ConnectionWatch(context, self._socket, cap)
            ends: Any = self._watch.fileno()
        else:
            ends = self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self.endpoint = bind(self._socket, endpoint)
        except ConfigError:
            self._end_watch()
            if guard is not None:
                guard.release()
            raise
        self._wake = Waker()
        self._poll_items: list[tuple[Any, int]] = [
            (self._socket, _POLL_IN),
            (ends, _POLL_IN),
            (self._wake.fileno(), _POLL_IN),
        ]
        self._ends = ends

    @property
    def is_connected(self) -> bool:
        return self._peer is not None

    def receive(self, timeout_s: float) -> Received | None:
        deadline = time.monotonic() + timeout_s
        while True:
            ready = zmq.zmq_poll(self._poll_items, max(0, int(self._wait_s(deadline) * 1000 + 0.999)))
            if not ready:
                if self._probes_left:
                    self._probe()
            elif (first := ready[0][0]) is self._socket:  # in the order of `_poll_items`: messages before a lost peer
                received = self._take()
                if received is not None:
                    if self._watch is not None:
                        self._watch.mark_active(self._peer_descriptor)
                        self._watch.enforce(time.monotonic())
                    return received
            elif first == self._ends:
                self._on_disconnect()
            else:
                self._wake.clear()
                return None
            now_s = time.monotonic()
            if self._watch is not None:
                self._watch.enforce(now_s)
            if now_s >= deadline:
                return None

    def _wait_s(self, deadline: float) -> float:
        wait_s = deadline - time.monotonic()
        if self._probes_left:
            wait_s = min(wait_s, _PROBE_INTERVAL_S)
        return wait_s if self._watch is None else min(wait_s, ENFORCE_INTERVAL_S)

    def wake(self) -> None:
        self._wake.set()

    def close(self) -> None:
        self._end_watch()
        self._socket.close(0)
        self._wake.close()
        if self._guard is not None:
            self._guard.release()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
        elif self._monitor is not None:
            if not self._socket.closed:
                self._socket.disable_monitor()
            self._monitor.close(0)

    def _take(self) -> Received | None:
        receive = self._socket.recv
        peer = receive(_NO_WAIT)  # ROUTER puts it before every message; the message's own frames follow
        frame = receive(_NO_WAIT, False)
        body = [frame.buffer]
        while frame.more:
            frame = receive(_NO_WAIT, False)
            if len(body) <= self._most_frames:  # One too many is noticed; more are not kept.
                body.append(frame.buffer)
        if self._guard is not None and not (self._guard.is_authorized(peer_key(frame)) and is_authenticated(peer)):
            self.num_refused += 1
            return None
        try:
            if len(body) > self._most_frames:
                raise BadMessage(f"a message of more than {self._most_frames} frames")
            received = decode_data(join_frames(body, self._most_bytes) if self._guard else body, self._limits)
        except BadMessage as error:
            self.num_refused += 1
            if peer != self._peer:
                return None
            raise BadMessage(f"from {self._peer_name}: {error.message}") from error
        message = received.message
        if isinstance(message, Hello):
            self._accept_hello(peer, message, descriptor_of(frame))
            return None
        if peer != self._peer or message.fence != self._limits.fence:
            self.num_refused += 1
            return None
        return received

    def _accept_hello(self, peer: bytes, hello: Hello, descriptor: int) -> None:
        if self._peer is not None or hello.version != PROTOCOL_VERSION or hello.fence != self._limits.fence:
            self.num_refused += 1
            return
        self._peer, self._peer_name, self._peer_descriptor = peer, hello.sender, descriptor
        if self._watch is not None:
            self._watch.follow(descriptor)

    def _on_disconnect(self) -> None:
        """The peer's connection has ended, or another one of this host: ROUTER does not say whose.

        Strangers come and go, and the peer must not get a question for each: it reads none of them.
        """
        if self._watch is not None:
            self._watch.clear()
        elif self._monitor is not None:
            self._monitor.recv_multipart()
        # More than once, because the monitor can be ahead of ROUTER.
        if self._peer is not None:
            self._probes_left = _NUM_PROBES
            self._probe()

    def _probe(self) -> None:
        self._probes_left -= 1
        if self._peer is not None and not self._can_reach(self._peer):
            raise NeighbourGone(f"{self._peer_name} is gone")

    def _can_reach(self, peer: bytes) -> bool:
        try:
            self._socket.send_multipart([peer, b""], flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            return error.errno != zmq.EHOSTUNREACH
        return True


def set_bulk_options(sock: zmq.Socket[bytes], *, max_message_bytes: int) -> None:
    """For both ends."""
    set_options(sock, max_message_bytes=max_message_bytes, on_network=True, silent_after_s=BULK_SILENT_S)
    # The system's own sizes grow with the link: 256 KiB would be 200 Mbit/s at 10 ms.
    sock.setsockopt(zmq.SNDBUF, -1)
    sock.setsockopt(zmq.RCVBUF, -1)
