"""Measures a link between two processes over the transport that a ring uses, with messages as a ring sends them.

Both ends listen, then connect to each other. The one that leads sends decode-sized messages, some time apart: in a
ring both ends have been idle when a message comes, their cores asleep and their caches full of something else. The
other one holds each for a while, as a stage that computes, and says how long; clocks need not agree.
Then each end sends large messages, and the other one times them as they come.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import dataclass

import zmq

from transport.codec import EdgeLimits, Received
from transport.errors import BadMessage, DeadlineExceeded, NeighbourGone
from transport.links.zmq_link import ZmqReceiver, ZmqSender
from transport.messages.measure import LinkProbed, LinkShape
from transport.messages.ring import DTYPE_BYTES, Entry, Hidden, SequenceId
from transport.security.curve import Guard, Prepare
from transport.timeouts import LINK_PROBE_CONNECT_S, LINK_PROBE_REPLY_S

_NUM_HOPS = 30
_NUM_WARM_UPS = 3
_IDLE_S = 0.02
_HELD_S = 0.005
_LARGE_BYTES = 2**20
_CACHE_BYTES = 2**23
_ONE = SequenceId(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkMeasurement:
    """One direction of a link. `hop_s` is the median, `hop_p95_s` the 95th percentile of the decode-sized messages."""

    hop_s: float
    hop_p95_s: float
    bytes_per_s: float


def link_measurements(leader: LinkProbed, follower: LinkProbed) -> tuple[LinkMeasurement, LinkMeasurement]:
    """The links from the leader to the follower and back. Half of a round trip counts for each.

    Raises DeadlineExceeded if there was none, BadMessage for numbers that nothing can be planned with.
    """
    if not (_is_plausible(leader) and _is_plausible(follower)):
        raise BadMessage("a link with impossible numbers", hint="update Potluck on both hosts")
    hops = [
        max(0.0, trip_s - held_s) / 2 for trip_s, held_s in zip(leader.round_trips_s, follower.held_s, strict=False)
    ]
    if len(hops) < 2:
        raise DeadlineExceeded("the link gave no round trips", hint="try again")
    p50_s, p95_s = statistics.median(hops), statistics.quantiles(hops, n=20, method="inclusive")[-1]
    # What the follower received, the leader sent.
    return (
        LinkMeasurement(hop_s=p50_s, hop_p95_s=p95_s, bytes_per_s=follower.bytes_per_s),
        LinkMeasurement(hop_s=p50_s, hop_p95_s=p95_s, bytes_per_s=leader.bytes_per_s),
    )


class LinkProbeEnd:
    """One end. `run` once, then `close`."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, shape: LinkShape, *, guard: Guard | None = None
    ) -> None:
        """Raises ConfigError if it can't listen at `endpoint`."""
        self._context = context
        self._shape = shape
        row_bytes = shape.hidden_size * DTYPE_BYTES[shape.dtype]
        self._num_rows = max(2, _LARGE_BYTES // row_bytes)
        self._limits = EdgeLimits(
            fence=shape.fence,
            hidden_size=shape.hidden_size,
            dtype=shape.dtype,
            vocab_size=1,
            context_tokens=self._num_rows,
            max_step_tokens=self._num_rows,
        )
        self._payload = memoryview(bytes(self._num_rows * row_bytes))
        self._row_bytes = row_bytes
        self._other_data = bytearray(_CACHE_BYTES)
        self._receiver = ZmqReceiver(context, endpoint, self._limits, guard=guard)
        self.endpoint = self._receiver.endpoint

    def run(self, next_endpoint: str, *, leads: bool, prepare: Prepare | None = None) -> LinkProbed:
        """Raises NeighbourGone if nobody listens at `next`, DeadlineExceeded if nothing comes back."""
        sender = ZmqSender(
            self._context,
            next_endpoint,
            self._limits,
            name="a link probe",
            connect_timeout_s=LINK_PROBE_CONNECT_S,
            prepare=prepare,
        )
        try:
            return self._lead(sender) if leads else self._follow(sender)
        finally:
            sender.close()

    def close(self) -> None:
        self._receiver.close()

    def _lead(self, sender: ZmqSender) -> LinkProbed:
        trips = []
        for step in range(_NUM_WARM_UPS + _NUM_HOPS):
            self._flush_caches()
            time.sleep(_IDLE_S)
            started = time.perf_counter()
            self._send(sender, step, 1)
            self._receive()
            trips.append(time.perf_counter() - started)
        for step in range(self._shape.num_large):
            self._send(sender, step, self._num_rows)
        rate = self._measure_rate(self._receive())
        with contextlib.suppress(NeighbourGone):  # It may leave now, even before this is known to have been sent.
            self._send(sender, 0, 1)
            self._receive()
        return LinkProbed(round_trips_s=tuple(trips[_NUM_WARM_UPS:]), held_s=(), bytes_per_s=rate)

    def _follow(self, sender: ZmqSender) -> LinkProbed:
        held = []
        while True:
            received = self._receive()
            arrived = time.perf_counter()
            if _num_rows(received) > 1:
                break
            self._flush_caches()
            time.sleep(_HELD_S)
            held.append(time.perf_counter() - arrived)
            self._send(sender, len(held), 1)
        rate = self._measure_rate(received)
        for step in range(self._shape.num_large):
            self._send(sender, step, self._num_rows)
        self._receive()
        with contextlib.suppress(NeighbourGone):
            self._send(sender, 0, 1)
        return LinkProbed(round_trips_s=(), held_s=tuple(held[_NUM_WARM_UPS:]), bytes_per_s=rate)

    def _measure_rate(self, first: Received) -> float:
        """Bytes per second of the large messages that follow `first`, which has just come."""
        started = time.perf_counter()
        num_bytes = 0
        assert _num_rows(first) > 1, "large messages come after all small ones"
        for _ in range(self._shape.num_large - 1):
            num_bytes += self._receive().buffers[0].nbytes
        return num_bytes / max(time.perf_counter() - started, 1e-9)

    def _send(self, sender: ZmqSender, step: int, num_rows: int) -> None:
        entry = Entry(_ONE, 0, (0,) * num_rows, 0)
        shape = self._shape
        message = Hidden(shape.fence, step, (), (entry,), shape.dtype, num_rows, shape.hidden_size)
        sender.send(message, (self._payload[: num_rows * self._row_bytes],))

    def _receive(self) -> Received:
        received = self._receiver.receive(LINK_PROBE_REPLY_S)
        if received is None:
            raise DeadlineExceeded(
                f"no answer over the link within {LINK_PROBE_REPLY_S:.0f} s",
                hint="is a firewall between the two hosts?",
            )
        return received

    def _flush_caches(self) -> None:
        bytes(self._other_data)


def _is_plausible(probed: LinkProbed) -> bool:
    seconds = (*probed.round_trips_s, *probed.held_s)
    return all(0.0 <= each < math.inf for each in seconds) and 0.0 < probed.bytes_per_s < math.inf


def _num_rows(received: Received) -> int:
    message = received.message
    return message.num_tokens if isinstance(message, Hidden) else 0
