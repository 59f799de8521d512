"""How many bytes come each second, of late. Pure: time is passed in."""

from __future__ import annotations

import math

_MEMORY_S = 3.0


class Rate:
    """An average in which what came a while ago counts less and less."""

    def __init__(self, now_s: float) -> None:
        self._bytes_per_s = 0.0
        self._noted_s = now_s

    def note(self, num_bytes: int, now_s: float) -> None:
        self._bytes_per_s = self.bytes_per_s(now_s) + num_bytes / _MEMORY_S
        self._noted_s = max(now_s, self._noted_s)

    def bytes_per_s(self, now_s: float) -> float:
        return self._bytes_per_s * math.exp(-max(0.0, now_s - self._noted_s) / _MEMORY_S)
