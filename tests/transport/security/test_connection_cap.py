"""Who is let in where too many come: real connections, from loopback addresses of their own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq

from transport.security.connection_cap import ConnectionCap

MOST, MOST_PER_ADDRESS = 6, 3


class Listener:
    """Connections that a cap hears of as from libzmq."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}".encode()
        self.cap = ConnectionCap(max_connections=MOST, max_per_address=MOST_PER_ADDRESS)

    def come(self, address: str) -> tuple[socket.socket, int]:
        """The stranger's end, and the descriptor of the other one."""
        outside = self._stack.enter_context(
            socket.create_connection(self._listener.getsockname(), 60.0, source_address=(address, 0))
        )
        inside, _ = self._listener.accept()
        descriptor = inside.detach()
        self._stack.callback(socket.close, descriptor)
        self.cap.on_event({"event": zmq.EVENT_ACCEPTED, "value": descriptor, "endpoint": self._endpoint})
        return outside, descriptor


@pytest.fixture
def listener() -> Iterator[Listener]:
    with ExitStack() as stack:
        yield Listener(stack)


def is_shut(outside: socket.socket) -> bool:
    outside.setblocking(False)
    try:
        return outside.recv(1) == b""
    except BlockingIOError:
        return False


def test_no_address_has_more_than_its_places(listener: Listener) -> None:
    found = [listener.come("127.0.0.1")[0] for _ in range(MOST_PER_ADDRESS + 2)]
    assert [is_shut(one) for one in found] == [False] * MOST_PER_ADDRESS + [True] * 2


def test_who_holds_all_places_from_few_addresses_keeps_nobody_out(listener: Listener) -> None:
    strangers = [listener.come(f"127.0.0.{2 + number % 2}")[0] for number in range(MOST)]
    honest, descriptor = listener.come("127.0.0.9")
    assert not is_shut(honest)
    assert [is_shut(one) for one in strangers] == [True] + [False] * (MOST - 1)
    # Nor is it put out by those that come again.
    for number in range(20):
        listener.come(f"127.0.0.{2 + number % 2}")
    assert not is_shut(honest)
    listener.cap.mark_active(descriptor)
    for number in range(20):
        listener.come(f"127.0.0.{10 + number}")
    assert not is_shut(honest)


def test_who_was_heard_never_makes_room(listener: Listener) -> None:
    members = []
    for number in range(MOST):
        outside, descriptor = listener.come(f"127.0.0.{2 + number % 2}")
        listener.cap.mark_active(descriptor)
        members.append(outside)
    newcomer, _ = listener.come("127.0.0.9")
    assert is_shut(newcomer)
    assert not any(map(is_shut, members))
