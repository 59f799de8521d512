"""A member in a process of its own that sends one message of very many frames:
`ENDPOINT SERVER_KEY PUBLIC SECRET FRAME_BYTES NUM_FRAMES`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import zmq

from tests.support.security.targets import Target
from transport.security.curve import Curve, KeyPair

CUT_OFF = 7
_WITHIN_MS = 60_000


def start_endless(target: Target, keys: KeyPair, frame_bytes: int, num_frames: int) -> subprocess.Popen[bytes]:
    """It ends with `CUT_OFF` when its connection is ended."""
    arguments = [target.endpoint, target.keys.public, keys.public, keys.secret, str(frame_bytes), str(num_frames)]
    return subprocess.Popen([sys.executable, "-m", "tests.support.security.endless", *arguments])


def main() -> int:
    endpoint, server_key, public, secret, frame_bytes, num_frames = sys.argv[1:]
    context: Any = zmq.Context()
    sock = context.socket(zmq.DEALER)
    Curve(context, KeyPair(public=public, secret=secret)).client_auth(server_key)(sock)
    monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    sock.connect(endpoint)
    # libzmq sends what is whole: this one has an end, if nobody gets so far.
    frame = bytes(int(frame_bytes))
    for left in range(int(num_frames), 0, -1):
        sock.send(frame, zmq.SNDMORE if left > 1 else 0)
    is_cut_off = bool(monitor.poll(_WITHIN_MS))
    context.destroy(0)
    return CUT_OFF if is_cut_off else 0


if __name__ == "__main__":
    sys.exit(main())
