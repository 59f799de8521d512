"""The relay: delays and drops a host's packets to some others. Userspace, for kernels without netem.

python -P -m bench.lab.relay --links JSON, run inside the host's namespace. Packets come out of a TUN device, wait their
time, and leave by a raw socket bound to the host's card, where its rate limit is. Order is kept for each target.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import socket
import struct
import sys
import time

from bench.lab.network import CARD, RELAY_DEVICE, RELAY_READY

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_MAX_PACKET_BYTES = 2**16
_MAX_QUEUED = 20_000
_TARGET_OFFSET = slice(16, 20)


class Path:
    """One direction to one target: when a packet that comes now may leave, or that it is lost."""

    def __init__(self, delay_s: float, jitter_s: float, loss: float, generator: random.Random) -> None:
        self._delay_s = delay_s
        self._jitter_s = jitter_s
        self._loss = loss
        self._random = generator
        self._last_s = 0.0

    def leaves_at(self, now_s: float) -> float | None:
        """None: lost."""
        if self._loss and self._random.random() < self._loss:
            return None
        delay_s = self._delay_s + self._jitter_s * (2 * self._random.random() - 1)
        self._last_s = max(self._last_s, now_s + delay_s)
        return self._last_s


def relay(paths: dict[bytes, Path]) -> None:
    """Until killed."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", RELAY_DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    out = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    out.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, CARD.encode())
    out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**22)
    print(RELAY_READY, flush=True)
    waiting: list[tuple[float, int, bytes, str]] = []
    numbers = itertools.count()
    while True:
        wait_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        if select.select([device], [], [], wait_s)[0]:
            for packet in _packets(device):
                target = packet[_TARGET_OFFSET]
                path = paths.get(target)
                leaves_s = path.leaves_at(time.monotonic()) if path is not None else None
                if leaves_s is not None and len(waiting) < _MAX_QUEUED:
                    heapq.heappush(waiting, (leaves_s, next(numbers), packet, socket.inet_ntoa(target)))
        now_s = time.monotonic()
        while waiting and waiting[0][0] <= now_s:
            _, _, packet, name = heapq.heappop(waiting)
            # A card that is full drops it, as a real one would.
            try:
                out.sendto(packet, (name, 0))
            except OSError:
                continue


def _packets(device: int, at_most: int = 64) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < at_most:
        try:
            packet = os.read(device, _MAX_PACKET_BYTES)
        except BlockingIOError:
            break
        if packet[:1] and packet[0] >> 4 == 4:
            found.append(packet)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", required=True, help="JSON: target address → [delay_s, jitter_s, loss]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    relay(
        {
            socket.inet_aton(address): Path(delay_s, jitter_s, loss, generator)
            for address, (delay_s, jitter_s, loss) in json.loads(options.links).items()
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
