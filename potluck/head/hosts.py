"""The other hosts of a pool as the head sees them, and calls to them that may take long but not fall silent."""

from __future__ import annotations

import ipaddress
import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar, get_args

import msgspec

from devices.hardware.interfaces import leads_to_lan
from transport.control import ControlPeer
from transport.errors import ConfigError, DeadlineExceeded, PotluckError, RingDown
from transport.links.endpoints import is_host_endpoint, tcp_endpoint
from transport.messages.control import ControlMessage
from transport.messages.measure import MeasureFault
from transport.messages.pool import (
    HostFault,
    HostReply,
    HostRequest,
    MembersChanged,
    NodeAccepted,
    NodeHello,
    OfferProgress,
    ProbeConnection,
    ProbeResult,
)


class HasPeer(Protocol):
    @property
    def peer(self) -> ControlPeer: ...


Callee = TypeVar("Callee", bound=HasPeer)
RpcRequest = TypeVar("RpcRequest", bound=msgspec.Struct)
RpcReply = TypeVar("RpcReply")
RpcProgress = TypeVar("RpcProgress")


@dataclass(slots=True)
class _PendingCall(Generic[Callee, RpcReply, RpcProgress]):
    callee: Callee
    last_reply_s: float
    progress: list[RpcProgress] = field(default_factory=list)
    reply: RpcReply | PotluckError | None = None


class RpcClient(Generic[Callee, RpcRequest, RpcReply, RpcProgress]):
    """Calls that wait for a reply. Thread-safe.

    `send` queues a message; `reply_types` are the messages that end a call, `progress_types` those that report progress
    of it; `lost_error` says why no reply will come, once the callee is gone.
    """

    def __init__(
        self,
        send: Callable[[ControlPeer, ControlMessage], None],
        *,
        reply_types: tuple[type[RpcReply], ...],
        progress_types: tuple[type[RpcProgress], ...],
        lost_error: Callable[[Callee], PotluckError | None],
    ) -> None:
        self._send = send
        self._reply_types = reply_types
        self._progress_types = progress_types
        self._lost_error = lost_error
        self._tokens = itertools.count(1)
        self._pending: dict[int, _PendingCall[Callee, RpcReply, RpcProgress]] = {}
        self._changed = threading.Condition()

    def call_all(
        self,
        requests: Sequence[tuple[Callee, RpcRequest]],
        *,
        silence_s: float,
        on_progress: Callable[[Callee, RpcProgress], None] = lambda callee, progress: None,
    ) -> list[RpcReply | PotluckError]:
        """Send all requests at once, and wait for the replies, in order; an error in place of one that did not come.

        `on_progress` is called with the progress reported meanwhile; a callee that is silent for `silence_s` is given
        up.
        """
        now_s = time.monotonic()
        pending = {
            next(self._tokens): _PendingCall[Callee, RpcReply, RpcProgress](callee, now_s) for callee, _ in requests
        }
        with self._changed:
            self._pending.update(pending)
        try:
            for token, (callee, request) in zip(pending, requests, strict=True):
                message: Any = msgspec.structs.replace(request, token=token)
                self._send(callee.peer, message)
            return self._wait(list(pending.values()), silence_s, on_progress)
        finally:
            with self._changed:
                for token in pending:
                    del self._pending[token]

    def on_message(self, peer: ControlPeer, message: ControlMessage) -> None:
        """Take a message of `peer`; one that no pending call of that peer waits for is ignored."""
        with self._changed:
            call = self._pending.get(getattr(message, "token", 0))
            if call is None or call.callee.peer.identity != peer.identity:
                return
            call.last_reply_s = time.monotonic()
            if isinstance(message, MeasureFault | HostFault):
                call.reply = message.error.error()
            elif isinstance(message, self._reply_types):
                call.reply = message
            elif isinstance(message, self._progress_types):
                call.progress.append(message)
            self._changed.notify_all()

    def _wait(
        self,
        pending: Sequence[_PendingCall[Callee, RpcReply, RpcProgress]],
        silence_s: float,
        on_progress: Callable[[Callee, RpcProgress], None],
    ) -> list[RpcReply | PotluckError]:
        while True:
            with self._changed:
                for one in pending:
                    self._check_silence(one, silence_s)
                progress = [(one.callee, message) for one in pending for message in one.progress]
                for one in pending:
                    one.progress.clear()
                replies = [one.reply for one in pending if one.reply is not None]
                if not progress and len(replies) == len(pending):
                    return replies
                if not progress:
                    self._changed.wait(0.2)
            for callee, message in progress:
                on_progress(callee, message)

    def _check_silence(self, one: _PendingCall[Callee, RpcReply, RpcProgress], silence_s: float) -> None:
        if one.reply is not None:
            return
        lost = self._lost_error(one.callee)
        if lost is not None:
            one.reply = lost
        elif time.monotonic() - one.last_reply_s > silence_s:
            one.reply = DeadlineExceeded(f"no answer within {silence_s:.0f} s", hint="its log says more")


_PROBE_TIMEOUT_S = 5.0


