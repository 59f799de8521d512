"""Flow control: how fast bytes come, and how many to have outstanding at a peer. Pure: time is passed in."""

from __future__ import annotations

import math

from transport.messages.pieces import PART_BYTES

_MEMORY_S = 3.0


class TransferRate:
    """An average in which what came a while ago counts less and less."""

    def __init__(self, now_s: float) -> None:
        self._bytes_per_s = 0.0
        self._noted_s = now_s

    def note(self, num_bytes: int, now_s: float) -> None:
        self._bytes_per_s = self.bytes_per_s(now_s) + num_bytes / _MEMORY_S
        self._noted_s = max(now_s, self._noted_s)

    def bytes_per_s(self, now_s: float) -> float:
        return self._bytes_per_s * math.exp(-max(0.0, now_s - self._noted_s) / _MEMORY_S)


INITIAL_WINDOW_BYTES = 4 * PART_BYTES
"""1 MiB: what fills 1 Gbit/s with a round trip of 8 ms."""

MAX_WINDOW_BYTES = 16 * PART_BYTES
SLOW_PART_BYTES = PART_BYTES // 4
MIN_WINDOW_BYTES = 2 * SLOW_PART_BYTES
_MIN_SPEEDUP = 1.15
_GROW_AGAIN_S = 3.0
_WINDOWS_A_ROUND = 4
_LEAST_ROUND_S = 0.05
_MOST_ROUND_S = 2.0
_SLOW_BYTES_PER_S = 2 * PART_BYTES


class RequestWindow:
    """How much to have asked of a peer at any time: enough to keep the link busy, little enough to lose when it breaks.

    Twice as large as long as that makes the transfer at least 15 % faster; tried again every 3 s."""

    def __init__(self) -> None:
        self.num_bytes = INITIAL_WINDOW_BYTES
        self.part_bytes = PART_BYTES
        self.bytes_per_s = 0.0
        self._before_bytes_per_s = 0.0
        self._may_grow_at_s = 0.0
        self._round_began_s: float | None = None
        self._round_bytes = 0
        self._was_full = False

    def note_received(self, num_bytes: int, now_s: float) -> None:
        if self._round_began_s is None:
            self._begin(now_s)  # The first part says how long the way is, not how wide.
            return
        self._round_bytes += num_bytes
        took_s = now_s - self._round_began_s
        if self._round_bytes >= _WINDOWS_A_ROUND * self.num_bytes and took_s >= _LEAST_ROUND_S:
            self.bytes_per_s = self._round_bytes / took_s
            self._judge(now_s)
            self._begin(now_s)

    def note_full(self) -> None:
        """There was more to ask for than the window lets."""
        self._was_full = True

    def note_idle(self) -> None:
        """Nothing is outstanding: the time until there is something again is not the link's."""
        self._round_began_s = None

    def note_silence(self) -> None:
        """Nothing came for too long: perhaps each part takes that long."""
        self.num_bytes, self.part_bytes = MIN_WINDOW_BYTES, SLOW_PART_BYTES
        self._before_bytes_per_s = 0.0
        self.note_idle()

    def _begin(self, now_s: float) -> None:
        self._round_began_s, self._round_bytes, self._was_full = now_s, 0, False

    def _judge(self, now_s: float) -> None:
        self.part_bytes = SLOW_PART_BYTES if self.bytes_per_s < _SLOW_BYTES_PER_S else PART_BYTES
        if self.num_bytes / self.bytes_per_s > _MOST_ROUND_S:
            self.num_bytes = max(MIN_WINDOW_BYTES, self.num_bytes // 2)
            self._before_bytes_per_s = 0.0
        elif self._before_bytes_per_s and self.bytes_per_s < _MIN_SPEEDUP * self._before_bytes_per_s:
            self.num_bytes = max(MIN_WINDOW_BYTES, self.num_bytes // 2)
            self._before_bytes_per_s, self._may_grow_at_s = 0.0, now_s + _GROW_AGAIN_S
        elif self._was_full and now_s >= self._may_grow_at_s and self.num_bytes < MAX_WINDOW_BYTES:
            self._before_bytes_per_s = self.bytes_per_s
            self.num_bytes = 2 * self.num_bytes
        else:
            self._before_bytes_per_s = 0.0
