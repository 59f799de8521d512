"""A link is one direction of one edge: a Sender and a Receiver; the one here is inside a process, for an unsplit engine
and for tests."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Protocol

from transport.codec import EdgeLimits, Received, check_data
from transport.errors import BadMessage, NeighbourGone
from transport.messages.ring import DataMessage


class Sender(Protocol):
    """The sending end. One owner thread."""

    def send(self, message: DataMessage, buffers: Sequence[memoryview] = ()) -> None:
        """Queue a message; the buffers must not change afterwards. Raises NeighbourGone if the peer is gone."""

    def close(self) -> None: ...


class Receiver(Protocol):
    """The receiving end. One owner thread, but for `wake`."""

    def receive(self, timeout_s: float) -> Received | None:
        """The next message; None after `timeout_s` or a `wake`. Raises NeighbourGone if a peer that said Hello is gone.

        A message that breaks the protocol or a limit never comes out: it is counted in `num_refused` and its connection
        is closed or ignored.
        """

    def wake(self) -> None:
        """Thread-safe: make a `receive` that is waiting, or the next one, return None."""

    def close(self) -> None: ...


class _Channel:
    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        self.closed = threading.Event()


class MemorySender:
    """Implements Sender."""

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
    """Implements Receiver. With `limits`, messages are checked as on a socket."""

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
