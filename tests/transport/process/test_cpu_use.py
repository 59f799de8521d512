"""Other programs' part of the processors is told apart from this process's own."""

from __future__ import annotations

import time

import pytest

from transport.process import cpu_use
from transport.process.cpu_use import CpuUse, share_of_cores


def test_others_are_what_is_busy_less_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_use, "num_cores", lambda: 4)
    clocks = {"now": iter([10.0, 12.0]), "all": iter([100.0, 106.0]), "own": iter([1.0, 3.0])}
    use = CpuUse(now=lambda: next(clocks["now"]), all_s=lambda: next(clocks["all"]), own_s=lambda: next(clocks["own"]))
    assert use.others_share() == pytest.approx((3.0 - 1.0) / 4)


def test_no_time_and_clocks_that_disagree_are_no_trouble() -> None:
    still = CpuUse(now=lambda: 1.0, all_s=lambda: 2.0, own_s=lambda: 3.0)
    assert still.others_share() == 0.0
    own = iter([0.0, 5.0])
    now = iter([0.0, 1.0])
    assert CpuUse(now=lambda: next(now), all_s=lambda: 0.0, own_s=lambda: next(own)).others_share() == 0.0
    assert share_of_cores(1e9) == 1.0
    assert share_of_cores(-1.0) == 0.0


def test_the_system_says_how_busy_it_is() -> None:
    use = CpuUse()
    ends_at = time.process_time() + 0.05
    while time.process_time() < ends_at:
        pass
    every, own = use.cores()
    assert 0 < own <= every
