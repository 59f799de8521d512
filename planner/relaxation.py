"""The relaxation finds a search node's best ring by dynamic programming: exact where no two devices get into each
other's way.

What devices do to each other beyond hops (memory of a shared pool, a shared bus with more devices at work than the
node says, hops that share a medium) is left out here, which never makes a ring look worse; `exact.py` adds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.cost import Assignment, CostModel, FloatArray, Objective, PlacedStage
from planner.problem import IntArray, SearchLimits, SearchProblem, build_problem

_SLACK = 1.0 + 1e-12
"""A load that is the cap itself must pass, whichever way it was added up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheapestRing:
    """The cheapest ring under a cap: its cost, and the highest load of its devices and hops."""

    cost_s: float
    load_s: float
    assignment: Assignment


class RingSearch:
    """One problem, searched under different caps and for different numbers of stages."""

    def __init__(self, problem: SearchProblem) -> None:
        self.problem = problem
        sizes = [len(members) for members in problem.members]
        self.strides = np.cumprod([1, *[size + 1 for size in sizes]])[:-1]
        self._counts = np.stack(np.unravel_index(np.arange(problem.num_states), [s + 1 for s in sizes], order="F"), 1)
        self._stages = self._counts.sum(axis=1)
        self._table = np.empty((len(sizes), problem.num_states, len(problem.boundaries)))
        self._allowed = self._allowed_states()
        self._states: dict[tuple[int, int], IntArray] = {}
        self.work = float(self._table.size * (len(sizes) + 12)) + 5e6

    def best(self, cap_s: float, least_stages: int, most_stages: int) -> CheapestRing | None:
        """None if no ring keeps within memory, the cap and the number of stages."""
        problem, table = self.problem, self._table
        windows, hops = self.windows(cap_s), self.hops(cap_s)
        table.fill(np.inf)
        for index, spans in enumerate(problem.spans):
            last = windows[index].first_last
            start = problem.hops[-1, index] + spans.cost_first + spans.cost_step
            table[index, self.strides[index], 1 : last + 1] = start + spans.cost[1 : last + 1]
        for num_stages in range(2, most_stages + 1):
            for index in range(len(problem.members)):
                self._extend(num_stages, index, windows[index], hops[:, index])
        totals = table[:, :, -1] + problem.hops[:-1, -1, None]
        totals[:, ~self.allowed(least_stages, most_stages)] = np.inf
        last_class, state = np.unravel_index(int(np.argmin(totals)), totals.shape)
        cost_s = float(totals[last_class, state])
        if cost_s == np.inf:
            return None
        return self._found(cost_s, self._trace(int(state), int(last_class), windows, hops))

    def windows(self, cap_s: float) -> list[_Window]:
        return [self._window(index, cap_s) for index in range(len(self.problem.members))]

    def hops(self, cap_s: float) -> FloatArray:
        """Without those between devices that load their link above the cap."""
        return np.where(self.problem.transfers <= cap_s * _SLACK, self.problem.hops[:-1, :-1], np.inf)

    def allowed(self, least_stages: int, most_stages: int) -> npt.NDArray[np.bool_]:
        """The states that a ring may end in."""
        return np.asarray(self._allowed & (self._stages >= least_stages) & (self._stages <= most_stages))

    def states_with(self, num_stages: int, index: int) -> IntArray:
        """The states of `num_stages` devices, one of class `index` among them."""
        key = num_stages, index
        if key not in self._states:
            self._states[key] = np.flatnonzero((self._stages == num_stages) & (self._counts[:, index] > 0))
        return self._states[key]

    def _allowed_states(self) -> npt.NDArray[np.bool_]:
        allowed = np.asarray((self._counts >= np.array(self.problem.least)).all(axis=1))
        for classes, least, most in self.problem.pools:
            used = self._counts[:, list(classes)].sum(axis=1)
            allowed &= (used >= least) & (used <= most)
        return allowed

    def _window(self, index: int, cap_s: float) -> _Window:
        spans = self.problem.spans[index]
        if cap_s == np.inf:
            return _Window(spans.lowest, spans.first_last)
        room = cap_s * _SLACK - spans.load_step
        lowest = np.maximum(spans.lowest, np.searchsorted(spans.load, spans.load - room, side="left"))
        first_last = int(np.searchsorted(spans.load, room - spans.load_first, side="right")) - 1
        return _Window(lowest, max(0, min(spans.first_last, first_last)))

    def _extend(self, num_stages: int, index: int, window: _Window, hops: FloatArray) -> None:
        """All rings' starts of `num_stages` stages whose last is of class `index`."""
        problem, table = self.problem, self._table
        states = self.states_with(num_stages, index)
        if not len(states) or window.is_empty:
            return
        before = states - self.strides[index]
        reached = np.full((len(states), len(problem.boundaries)), np.inf)
        for other, hop_s in enumerate(hops):
            if hop_s < np.inf:
                np.minimum(reached, table[other][before] + hop_s, out=reached)
        spans = problem.spans[index]
        reached -= spans.cost
        table[index][states] = window.least(reached) + (spans.cost + spans.cost_step)

    def _trace(self, state: int, index: int, windows: list[_Window], hops: FloatArray) -> list[tuple[int, int, int]]:
        """(class, first boundary, last boundary) of each stage."""
        problem, high = self.problem, len(self.problem.boundaries) - 1
        stages: list[tuple[int, int, int]] = []
        while self._stages[state] > 1:
            before = state - self.strides[index]
            lowest = windows[index].lowest[high]
            starts = slice(lowest, high)
            options = self._table[:, before, starts] + hops[:, index, None] - problem.spans[index].cost[starts]
            other, offset = np.unravel_index(int(np.argmin(options)), options.shape)
            low = int(lowest + offset)
            stages.append((index, low, high))
            state, index, high = int(before), int(other), low
        return [(index, 0, high), *reversed(stages)]

    def _found(self, cost_s: float, stages: list[tuple[int, int, int]]) -> CheapestRing:
        problem = self.problem
        used = [0] * len(problem.members)
        placed: list[PlacedStage] = []
        loads: list[float] = []
        for index, low, high in stages:
            spans = problem.spans[index]
            device = problem.members[index][used[index]]
            placed.append(PlacedStage(device, problem.boundaries[low], problem.boundaries[high]))
            start = spans.load_first if low == 0 else -float(spans.load[low])
            loads.append(float(spans.load[high]) + start + spans.load_step)
            used[index] += 1
        loads += [float(problem.transfers[a[0], b[0]]) for a, b in itertools.pairwise(stages)]
        return CheapestRing(cost_s=cost_s, load_s=max(loads), assignment=tuple(placed))


