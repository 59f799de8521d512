"""Strangers at a socket whose owner is busy, as one that loads weights is: the rest of its process goes on."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq

from tests.support.transport.linked import LIMITS, Context, kept_context, next_message, receiver_at, sender_to, step
from transport.errors import RingDown
from transport.links.endpoints import port_of

# libzmq's thread used to wait for ever for someone who listens after a thousand of them.
NUM_STRANGERS = 1200


@pytest.fixture
def context() -> Iterator[Context]:
    with kept_context() as context:
        yield context


def test_strangers_at_a_busy_receiver_do_not_stop_its_process(context: Context) -> None:
    receiver = receiver_at(context, "tcp://127.0.0.1:*", LIMITS)
    other = context.socket(zmq.PULL)
    port = other.bind_to_random_port("tcp://127.0.0.1")
    with zmq.Context() as outside, outside.socket(zmq.PUSH) as peer:
        peer.linger = 0
        peer.connect(f"tcp://127.0.0.1:{port}")
        for _ in range(NUM_STRANGERS):
            socket.create_connection(("127.0.0.1", port_of(receiver.endpoint)), 60.0).close()
        peer.send(b"still there?")
        assert other.poll(60_000), "this process's sockets are stuck"
    other.close(0)
    sender = sender_to(context, receiver.endpoint, LIMITS, name="engine")
    sender.send(step(1))
    assert next_message(receiver).message == step(1)
    sender.close()
    receiver.close()


def test_a_busy_receivers_connections_are_capped(context: Context) -> None:
    receiver = receiver_at(context, "tcp://127.0.0.1:*", LIMITS)
    with ExitStack() as stack:
        strangers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port_of(receiver.endpoint)), 60.0))
            for _ in range(100)
        ]
        capped_by_s = time.monotonic() + 2.5  # Handshakes have three.
        while (num_open := sum(is_open(stranger) for stranger in strangers)) > 16 and time.monotonic() < capped_by_s:
            time.sleep(0.05)
        assert num_open <= 16
    receiver.close()


def is_open(stranger: socket.socket) -> bool:
    stranger.setblocking(False)
    try:
        while stranger.recv(4096):  # ZeroMQ's greeting
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def test_a_peer_that_goes_while_the_receiver_is_busy_is_noticed(context: Context) -> None:
    receiver = receiver_at(context, "tcp://127.0.0.1:*", LIMITS)
    sender = sender_to(context, receiver.endpoint, LIMITS, name="engine")
    sender.send(step(1))
    time.sleep(0.3)
    sender.close()
    time.sleep(0.3)
    with pytest.raises(RingDown, match="engine is gone"):
        for _ in range(600):
            receiver.receive(0.1)
    receiver.close()
