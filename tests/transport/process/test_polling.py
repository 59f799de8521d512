"""Who was asleep himself can't say that the others were silent."""

from __future__ import annotations

from transport.process.polling import SuspendDetector


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_only_what_nobody_meant_to_wait_is_sleep() -> None:
    clock = Clock()
    awake = SuspendDetector(clock)
    clock.now_s += 1.1
    assert awake.suspended_s(1.0) == 0.0  # a busy machine
    clock.now_s += 0.2
    assert awake.suspended_s(1.0) == 0.0  # woken before its time
    clock.now_s += 9.0
    assert awake.suspended_s(1.0) == 8.0
    clock.now_s += 1.0
    assert awake.suspended_s(1.0) == 0.0  # told once
