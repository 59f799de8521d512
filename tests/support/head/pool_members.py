"""Hosts of a pool as its head sees them: this process, with keys of their own, and answers that the test makes up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec
import zmq

from potluck.host.local_host import ThisHost
from potluck.host.piece_server import HostPieceServer
from tests.support.doctor.small_head import SmallHead
from tests.support.transport.introductions import ARRIVE, wait_until
from transport.control import ControlClient
from transport.links.endpoints import tcp_endpoint
from transport.messages.control import ControlMessage
from transport.messages.pool import HostRequest
from transport.security.curve import Curve, new_key_pair

Answer = Callable[[Any], list[ControlMessage]]


class FakeHost:
    """A host of the pool that answers by `answer`."""

    def __init__(self, head: SmallHead, stack: ExitStack, name: str, address: str, answer: Answer) -> None:
        self.keys = new_key_pair()
        self.requests: list[ControlMessage] = []
        self.answer = answer
        self._stack = ExitStack()
        stack.callback(self.close)
        head.roster.add(self.keys.public, name, "Linux x86-64")
        here = ThisHost(name=name, address=address, keys=self.keys)
        self.piece_server = HostPieceServer(here, tcp_endpoint(address), lambda key: key == head.key)
        self._stack.callback(self.piece_server.close)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stack.callback(context.destroy, 0)
        curve = Curve(context, self.keys)
        self._stack.callback(curve.close)
        self.control = ControlClient(
            context,
            str(head.pool.control),
            msgspec.structs.replace(ARRIVE, address=address, pieces=self.piece_server.endpoint),
            on_message=self._on_message,
            on_lost=lambda: None,
            prepare=curve.client_auth(head.key),
        )
        self._stack.callback(self.control.close)
        wait_until(lambda: name in {host.name for host in head.pool.hosts.connected()})

    def close(self) -> None:
        self._stack.close()

    def _on_message(self, message: ControlMessage) -> None:
        if isinstance(message, HostRequest):
            self.requests.append(message)
            for answer in self.answer(message):
                self.control.send(answer)
