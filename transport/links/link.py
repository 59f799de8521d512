"""A link is one direction of one edge: a Sender and a Receiver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from transport.messages.ring import DataMessage


class Received(Struct, frozen=True, kw_only=True):
    """A checked message and the buffers behind it. A buffer is read-only and may share memory with the frame.

    A Struct, as messages are: a frozen dataclass takes a tenth of a hop to make.
    """

    message: DataMessage
    buffers: tuple[memoryview, ...] = ()


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
