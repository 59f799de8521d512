"""Exact search where devices share memory, a bus or a medium: branch and bound over `relaxed.py`.

A node's best ring that breaks no rule is the node's optimum. One that does splits the node so that no allowed ring is
lost and this one is gone:
- members of a pool use m₁ + m₂ + … > total: in any ring some member stays within mᵢ · total / Σm (one branch each);
- n devices of a pool are at work, the node reckoned with fewer: fewer than n, or at least n;
- hops that share a link or medium load it more than allowed: one of them is not used (one branch each).
After `MAX_NODES` the best ring found so far is returned and said to be not proven best.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass

from planner.cost import CostModel
from planner.evaluate import Assignment, Objective, objective_s, pool_bytes
from planner.limits import SearchLimits
from planner.relaxed import Progress, Relaxation

MAX_NODES = 400
_SAME = 1.0 + 1e-9


@dataclass(frozen=True, slots=True)
class Solution:
    """`is_exact`: proven to have the best objective."""

    objective_s: float
    assignment: Assignment
    is_exact: bool


def solve(
    costs: CostModel,
    objective: Objective,
    limits: SearchLimits,
    *,
    progress: Progress | None = None,
    max_nodes: int = MAX_NODES,
) -> Solution | None:
    """The ring with the least `objective_s`; None if none fits."""
    relaxation = Relaxation(costs, objective, progress)
    best: Solution | None = None
    order = itertools.count()
    nodes: list[tuple[float, int, SearchLimits, Assignment]] = []

    def add(node: SearchLimits) -> None:
        relaxed = relaxation.solve(node, best.objective_s if best else float("inf"))
        if relaxed is not None:
            heapq.heappush(nodes, (relaxed.bound_s, next(order), node, relaxed.assignment))

    add(limits)
    num_nodes = 0
    while nodes:
        bound_s, _, node, assignment = heapq.heappop(nodes)
        if best is not None and bound_s >= best.objective_s:
            break
        true_s = objective_s(costs, assignment, objective)
        if true_s < (best.objective_s if best else float("inf")):
            best = Solution(true_s, assignment, True)
        if true_s <= bound_s * _SAME:
            break
        num_nodes += 1
        if num_nodes > max_nodes and best is not None:
            return Solution(best.objective_s, best.assignment, False)
        for child in _children(costs, objective, node, assignment, bound_s):
            add(child)
    return best


def _children(
    costs: CostModel, objective: Objective, node: SearchLimits, assignment: Assignment, bound_s: float
) -> list[SearchLimits]:
    overfull = _overfull(costs, node, assignment)
    if overfull:
        return overfull
    if objective != "latency" and costs.workload.concurrency > 1:
        crowded = _crowded(costs, node, assignment)
        if crowded:
            return crowded
    return _without_a_hop(costs, node, assignment, bound_s)


def _overfull(costs: CostModel, node: SearchLimits, assignment: Assignment) -> list[SearchLimits]:
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


def _crowded(costs: CostModel, node: SearchLimits, assignment: Assignment) -> list[SearchLimits]:
    used = Counter(costs.pool_of[placed.device] for placed in assignment)
    for pool, count in used.items():
        slows = any(
            costs.pool.devices[device].busy > 1 for device in node.devices if costs.pool_of[device] == pool
        )
        if slows and count > node.at_least(pool):
            most = costs.pool_sizes[pool]
            return [node.with_num_used(pool, 0, count - 1), node.with_num_used(pool, count, most)]
    return []


def _without_a_hop(
    costs: CostModel, node: SearchLimits, assignment: Assignment, bound_s: float
) -> list[SearchLimits]:
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
