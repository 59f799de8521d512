"""Both ends of a link with one host's keys, which they need over TCP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import zmq

from transport.codec import EdgeLimits
from transport.links.secure_endpoints import SecureEndpoints
from transport.links.zmq_link import ZmqReceiver, ZmqSender
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
