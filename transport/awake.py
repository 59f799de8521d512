"""Time that passed, told from time that this process slept through: a closed lid, a paused machine, a stopped process.

After such a pause everybody seems to have been silent for long, although their messages may be waiting to be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_LATE_S = 0.5


class Awake:
    """One owner thread, which asks whenever it looks at the clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s = clock()

    def slept_s(self, expected_s: float) -> float:
        """Seconds since it was last asked beyond the `expected_s` that the owner meant to wait; 0 if it was in time."""
        now_s = self._clock()
        late_s = now_s - self._last_s - expected_s
        self._last_s = now_s
        return late_s if late_s > _LATE_S else 0.0
