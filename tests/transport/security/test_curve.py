"""Keys, and what a process keeps of the sockets that it has closed."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import zmq

from tests.support.transport.linked import LIMITS, Context, kept_context, next_message, receiver_at, sender_to, step
from transport.security.curve import Curve, is_key, new_key_pair


@pytest.mark.parametrize(
    "text", ["", "a" * 39, "a" * 41, "ä" * 40, "~" * 40, "#" * 40, "a" * 35 + "%nSc1", "a" * 39 + "\n"]
)
def test_what_is_no_key_is_told(text: str) -> None:
    assert not is_key(text)


def test_keys_are_keys() -> None:
    assert all(is_key(new_key_pair().public) for _ in range(50))
    assert is_key("a" * 35 + "%nSc0")  # The largest number that four bytes hold.


def test_a_worker_that_loads_often_keeps_nothing_of_edges_that_are_closed() -> None:
    context: Context = zmq.Context()
    keys = new_key_pair()
    with closing(Curve(context, keys)) as curve:
        for _ in range(20):
            guard = curve.guard(lambda key: True)
            guard.release()
        handler: Any = curve._handler()
        assert len(handler.credentials_providers) == 0
    context.destroy(0)


def test_an_edge_that_is_closed_is_forgotten_and_the_next_one_is_not() -> None:
    with kept_context() as context:
        first = receiver_at(context, "tcp://127.0.0.1:*", LIMITS)
        second = receiver_at(context, "tcp://127.0.0.1:*", LIMITS)
        first.close()
        sender = sender_to(context, second.endpoint, LIMITS, name="engine")
        sender.send(step(1))
        assert next_message(second).message == step(1)
        sender.close()
        second.close()


def test_a_question_that_fails_admits_nobody_and_the_next_one_is_answered() -> None:
    """pyzmq's thread would end, and nobody could ever connect again."""
    context: Context = zmq.Context()
    server, client = new_key_pair(), new_key_pair()
    asked: list[str] = []

    def admits(key: str) -> bool:
        asked.append(key)
        if len(asked) == 1:
            raise RuntimeError("no more files")
        return True

    with closing(Curve(context, server)) as curve, closing(Curve(context, client)) as other:
        pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        push.setsockopt(zmq.LINGER, 0)
        curve.guard(admits).prepare(pull)
        other.client_auth(server.public)(push)
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        for tries in (1, 2):
            push.connect(f"tcp://127.0.0.1:{port}")
            push.send(b"in")
            while len(asked) < tries:
                pull.poll(20)
            if tries == 1:
                assert not pull.poll(200)
                push.disconnect(f"tcp://127.0.0.1:{port}")
        assert pull.poll(10_000)
        pull.close(0)
        push.close(0)
    context.destroy(0)
