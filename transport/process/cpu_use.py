"""CpuUse measures how busy this host's cores are, and how much of it is this process."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

Clock = Callable[[], float]

_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""Of what systems tell; the others are idle, or in one of these as well (Linux' guests, Windows' interrupts)."""


class CpuUse:
    """Since it was made: of how many cores all programs, and this process alone, took the time."""

    def __init__(
        self,
        *,
        now: Clock = time.monotonic,
        all_s: Clock | None = None,
        own_s: Clock = time.process_time,
    ) -> None:
        self._clocks = (now, all_s or busy_s, own_s)
        self._began = self._read()

    def cores(self) -> tuple[float, float]:
        """All programs', and this process's part of it."""
        elapsed_s, all_s, own_s = (after - before for after, before in zip(self._read(), self._began, strict=True))
        if elapsed_s <= 0:
            return 0.0, 0.0
        own = own_s / elapsed_s
        return max(all_s / elapsed_s, own), own

    def others_share(self) -> float:
        """The share of all cores' time that other programs had, between 0 and 1."""
        every, own = self.cores()
        return share_of_cores(every - own)

    def _read(self) -> tuple[float, float, float]:
        now, all_s, own_s = self._clocks
        return now(), all_s(), own_s()


def share_of_cores(cores: float) -> float:
    return min(max(cores / num_cores(), 0.0), 1.0)


def num_cores() -> int:
    return psutil.cpu_count() or 1


def busy_s() -> float:
    """Seconds that all cores together have computed since the system started, whatever for."""
    times = psutil.cpu_times()._asdict()
    return float(sum(times.get(name, 0.0) for name in _BUSY))
