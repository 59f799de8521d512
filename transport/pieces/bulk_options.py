"""Socket options for connections that carry pieces: much at once, over networks of any speed."""

from __future__ import annotations

import zmq

from transport.zmq_link import set_options

SILENT_AFTER_S = 10.0
"""A heartbeat stands behind whole parts in a slow network's queue."""


def set_bulk_options(sock: zmq.Socket[bytes], *, max_message_bytes: int) -> None:
    """For both ends."""
    silent_after_ms = int(SILENT_AFTER_S * 1000)
    set_options(sock, max_message_bytes=max_message_bytes, on_network=True, silent_after_ms=silent_after_ms)
    # The system's own sizes grow with the link: 256 KiB would be 200 Mbit/s at 10 ms.
    sock.setsockopt(zmq.SNDBUF, -1)
    sock.setsockopt(zmq.RCVBUF, -1)
