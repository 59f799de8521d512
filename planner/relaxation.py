"""The best ring of one node of a search: exact where no two devices get into each other's way.

What devices do to each other beyond hops (memory of a shared pool, a shared bus with more devices at work than the
node says, hops that share a medium) is left out here, which never makes a ring look worse; `branch.py` adds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.cost import Assignment, CostModel, FloatArray, Objective
from planner.dynamic_programming import CheapestRing, RingSearch, is_reachable
from planner.problem import SearchLimits, SearchProblem, build_problem

SearchProgress = Callable[[int], object]
"""Called with the number of searches done so far."""

MAX_EXACT_STATES = 4096
"""Subsets of 12 devices that all differ."""


@dataclass(frozen=True, slots=True)
class RelaxedRing:
    """No ring within the node's limits has a better objective than `bound_s`."""

    bound_s: float
    assignment: Assignment


class Relaxation:
    def __init__(self, costs: CostModel, objective: Objective, progress: SearchProgress | None = None) -> None:
        self._costs = costs
        self._objective = objective
        self._progress = progress
        self._num_searches = 0
        self.work = 0.0

    def solve(self, limits: SearchLimits, cutoff_s: float) -> RelaxedRing | None:
        """The best ring, or None if there is none better than `cutoff_s`."""
        if not limits.devices:
            return None
        most = len(limits.devices)
        if self._objective == "latency":
            problem = build_problem(self._costs, limits, 1, one_chat=True)
            found = self._best(RingSearch(problem), np.inf, 1, most)
            return RelaxedRing(found.cost_s, found.assignment) if found and found.cost_s < cutoff_s else None
        best: RelaxedRing | None = None
        for group, least_stages, most_stages in self._groups(most):
            problem = build_problem(self._costs, limits, group, one_chat=False)
            search = _Capped(problem, least_stages, most_stages, self._best, self._is_reachable)
            found_s = best.bound_s if best else cutoff_s
            if self._objective == "auto":
                better = search.auto(self._costs.workload.concurrency, found_s)
            else:
                better = search.throughput(found_s)
            best = better or best
        return best

    def _groups(self, most: int) -> list[tuple[int, int, int]]:
        """(sequences of a step, from, to how many stages make it that many)."""
        sizes = {stages: self._costs.workload.group_size(stages) for stages in range(1, most + 1)}
        groups = sorted(set(sizes.values()))
        return [
            (group, min(s for s in sizes if sizes[s] == group), max(s for s in sizes if sizes[s] == group))
            for group in groups
        ]

    def _is_reachable(self, search: RingSearch, cap_s: float, least_stages: int, most_stages: int) -> bool:
        self._count(search.work / 5)
        return is_reachable(search, cap_s, least_stages, most_stages)

    def _best(self, search: RingSearch, cap_s: float, least_stages: int, most_stages: int) -> CheapestRing | None:
        self._count(search.work)
        return search.best(cap_s, least_stages, most_stages)

    def _count(self, work: float) -> None:
        self._num_searches += 1
        self.work += work
        if self._progress is not None:
            self._progress(self._num_searches)


class _Capped:
    """Searches under caps on the load, which only matter where they equal the load of some span or hop."""

    def __init__(
        self,
        problem: SearchProblem,
        least_stages: int,
        most_stages: int,
        best: Callable[[RingSearch, float, int, int], CheapestRing | None],
        is_possible: Callable[[RingSearch, float, int, int], bool],
    ) -> None:
        self._problem = problem
        self._least, self._most = least_stages, most_stages
        self._search: RingSearch | None = None
        self._find_cheapest = best
        self._is_reachable = is_possible

    def throughput(self, cutoff_s: float) -> RelaxedRing | None:
        """The lowest cap that any ring keeps."""
        group = self._problem.group
        caps = self._caps(cutoff_s)
        low, high = 0, len(caps)
        middle = high - 1
        while low < high:
            if self._has_ring(float(caps[middle])):
                high = middle
            elif middle == len(caps) - 1:
                return None
            else:
                low = middle + 1
            # The answer is mostly not far above the lowest.
            middle = low + (high - low) // 3
        found = self._cheapest_ring(float(caps[low])) if low < len(caps) else None
        return RelaxedRing(found.load_s / group, found.assignment) if found is not None else None

    def auto(self, concurrency: int, cutoff_s: float) -> RelaxedRing | None:
        """The least max(trip / concurrency, load / group): trips get shorter as the cap rises."""
        group = self._problem.group
        caps = self._caps(cutoff_s)
        if not len(caps):
            return None
        best: RelaxedRing | None = None
        low, high = 0, len(caps)
        middle = high - 1
        while low < high:
            found = self._cheapest_ring(float(caps[middle]))
            trip_s = found.cost_s / concurrency if found else np.inf
            if found is not None:
                value_s = max(trip_s, found.load_s / group)
                if value_s < min(cutoff_s, best.bound_s if best else np.inf):
                    best = RelaxedRing(value_s, found.assignment)
            if found is not None and trip_s <= caps[middle] / group:
                # Lower caps may do better; those above this ring's load give the same ring.
                high = middle
            elif middle == len(caps) - 1 and trip_s >= cutoff_s:
                return None
            else:
                low = middle + 1
                if best is not None and best.bound_s * group < caps[-1]:
                    high = min(high, int(np.searchsorted(caps, best.bound_s * group)))
            middle = (low + high) // 2
        return best

    def _has_ring(self, cap_s: float) -> bool:
        if self._search is None:
            self._search = RingSearch(self._problem)
        return self._is_reachable(self._search, cap_s, self._least, self._most)

    def _cheapest_ring(self, cap_s: float) -> CheapestRing | None:
        if self._search is None:
            self._search = RingSearch(self._problem)
        return self._find_cheapest(self._search, cap_s, self._least, self._most)

    def _caps(self, cutoff_s: float) -> FloatArray:
        """Loads of spans and hops between what is possible at best and what is wanted, ascending."""
        values = [self._problem.transfers.ravel()]
        for spans in self._problem.spans:
            loads = spans.load[None, :] - spans.load[1:, None] + spans.load_step
            values += [loads[loads > 0], spans.load[1:] + spans.load_first + spans.load_step]
        found = np.unique(np.concatenate(values))
        found = found[(found < cutoff_s * self._problem.group) & (found >= least_load_s(self._problem) * (1 - 1e-9))]
        return found[np.isfinite(found)]


def least_load_s(problem: SearchProblem) -> float:
    """No ring has a lower highest load: layers weighed by the fastest device for each, as if they could be shared
    out exactly, without steps, embedding or hops."""
    layers = np.array([np.diff(spans.load) for spans in problem.spans])
    weights = layers.min(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(layers > 0, weights / layers, 1.0)
    speeds = ratios.max(axis=1) * np.array([len(members) for members in problem.members])
    return float(weights.sum() / speeds.sum())
