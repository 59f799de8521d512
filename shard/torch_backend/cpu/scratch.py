"""Memory that kernels work in, used again by each call."""

from __future__ import annotations

import threading

import numpy as np

_ALIGNMENT = 64


def empty_aligned(num_bytes: int) -> np.ndarray:
    """uint8, at an address that vectors like."""
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes]


class Scratch(threading.local):
    """One buffer for each thread, grown to the largest call's need."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)
        self._address = 0

    def reserve(self, num_bytes: int) -> int:
        """The address of `num_bytes` that are the caller's until this thread's next call."""
        if num_bytes > self._buffer.size:
            self._buffer = empty_aligned(num_bytes)
            self._address = self._buffer.ctypes.data
        return self._address
