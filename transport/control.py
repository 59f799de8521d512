"""Control between the head and its workers, apart from the data: register, load, statistics, signs of life, stop."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.codec import MAX_CONTROL_BYTES, decode_control, encode
from transport.errors import BadMessage
from transport.links.endpoints import bind, is_tcp
from transport.links.zmq_link import set_options
from transport.messages.control import ControlMessage, Heartbeat, Register, Stop
from transport.messages.pool import NodeHello
from transport.messages.ring import PROTOCOL_VERSION
from transport.process.polling import PollThread, SuspendDetector
from transport.security.connection_cap import MONITORED_EVENTS, ConnectionCap
from transport.security.curve import Guard, Prepare, address_of, descriptor_of, is_authenticated, peer_key
from transport.timeouts import CONTROL_CONNECT_S, CONTROL_HEARTBEAT_S, CONTROL_SILENT_S

log = logging.getLogger("potluck.control")

REVOKED_REASON = "this host was revoked by the head's owner"
"""What a host is told that was removed for good."""
_RETRY_S = 0.02
_MAX_MESSAGES_AT_ONCE = 1000
# Who is revoked is out within this time, and what waits is sent.
_TICK_S = 0.1
# From the network: a stranger can make the head keep as much before it has proved who it is.
_NETWORK_BYTES = 2**18
_UNREAD_BYTES = 2**20
_MAX_CONNECTIONS = 128
_MAX_PER_ADDRESS = 32

Introduction = Register | NodeHello
"""The first message on a control connection: a worker's, or a host's node's."""


def _set_options(sock: zmq.Socket[bytes], *, on_network: bool, max_bytes: int = MAX_CONTROL_BYTES) -> None:
    set_options(sock, max_message_bytes=max_bytes, on_network=on_network, silent_after_s=CONTROL_SILENT_S)


class ControlClient:
    """A worker's or a node's end. Introduces itself at once; one thread owns the socket.

    Over TCP `prepare` sets CURVE's keys, the head's among them: nobody else is obeyed. `on_message` and `on_lost` (the
    head is gone, was never reached, or says what can't be understood) are called from that thread and must not block.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        introduction: Introduction,
        *,
        on_message: Callable[[ControlMessage], None],
        on_lost: Callable[[], None],
        prepare: Prepare | None = None,
    ) -> None:
        assert prepare is not None or not is_tcp(endpoint), "nothing goes over TCP without CURVE"
        self._on_message = on_message
        self._on_lost = on_lost
        self._outbox: deque[ControlMessage] = deque()
        self._heartbeat_due_s = time.monotonic() + CONTROL_HEARTBEAT_S
        self._connect_by_s: float | None = time.monotonic() + CONTROL_CONNECT_S
        self._socket = context.socket(zmq.DEALER)
        _set_options(self._socket, on_network=is_tcp(endpoint))
        if prepare is not None:
            prepare(self._socket)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(endpoint)
        self._loop = PollThread(
            "control",
            (self._socket, self._monitor),
            self._on_ready,
            wait_s=self._wait_s,
            on_end=self._end,
            on_failure=on_lost,
        )
        self.send(introduction)
        self._loop.start()

    def send(self, message: ControlMessage) -> None:
        """Thread-safe; never blocks."""
        self._outbox.append(message)
        self._loop.wake()

    def close(self) -> None:
        """Send what is queued and close; waits at most 2 s."""
        self._loop.close()

    def _wait_s(self) -> float:
        return _RETRY_S if self._outbox else self._heartbeat_due_s - time.monotonic()

    def _on_ready(self, ready: Container[Any]) -> None:
        self._flush()
        if self._socket in ready:
            self._on_message(decode_control(self._socket.recv()))
        if not self._outbox:
            self._connect_by_s = None
        now_s = time.monotonic()
        if self._monitor in ready or (self._connect_by_s is not None and now_s >= self._connect_by_s):
            self._on_lost()
            self._loop.stop()
        elif now_s >= self._heartbeat_due_s:
            self._outbox.append(Heartbeat())
            self._heartbeat_due_s = now_s + CONTROL_HEARTBEAT_S

    def _end(self) -> None:
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
class ControlPeer:
    """A worker or a host's node as the head knows it. `identity` is the socket's index, and the peer's routing id
    there; `key` is its host's, and `address` where it comes from, empty for processes of this host that came by ipc."""

    identity: bytes
    introduction: Introduction
    key: str = ""
    address: str = ""
    last_heard_s: float = field(default_factory=time.monotonic)

    @property
    def register(self) -> Register:
        """Of a worker."""
        assert isinstance(self.introduction, Register)
        return self.introduction


