"""A capture holds all that crosses TCP on the loopback interface, as a wire-tapper has it. Linux, as root."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import threading
from collections.abc import Collection
from typing import Any

import numpy as np

_ETH_P_ALL = 3
_OUTGOING = 4  # The loopback interface shows every packet twice.
_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_BUFFER_BYTES = 512 * 2**20
_SO_ATTACH_FILTER = 26
# The kernel's own filter: of each packet the outgoing copy, whole. Codes of BPF: load, compare, return.
_OUTGOING_ONLY = ((0x20, 0, 0, 0xFFFFF004), (0x15, 0, 1, _OUTGOING), (0x06, 0, 0, 2**18), (0x06, 0, 0, 0))
_KEY_BITS = 24
_CHUNK_BYTES = 2**22


def why_not() -> str | None:
    """Why nothing can be captured here; None if it can."""
    if sys.platform != "linux":
        return "captures packets of Linux"
    if os.geteuid() != 0:
        return "only root captures packets"
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except OSError as error:
        return f"no packet sockets here: {error}"
    return None


class Capture:
    """Payloads by connection and direction, (source port, destination port), in the order that they crossed."""

    def __init__(self) -> None:
        self._payloads: dict[tuple[int, int], bytearray] = {}
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))  # type: ignore[attr-defined]
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in _OUTGOING_ONLY))
        attached = struct.pack("HP", len(_OUTGOING_ONLY), ctypes.addressof(program))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)
        self._socket.bind(("lo", 0))
        self._socket.settimeout(0.2)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def of_ports(self, ports: Collection[int]) -> list[bytes]:
        """What went to them and came from them."""
        with self._lock:
            return [bytes(data) for ends, data in self._payloads.items() if set(ends) & set(ports)]

    def share_dropped(self) -> float:
        """Of all packets, whosever they were, since this was last asked."""
        num_packets, num_dropped = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        return float(num_dropped / max(1, num_packets))

    def close(self) -> None:
        """Forget all of it. May be called again."""
        self._ending.set()
        self._thread.join()
        self._payloads.clear()
        self._socket.close()

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                packet, source = self._socket.recvfrom(2**17)
            except TimeoutError:
                continue
            if source[2] == _OUTGOING and packet[12:14] == b"\x08\x00" and packet[23] == socket.IPPROTO_TCP:
                self._keep(packet)

    def _keep(self, packet: bytes) -> None:
        tcp = 14 + 4 * (packet[14] & 15)
        source, destination = struct.unpack_from(">HH", packet, tcp)
        payload = packet[tcp + 4 * (packet[tcp + 12] >> 4) :]
        with self._lock:
            self._payloads.setdefault((source, destination), bytearray()).extend(payload)


class Windows:
    """32 bytes of every `every` of some data, to be found at any offset of other data."""

    def __init__(self, data: Any, every: int) -> None:
        """`data` is a buffer of bytes."""
        data = np.frombuffer(data, np.uint8)
        starts = np.arange(0, len(data) - 32, every)
        windows = data[starts[:, None] + np.arange(32)]
        # Constant ones are in anything.
        windows = windows[windows.min(axis=1) != windows.max(axis=1)]
        self._windows = {window.tobytes() for window in windows}
        keys = np.ascontiguousarray(windows[:, :8]).view(np.uint64).ravel()
        self._keys = np.unique(keys)
        self._is_key = np.zeros(2**_KEY_BITS, bool)
        self._is_key[self._keys & np.uint64(2**_KEY_BITS - 1)] = True

    def __len__(self) -> int:
        return len(self._windows)

    def num_in(self, data: bytes) -> int:
        """How many places of `data` have one of them."""
        return sum(self._num_in(data[at : at + _CHUNK_BYTES + 31]) for at in range(0, len(data), _CHUNK_BYTES))

    def _num_in(self, data: bytes) -> int:
        found = 0
        if len(data) < 32:
            return 0
        for shift in range(8):
            words = np.frombuffer(data, np.uint64, max(0, (len(data) - shift) // 8), shift)
            maybe = np.nonzero(self._is_key.take((words & np.uint64(2**_KEY_BITS - 1)).view(np.int64)))[0]
            # Looked up in what is sorted already: np.isin would sort it again for every chunk.
            places = np.minimum(np.searchsorted(self._keys, words[maybe]), len(self._keys) - 1)
            sure = maybe[self._keys[places] == words[maybe]]
            found += sum(data[8 * at + shift : 8 * at + shift + 32] in self._windows for at in sure.tolist())
        return found