class _Window:
    """The starts that a span may have, by its end: [lowest[end], end), besides 0."""

    def __init__(self, lowest: IntArray, first_last: int) -> None:
        ends = np.arange(len(lowest))
        self.lowest = lowest
        self.first_last = first_last
        self._ends = np.flatnonzero(lowest < ends)
        self._lengths = (ends - lowest)[self._ends]
        self.is_empty = not len(self._ends)

    def least(self, values: FloatArray) -> FloatArray:
        """[rows, starts] → [rows, ends]: the least value among each end's starts; two overlapping powers of two."""
        result = np.full_like(values, np.inf)
        power = 1
        while power <= self._lengths.max():
            ends = self._ends[(self._lengths >= power) & (self._lengths < 2 * power)]
            if len(ends):
                result[:, ends] = np.minimum(values[:, self.lowest[ends]], values[:, ends - power])
            values = np.minimum(values[:, :-power], values[:, power:])
            power *= 2
        return result


BoolArray = npt.NDArray[np.bool_]


def is_reachable(search: RingSearch, cap_s: float, least_stages: int, most_stages: int) -> bool:
    """A ring of that many stages keeps within memory and the cap."""
    problem = search.problem
    num_classes, num_ends = len(problem.members), len(problem.boundaries)
    windows, hops = search.windows(cap_s), search.hops(cap_s)
    reached: BoolArray = np.zeros((num_classes, problem.num_states, num_ends), dtype=np.bool_)
    by_any: BoolArray = np.zeros((problem.num_states, num_ends), dtype=np.bool_)
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
    reached: BoolArray, by_any: BoolArray, before: npt.NDArray[np.int64], hops: FloatArray, *, can_follow_itself: bool
) -> BoolArray:
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


def _any_between(starts: BoolArray, lowest: npt.NDArray[np.int64]) -> BoolArray:
    """[rows, starts] → [rows, ends]: whether any start is in [lowest[end], end)."""
    counts = np.zeros((len(starts), starts.shape[1] + 1), dtype=np.int16)
    np.cumsum(starts, axis=1, dtype=np.int16, out=counts[:, 1:])
    ends = np.arange(starts.shape[1])
    found: BoolArray = counts[:, ends] > counts[:, np.minimum(lowest, ends)]
    return found


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
