"""Control between the head and its workers, apart from the data: register, load, statistics, signs of life, stop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq

from transport.awake import Awake
from transport.codec import MAX_CONTROL_BYTES, decode_control, encode
from transport.endpoints import bind, is_tcp
from transport.errors import BadMessage
from transport.messages import PROTOCOL_VERSION, Alive, ControlMessage, Register, Stop
from transport.wake import Wake
from transport.zmq_link import set_options

ALIVE_INTERVAL_S = 1.0
SILENT_AFTER_S = 6.0
REACH_WITHIN_S = 20.0
_RETRY_S = 0.02
_MOST_AT_ONCE = 1000


def _set_options(sock: zmq.Socket[bytes], *, on_network: bool) -> None:
    # Patient: a worker that a busy host or network holds up for a moment has weights loaded that would be lost.
    silent_after_ms = int(SILENT_AFTER_S * 1000)
    set_options(sock, max_message_bytes=MAX_CONTROL_BYTES, on_network=on_network, silent_after_ms=silent_after_ms)


class ControlClient:
    """A worker's end. Registers at once; one thread owns the socket.

    `on_message` and `on_lost` (the head is gone, or was never reached) are called from that thread and must not block.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        register: Register,
        *,
        on_message: Callable[[ControlMessage], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._outbox: deque[ControlMessage] = deque()
        self._wake = Wake()
        self._closing = threading.Event()
        self._socket = context.socket(zmq.DEALER)
        _set_options(self._socket, on_network=is_tcp(endpoint))
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(endpoint)
        self.send(register)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def send(self, message: ControlMessage) -> None:
        """Thread-safe; never blocks."""
        self._outbox.append(message)
        self._wake.set()

    def close(self) -> None:
        """Send what is queued and close; waits at most 2 s."""
        self._closing.set()
        self._wake.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        next_alive_s = time.monotonic() + ALIVE_INTERVAL_S
        reach_by_s: float | None = time.monotonic() + REACH_WITHIN_S
        while not self._closing.is_set():
            wait_s = _RETRY_S if self._outbox else next_alive_s - time.monotonic()
            ready = dict(poller.poll(max(1, int(wait_s * 1000))))
            self._wake.clear()
            self._flush()
            if self._socket in ready:
                self._on_message(decode_control(self._socket.recv()))
            if not self._outbox:
                reach_by_s = None
            if self._monitor in ready or (reach_by_s is not None and time.monotonic() >= reach_by_s):
                self._on_lost()
                break
            if time.monotonic() >= next_alive_s:
                self._outbox.append(Alive())
                next_alive_s = time.monotonic() + ALIVE_INTERVAL_S
        self._flush()
        # LINGER is 0 on every socket: give what was just written a moment to leave.
        self._socket.close(linger=500)
        self._monitor.close(0)

    def _flush(self) -> None:
        while self._outbox:
            try:
                self._socket.send(encode(self._outbox[0]), flags=zmq.DONTWAIT)
            except zmq.Again:
                return  # not connected yet (IMMEDIATE)
            self._outbox.popleft()


@dataclass(slots=True)
class Peer:
    """A worker as the head knows it. `identity` is the socket's index, and the worker's routing id there."""

    identity: bytes
    register: Register
    last_heard_s: float = field(default_factory=time.monotonic)


class ControlServer:
    """The head's end. One thread owns the sockets; `on_message(peer, message)` and `on_lost(peer)` run in it.

    `endpoints` are those that it listens at, with the ports that were free.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Sequence[str],
        *,
        on_message: Callable[[Peer, ControlMessage], None],
        on_lost: Callable[[Peer], None],
    ) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._peers: dict[bytes, Peer] = {}
        self._outbox: deque[tuple[bytes, ControlMessage]] = deque()
        self._wake = Wake()
        self._closing = threading.Event()
        self.num_refused = 0
        # One for each: those of this host must not have the heartbeats that the network needs.
        self._sockets: list[zmq.Socket[bytes]] = []
        self.endpoints: list[str] = []
        for endpoint in endpoints:
            sock = context.socket(zmq.ROUTER)
            _set_options(sock, on_network=is_tcp(endpoint))
            self.endpoints.append(bind(sock, endpoint))
            self._sockets.append(sock)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def send(self, peer: Peer, message: ControlMessage) -> None:
        """Thread-safe; a message to a peer that is gone is dropped (its loss is reported by `on_lost`)."""
        self._outbox.append((peer.identity, message))
        self._wake.set()

    def close(self) -> None:
        """Send what is queued and close; waits at most 2 s."""
        self._closing.set()
        self._wake.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        poller = zmq.Poller()
        for sock in self._sockets:
            poller.register(sock, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        awake = Awake()
        while not self._closing.is_set():
            poller.poll(int(ALIVE_INTERVAL_S * 1000))
            slept_s = awake.slept_s(ALIVE_INTERVAL_S)
            self._wake.clear()
            self._flush()
            for index in range(len(self._sockets)):
                self._take_all(index)
            self._drop_silent(slept_s)
        self._flush()
        for sock in self._sockets:
            sock.close(linger=500)

    def _take_all(self, index: int) -> None:
        """Everything that waits: nobody is silent whose sign of life only has not been read yet."""
        for _ in range(_MOST_AT_ONCE):
            try:
                identity, *frames = self._sockets[index].recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            # Sockets give identities of their own: two could be equal.
            self._take(bytes([index]) + identity, *frames)

    def _take(self, identity: bytes, *frames: bytes) -> None:
        try:
            message = decode_control(frames[0] if len(frames) == 1 else b"")
        except BadMessage:
            self.num_refused += 1
            return
        peer = self._peers.get(identity)
        if peer is None:
            if not isinstance(message, Register):
                self.num_refused += 1
                return
            if message.version != PROTOCOL_VERSION:
                self.num_refused += 1
                reason = f"the head speaks protocol {PROTOCOL_VERSION}, this worker {message.version}: update Potluck"
                self._outbox.append((identity, Stop(reason)))
                return
            peer = self._peers[identity] = Peer(identity=identity, register=message)
        peer.last_heard_s = time.monotonic()
        if not isinstance(message, Alive):
            self._on_message(peer, message)

    def _drop_silent(self, slept_s: float) -> None:
        """Nobody is blamed for `slept_s` in which this thread itself did not run."""
        now_s = time.monotonic()
        for peer in self._peers.values():
            peer.last_heard_s = min(now_s, peer.last_heard_s + slept_s)
        for peer in [peer for peer in self._peers.values() if now_s - peer.last_heard_s > SILENT_AFTER_S]:
            del self._peers[peer.identity]
            self._on_lost(peer)

    def _flush(self) -> None:
        while self._outbox:
            identity, message = self._outbox.popleft()
            try:
                self._sockets[identity[0]].send_multipart([identity[1:], encode(message)], flags=zmq.DONTWAIT)
            except zmq.ZMQError:
                peer = self._peers.pop(identity, None)
                if peer is not None:
                    self._on_lost(peer)
