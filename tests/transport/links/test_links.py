"""Links deliver checked messages in order, refuse the rest, notice a dead peer, and can be woken."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tests.support.transport.linked import (
    FENCE,
    LIMITS,
    kept_context,
    next_message,
    receiver_at,
    sender_to,
    step,
    stranger_at,
)
from transport.codec import encode
from transport.errors import BadMessage, ConfigError, NeighbourGone, RingDown
from transport.links.link import Receiver, memory_link
from transport.links.zmq_link import ZmqSender
from transport.messages.ring import PROTOCOL_VERSION, Entry, Fence, Hello, Hidden, SequenceId


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """To bind; the receiver's own `endpoint` is the one to connect to."""
    return "tcp://127.0.0.1:*" if request.param == "tcp" else f"ipc://{tmp_path}/edge"


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with kept_context() as context:
        yield context


def hidden(number: int, buffer_tokens: int = 2) -> tuple[Hidden, memoryview]:
    message = Hidden(FENCE, number, (), (Entry(SequenceId(1), 0, (1, 2), 1),), "float32", 2, 4)
    return message, memoryview(bytes(buffer_tokens * 16))


def until_refused(receiver: Receiver) -> None:
    deadline = time.monotonic() + 60.0
    while receiver.num_refused == 0:
        assert time.monotonic() < deadline and receiver.receive(0.1) is None


def test_messages_and_buffers_arrive_in_order(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
    receiver = receiver_at(context, endpoint, LIMITS)
    sender = sender_to(context, receiver.endpoint, LIMITS, name="engine")
    for number in range(50):
        message, buffer = hidden(number)
        sender.send(message, (buffer,))
    got = [next_message(receiver) for _ in range(50)]
    assert [received.message.step for received in got] == list(range(50))  # type: ignore[union-attr]
    assert all(bytes(received.buffers[0]) == bytes(32) for received in got)
    sender.close()
    receiver.close()


def test_a_wake_interrupts_a_waiting_receive(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
    for receiver in (receiver_at(context, endpoint, LIMITS), memory_link(LIMITS)[1]):
        threading.Timer(0.1, receiver.wake).start()
        started = time.monotonic()
        assert receiver.receive(120.0) is None
        assert time.monotonic() - started < 60.0
        receiver.close()


def test_a_dead_sender_is_noticed(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
    receiver = receiver_at(context, endpoint, LIMITS)
    sender = sender_to(context, receiver.endpoint, LIMITS, name="stage 0")
    sender.send(step(1))
    next_message(receiver)
    sender.close()
    with pytest.raises(RingDown, match="stage 0 is gone"):
        next_message(receiver)
    receiver.close()


def test_a_dead_receiver_is_noticed(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
    receiver = receiver_at(context, endpoint, LIMITS)
    sender = sender_to(context, receiver.endpoint, LIMITS, name="engine")
    receiver.close()
    started = time.monotonic()
    # Whether it went before a send or, as one waited, during it.
    with pytest.raises(RingDown):
        while True:
            sender.send(step(1))
            time.sleep(0.05)
    assert time.monotonic() - started < 20.0  # a send waits for 30
    sender.close()


def test_a_receiver_that_dies_while_a_send_waits_is_noticed_at_once(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    receiver = receiver_at(context, f"ipc://{tmp_path}/edge", LIMITS)
    sender = sender_to(context, f"ipc://{tmp_path}/edge", LIMITS, name="engine")
    closing = threading.Timer(1.0, receiver.close)
    closing.start()
    started = time.monotonic()
    with pytest.raises(RingDown):
        while True:
            sender.send(step(1))  # nobody takes them: sooner or later it has to wait
    closing.join()
    assert time.monotonic() - started < 20.0
    sender.close()


def test_nobody_listening_is_an_error_not_a_hang(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    with pytest.raises(RingDown):
        sender_to(context, f"ipc://{tmp_path}/nobody", LIMITS, name="engine", connect_timeout_s=0.2)


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1garbage"],
        [b"\x93\xa5hello\x01"],
        [encode(step(1))],
        [encode(Hello(PROTOCOL_VERSION + 1, FENCE, "old"))],
        [encode(Hello(PROTOCOL_VERSION, Fence("other", 1, "plan"), "stranger"))],
        [encode(Hello(PROTOCOL_VERSION, FENCE, "second"))],
    ],
)
def test_a_stranger_is_ignored_and_the_peer_goes_on(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, frames: list[bytes]
) -> None:
    receiver = receiver_at(context, endpoint, LIMITS)
    sender = sender_to(context, receiver.endpoint, LIMITS, name="engine")
    sender.send(step(1))
    assert next_message(receiver).message == step(1)
    stranger = stranger_at(context, receiver.endpoint)
    stranger.send_multipart(frames)
    until_refused(receiver)
    stranger.close(0)
    assert receiver.receive(0.3) is None
    assert receiver.num_refused == 1
    sender.send(step(2))
    assert next_message(receiver).message == step(2)
    sender.close()
    receiver.close()


def test_an_oversized_frame_never_reaches_the_application(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str
) -> None:
    receiver = receiver_at(context, endpoint, LIMITS)
    stranger = stranger_at(context, receiver.endpoint)
    stranger.send(bytes(LIMITS.max_message_bytes + 1))
    assert receiver.receive(0.5) is None
    assert receiver.num_refused == 0
    stranger.close(0)
    receiver.close()


def test_the_peers_own_bad_message_is_reported(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
    receiver = receiver_at(context, endpoint, LIMITS)
    sender = sender_to(context, receiver.endpoint, LIMITS, name="stage 3")
    message, short = hidden(1, buffer_tokens=1)
    sender.send(message, (short,))
    with pytest.raises(BadMessage, match=r"stage 3.*16 bytes.*32"):
        next_message(receiver)
    sender.close()
    receiver.close()


def test_another_epoch_is_dropped(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
    receiver = receiver_at(context, endpoint, LIMITS)
    sender = sender_to(context, receiver.endpoint, LIMITS, name="engine")
    sender.send(step(1, Fence("ring", 0, "plan")))
    sender.send(step(2))
    assert next_message(receiver).message == step(2)
    assert receiver.num_refused == 1
    sender.close()
    receiver.close()


@pytest.mark.parametrize("endpoint", ["tcp://203.0.113.7:*", "ipc:///no/such/folder/edge"])
def test_an_endpoint_that_can_not_be_bound_is_an_error_with_its_name(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(endpoint)):
        receiver_at(context, endpoint, LIMITS)


def test_connecting_ends_when_something_else_is_to_be_done(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    started = time.monotonic()
    with pytest.raises(NeighbourGone, match="interrupted"):
        ZmqSender(context, "ipc:///tmp/nobody-listens-here", LIMITS, name="engine", stop=lambda: True)
    assert time.monotonic() - started < 5.0


def test_nobody_at_an_address_is_an_error_not_a_hang(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with pytest.raises(RingDown):
        sender_to(context, "tcp://127.0.0.1:1", LIMITS, name="engine", connect_timeout_s=0.5)
