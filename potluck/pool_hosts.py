"""The other hosts of a pool as its head sees them: who has arrived, and what they are told of each other."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, get_args

import msgspec

from devices.interfaces import leads_to_lan
from potluck.questions import Questions
from transport.control import Peer
from transport.control_messages import ControlMessage
from transport.endpoints import is_host_endpoint, tcp_endpoint
from transport.errors import ConfigError, PotluckError, RingDown
from transport.pool_messages import (
    Arrive,
    HostAnswer,
    HostQuestion,
    Members,
    Preparing,
    Reach,
    Reached,
    Welcome,
)

_REACH_S = 5.0


class Roster(Protocol):
    """Who may be in the pool, by public key; a name is a host's alone."""

    def admits(self, key: str) -> bool: ...

    def name_of(self, key: str) -> str | None:
        """None for a key that it does not admit."""

    def keys(self) -> tuple[str, ...]: ...

    def problem(self) -> ConfigError | None:
        """Why nobody is admitted now, whoever is a member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolHost:
    """Another host that has arrived, at `arrived_s` since 1970. Its workers register by themselves."""

    peer: Peer
    name: str
    arrive: Arrive
    arrived_s: float

    @property
    def key(self) -> str:
        return self.peer.key


class PoolHosts:
    """Those that have arrived. Thread-safe; `send` puts a message on its way."""

    def __init__(
        self,
        *,
        own_key: str,
        roster: Roster | None,
        pool: str,
        pieces: Callable[[], str],
        send: Callable[[Peer, ControlMessage], None],
    ) -> None:
        """Only hosts of the `roster` are let in; `pool` is the id that they are told, `pieces` where the head's own
        host, which has the key `own_key`, gives them pieces of models."""
        self._own_key = own_key
        self._roster = roster
        self._pool = pool
        self._pieces = pieces
        self._send = send
        self._hosts: dict[bytes, PoolHost] = {}
        self._told: tuple[str, ...] = ()
        self._reaching: set[bytes] = set()
        self._changed = threading.Condition()
        self.questions: Questions[PoolHost, HostQuestion, HostAnswer, Preparing] = Questions(
            send, answers=get_args(HostAnswer), news=(Preparing,), why_gone=self._why_gone
        )

    def all(self) -> list[PoolHost]:
        """By name, as the roster calls them now."""
        with self._changed:
            found = [replace(host, name=self._name_now(host)) for host in self._hosts.values()]
        return sorted(found, key=lambda host: host.name)

    def members(self) -> list[str]:
        """Names of all that may come, whether or not they are there; in order."""
        keys = self._roster.keys() if self._roster is not None else ()
        return sorted(name for key in keys if self._roster and (name := self._roster.name_of(key)) is not None)

    def hear(self, peer: Peer, message: ControlMessage) -> None:
        match message:
            case Arrive():
                self._welcome(peer, message)
            case Reach(port=port) if isinstance(peer.introduction, Arrive) and 0 < port < 65536:
                self._start_reach(peer, peer.introduction.address, port)
            case _:
                self.questions.hear(peer, message)

    def lose(self, peer: Peer) -> None:
        """Its connection has ended, if it is a host's."""
        with self._changed:
            host = self._hosts.pop(peer.identity, None)
            self._changed.notify_all()
        if host is not None:
            self.tell_members()

    def tell_members(self, *, anew: bool = False) -> None:
        """Tell the hosts who may take pieces of models from them, if that has changed (or `anew`)."""
        if self._roster is None:
            return
        members = (self._own_key, *self._roster.keys())
        if anew or members != self._told:
            self._told = members
            for host in self.all():
                self._send(host.peer, Members(members))

    def _name_now(self, host: PoolHost) -> str:
        """It may have been renamed since it arrived."""
        return (self._roster.name_of(host.key) if self._roster is not None else None) or host.name

    def _why_gone(self, host: PoolHost) -> PotluckError | None:
        with self._changed:
            return None if host.peer.identity in self._hosts else RingDown(f"{host.name} has left")

    def _welcome(self, peer: Peer, arrive: Arrive) -> None:
        name = self._roster.name_of(peer.key) if self._roster is not None else None
        if self._roster is None or name is None:
            return
        if not is_host_endpoint(arrive.pieces):
            arrive = msgspec.structs.replace(arrive, pieces="")  # Nobody is sent there.
        with self._changed:
            self._hosts[peer.identity] = PoolHost(peer=peer, name=name, arrive=arrive, arrived_s=time.time())
            self._changed.notify_all()
        self._told = (self._own_key, *self._roster.keys())
        welcome = Welcome(name=name, pool=self._pool, members=self._told, pieces=self._pieces(), clock_s=time.time())
        self._send(peer, welcome)
        self.tell_members(anew=True)

    def _start_reach(self, peer: Peer, address: str, port: int) -> None:
        """One at a time for each host: it asks for one after the other."""
        with self._changed:
            if peer.identity in self._reaching:
                return
            self._reaching.add(peer.identity)
        threading.Thread(target=self._reach, args=(peer, address, port), name="reach", daemon=True).start()

    def _reach(self, peer: Peer, address: str, port: int) -> None:
        """Try to connect to a host that asked for it, at the address that it says is its own."""
        problem = ""
        try:
            if not is_host_endpoint(tcp_endpoint(address, port)):
                raise OSError(f"{address[:80]!r} is no address")
            if not _may_be_its_own(address, peer.address):
                raise OSError(f"this host comes from {peer.address}, and says that it is at {address}")
            socket.create_connection((address, port), _REACH_S).close()
        except OSError as error:
            problem = error.strerror or str(error) or "no answer in time"
        with self._changed:
            self._reaching.discard(peer.identity)
        self._send(peer, Reached(port, problem))


def _may_be_its_own(address: str, comes_from: str) -> bool:
    """Else a device could look by the head's eyes at what only that reaches: its own loopback, or behind its VPN."""
    if address == comes_from:
        return True
    if ipaddress.ip_address(address).is_loopback:
        return bool(comes_from) and ipaddress.ip_address(comes_from).is_loopback
    return leads_to_lan(address)