class HostRoster(Protocol):
    """Who may be in the pool, by public key; a name belongs to one host."""

    def admits(self, key: str) -> bool: ...

    def name_of(self, key: str) -> str | None:
        """None for a key that it does not admit."""

    def keys(self) -> tuple[str, ...]: ...

    def problem(self) -> ConfigError | None:
        """Why nobody is admitted now, whoever is a member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolHost:
    """Another host that has connected, at `connected_s` since 1970. Its workers register by themselves."""

    peer: ControlPeer
    name: str
    hello: NodeHello
    connected_s: float

    @property
    def key(self) -> str:
        return self.peer.key


class PoolHosts:
    """Those that have connected. Thread-safe; `send` queues a message."""

    def __init__(
        self,
        *,
        own_key: str,
        roster: HostRoster | None,
        pool: str,
        pieces: Callable[[], str],
        send: Callable[[ControlPeer, ControlMessage], None],
    ) -> None:
        """Only hosts of the `roster` are accepted; `pool` is the id that they get, `pieces` the piece server of the
        head's own host, which has the key `own_key`."""
        self._own_key = own_key
        self._roster = roster
        self._pool = pool
        self._pieces = pieces
        self._send = send
        self._hosts: dict[bytes, PoolHost] = {}
        self._sent_members: tuple[str, ...] = ()
        self._probing: set[bytes] = set()
        self._changed = threading.Condition()
        self.rpc: RpcClient[PoolHost, HostRequest, HostReply, OfferProgress] = RpcClient(
            send, reply_types=get_args(HostReply), progress_types=(OfferProgress,), lost_error=self._lost_error
        )

    def connected(self) -> list[PoolHost]:
        """By name, as the roster calls them now."""
        with self._changed:
            found = [replace(host, name=self._current_name(host)) for host in self._hosts.values()]
        return sorted(found, key=lambda host: host.name)

    def with_pieces(self) -> list[PoolHost]:
        """Those that are connected and serve pieces; `potluck doctor` on another host does not."""
        return [host for host in self.connected() if host.hello.pieces]

    def member_names(self) -> list[str]:
        """Names of all that may connect, whether or not they have; in order."""
        keys = self._roster.keys() if self._roster is not None else ()
        return sorted(name for key in keys if self._roster and (name := self._roster.name_of(key)) is not None)

    def on_message(self, peer: ControlPeer, message: ControlMessage) -> None:
        match message:
            case NodeHello():
                self._accept(peer, message)
            case ProbeConnection(port=port) if isinstance(peer.introduction, NodeHello) and 0 < port < 65536:
                self._start_probe(peer, peer.introduction.address, port)
            case _:
                self.rpc.on_message(peer, message)

    def on_lost(self, peer: ControlPeer) -> None:
        """Its connection has ended, if it is a host's."""
        with self._changed:
            host = self._hosts.pop(peer.identity, None)
            self._changed.notify_all()
        if host is not None:
            self.send_members()

    def send_members(self, *, force: bool = False) -> None:
        """Send the hosts who may get pieces of models from them, if that has changed (or `force`)."""
        if self._roster is None:
            return
        members = (self._own_key, *self._roster.keys())
        if force or members != self._sent_members:
            self._sent_members = members
            for host in self.connected():
                self._send(host.peer, MembersChanged(members))

    def _current_name(self, host: PoolHost) -> str:
        """It may have been renamed since it connected."""
        return (self._roster.name_of(host.key) if self._roster is not None else None) or host.name

    def _lost_error(self, host: PoolHost) -> PotluckError | None:
        with self._changed:
            return None if host.peer.identity in self._hosts else RingDown(f"{host.name} has left")

    def _accept(self, peer: ControlPeer, hello: NodeHello) -> None:
        name = self._roster.name_of(peer.key) if self._roster is not None else None
        if self._roster is None or name is None:
            return
        if not is_host_endpoint(hello.pieces):
            hello = msgspec.structs.replace(hello, pieces="")  # Nobody is sent there.
        with self._changed:
            self._hosts[peer.identity] = PoolHost(peer=peer, name=name, hello=hello, connected_s=time.time())
            self._changed.notify_all()
        self._sent_members = (self._own_key, *self._roster.keys())
        accepted = NodeAccepted(
            name=name, pool=self._pool, members=self._sent_members, pieces=self._pieces(), clock_s=time.time()
        )
        self._send(peer, accepted)
        self.send_members(force=True)

    def _start_probe(self, peer: ControlPeer, address: str, port: int) -> None:
        """One at a time for each host: it asks for one after the other."""
        with self._changed:
            if peer.identity in self._probing:
                return
            self._probing.add(peer.identity)
        threading.Thread(target=self._probe_connection, args=(peer, address, port), name="reach", daemon=True).start()

    def _probe_connection(self, peer: ControlPeer, address: str, port: int) -> None:
        """Try to connect to a host at its request, at the address that it claims."""
        problem = ""
        try:
            if not is_host_endpoint(tcp_endpoint(address, port)):
                raise OSError(f"{address[:80]!r} is no address")
            if not _may_belong_to_peer(address, peer.address):
                raise OSError(f"this host connects from {peer.address}, and claims the address {address}")
            socket.create_connection((address, port), _PROBE_TIMEOUT_S).close()
        except OSError as error:
            problem = error.strerror or str(error) or "no answer in time"
        with self._changed:
            self._probing.discard(peer.identity)
        self._send(peer, ProbeResult(port, problem))


def _may_belong_to_peer(address: str, comes_from: str) -> bool:
    """Else a device could probe through the head what only the head reaches: its loopback, or behind its VPN."""
    if address == comes_from:
        return True
    if ipaddress.ip_address(address).is_loopback:
        return bool(comes_from) and ipaddress.ip_address(comes_from).is_loopback
    return leads_to_lan(address)
