"""Whether multicast DNS can work on an interface: a question that this host asks there must come back to itself.

Group and port: RFC 6762, section 3. The question is a proper one, for services of Potluck's.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time

_GROUP, _PORT = "224.0.0.251", 5353
_WAIT_S = 1.0
_MAX_BYTES = 9000
# Header: one question; name; type PTR, class IN (RFC 1035, section 4.1).
_QUESTION = b"\0\0\0\0\0\1\0\0\0\0\0\0" + b"\x08_potluck\x04_tcp\x05local\0" + b"\0\x0c\0\1"


def multicast_problem(address: str) -> str:
    """Why what is sent to the group at the interface with that address does not come back; empty if it does."""
    try:
        with _listener(address) as listener, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((address, 0))
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
            sender.sendto(_QUESTION, (_GROUP, _PORT))
            return "" if _came_back(listener, sender.getsockname()) else "what is sent does not come back"
    except OSError as error:
        return error.strerror or str(error)


def _listener(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        # Others of this host listen there too: the system's own resolver, and Potluck's discovery.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            with contextlib.suppress(OSError):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("" if sys.platform == "win32" else _GROUP, _PORT))
        member = socket.inet_aton(_GROUP) + socket.inet_aton(address)
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
    except OSError:
        listener.close()
        raise
    return listener


def _came_back(listener: socket.socket, sender: tuple[str, int]) -> bool:
    deadline = time.monotonic() + _WAIT_S
    while (left_s := deadline - time.monotonic()) > 0:
        listener.settimeout(left_s)
        try:
            data, source = listener.recvfrom(_MAX_BYTES)
        except TimeoutError:
            return False
        if source == sender and data == _QUESTION:
            return True
    return False
