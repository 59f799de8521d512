"""How fast a link between two hosts is, measured with bytes that mean nothing, encrypted like all others."""

from __future__ import annotations

import time

import zmq

from transport.curve import Curve
from transport.errors import BadMessage, DeadlineExceeded, NotAllowed
from transport.pieces.messages import MAX_SPEED_TEST_BYTES, Part, Refused, SpeedTest
from transport.pieces.peer_line import PeerLine
from transport.pool_messages import PiecePeer

SPEED_TEST_BYTES = 8 * 2**20
CONNECT_WITHIN_S = 5.0
SILENT_AFTER_S = 5.0
_TICK_S = 0.05


def link_speed(
    peer: PiecePeer,
    curve: Curve,
    context: zmq.Context[zmq.Socket[bytes]],
    *,
    num_bytes: int = SPEED_TEST_BYTES,
    within_s: float = 20.0,
) -> float:
    """Bytes per second from `peer` to this host, from the first part to the last: what came in `within_s` counts.

    Raises NotAllowed if it does not let this host in, DeadlineExceeded if nothing comes, BadMessage.
    """
    line = PeerLine(context, peer, curve)
    try:
        return _measure(line, peer, min(num_bytes, MAX_SPEED_TEST_BYTES), within_s)
    finally:
        line.close()


def _measure(line: PeerLine, peer: PiecePeer, num_bytes: int, within_s: float) -> float:
    began_s = heard_s = time.monotonic()
    is_sent = False
    first_s, first_bytes, came_bytes = 0.0, 0, 0
    while came_bytes < num_bytes:
        zmq.zmq_poll([(line.socket, zmq.POLLIN), (line.monitor, zmq.POLLIN)], int(_TICK_S * 1000))
        now_s = time.monotonic()
        for answer, buffer in line.received():
            if isinstance(answer, Refused):
                raise NotAllowed(f"{peer.name} refused to measure: {answer.reason!r}")
            if not isinstance(answer, Part) or answer.offset != came_bytes or not buffer:
                raise BadMessage(f"{peer.name} sent what was not asked for")
            heard_s = time.monotonic()
            if not came_bytes:
                first_s, first_bytes = heard_s, len(buffer)
            came_bytes += len(buffer)
        line.look()
        if line.lost:
            raise NotAllowed(f"{peer.name}: {line.lost}", hint="is this host paired with it?")
        if line.is_open and not is_sent:
            is_sent = line.send(SpeedTest(1, num_bytes))
            heard_s = now_s
        if not line.is_open and now_s - began_s > CONNECT_WITHIN_S:
            raise DeadlineExceeded(f"nobody answers at {peer.endpoint}", hint=f"is potluck running on {peer.name}?")
        if line.is_open and now_s - heard_s > SILENT_AFTER_S:
            raise DeadlineExceeded(f"{peer.name} was silent for {SILENT_AFTER_S:.0f} s")
        if came_bytes > first_bytes and now_s - began_s > within_s:
            break
    took_s = heard_s - first_s
    return (came_bytes - first_bytes) / took_s if took_s > 0 else 0.0
