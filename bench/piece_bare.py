"""What CURVE itself carries: a bare ROUTER that sends frames of 256 KiB and a bare DEALER that throws them away."""

from __future__ import annotations

import threading
import time

import zmq

from transport.curve import Curve, only
from transport.pieces.bulk_options import set_bulk_options
from transport.pieces.messages import MAX_ANSWER_FRAME_BYTES, PART_BYTES

_WAIT_MS = 30_000


def bare_give(context: zmq.Context[zmq.Socket[bytes]], curve: Curve, key: str, num_bytes: int) -> str:
    """Send so much to the first who asks and has `key`. Returns the endpoint."""
    sock = context.socket(zmq.ROUTER)
    set_bulk_options(sock, max_message_bytes=MAX_ANSWER_FRAME_BYTES)
    sock.setsockopt(zmq.SNDHWM, 8)
    sock.setsockopt(zmq.RCVTIMEO, _WAIT_MS)
    sock.setsockopt(zmq.SNDTIMEO, _WAIT_MS)
    curve.guard(only(key)).prepare(sock)
    sock.bind("tcp://127.0.0.1:*")
    endpoint = sock.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def give() -> None:
        who, _ = sock.recv_multipart()
        part = bytes(PART_BYTES)
        for _ in range(num_bytes // PART_BYTES):
            sock.send(who, zmq.SNDMORE)
            sock.send(part)
        sock.recv_multipart()  # It has all.
        sock.close(0)

    threading.Thread(target=give, daemon=True).start()
    return endpoint


def bare_take(context: zmq.Context[zmq.Socket[bytes]], curve: Curve, endpoint: str, key: str, num_bytes: int) -> float:
    """Bytes per second, from the first frame to the last."""
    sock = context.socket(zmq.DEALER)
    set_bulk_options(sock, max_message_bytes=MAX_ANSWER_FRAME_BYTES)
    sock.setsockopt(zmq.RCVTIMEO, _WAIT_MS)
    sock.setsockopt(zmq.SNDTIMEO, _WAIT_MS)
    curve.towards(key)(sock)
    sock.connect(endpoint)
    sock.send(b"all of it")
    sock.recv(copy=False)
    began_s = time.monotonic()
    for _ in range(num_bytes // PART_BYTES - 1):
        sock.recv(copy=False)
    took_s = time.monotonic() - began_s
    sock.send(b"done")
    sock.close(500)
    return (num_bytes - PART_BYTES) / took_s