class ControlServer:
    """The head's end. One thread owns the sockets; `on_message(peer, message)` and `on_lost(peer)` run in it, and ten
    times a second or more often `on_tick`, whatever the head does meanwhile.

    `endpoints` are those that it listens at, with the ports that were free. Those over TCP have a guard; a peer whose
    key is not authorized any more is told why (`eviction_reason`), lost, and ignored from then on.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Sequence[tuple[str, Guard | None]],
        *,
        on_message: Callable[[ControlPeer, ControlMessage], None],
        on_lost: Callable[[ControlPeer], None],
        on_tick: Callable[[], object] = lambda: None,
        eviction_reason: Callable[[str], str] = lambda key: REVOKED_REASON,
    ) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_tick = on_tick
        self._eviction_reason = eviction_reason
        self._peers: dict[bytes, ControlPeer] = {}
        self._outbox: deque[tuple[bytes, ControlMessage]] = deque()
        self._suspends = SuspendDetector()
        self.num_refused = 0
        # One for each: those of this host must not have the heartbeats that the network needs.
        self._sockets: list[zmq.Socket[bytes]] = []
        self._guards: list[Guard | None] = []
        self._monitors: dict[zmq.Socket[bytes], ConnectionCap] = {}
        self._caps: dict[zmq.Socket[bytes], ConnectionCap] = {}
        self.endpoints: list[str] = []
        for endpoint, guard in endpoints:
            self._open(context, endpoint, guard)
        self._loop = PollThread(
            "control", (*self._sockets, *self._monitors), self._on_ready, wait_s=lambda: _TICK_S, on_end=self._end
        )
        self._loop.start()

    def send(self, peer: ControlPeer, message: ControlMessage) -> None:
        """Thread-safe; a message to a peer that is gone is dropped (its loss is reported by `on_lost`)."""
        self._outbox.append((peer.identity, message))
        self._loop.wake()

    def close(self) -> None:
        """Send what is queued and close; waits at most 2 s."""
        self._loop.close()

    def _open(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, guard: Guard | None) -> None:
        on_network = is_tcp(endpoint)
        assert guard is not None or not on_network, "nothing listens at TCP without CURVE"
        sock = context.socket(zmq.ROUTER)
        _set_options(sock, on_network=on_network, max_bytes=_NETWORK_BYTES if on_network else MAX_CONTROL_BYTES)
        if guard is not None and on_network:
            guard.prepare(sock)
            monitor = sock.get_monitor_socket(MONITORED_EVENTS)
            cap = ConnectionCap(
                max_connections=_MAX_CONNECTIONS, max_per_address=_MAX_PER_ADDRESS, max_unread_bytes=_UNREAD_BYTES
            )
            self._monitors[monitor] = self._caps[sock] = cap
        self.endpoints.append(bind(sock, endpoint))
        self._sockets.append(sock)
        self._guards.append(guard if on_network else None)

    def _on_ready(self, ready: Container[Any]) -> None:
        suspended_s = self._suspends.suspended_s(_TICK_S)
        for monitor, cap in self._monitors.items():
            if monitor in ready:
                cap.on_event(parse_monitor_message(monitor.recv_multipart()))
        self._flush()
        for index in range(len(self._sockets)):
            self._take_all(index)
        for cap in self._caps.values():
            cap.enforce(time.monotonic())
        self._drop_silent(suspended_s)
        self._drop_revoked()
        self._on_tick()

    def _end(self) -> None:
        self._flush()
        for sock in self._sockets:
            sock.disable_monitor()
            sock.close(linger=500)
        for monitor in self._monitors:
            monitor.close(0)

    def _take_all(self, index: int) -> None:
        """Everything that waits: nobody is silent whose sign of life only has not been read yet."""
        guard = self._guards[index]
        for _ in range(_MAX_MESSAGES_AT_ONCE):
            try:
                identity, *frames = self._sockets[index].recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            key = peer_key(frames[0]) if guard is not None and frames else ""
            is_allowed = guard is None or (guard.is_authorized(key) and is_authenticated(identity.bytes))
            if len(frames) != 1 or not is_allowed:
                self.num_refused += 1
                continue
            if guard is not None:
                self._caps[self._sockets[index]].mark_active(descriptor_of(frames[0]))
            # Sockets give identities of their own: two could be equal.
            self._take(bytes([index]) + identity.bytes, key, frames[0])

    def _take(self, identity: bytes, key: str, frame: zmq.Frame) -> None:
        try:
            message = decode_control(frame.buffer)
        except BadMessage:
            self.num_refused += 1
            return
        peer = self._peers.get(identity)
        if peer is None:
            if not isinstance(message, Register | NodeHello):
                self.num_refused += 1
                return
            if message.version != PROTOCOL_VERSION:
                self.num_refused += 1
                reason = f"the head speaks protocol {PROTOCOL_VERSION}, this host {message.version}: update Potluck"
                self._outbox.append((identity, Stop(reason)))
                return
            peer = self._peers[identity] = ControlPeer(
                identity=identity, introduction=message, key=key, address=address_of(frame) if key else ""
            )
        if peer.key != key:  # A routing id that somebody else has taken over.
            self.num_refused += 1
            return
        peer.last_heard_s = time.monotonic()
        if not isinstance(message, Heartbeat):
            self._dispatch(peer, message)

    def _dispatch(self, peer: ControlPeer, message: ControlMessage) -> None:
        try:
            self._on_message(peer, message)
        except Exception:  # What one peer says must not end control for all of them.
            log.exception("a message of %s", peer.introduction)
            self.num_refused += 1
            if self._peers.pop(peer.identity, None) is not None:
                self._on_lost(peer)

    def _drop_silent(self, suspended_s: float) -> None:
        """Nobody is blamed for `suspended_s` in which this thread itself did not run."""
        now_s = time.monotonic()
        for peer in self._peers.values():
            peer.last_heard_s = min(now_s, peer.last_heard_s + suspended_s)
        for peer in [peer for peer in self._peers.values() if now_s - peer.last_heard_s > CONTROL_SILENT_S]:
            del self._peers[peer.identity]
            self._on_lost(peer)

    def _drop_revoked(self) -> None:
        for peer in list(self._peers.values()):
            guard = self._guards[peer.identity[0]]
            if guard is not None and not guard.is_authorized(peer.key):
                self._outbox.append((peer.identity, Stop(self._eviction_reason(peer.key))))
                self._flush()
                if self._peers.pop(peer.identity, None) is not None:  # Else it has just been found to be gone.
                    self._on_lost(peer)

    def _flush(self) -> None:
        while self._outbox:
            identity, message = self._outbox.popleft()
            if not self._may_send(identity, message):
                continue
            try:
                self._sockets[identity[0]].send_multipart([identity[1:], encode(message)], flags=zmq.DONTWAIT)
            except zmq.ZMQError:
                peer = self._peers.pop(identity, None)
                if peer is not None:
                    self._on_lost(peer)

    def _may_send(self, identity: bytes, message: ControlMessage) -> bool:
        """Whoever was removed, or is no member, gets `Stop` and nothing else."""
        guard = self._guards[identity[0]]
        if guard is None or isinstance(message, Stop):
            return True
        peer = self._peers.get(identity)
        return peer is not None and guard.is_authorized(peer.key)
