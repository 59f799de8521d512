"""Both ends of a link with one host's keys, which they need over TCP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import zmq

from transport.codec import EdgeLimits, Received
from transport.links.link import Receiver
from transport.links.secure_endpoints import SecureEndpoints
from transport.links.zmq_link import ZmqReceiver, ZmqSender
from transport.messages.measure import LinkShape
from transport.messages.ring import Entry, Fence, SequenceId, Tokens
from transport.security.curve import new_key_pair

Context = zmq.Context[zmq.Socket[bytes]]
KEYS = new_key_pair()
_edges: dict[Context, SecureEndpoints] = {}


@contextmanager
def kept_context() -> Iterator[Context]:
    context: Context = zmq.Context()
    with closing(SecureEndpoints(context, Path(), keys=KEYS, address=None)) as edges:
        _edges[context] = edges
        try:
            yield context
        finally:
            del _edges[context]
    context.destroy(0)


def edges_of(context: Context) -> SecureEndpoints:
    return _edges[context]


def receiver_at(context: Context, endpoint: str, limits: EdgeLimits, **options: Any) -> ZmqReceiver:
    return ZmqReceiver(context, endpoint, limits, guard=_edges[context].guard(endpoint, ""), **options)


def stranger_at(context: Context, endpoint: str) -> zmq.Socket[bytes]:
    """Connected to `endpoint`, with the right keys."""
    stranger = context.socket(zmq.DEALER)
    prepare = _edges[context].client_auth(endpoint, "")
    if prepare is not None:
        prepare(stranger)
    stranger.connect(endpoint)
    return stranger


def sender_to(context: Context, endpoint: str, limits: EdgeLimits, **options: Any) -> ZmqSender:
    return ZmqSender(context, endpoint, limits, prepare=_edges[context].client_auth(endpoint, ""), **options)


SHAPE = LinkShape(fence=Fence("probe", 0, "probe"), hidden_size=576, dtype="bfloat16", num_large=4)


FENCE = Fence("ring", 1, "plan")
LIMITS = EdgeLimits(fence=FENCE, hidden_size=4, dtype="float32", vocab_size=100, context_tokens=64, max_step_tokens=32)


def step(number: int, fence: Fence = FENCE) -> Tokens:
    return Tokens(fence, number, (), (Entry(SequenceId(1), 0, (1, 2), 1),))


def next_message(receiver: Receiver, timeout_s: float = 60.0) -> Received:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        received = receiver.receive(0.2)
        if received is not None:
            return received
    raise AssertionError("nothing came")
