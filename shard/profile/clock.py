"""How often a step is timed, and what its time is then said to be."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

_LONGEST_PAUSE_S = 0.008
_SHORTEST_PAUSE_S = 0.001


def typical(samples: Sequence[float]) -> float:
    """The mean of the middle half.

    Under a CPU quota the times of one step have several modes: a median would pick one of them, and be wrong for the
    sum of many steps; the plain mean would keep what another program did to a few.
    """
    ordered = sorted(samples)
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    return sum(kept) / len(kept)


class Clock:
    """Spends `budget_s` over all points of a profile: each gets a share of it, and at least one sample.

    Between samples it sleeps about as long as the step took: a stage of a ring waits for its turn as well, while
    its CPU quota fills up again and its cores doze off.
    """

    def __init__(
        self,
        budget_s: float,
        *,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.budget_s = budget_s
        self._now = now
        self._sleep = sleep

    def sample(self, runs: Sequence[Callable[[], float]], *, share: float, most: int = 16) -> list[float]:
        """Run all of `runs` in turn, over and over, for `share` of the budget; a typical time of each.

        In turn, so that a machine that gets slower meanwhile does so for all of them.
        """
        samples: list[list[float]] = [[] for _ in runs]
        ends_at = self._now() + share * self.budget_s
        while len(samples[0]) < most:
            for run, taken in zip(runs, samples, strict=True):
                seconds = run()
                taken.append(seconds)
                self._sleep(min(max(seconds, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S))
            # Another round must fit: a slow device would overshoot by a whole one.
            if self._now() + sum(taken[-1] for taken in samples) > ends_at:
                break
        return [typical(taken) for taken in samples]
