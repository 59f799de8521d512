"""How much to have asked of a peer at any time: enough to keep the link busy, little enough to lose when it breaks.

Pure: time is passed in.
"""

from __future__ import annotations

from transport.pieces.messages import PART_BYTES

FIRST_BYTES = 4 * PART_BYTES
"""1 MiB: what fills 1 Gbit/s with a round trip of 8 ms."""

MOST_BYTES = 16 * PART_BYTES
SLOW_PART_BYTES = PART_BYTES // 4
LEAST_BYTES = 2 * SLOW_PART_BYTES
_WORTH_IT = 1.15
_AGAIN_S = 3.0
_WINDOWS_A_ROUND = 4
_LEAST_ROUND_S = 0.05
_MOST_ROUND_S = 2.0
_SLOW_BYTES_PER_S = 2 * PART_BYTES


class Window:
    """Twice as large as long as that makes the transfer at least 15 % faster; tried again every 3 s."""

    def __init__(self) -> None:
        self.num_bytes = FIRST_BYTES
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
        self.num_bytes, self.part_bytes = LEAST_BYTES, SLOW_PART_BYTES
        self._before_bytes_per_s = 0.0
        self.note_idle()

    def _begin(self, now_s: float) -> None:
        self._round_began_s, self._round_bytes, self._was_full = now_s, 0, False

    def _judge(self, now_s: float) -> None:
        self.part_bytes = SLOW_PART_BYTES if self.bytes_per_s < _SLOW_BYTES_PER_S else PART_BYTES
        if self.num_bytes / self.bytes_per_s > _MOST_ROUND_S:
            self.num_bytes = max(LEAST_BYTES, self.num_bytes // 2)
            self._before_bytes_per_s = 0.0
        elif self._before_bytes_per_s and self.bytes_per_s < _WORTH_IT * self._before_bytes_per_s:
            self.num_bytes = max(LEAST_BYTES, self.num_bytes // 2)
            self._before_bytes_per_s, self._may_grow_at_s = 0.0, now_s + _AGAIN_S
        elif self._was_full and now_s >= self._may_grow_at_s and self.num_bytes < MOST_BYTES:
            self._before_bytes_per_s = self.bytes_per_s
            self.num_bytes = 2 * self.num_bytes
        else:
            self._before_bytes_per_s = 0.0
