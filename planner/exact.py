"""Exact search where devices share memory, a bus or a medium: branch and bound over `relaxed.py`.

A node's best ring that breaks no rule is the node's optimum. One that does splits the node so that no allowed ring is
lost and this one is gone:
- members of a pool use m₁ + m₂ + … > total: in any ring some member stays within mᵢ · total / Σm (one branch each);
- n devices of a pool are at work, the node reckoned with fewer: fewer than n, or at least n;
- hops that share a link or medium load it more than allowed: one of them is not used (one branch each).
Cautious rings come first, so that much of the tree is cut off at once. Where `WORK` is used up, which takes many
devices that share resources and limit each other, the best ring so far is returned and said to be not proven best.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass, replace

from planner.cost import Assignment, CostModel, Objective, objective_s, pool_bytes
from planner.problem import SearchLimits
from planner.relaxation import Relaxation, RelaxedRing, SearchProgress

WORK_BUDGET: dict[Objective, float] = {"latency": 2e9, "throughput": 7e8, "auto": 5e9}
"""In numbers that searches combine: about 1e9 a second on one core. A search of twelve unequal devices takes 1e8."""

_SAME = 1.0 + 1e-9


@dataclass(frozen=True, slots=True)
class Solution:
    """`is_exact`: proven to have the best objective."""

    objective_s: float
    assignment: Assignment
    is_exact: bool


def solve_exactly(
    costs: CostModel,
    objective: Objective,
    limits: SearchLimits,
    *,
    progress: SearchProgress | None = None,
    work: float | None = None,
) -> Solution | None:
    """The ring with the least `objective_s`; None if none fits."""
    tree = _Tree(costs, objective, Relaxation(costs, objective, progress))
    tree.add(limits)
    if tree.is_settled():
        return tree.best
    for cautious in _initial_limits(costs, limits):
        tree.consider(cautious)
    budget = WORK_BUDGET[objective] if work is None else work
    while not tree.is_settled():
        # Without any ring so far the search goes on for longer.
        if tree.relaxation.work > (budget if tree.best else 10 * budget):
            return replace(tree.best, is_exact=False) if tree.best else None
        tree.branch()
    return tree.best


class _Tree:
    def __init__(self, costs: CostModel, objective: Objective, relaxation: Relaxation) -> None:
        self.relaxation = relaxation
        self.best: Solution | None = None
        self._costs = costs
        self._objective = objective
        self._order = itertools.count()
        self._nodes: list[tuple[float, int, SearchLimits, Assignment]] = []

    @property
    def _best_s(self) -> float:
        return self.best.objective_s if self.best else float("inf")

    def add(self, node: SearchLimits) -> None:
        relaxed = self.consider(node)
        if relaxed is not None:
            heapq.heappush(self._nodes, (relaxed.bound_s, next(self._order), node, relaxed.assignment))

    def consider(self, node: SearchLimits) -> RelaxedRing | None:
        """The node's best ring, if it may be better than the best so far; which it replaces, if it breaks no rule."""
        relaxed = self.relaxation.solve(node, self._best_s)
        if relaxed is not None:
            true_s = objective_s(self._costs, relaxed.assignment, self._objective)
            if true_s < self._best_s:
                self.best = Solution(true_s, relaxed.assignment, True)
        return relaxed

    def is_settled(self) -> bool:
        """No node left can be better than the best ring."""
        return not self._nodes or self._nodes[0][0] * _SAME >= self._best_s

    def branch(self) -> None:
        bound_s, _, node, assignment = heapq.heappop(self._nodes)
        for child in _children(self._costs, self._objective, node, assignment, bound_s):
            self.add(child)


def _initial_limits(costs: CostModel, limits: SearchLimits) -> list[SearchLimits]:
    """Shared memory split in proportion; only the fastest device of each pool; only the largest one."""
    whole_s = {device: costs.decode(device, 1).span_s(0, costs.profile.num_layers) for device in limits.devices}
    split, fast, large = limits, limits, limits
    for pool, total in costs.pool_total_bytes.items():
        members = [device for device in limits.devices if costs.pool_of[device] == pool]
        if len(members) < 2:
            continue
        free = {device: limits.free_bytes[device] for device in members}
        for device in members:
            split = split.with_free_bytes(device, free[device] * total // max(total, sum(free.values())))
        fast = fast.without_devices(set(members) - {min(members, key=whole_s.__getitem__)} - limits.required)
        large = large.without_devices(set(members) - {max(members, key=free.__getitem__)} - limits.required)
    return [split, fast, large]


def _children(
    costs: CostModel, objective: Objective, node: SearchLimits, assignment: Assignment, bound_s: float
) -> list[SearchLimits]:
    overfull = _limit_memory(costs, node, assignment)
    if overfull:
        return overfull
    if objective != "latency" and costs.workload.concurrency > 1:
        crowded = _limit_num_used(costs, node, assignment)
        if crowded:
            return crowded
    return _forbid_hops(costs, node, assignment, bound_s)


def _limit_memory(costs: CostModel, node: SearchLimits, assignment: Assignment) -> list[SearchLimits]:
    used = pool_bytes(costs, assignment)
    for pool, total in costs.pool_total_bytes.items():
        if used[pool] > total:
            needs = {
                placed.device: costs.memory_bytes(placed.device, placed.first, placed.last)
                for placed in assignment
                if costs.pool_of[placed.device] == pool
            }
            return [node.with_free_bytes(device, needed * total // used[pool]) for device, needed in needs.items()]
    return []


def _limit_num_used(costs: CostModel, node: SearchLimits, assignment: Assignment) -> list[SearchLimits]:
    used = Counter(costs.pool_of[placed.device] for placed in assignment)
    for pool, count in used.items():
        slows = any(costs.pool.devices[device].busy > 1 for device in node.devices if costs.pool_of[device] == pool)
        if slows and count > node.at_least(pool):
            most = costs.pool_sizes[pool]
            return [node.with_num_used(pool, 0, count - 1), node.with_num_used(pool, count, most)]
    return []


def _forbid_hops(costs: CostModel, node: SearchLimits, assignment: Assignment, bound_s: float) -> list[SearchLimits]:
    """Of the link or medium with the highest load."""
    group = costs.workload.group_size(len(assignment))
    hops = [(a.device, b.device) for a, b in itertools.pairwise(assignment)]
    seconds = {hop: costs.load_transfer_s(*hop, group) for hop in hops}
    pairs = {hop: (costs.host(hop[0]), costs.host(hop[1])) for hop in hops}
    media = [{pair} for pair in set(pairs.values())] + [set(shared) for shared in costs.pool.shared_links]
    loaded = [[hop for hop in hops if pairs[hop] in medium] for medium in media]
    loaded = [each for each in loaded if len(each) > 1 and sum(seconds[hop] for hop in each) / group > bound_s]
    if not loaded:
        return []
    worst = max(loaded, key=lambda each: sum(seconds[hop] for hop in each))
    return [node.without_hop(*hop) for hop in worst]
