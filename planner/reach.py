"""Whether any ring keeps under a cap: `dp.py`'s search with yes or no in place of costs, several times as fast."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planner.cost import Floats
from planner.dp import Search

Bools = npt.NDArray[np.bool_]


def is_possible(search: Search, cap_s: float, least_stages: int, most_stages: int) -> bool:
    """A ring of that many stages keeps within memory and the cap."""
    problem = search.problem
    num_classes, num_ends = len(problem.members), len(problem.boundaries)
    windows, hops = search.windows(cap_s), search.hops(cap_s)
    reached: Bools = np.zeros((num_classes, problem.num_states, num_ends), dtype=np.bool_)
    by_any: Bools = np.zeros((problem.num_states, num_ends), dtype=np.bool_)
    for index in range(num_classes):
        if problem.hops[-1, index] == np.inf:
            continue
        state = search.strides[index]
        reached[index, state, 1 : windows[index].first_last + 1] = True
        by_any[state] |= reached[index, state]
    for num_stages in range(2, most_stages + 1):
        for index in range(num_classes):
            states = search.states_with(num_stages, index)
            if not len(states) or windows[index].is_empty:
                continue
            before = states - search.strides[index]
            starts = _starts(reached, by_any, before, hops[:, index], can_follow_itself=len(problem.members[index]) > 1)
            found = _any_between(starts, windows[index].lowest)
            reached[index][states] = found
            by_any[states] |= found
    ends = reached[problem.hops[:-1, -1] < np.inf, :, -1].any(axis=0)
    return bool((ends & search.allowed(least_stages, most_stages)).any())


def _starts(
    reached: Bools, by_any: Bools, before: npt.NDArray[np.int64], hops: Floats, *, can_follow_itself: bool
) -> Bools:
    """Where rings of the states `before` may end that have a hop to the next device."""
    forbidden = np.flatnonzero(hops == np.inf)
    # A class of one device is never in a state before itself.
    if len(forbidden) == 0 or (
        not can_follow_itself and len(forbidden) == 1 and not reached[forbidden[0]][before].any()
    ):
        return by_any[before]
    starts = np.zeros((len(before), reached.shape[2]), dtype=np.bool_)
    for other in np.flatnonzero(hops < np.inf):
        starts |= reached[other][before]
    return starts


def _any_between(starts: Bools, lowest: npt.NDArray[np.int64]) -> Bools:
    """[rows, starts] → [rows, ends]: whether any start is in [lowest[end], end)."""
    counts = np.zeros((len(starts), starts.shape[1] + 1), dtype=np.int16)
    np.cumsum(starts, axis=1, dtype=np.int16, out=counts[:, 1:])
    ends = np.arange(starts.shape[1])
    found: Bools = counts[:, ends] > counts[:, np.minimum(lowest, ends)]
    return found
