"""A link inside one process, for an unsplit engine and for tests."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

from transport.codec import EdgeLimits, check_data
from transport.errors import BadMessage, NeighbourGone
from transport.links.link import Received
from transport.messages.ring import DataMessage


class _Channel:
    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        self.closed = threading.Event()


class MemorySender:
    """Implements `transport.links.link.Sender`."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel

    def send(self, message: DataMessage, buffers: Sequence[memoryview] = ()) -> None:
        if self._channel.closed.is_set():
            raise NeighbourGone("the neighbour has closed the link")
        self._channel.queue.put(Received(message=message, buffers=tuple(buffers)))

    def close(self) -> None:
        self._channel.closed.set()
        self._channel.queue.put(None)


class MemoryReceiver:
    """Implements `transport.links.link.Receiver`. With `limits`, messages are checked as on a socket."""

    def __init__(self, channel: _Channel, limits: EdgeLimits | None) -> None:
        self._channel = channel
        self._limits = limits
        self.num_refused = 0

    def receive(self, timeout_s: float) -> Received | None:
        try:
            received = self._channel.queue.get(timeout=timeout_s) if timeout_s > 0 else self._channel.queue.get_nowait()
        except queue.Empty:
            received = None
        if received is None:
            if self._channel.closed.is_set() and self._channel.queue.empty():
                raise NeighbourGone("the neighbour has closed the link")
            return None
        if self._limits is not None:
            if received.message.fence != self._limits.fence:
                self.num_refused += 1
                return None
            try:
                check_data(received.message, received.buffers, self._limits)
            except BadMessage:
                self.num_refused += 1
                raise
        return received

    def wake(self) -> None:
        self._channel.queue.put(None)

    def close(self) -> None:
        self._channel.closed.set()


def memory_link(limits: EdgeLimits | None = None) -> tuple[MemorySender, MemoryReceiver]:
    channel = _Channel()
    return MemorySender(channel), MemoryReceiver(channel, limits)
