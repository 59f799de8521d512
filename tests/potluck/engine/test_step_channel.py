"""The ring's deadline: passed by stages that are silent, not by a machine that stood still."""

from __future__ import annotations

import pytest

from potluck.engine.scheduler import StepPlan
from potluck.engine.settings import StepDeadlines
from potluck.engine.step_channel import StepChannel
from tests.support.engine.fakes import FENCE
from transport.codec import Received
from transport.errors import DeadlineExceeded
from transport.links.link import memory_link
from transport.messages.ring import Entry, SequenceId

PLAN = StepPlan(ops=(), entries=(Entry(SequenceId(1), 0, (1,), 1),))


class Silent:
    """A receiver that hears nothing: each wait takes as long as was asked for, and a pause where there is one."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pause_s = 0.0

    def receive(self, timeout_s: float) -> Received | None:
        self.now_s += timeout_s + self.pause_s
        self.pause_s = 0.0
        return None

    def wake(self) -> None: ...

    def close(self) -> None: ...


def waiting_ring() -> tuple[StepChannel, Silent]:
    silent = Silent()
    sender, _ = memory_link()
    deadlines = StepDeadlines(first_s=10.0)
    ring = StepChannel(sender, silent, FENCE, deadlines, lambda: silent.now_s)
    ring.send(PLAN)
    return ring, silent


def wait_for_the_deadline(ring: StepChannel) -> None:
    with pytest.raises(DeadlineExceeded, match="step 0"):
        while True:
            ring.receive(60.0)


def test_silence_ends_at_the_deadline() -> None:
    ring, silent = waiting_ring()
    wait_for_the_deadline(ring)
    assert silent.now_s == 10.0


@pytest.mark.parametrize("after_s", [0, 5, 9])
def test_a_pause_is_not_the_stages_time(after_s: int) -> None:
    ring, silent = waiting_ring()
    for _ in range(after_s):
        assert ring.receive(60.0) is None
    silent.pause_s = 3600.0
    wait_for_the_deadline(ring)
    assert silent.now_s == 3600.0 + 10.0
